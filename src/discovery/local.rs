//! Finds the inference servers on this machine.

use std::sync::Arc;
use std::time::Duration;

use super::configured_backend;
use super::probe_threads::probe_within;
use crate::backend::{Backend, BackendModel, BaseUrl, Kind};
use crate::config::BackendConfig;

/// Time limit of the search. A local server responds within milliseconds unless it is busy; busy servers are not listed.
const SEARCH_TIMEOUT: Duration = Duration::from_millis(800);

/// A server on this machine, and the models that it could offer.
pub struct LocalBackend {
    /// The server's entry for `agent.toml`.
    pub config: BackendConfig,
    /// The models that it could offer; never empty.
    pub models: Vec<BackendModel>,
}

/// Returns the servers on the default ports that could offer at least one model, by rank.
pub fn find_local() -> Vec<LocalBackend> {
    let mut candidates: Vec<BackendConfig> = Vec::new();
    for kind in Kind::ALL {
        let urls = kind.default_urls().iter().filter_map(|url| BaseUrl::parse(url).ok());
        candidates.extend(urls.map(|url| BackendConfig::at(kind, url)));
    }
    let backends: Vec<Arc<dyn Backend>> = candidates.iter().map(configured_backend).collect();
    // The probe of a hung server continues on its thread until it times out.
    let results = probe_within(&backends, SEARCH_TIMEOUT);
    let mut found = Vec::new();
    for ((config, backend), result) in candidates.into_iter().zip(&backends).zip(results) {
        let id = backend.id();
        match result {
            Some(Ok(probed)) if probed.models.is_empty() => {
                log::info!("no {id}: {}", probed.exclusions().as_deref().unwrap_or("it lists no models"));
            }
            Some(Ok(probed)) => found.push(LocalBackend { config, models: probed.models }),
            Some(Err(error)) => crate::debug!("no {id}: {}", error.for_log()),
            None => crate::debug!("no {id}: no response in time"),
        }
    }
    found
}
