//! Finds the inference servers on this machine.

use std::sync::Arc;
use std::time::Duration;

use super::probe_threads::probe_within;
use crate::backend::{Backend, BackendError, BackendModel, BaseUrl, HttpBackend, Kind};
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

/// The servers on the default ports, by rank.
#[derive(Default)]
pub struct LocalServers {
    /// Those that could offer at least one model.
    pub found: Vec<LocalBackend>,
    /// Those that reject requests without an API key.
    pub needing_key: Vec<BackendConfig>,
}

/// Finds the servers on the default ports.
pub fn find_local() -> LocalServers {
    let mut candidates: Vec<BackendConfig> = Vec::new();
    for kind in Kind::ALL {
        let urls = kind.default_urls().iter().filter_map(|url| BaseUrl::parse(url).ok());
        candidates.extend(urls.map(|url| BackendConfig::at(kind, url)));
    }
    let server = |config: &BackendConfig| Arc::new(HttpBackend::new(config.kind, config.url.clone(), None));
    let servers: Vec<Arc<HttpBackend>> = candidates.iter().map(server).collect();
    let backends: Vec<Arc<dyn Backend>> = servers.iter().map(|server| server.clone() as Arc<dyn Backend>).collect();
    // The probe of a hung server continues on its thread until it times out.
    let results = probe_within(&backends, SEARCH_TIMEOUT);
    let mut local = LocalServers::default();
    for ((config, server), result) in candidates.into_iter().zip(&servers).zip(results) {
        let id = server.id();
        match result {
            Some(Err(BackendError::AuthRejected(_))) => local.needing_key.push(config),
            Some(Ok(_)) if server.needs_key() => local.needing_key.push(config),
            Some(Ok(probed)) if probed.models.is_empty() => {
                log::info!("no {id}: {}", probed.exclusions().as_deref().unwrap_or("it lists no models"));
            }
            Some(Ok(probed)) => local.found.push(LocalBackend { config, models: probed.models }),
            Some(Err(error)) => crate::debug!("no {id}: {}", error.for_log()),
            None => crate::debug!("no {id}: no response in time"),
        }
    }
    local
}
