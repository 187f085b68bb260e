//! Each backend: its key, its health, what it lists and what of that is offered, the windows it runs, what is not loaded.

use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::report::Report;
use super::trial;
use crate::backend::{Backend, BackendError, BackendModel, BackendResult, Examination, HttpBackend, Kind};
use crate::config::{BackendConfig, Config};
use crate::discovery::{OfferedBackend, ResolvedModel, Terms};
use crate::logging::shown;
use crate::threads;

/// So many names are listed, then counted.
const NAMES_MAX: usize = 6;
/// Names that differ in more than a third of their letters are not alike.
const ALIKE: usize = 3;
/// The most of two names that is compared, in bytes.
const COMPARED_MAX: usize = 80;

/// A backend that is being examined; all of them side by side, while other layers are.
pub struct Patient {
    config: BackendConfig,
    server: Arc<HttpBackend>,
    examined: Arc<Mutex<Option<Examination>>>,
    asking: Option<JoinHandle<()>>,
}

impl Patient {
    /// Begins to ask.
    pub fn admit(config: &BackendConfig) -> Patient {
        let server = Arc::new(HttpBackend::new(config.kind, config.url.clone(), config.api_key_env.as_deref()));
        let examined = Arc::new(Mutex::new(None));
        let ask = {
            let (server, examined) = (server.clone(), examined.clone());
            move || *examined.lock().unwrap_or_else(PoisonError::into_inner) = Some(server.examine())
        };
        Patient { config: config.clone(), server, examined, asking: threads::spawn("examine", ask).ok() }
    }

    /// Tells what was found; with `inference` tries a job too. Returns how many models it has to offer.
    pub fn tell(mut self, report: &mut Report<'_>, config: &Config, inference: bool) -> usize {
        report.heading(&format_args!("backend {}", shown(self.server.id())));
        report.pending("health");
        // Without a thread there is nothing, and so it is when it panicked.
        let asked = self.asking.take().is_some_and(|asking| asking.join().is_ok());
        let examination = if asked { self.examined.lock().ok().and_then(|mut e| e.take()) } else { None };
        let Some(examination) = examination else {
            report.fail("health", &"not asked: the box has no thread left for it", &"ulimit -u; free -m");
            return 0;
        };
        let key = self.key(report);
        match (&examination.health, &examination.models) {
            (Err(e), _) => self.failed(report, "health", e),
            (Ok(took), _) => report.pass("health", &format_args!("answered within {} ms", took.as_millis())),
        }
        let offered = match (examination.health, examination.models) {
            (Err(_), _) => {
                report.skip("models", &"rests on health");
                Vec::new()
            }
            (Ok(_), Err(e)) => {
                self.failed(report, "models", &e);
                Vec::new()
            }
            (Ok(_), Ok(listed)) => self.models(report, config, listed, &examination.unloaded),
        };
        // Without its key no job succeeds, and nothing is offered.
        let offered = if key.is_ok() { offered } else { Vec::new() };
        if offered.is_empty() {
            report.skip("completion", &"there is no model to try it with");
        } else if self.config.kind.is_hosted() {
            report.skip("completion", &"not tried: on a hosted backend it costs money");
        } else if !inference {
            report.skip("completion", &"not tried: --no-inference");
        } else {
            trial::run(report, &*self.server, trial::pick(&offered, &examination.unloaded), self.config.kind);
        }
        offered.len()
    }

    fn key(&self, report: &mut Report<'_>) -> BackendResult<()> {
        let ready = self.server.ready();
        match (&ready, &self.config.api_key_env) {
            (Ok(()), Some(variable)) => report.pass("key", &format_args!("`{variable}` holds one")),
            (Ok(()), None) => {}
            (Err(e), variable) => {
                let name = variable.as_deref().unwrap_or("NAME");
                let fix = format_args!("export {name}=… here, and in what starts the agent: the crontab, the unit");
                report.fail("key", e, &fix);
            }
        }
        ready
    }

