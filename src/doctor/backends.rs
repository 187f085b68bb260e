//! Each backend: its key, its health, what it lists and what of that is offered, the windows it runs, what is not loaded.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::backend_fixes::{fix_of, load_fix, no_model_fix};
use super::inference_check;
use super::report::Report;
use crate::backend::{Backend, BackendError, BackendModel, BackendResult, Diagnosis, HttpBackend, Kind};
use crate::config::BackendConfig;
use crate::discovery::{BackendOffer, OfferTerms, ResolvedModel};
use crate::sys::threads;

/// So many names are listed, then counted.
const NAMES_MAX: usize = 6;
/// Names that differ in more than a third of their letters are not alike.
const ALIKE: usize = 3;
/// The most of two names that is compared, in bytes.
const COMPARED_MAX: usize = 80;

/// A backend that is being examined; all of them side by side, while other layers are.
pub struct BackendCheck<'a> {
    config: &'a BackendConfig,
    server: Arc<HttpBackend>,
    examined: Arc<Mutex<Option<BackendResult<Diagnosis>>>>,
    asking: Option<JoinHandle<()>>,
}

impl<'a> BackendCheck<'a> {
    /// Begins to ask.
    pub fn start(config: &'a BackendConfig) -> BackendCheck<'a> {
        let server = Arc::new(HttpBackend::new(config.kind, config.url.clone(), config.api_key_env.as_deref()));
        let examined = Arc::new(Mutex::new(None));
        let ask = {
            let (server, examined) = (server.clone(), examined.clone());
            move || *examined.lock().unwrap_or_else(PoisonError::into_inner) = Some(server.diagnose())
        };
        BackendCheck { config, server, examined, asking: threads::spawn("examine", ask).ok() }
    }

    /// Tells what was found; with `inference` tries a job too. Returns how many models it has to offer.
    pub fn tell(mut self, report: &mut Report<'_>, terms: &OfferTerms, inference: bool) -> usize {
        report.heading(format_args!("backend {}", self.server.id()));
        report.pending("health");
        // Without a thread there is nothing, and so it is when it panicked.
        let asked = self.asking.take().is_some_and(|asking| asking.join().is_ok());
        let examination = if asked { self.examined.lock().ok().and_then(|mut e| e.take()) } else { None };
        let Some(examination) = examination else {
            report.fail(
                "health",
                format_args!("not asked: the box has no thread left for it"),
                format_args!("ulimit -u; free -m"),
            );
            return 0;
        };
        let key = self.key(report);
        let (offered, unloaded) = match examination {
            Err(e) => {
                self.failed(report, "health", &e);
                report.skip("models", format_args!("rests on health"));
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
        // Without its key no job succeeds, and nothing is offered.
        let offered = if key.is_ok() { offered } else { Vec::new() };
        if offered.is_empty() {
            report.skip("completion", format_args!("there is no model to try it with"));
        } else if self.config.kind.is_hosted() {
            report.skip("completion", format_args!("not tried: on a hosted backend it costs money"));
        } else if !inference {
            report.skip("completion", format_args!("not tried: --no-inference"));
        } else {
            inference_check::run(report, &*self.server, inference_check::pick(&offered, &unloaded), self.config.kind);
        }
        offered.len()
    }

    fn key(&self, report: &mut Report<'_>) -> BackendResult<()> {
        let ready = self.server.ready();
        match (&ready, &self.config.api_key_env) {
            (Ok(()), Some(variable)) => report.pass("key", format_args!("`{variable}` holds one")),
            (Ok(()), None) => {}
            (Err(e), variable) => {
                let name = variable.as_deref().unwrap_or("NAME");
                let fix = format_args!("export {name}=… here, and in what starts the agent: the crontab, the unit");
                report.fail("key", format_args!("{e}"), fix);
            }
        }
        ready
    }

    fn failed(&self, report: &mut Report<'_>, check: &str, e: &BackendError) {
        report.fail(check, format_args!("{e}"), format_args!("{}", fix_of(e, self.config.kind)));
    }

    /// What is listed and what of it is offered.
    fn models(
        &self,
        report: &mut Report<'_>,
        terms: &OfferTerms,
        listed: Vec<BackendModel>,
        unloaded: &[String],
    ) -> Vec<ResolvedModel> {
        let kind = self.config.kind;
        let allowed = self.config.models.as_deref();
        let offer = BackendOffer {
            backend: self.server.clone(),
            allowed_models: self.config.models.clone(),
            max_concurrent: self.config.max_concurrent,
        };
        let listed_ids: Vec<String> = listed.iter().map(|model| model.model_id.clone()).collect();
        let offered = offer.price(listed, terms).models;
        let is_offered = |id: &String| offered.iter().any(|model| model.model_id == *id);
        let is_allowed = |id: &String| allowed.is_none_or(|only| only.contains(id));
        for wanted in allowed.unwrap_or_default() {
            if !listed_ids.contains(wanted) && !unloaded.contains(wanted) {
                unknown(report, wanted, &listed_ids, unloaded);
            }
        }
        let [mut free, mut ids, mut windows, mut waiting, mut left_out] = [const { Names::new() }; 5];
        for id in &listed_ids {
            // A listed model that is allowed and not offered has no price.
            if is_allowed(id) && !is_offered(id) {
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
                // LM Studio and Ollama list what they have not loaded, so that it is offered.
                left_out.add(id);
            }
        }
        if free.count > 0 {
            let fix = format_args!("give each a price above 0 in [pricing.models]");
            report.warn("prices", format_args!("a price of 0, and so not offered: {free}"), fix);
        }
        let count = listed_ids.len();
        if ids.count > 0 {
            report.pass("models", format_args!("lists {count}, {} to offer: {ids}", ids.count));
            report.pass("window", format_args!("{windows}"));
        } else {
            let fix = if count == 0 {
                no_model_fix(kind)
            } else {
                "leave out `models` of this backend to offer all that it lists, each at a price above 0"
            };
            report.fail("models", format_args!("lists {count} model(s), none of them to offer"), format_args!("{fix}"));
        }
        let fix = load_fix(kind);
        for (names, outcome) in
            [(waiting, "that its first job waits and may time out"), (left_out, "it is not offered")]
        {
            if names.count > 0 {
                report.warn("loaded", format_args!("not loaded, so {outcome}: {names}"), format_args!("{fix}"));
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

/// What the configuration allows and the server does not have.
fn unknown(report: &mut Report<'_>, wanted: &str, listed: &[String], unloaded: &[String]) {
    let fix = match nearest(wanted, [listed, unloaded]) {
        Some(nearest) => format!("did you mean \"{nearest}\"? Correct `models` of this backend"),
        None => {
            let mut ids = Names::new();
            listed.iter().for_each(|id| ids.add(id));
            format!("take it out of `models`, or have the server load it; it lists: {ids}")
        }
    };
    let what = format_args!("model unknown: the server does not list `{wanted}`");
    report.fail("models", what, format_args!("{fix}"));
}

/// The first few, and how many more there are.
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

/// The name that it may have been meant to be.
fn nearest<'a>(wanted: &str, lists: [&'a [String]; 2]) -> Option<&'a str> {
    let mut nearest: Option<(usize, &str)> = None;
    for id in lists.into_iter().flatten() {
        let distance = distance(wanted, id);
        if distance <= wanted.len().max(id.len()) / ALIKE && nearest.is_none_or(|(least, _)| distance < least) {
            nearest = Some((distance, id));
        }
    }
    nearest.map(|(_, id)| id)
}

/// Bytes to change, add or take away, upper case being no change; one that begins with the other is meant by it.
fn distance(a: &str, b: &str) -> usize {
    let letters = |text: &str| -> Vec<u8> { text.bytes().take(COMPARED_MAX).map(|b| b.to_ascii_lowercase()).collect() };
    let (a, b) = (letters(a), letters(b));
    if !a.is_empty() && !b.is_empty() && (a.starts_with(&b) || b.starts_with(&a)) {
        return 0;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let changed = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_one_that_could_have_been_meant() {
        let listed = ["llama3.2:latest", "qwen2.5-coder:7b", "mistral"].map(str::to_owned);
        for (wanted, expected) in [
            ("llama3.2", Some("llama3.2:latest")),
            ("Mistral", Some("mistral")),
            ("qwen2.5-codr:7b", Some("qwen2.5-coder:7b")),
            ("gpt-oss-120b", None),
            ("", None),
        ] {
            assert_eq!(nearest(wanted, [&listed, &[]]), expected, "{wanted}");
        }
        assert_eq!(nearest("x", [&[], &[]]), None);
        assert_eq!((distance("kitten", "sitting"), distance("", "abc"), distance("a", "A")), (3, 3, 0));
    }
}
