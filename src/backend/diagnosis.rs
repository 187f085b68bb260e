//! A detailed examination of a server, for `doctor` and `setup`: each part of a probe has its own result.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::probe::Probe;
use super::{BackendResult, HttpBackend, Kind, ProbedModels};

/// The report of a healthy server.
#[derive(Debug)]
pub struct Diagnosis {
    /// Duration of the health check.
    pub latency: Duration,
    /// The listed models.
    pub models: BackendResult<ProbedModels>,
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
            probe.readiness()?;
            latency = started.elapsed();
        }
        let unloaded = match &models {
            Ok(listed) => unloaded(kind, listed, &self.start_probe()),
            Err(_) => Vec::new(),
        };
        Ok(Diagnosis { latency, models, unloaded })
    }
}

fn unloaded(kind: Kind, listed: &ProbedModels, probe: &Probe<'_>) -> Vec<String> {
    // The ids of the entries that count, or `None` if the server has no such list.
    let ids = |path: &str, list: &str, names: &[&str], counts: &dyn Fn(&Value) -> bool| -> Option<Vec<String>> {
        let mut ids = Vec::new();
        let fields = [names, &["status", "state"]].concat();
        let walked = probe.ask(path)?.for_each_entry(list, &fields, |entry| {
            if counts(&entry) {
                ids.extend(names.iter().find_map(|name| entry[*name].as_str()).map(str::to_owned));
            }
            ControlFlow::Continue(())
        });
        walked.is_ok().then_some(ids)
    };
    match kind {
        Kind::LlamaCpp => {
            let is_unloaded =
                |entry: &Value| entry["status"]["value"].as_str().is_some_and(|s| s != "loaded" && s != "sleeping");
            ids("/v1/models", "data", &["id"], &is_unloaded).unwrap_or_default()
        }
        Kind::LmStudio => {
            let is_unloaded = |entry: &Value| entry["state"].as_str().is_some_and(|state| state != "loaded");
            ids("/api/v0/models", "data", &["id"], &is_unloaded).unwrap_or_default()
        }
        Kind::Ollama => {
            // Without a list, the loaded models are unknown.
            let Some(running) = ids("/api/ps", "models", &["name", "model"], &|_| true) else { return Vec::new() };
            let running: HashSet<String> = running.into_iter().collect();
            let ids = listed.models.iter().map(|model| &model.model_id);
            ids.filter(|id| !running.contains(*id)).cloned().collect()
        }
        Kind::Vllm | Kind::OpenAi | Kind::Venice | Kind::OpenRouter => Vec::new(),
    }
}