    fn failed(&self, report: &mut Report<'_>, check: &str, e: &BackendError) {
        report.fail(check, &shown(&e.to_string()), &fix_of(e, self.config.kind));
    }

    /// What is listed and what of it is offered.
    fn models(
        &self,
        report: &mut Report<'_>,
        config: &Config,
        listed: Vec<BackendModel>,
        unloaded: &[String],
    ) -> Vec<ResolvedModel> {
        let terms = Terms { pricing: config.pricing.clone(), max_concurrent: config.limits.max_concurrent };
        let offer = OfferedBackend {
            backend: self.server.clone(),
            allowed_models: self.config.models.clone(),
            max_concurrent: self.config.max_concurrent,
        };
        let count = listed.len();
        let ids: Vec<String> = listed.iter().map(|model| model.model_id.clone()).collect();
        let offered = offer.resolve(listed, &terms).models;
        let allowed = self.config.models.as_deref();
        self.unknown(report, allowed.unwrap_or_default(), &ids, unloaded);
        let is_free = |id: &&String| {
            let price = config.pricing.of(id);
            price.input_per_1m == 0 || price.output_per_1m == 0
        };
        let is_allowed = |id: &&String| allowed.is_none_or(|only| only.contains(*id));
        let free: Vec<&String> = ids.iter().filter(is_allowed).filter(is_free).collect();
        if !free.is_empty() {
            let fix = "give each a price above 0 in [pricing.models]";
            report.warn("prices", &format_args!("a price of 0, and so not offered: {}", names(&free)), &fix);
        }
        if offered.is_empty() {
            let (what, fix) = match (count, allowed) {
                (0, _) => ("it lists no model".to_owned(), no_model_fix(self.config.kind)),
                (_, Some([])) => ("`models = []` offers nothing".to_owned(), "leave `models` out to offer all"),
                _ => (
                    format!("lists {count}, none of them to offer"),
                    "see `models` of this backend, and [pricing.models]",
                ),
            };
            report.fail("models", &what, &fix);
        } else {
            let ids: Vec<&String> = offered.iter().map(|model| &model.model_id).collect();
            report.pass("models", &format_args!("lists {count}, {} to offer: {}", offered.len(), names(&ids)));
            let window = |model: &ResolvedModel| match model.context_window {
                Some(tokens) => format!("{} {tokens}", shown(&model.model_id)),
                None => format!("{} unknown", shown(&model.model_id)),
            };
            report.pass("window", &names(&offered.iter().map(window).collect::<Vec<_>>()));
        }
        self.waiting(report, &offered, unloaded);
        offered
    }

    /// What the configuration allows and the server does not have.
    fn unknown(&self, report: &mut Report<'_>, allowed: &[String], listed: &[String], unloaded: &[String]) {
        for wanted in allowed.iter().filter(|wanted| !listed.contains(wanted) && !unloaded.contains(wanted)) {
            let what = format_args!("model unknown: the server does not list `{}`", shown(wanted));
            let nearest = nearest(wanted, listed.iter().chain(unloaded));
            let fix = match nearest {
                Some(nearest) => format!("did you mean \"{}\"? Correct `models` of this backend", shown(nearest)),
                None => format!("take it out of `models`, or have the server load it; it lists: {}", names(listed)),
            };
            report.fail("models", &what, &fix);
        }
    }

    /// What would have to be loaded first.
    fn waiting(&self, report: &mut Report<'_>, offered: &[ResolvedModel], unloaded: &[String]) {
        let is_offered = |id: &&String| offered.iter().any(|model| model.model_id == **id);
        let first_jobs: Vec<&String> = unloaded.iter().filter(is_offered).collect();
        if !first_jobs.is_empty() {
            let what = format_args!("not loaded, so that its first job waits and may time out: {}", names(&first_jobs));
            report.warn("loaded", &what, &load_fix(self.config.kind));
        }
        let is_wanted = |id: &&String| self.config.models.as_ref().is_none_or(|only| only.contains(id));
        let left_out: Vec<&String> = unloaded.iter().filter(|id| !is_offered(id)).filter(is_wanted).collect();
        if self.config.kind == Kind::LlamaCpp && !left_out.is_empty() {
            let what = format_args!("not loaded, and so not offered: {}", names(&left_out));
            report.warn("loaded", &what, &load_fix(self.config.kind));
        }
    }
}

