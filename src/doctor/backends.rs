//! Checks the layers of a backend: its API key, its health, its models and which of them are offered, their context windows, and the
//! models that are not loaded.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::backend_fixes::{fix_of, load_fix, no_model_fix};
use super::inference_check;
use super::report::Report;
use crate::backend::{Backend, BackendError, BackendResult, Diagnosis, HttpBackend, Kind, ProbedModels};
use crate::config::BackendConfig;
use crate::discovery::{BackendOffer, OfferTerms, ResolvedModel};
use crate::sys::edit_distance::nearest;
use crate::sys::threads;

/// The maximum number of listed names; the others are counted.
const NAMES_MAX: usize = 6;

/// The check of a backend, which runs on a separate thread while other layers are checked.
pub struct BackendCheck<'a> {
    config: &'a BackendConfig,
    server: Arc<HttpBackend>,
    thread: Option<JoinHandle<BackendResult<Diagnosis>>>,
}

impl<'a> BackendCheck<'a> {
    /// Starts to query the backend.
    pub fn start(config: &'a BackendConfig) -> BackendCheck<'a> {
        let server = Arc::new(HttpBackend::new(config.kind, config.url.clone(), config.api_key_env.as_deref()));
        let of_thread = server.clone();
        BackendCheck { config, server, thread: threads::spawn("diagnose", move || of_thread.diagnose()).ok() }
    }

    /// Reports the result, with a test completion if `inference`. Returns the number of models to offer.
    pub fn report(mut self, report: &mut Report<'_>, terms: &OfferTerms, inference: bool) -> usize {
        report.heading(format_args!("backend {}", self.server.id()));
        report.pending("health");
        // There is no result if the thread could not be started, or panicked.
        let Some(result) = self.thread.take().and_then(|thread| thread.join().ok()) else {
            report.fail("health", "not checked: failed to start a thread", "ulimit -u; free -m");
            return 0;
        };
        let key = self.key(report);
        let (offered, unloaded) = match result {
            Err(e) => {
                self.failed(report, "health", &e);
                report.skip("models", "skipped: needs health");
                (Vec::new(), Vec::new())
            }
            Ok(Diagnosis { latency: took, models, unloaded }) => {
                report.pass("health", format_args!("answered within {} ms", took.as_millis()));
                let offered = match models {
                    Err(e) => {
                        self.failed(report, "models", &e);
                        Vec::new()
                    }
                    Ok(listed) => self.models(report, terms, listed, &unloaded),
                };
                (offered, unloaded)
            }
        };
        // Without its API key no job can succeed, so no model is offered.
        let offered = if key.is_ok() { offered } else { Vec::new() };
        if offered.is_empty() {
            report.skip("completion", "skipped: no model to test");
        } else if self.config.kind.is_hosted() {
            report.skip("completion", "skipped: it costs money on a hosted backend");
        } else if !inference {
            report.skip("completion", "skipped: --no-inference");
        } else {
            inference_check::run(report, &*self.server, inference_check::pick(&offered, &unloaded), self.config.kind);
        }
        offered.len()
    }

    fn key(&self, report: &mut Report<'_>) -> BackendResult<()> {
        let ready = self.server.ready();
        match (&ready, &self.config.api_key_env) {
            (Ok(()), Some(variable)) => report.pass("key", format_args!("`{variable}` is set")),
            (Ok(()), None) => {}
            (Err(e), variable) => {
                let name = variable.as_deref().unwrap_or("NAME");
                let fix = format_args!(
                    "export {name}=VALUE here, and set it in the crontab or the unit that starts the agent"
                );
                report.fail("key", e, fix);
            }
        }
        ready
    }

    fn failed(&self, report: &mut Report<'_>, check: &str, e: &BackendError) {
        report.fail(check, e, fix_of(e, self.config.kind));
    }

    /// Reports the models that are listed, and returns those that are offered.
    fn models(
        &self,
        report: &mut Report<'_>,
        terms: &OfferTerms,
        probed: ProbedModels,
        unloaded: &[String],
    ) -> Vec<ResolvedModel> {
        let kind = self.config.kind;
        let allowed = self.config.models.as_deref();
        let offer = BackendOffer {
            backend: self.server.clone(),
            allowed_models: self.config.models.clone(),
            max_concurrent: self.config.max_concurrent,
        };
        let count = probed.count();
        let mut listed_ids: Vec<String> = probed.models.iter().map(|model| model.model_id.clone()).collect();
        listed_ids.extend(probed.excluded.iter().map(|excluded| excluded.model.model_id.clone()));
        let selected = offer.select(probed);
        let exclusions = selected.exclusions();
        let excluded_ids: HashSet<String> =
            selected.excluded.iter().map(|excluded| excluded.model.model_id.clone()).collect();
        let offered = offer.price(selected.models, terms).models;
        let offered_ids: HashSet<&str> = offered.iter().map(|model| &*model.model_id).collect();
        let is_offered = |id: &String| offered_ids.contains(id.as_str());
        let is_allowed = |id: &String| allowed.is_none_or(|only| only.contains(id));
        for wanted in allowed.unwrap_or_default() {
            if !listed_ids.contains(wanted) && !unloaded.contains(wanted) {
                report_unknown(report, wanted, &listed_ids, unloaded);
            }
        }
        let [mut free, mut ids, mut windows, mut waiting, mut excluded] = [const { Names::new() }; 5];
        for id in &listed_ids {
            // A model that is allowed and can be offered, but is not, has no price.
            if is_allowed(id) && !is_offered(id) && !excluded_ids.contains(id) {
                free.add(id);
            }
        }
        for model in &offered {
            ids.add(&model.model_id);
            windows.add(&window(model));
        }
        for id in unloaded {
            if is_offered(id) {
                waiting.add(id);
            } else if kind == Kind::LlamaCpp && is_allowed(id) {
                // LM Studio and Ollama list models that are not loaded, so these models are offered.
                excluded.add(id);
            }
        }
        if free.count > 0 {
            let fix = "set a price above 0 in [pricing.models]";
            report.warn("prices", format_args!("price 0, so not offered: {free}"), fix);
        }
        if ids.count > 0 {
            report.pass("models", format_args!("lists {count}, {} to offer: {ids}", ids.count));
            report.pass("window", windows);
            if let Some(exclusions) = exclusions {
                report.skip("models", exclusions);
            }
        } else if let Some(exclusions) = exclusions {
            let what = format_args!("lists {count} model(s), none of them to offer; {exclusions}");
            report.fail("models", what, no_model_fix(kind));
        } else {
            let fix = if count == 0 {
                no_model_fix(kind)
            } else {
                "remove `models` of this backend to offer all models it lists, and set their prices above 0"
            };
            report.fail("models", format_args!("lists {count} model(s), none of them to offer"), fix);
        }
        let fix = load_fix(kind);
        for (names, outcome) in [(waiting, "its first job waits and may time out"), (excluded, "it is not offered")] {
            if names.count > 0 {
                report.warn("loaded", format_args!("not loaded, so {outcome}: {names}"), fix);
            }
        }
        offered
    }
}

fn window(model: &ResolvedModel) -> String {
    match model.context_window {
        Some(tokens) => format!("{} {tokens}", model.model_id),
        None => format!("{} unknown", model.model_id),
    }
}

/// Reports a model that the configuration allows but the server does not list.
fn report_unknown(report: &mut Report<'_>, wanted: &str, listed: &[String], unloaded: &[String]) {
    let fix = match nearest(wanted, listed.iter().chain(unloaded).map(String::as_str)) {
        Some(nearest) => format!("did you mean \"{nearest}\"? Correct `models` of this backend"),
        None => {
            let mut ids = Names::new();
            listed.iter().for_each(|id| ids.add(id));
            format!("remove it from `models`, or load it on the server; it lists: {ids}")
        }
    };
    let what = format_args!("model unknown: the server does not list `{wanted}`");
    report.fail("models", what, fix);
}

/// A list of names: the first few, and the number of the others.
struct Names {
    text: String,
    count: usize,
}

impl Names {
    const fn new() -> Names {
        Names { text: String::new(), count: 0 }
    }

    fn add(&mut self, name: &str) {
        if self.count < NAMES_MAX {
            self.text.push_str(if self.count > 0 { ", " } else { "" });
            self.text.push_str(name);
        }
        self.count += 1;
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        if self.count > NAMES_MAX { write!(f, ", and {} more", self.count - NAMES_MAX) } else { Ok(()) }
    }
}
