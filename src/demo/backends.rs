//! Chooses the backends of the demo's agent: those of the config, else those found on the default local ports, else the built-in
//! echo.

use std::io;
use std::sync::Arc;

use super::echo;
use super::recording_backend::{Recording, RecordingBackend};
use crate::backend::{BackendError, BaseUrl, Kind, ProbedModels};
use crate::config::{BackendConfig, Config};
use crate::discovery::{BackendOffer, configured_backend, find_local};
use crate::http_server::HttpServer;
use crate::logging::sanitize_for_log;

/// The chosen backends.
pub(super) struct Chosen {
    pub(super) backends: Vec<BackendOffer>,
    pub(super) record: Arc<Recording>,
    /// The built-in echo backend, if it is used; dropping it stops it.
    pub(super) echo: Option<HttpServer>,
}

/// Chooses the backends, and starts the echo backend if there is no other.
pub(super) fn choose(config: Option<&Config>) -> io::Result<Chosen> {
    let record = Arc::new(Recording::default());
    let (configs, echo) = match config {
        Some(config) => (config.backends.clone(), None),
        None => match find_local().found {
            found if found.is_empty() => {
                let echo = echo::start()?;
                let url = BaseUrl::parse(&format!("http://{}", echo.address)).map_err(io::Error::other)?;
                (vec![BackendConfig::at(Kind::OpenAi, url)], Some(echo))
            }
            found => (found.into_iter().map(|found| found.config).collect(), None),
        },
    };
    let backends = configs.iter().map(|config| recorded(config, &record)).collect();
    Ok(Chosen { backends, record, echo })
}

/// Whether this is the model of the built-in echo.
pub(super) fn is_echo(chosen: &Chosen, model_id: &str) -> bool {
    chosen.echo.is_some() && model_id == echo::MODEL
}

fn recorded(config: &BackendConfig, record: &Arc<Recording>) -> BackendOffer {
    let backend = RecordingBackend::new(configured_backend(config), record.clone());
    BackendOffer { backend: Arc::new(backend), ..BackendOffer::configured(config) }
}

/// The backends that are still loading their model.
pub(super) fn loading(backends: &[BackendOffer]) -> Vec<String> {
    let is_loading = |b: &&BackendOffer| matches!(b.backend.probe(), Err(BackendError::Loading(_)));
    backends.iter().filter(is_loading).map(|b| b.backend.id().to_owned()).collect()
}

/// Why each backend offers no model.
pub(super) fn diagnose(backends: &[BackendOffer]) -> Vec<String> {
    if backends.is_empty() {
        return vec!["the config has no [[backends]]; add one, or omit `--config`".to_owned()];
    }
    backends
        .iter()
        .map(|offer| {
            let backend = &offer.backend;
            let why = match backend.ready().and_then(|()| backend.probe()) {
                Err(error) => error.for_operator(),
                Ok(probed) if probed.count() == 0 => "it lists no models".to_owned(),
                Ok(probed) => not_offered(&probed, offer.allowed_models.as_deref()),
            };
            format!("{}: {why}", backend.id())
        })
        .collect()
}

fn not_offered(probed: &ProbedModels, allowed: Option<&[String]>) -> String {
    let models = &probed.models;
    if let (true, Some(exclusions)) = (models.is_empty(), probed.exclusions()) {
        return exclusions;
    }
    let Some(allowed) = allowed else {
        return format!("it lists {} now; check their prices in [pricing], or try again", counted(models.len()));
    };
    let listed: Vec<String> = models.iter().map(|model| sanitize_for_log(&model.model_id)).collect();
    format!("it lists {}, but `models` in the config allows only {}", listed.join(", "), allowed.join(", "))
}

pub(super) fn counted(models: usize) -> String {
    if models == 1 { "1 model".to_owned() } else { format!("{models} models") }
}
