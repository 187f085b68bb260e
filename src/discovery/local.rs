//! The servers on this machine that nobody had to name.
//!
//! Who runs here: one short-lived thread for each default address, `look-N`; nobody waits for one that hangs.

use std::time::{Duration, Instant};

use super::configured_backend;
use crate::backend::{BackendModel, BaseUrl, Kind};
use crate::config::BackendConfig;
use crate::threads;

/// How long the look takes at the most. A server on this machine answers in milliseconds, or is too busy to show.
const LOOK_TIME: Duration = Duration::from_millis(800);

/// A server that was found, and what it lists.
pub struct Found {
    /// As it would stand in `agent.toml`.
    pub config: BackendConfig,
    /// Never empty.
    pub models: Vec<BackendModel>,
}

/// The servers on the default ports that list at least one model, in the order of rank.
pub fn find_local() -> Vec<Found> {
    let addresses = Kind::ALL.into_iter().flat_map(|kind| kind.default_urls().iter().map(move |url| (kind, *url)));
    let at = |(kind, url)| Some(BackendConfig::at(kind, BaseUrl::parse(url).ok()?));
    let candidates: Vec<BackendConfig> = addresses.filter_map(at).collect();
    let (answers, inbox) = crossbeam_channel::bounded(candidates.len());
    for (index, candidate) in candidates.iter().enumerate() {
        let (backend, answers) = (configured_backend(candidate), answers.clone());
        // Not joined: a server that accepts and then hangs must not hold anybody up. The probe ends by its own timeout.
        let look = move || {
            let probed = backend.probe();
            let _ = answers.send((index, backend.id().to_owned(), probed));
        };
        if let Err(error) = threads::spawn(format!("look-{index}"), look) {
            log::warn!("failed to start a thread to look for backends: {error}");
        }
    }
    drop(answers);
    let give_up = Instant::now() + LOOK_TIME;
    let mut listed: Vec<Vec<BackendModel>> = candidates.iter().map(|_| Vec::new()).collect();
    while let Ok((index, id, probed)) = inbox.recv_deadline(give_up) {
        match probed {
            Ok(models) if models.is_empty() => log::info!("no {id}: it lists no models"),
            Ok(models) => listed[index] = models,
            Err(error) => crate::debug!("no {id}: {error}"),
        }
    }
    let found = candidates.into_iter().zip(listed).map(|(config, models)| Found { config, models });
    found.filter(|found| !found.models.is_empty()).collect()
}
