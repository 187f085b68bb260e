//! A detailed examination of a server, for `doctor` and `setup`: each part of a probe has its own result.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::context_window::get;
use super::probe::Probe;
use super::{BackendModel, BackendResult, HttpBackend, Kind};

/// The report of a healthy server.
#[derive(Debug)]
pub struct Diagnosis {
    /// Duration of the health check.
    pub latency: Duration,
    /// The listed models.
    pub models: BackendResult<Vec<BackendModel>>,
    /// The models that the server would have to load first. Does not include those of a llama.cpp router.
    pub unloaded: Vec<String>,
}

impl HttpBackend {
    /// Examines the server, within twice the time limit of a probe.
    ///
    /// # Errors
    /// The server is not healthy.
    pub fn diagnose(&self) -> BackendResult<Diagnosis> {
        let kind = self.server_kind();
        let started = Instant::now();
        let probe = self.start_probe();
        probe.health()?;
        let mut latency = started.elapsed();
        let mut models = self.models(&probe);
        if kind.health_path().is_none() {
            // The listing is the health check.
            models = Ok(models?);
            latency = started.elapsed();
        }
        let unloaded = match &models {
            Ok(listed) => unloaded(kind, listed, &self.start_probe()),
            Err(_) => Vec::new(),
        };
        Ok(Diagnosis { latency, models, unloaded })
    }
}

fn unloaded(kind: Kind, listed: &[BackendModel], probe: &Probe<'_>) -> Vec<String> {
    let entries = |response: &Value, list: &str, keys: &[&str], counts: &dyn Fn(&Value) -> bool| -> Vec<String> {
        let entries = response[list].as_array().map(Vec::as_slice).unwrap_or_default();
        let counted = entries.iter().filter(|entry| counts(entry));
        counted.filter_map(|entry| keys.iter().find_map(|key| entry[*key].as_str()).map(str::to_owned)).collect()
    };
    match kind {
        Kind::LlamaCpp => {
            let is_unloaded =
                |entry: &Value| entry["status"]["value"].as_str().is_some_and(|s| s != "loaded" && s != "sleeping");
            entries(&get(probe, "/v1/models"), "data", &["id"], &is_unloaded)
        }
        Kind::LmStudio => {
            let is_unloaded = |entry: &Value| entry["state"].as_str().is_some_and(|state| state != "loaded");
            entries(&get(probe, "/api/v0/models"), "data", &["id"], &is_unloaded)
        }
        Kind::Ollama => {
            let response = get(probe, "/api/ps");
            // Without a list, the loaded models are unknown.
            if !response["models"].is_array() {
                return Vec::new();
            }
            let running = entries(&response, "models", &["name", "model"], &|_| true);
            let ids = listed.iter().map(|model| &model.model_id);
            ids.filter(|id| !running.contains(id)).cloned().collect()
        }
        Kind::Vllm | Kind::OpenAi | Kind::Venice | Kind::OpenRouter => Vec::new(),
    }
}