/// The first few, and how many more there are.
fn names<N: Display>(all: &[N]) -> String {
    let mut listed: Vec<String> = all.iter().take(NAMES_MAX).map(|name| shown(&name.to_string())).collect();
    if all.len() > NAMES_MAX {
        listed.push(format!("and {} more", all.len() - NAMES_MAX));
    }
    listed.join(", ")
}

/// What mends it, by cause.
pub fn fix_of(e: &BackendError, kind: Kind) -> String {
    let fix = match e {
        BackendError::Unreachable(_) => {
            return format!("start it ({}), or correct `url` of this backend", start_of(kind));
        }
        BackendError::Loading(_) => "wait until it is through, and look at its log if that takes minutes",
        BackendError::Unanswered(_) => "it hangs or is overloaded: look at its log, start it again",
        BackendError::NotHttp(_) => "something else listens there: correct `url` of this backend",
        BackendError::BadGateway(_) => "start what is behind the gateway at this address",
        BackendError::AuthRejected(_) => {
            "the server wants a (nother) key: put it into an environment variable, and that one's name into `api_key_env`"
        }
        BackendError::MissingKey(_) => "set that variable where the agent is started",
        BackendError::ModelNotFound(_) | BackendError::BadAnswer(_) => {
            "is `url` of this backend the server's own address, and `kind` what it is?"
        }
        BackendError::Overloaded(_) => "it is full, or your account is empty: try again when it is quiet",
        BackendError::DeadlinePassed => {
            "a job has so long, as a rule: load the model beforehand and keep it loaded, or offer a smaller one"
        }
        BackendError::BadRequest(_) => {
            "if it is no chat model, leave it out: name the others in `models` of this backend"
        }
        BackendError::Exhausted(_) => "ulimit -n; ulimit -u; free -m",
        _ => "look at the server's log",
    };
    fix.into()
}

fn start_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Vllm => "vllm serve MODEL --port 8000",
        Kind::LlamaCpp => "llama-server -m MODEL.gguf --port 8080",
        Kind::LmStudio => "lms server start",
        Kind::Ollama => "ollama serve",
        Kind::OpenAi => "whatever serves it",
        Kind::Venice | Kind::OpenRouter => "it is hosted: is this box online?",
    }
}

fn load_fix(kind: Kind) -> &'static str {
    match kind {
        Kind::Ollama => "ollama run MODEL \"\", and OLLAMA_KEEP_ALIVE=-1 for the server; or leave it out of `models`",
        Kind::LmStudio => "lms load MODEL; or leave it out of `models`",
        _ => "load it on the server, or leave it out of `models`",
    }
}

fn no_model_fix(kind: Kind) -> &'static str {
    match kind {
        Kind::Ollama => "ollama pull MODEL",
        Kind::LmStudio => "lms get MODEL, lms load MODEL",
        _ => "have the server load one",
    }
}

/// The name that it may have been meant to be.
fn nearest<'a>(wanted: &str, listed: impl Iterator<Item = &'a String>) -> Option<&'a String> {
    let (distance, nearest) = listed.map(|id| (distance(wanted, id), id)).min_by_key(|(distance, _)| *distance)?;
    (distance <= wanted.len().max(nearest.len()) / ALIKE).then_some(nearest)
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
            assert_eq!(nearest(wanted, listed.iter()).map(String::as_str), expected, "{wanted}");
        }
        assert_eq!(nearest("x", [].iter()), None);
        assert_eq!((distance("kitten", "sitting"), distance("", "abc"), distance("a", "A")), (3, 3, 0));
    }
}
