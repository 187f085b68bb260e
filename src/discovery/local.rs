//! The servers on this machine that nobody had to name.

use std::sync::Arc;
use std::time::Duration;

use super::configured_backend;
use super::prober::probe_within;
use crate::backend::{Backend, BackendModel, BaseUrl, Kind};
use crate::config::BackendConfig;

/// How long the look takes at the most. A server on this machine answers in milliseconds, or is too busy to show.
const LOOK_TIME: Duration = Duration::from_millis(800);

/// A server that was found, and what it lists.
pub struct LocalBackend {
    /// As it would stand in `agent.toml`.
    pub config: BackendConfig,
    /// Never empty.
    pub models: Vec<BackendModel>,
}

/// The servers on the default ports that list at least one model, in the order of rank.
pub fn find_local() -> Vec<LocalBackend> {
    let mut candidates: Vec<BackendConfig> = Vec::new();
    for kind in Kind::ALL {
        let urls = kind.default_urls().iter().filter_map(|url| BaseUrl::parse(url).ok());
        candidates.extend(urls.map(|url| BackendConfig::at(kind, url)));
    }
    let backends: Vec<Arc<dyn Backend>> = candidates.iter().map(configured_backend).collect();
    // A server that accepts and then hangs holds nobody up. Its probe ends by its own timeout.
    let answers = probe_within(&backends, LOOK_TIME);
    let mut found = Vec::new();
    for ((config, backend), answer) in candidates.into_iter().zip(&backends).zip(answers) {
        let id = backend.id();
        match answer {
            Some(Ok(models)) if models.is_empty() => log::info!("no {id}: it lists no models"),
            Some(Ok(models)) => found.push(LocalBackend { config, models }),
            Some(Err(error)) => log::debug!("no {id}: {error}"),
            None => log::debug!("no {id}: no answer in time"),
        }
    }
    found
}
