//! What an operator is told of a server, question by question; the prober's one answer for all says less.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::context_window::get;
use super::probe::Probe;
use super::{BackendModel, BackendResult, HttpBackend, Kind};

/// The answers of a server that is healthy.
#[derive(Debug)]
pub struct Diagnosis {
    /// How long the health check took.
    pub latency: Duration,
    /// What it lists.
    pub models: BackendResult<Vec<BackendModel>>,
    /// What it knows, but would have to load first. A llama.cpp router's are not among the listed.
    pub unloaded: Vec<String>,
}

impl HttpBackend {
    /// Asks the server for all of it, within twice the time of a probe.
    ///
    /// # Errors
    /// It is not healthy.
    pub fn diagnose(&self) -> BackendResult<Diagnosis> {
        let kind = self.server_kind();
        let began = Instant::now();
        let probe = self.start_probe();
        probe.health()?;
        let mut took = began.elapsed();
        let mut models = self.models(&probe);
        if kind.health_path().is_none() {
            // The listing is the check.
            models = Ok(models?);
            took = began.elapsed();
        }
        let unloaded = match &models {
            Ok(listed) => unloaded(kind, listed, &self.start_probe()),
            Err(_) => Vec::new(),
        };
        Ok(Diagnosis { latency: took, models, unloaded })
    }
}

fn unloaded(kind: Kind, listed: &[BackendModel], probe: &Probe<'_>) -> Vec<String> {
    let entries = |answer: &Value, list: &str, keys: &[&str], counts: &dyn Fn(&Value) -> bool| -> Vec<String> {
        let entries = answer[list].as_array().map(Vec::as_slice).unwrap_or_default();
        let counted = entries.iter().filter(|entry| counts(entry));
        counted.filter_map(|entry| keys.iter().find_map(|key| entry[*key].as_str()).map(str::to_owned)).collect()
    };
    match kind {
        Kind::LlamaCpp => {
            let waits =
                |entry: &Value| entry["status"]["value"].as_str().is_some_and(|s| s != "loaded" && s != "sleeping");
            entries(&get(probe, "/v1/models"), "data", &["id"], &waits)
        }
        Kind::LmStudio => {
            let waits = |entry: &Value| entry["state"].as_str().is_some_and(|state| state != "loaded");
            entries(&get(probe, "/api/v0/models"), "data", &["id"], &waits)
        }
        Kind::Ollama => {
            let answer = get(probe, "/api/ps");
            // One that does not say has not said that it has none.
            if !answer["models"].is_array() {
                return Vec::new();
            }
            let running = entries(&answer, "models", &["name", "model"], &|_| true);
            let ids = listed.iter().map(|model| &model.model_id);
            ids.filter(|id| !running.contains(id)).cloned().collect()
        }
        Kind::Vllm | Kind::OpenAi | Kind::Venice | Kind::OpenRouter => Vec::new(),
    }
}
