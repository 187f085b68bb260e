//! Which backends the demo's agent gets: those of the config, else those that answer on the default local ports, else
//! the built-in echo.
//!
//! Who runs here: one short-lived thread for each default address, `demo-probe-N`; nobody waits for one that hangs.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::echo::{self, Echo};
use super::witness::{Record, Witness};
use crate::backend::{BackendError, BackendModel, BaseUrl, Kind};
use crate::config::{BackendConfig, Config};
use crate::discovery::{OfferedBackend, configured_backend};
use crate::threads::spawn;

/// How long the demo looks for local servers. A server on this machine answers in milliseconds, or is too busy to show.
const PROBE_WAIT: Duration = Duration::from_millis(800);

/// What the agent is given, and what the operator is told about it.
pub(super) struct Chosen {
    pub(super) backends: Vec<OfferedBackend>,
    pub(super) record: Arc<Record>,
    /// The built-in backend, when it is what is used; dropping it stops it.
    pub(super) echo: Option<Echo>,
}

/// Chooses, and starts the echo backend if nothing else is there.
pub(super) fn choose(config: Option<&Config>) -> io::Result<Chosen> {
    let record = Arc::new(Record::default());
    let (configs, echo) = match config {
        Some(config) => (config.backends.clone(), None),
        None => match find_local() {
            found if found.is_empty() => {
                let echo = Echo::start()?;
                (vec![at(Kind::OpenAi, &format!("http://{}", echo.address()))?], Some(echo))
            }
            found => (found, None),
        },
    };
    let backends = configs.iter().map(|config| watched(config, &record)).collect();
    Ok(Chosen { backends, record, echo })
}

/// Whether the demo's agent runs on the built-in echo with this model.
pub(super) fn is_echo(chosen: &Chosen, model_id: &str) -> bool {
    chosen.echo.is_some() && model_id == echo::MODEL
}

fn watched(config: &BackendConfig, record: &Arc<Record>) -> OfferedBackend {
    let witness = Witness::new(configured_backend(config), record.clone());
    OfferedBackend { backend: Arc::new(witness), ..OfferedBackend::configured(config) }
}

fn at(kind: Kind, url: &str) -> io::Result<BackendConfig> {
    let url = BaseUrl::parse(url).map_err(io::Error::other)?;
    Ok(BackendConfig { kind, url: Some(url), api_key_env: None, models: None, max_concurrent: None })
}

/// The servers on the default ports that list at least one model, in the order of rank.
fn find_local() -> Vec<BackendConfig> {
    let addresses = Kind::ALL.into_iter().flat_map(|kind| kind.default_urls().iter().map(move |url| (kind, *url)));
    let candidates: Vec<BackendConfig> = addresses.filter_map(|(kind, url)| at(kind, url).ok()).collect();
    let (answers, inbox) = crossbeam_channel::bounded(candidates.len());
    for (index, candidate) in candidates.iter().enumerate() {
        let (backend, answers) = (configured_backend(candidate), answers.clone());
        // Not joined: a server that accepts and then hangs must not hold the demo up. The probe ends by its own timeout.
        let probe = move || {
            let probed = backend.probe();
            let _ = answers.send((index, backend.id().to_owned(), probed));
        };
        if let Err(error) = spawn(format!("demo-probe-{index}"), probe) {
            log::warn!("failed to start a thread to look for backends: {error}");
        }
    }
    drop(answers);
    let give_up = Instant::now() + PROBE_WAIT;
    let mut answered = vec![false; candidates.len()];
    while let Ok((index, id, probed)) = inbox.recv_deadline(give_up) {
        match probed {
            Ok(models) if !models.is_empty() => answered[index] = true,
            Ok(_) => log::info!("no {id}: it lists no models"),
            Err(error) => crate::debug!("no {id}: {error}"),
        }
    }
    candidates.into_iter().zip(answered).filter(|(_, answered)| *answered).map(|(candidate, _)| candidate).collect()
}

/// Those that are there, but not ready yet: waiting will help.
pub(super) fn loading(backends: &[OfferedBackend]) -> Vec<String> {
    let is_loading = |b: &&OfferedBackend| matches!(b.backend.probe(), Err(BackendError::Loading(_)));
    backends.iter().filter(is_loading).map(|b| b.backend.id().to_owned()).collect()
}

/// Why each backend contributes nothing, for an agent that offers nothing.
pub(super) fn diagnose(backends: &[OfferedBackend]) -> Vec<String> {
    if backends.is_empty() {
        return vec!["the config has no [[backends]]; add one, or leave out `--config` to see the demo".to_owned()];
    }
    backends
        .iter()
        .map(|offered| {
            let backend = &offered.backend;
            let why = match backend.ready().and_then(|()| backend.probe()) {
                Err(error) => error.to_string(),
                Ok(models) if models.is_empty() => "it lists no models".to_owned(),
                Ok(models) => not_offered(&models, offered.allowed_models.as_deref()),
            };
            format!("{}: {why}", backend.id())
        })
        .collect()
}

fn not_offered(models: &[BackendModel], allowed: Option<&[String]>) -> String {
    let Some(allowed) = allowed else {
        return format!("it lists {} now; check their prices in [pricing], or try again", counted(models.len()));
    };
    let listed: Vec<&str> = models.iter().map(|model| model.model_id.as_str()).collect();
    format!("it lists {}, but `models` in the config allows only {}", listed.join(", "), allowed.join(", "))
}

pub(super) fn counted(models: usize) -> String {
    if models == 1 { "1 model".to_owned() } else { format!("{models} models") }
}
