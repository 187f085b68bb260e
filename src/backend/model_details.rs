//! Queries a server for what its model listing leaves out: the context window that a model actually runs with, and whether the model
//! can chat and runs on this machine. Each kind reports them on different routes.
//!
//! Invariants: a query changes nothing on the server; in particular, it never loads a model. If a query fails, the previous details
//! still apply, and a model without any is offered.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

use super::Kind;
use super::exclusion::Exclusion;
use super::listing::{Listed, window};
use super::probe::Probe;
use super::probe_json::Body;
use super::purpose::other_than_chat;
use crate::sys::threads;

/// What is escaped in the value of a query.
const QUERY_VALUE: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// Maximum number of concurrent queries to one server. At 60 ms each, a probe has time for 200 models.
const CONCURRENT_QUESTIONS: usize = 4;
/// Routes of vLLM for models that cannot chat.
const OTHER_ROUTES: [&str; 6] =
    ["/pooling", "/v1/embeddings", "/classify", "/score", "/v1/audio/transcriptions", "/v1/audio/speech"];
const CHAT_ROUTE: &str = "/v1/chat/completions";

/// What a server reports about a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Details {
    /// The configured context window.
    window: Option<u32>,
    exclusion: Option<Exclusion>,
}

/// The details of a model, and whether they must be asked for again.
#[derive(Debug, Clone)]
struct KnownModel {
    details: Details,
    /// Identifies the version of the model, if the server states one.
    digest: Option<String>,
    /// Whether the details may be out of date.
    is_stale: bool,
    /// The context window that was last offered.
    window: Option<u32>,
}

/// The details of the models that a server listed last, by id.
#[derive(Debug, Clone, Default)]
pub struct KnownModels(HashMap<String, KnownModel>);

impl KnownModels {
    /// Marks the details of a model as out of date, because a job did not find it. A digest makes this unnecessary: it shows whether
    /// the model was replaced.
    pub fn expire(&mut self, model_id: &str) {
        if let Some(known) = self.0.get_mut(model_id).filter(|known| known.digest.is_none()) {
            known.is_stale = true;
        }
    }

    /// Marks the details of all models without a digest as out of date: the server failed, and may come back with other models.
    pub fn expire_undated(&mut self) {
        self.0.values_mut().filter(|known| known.digest.is_none()).for_each(|known| known.is_stale = true);
    }

    fn current(&self, model_id: &str, digest: Option<&String>) -> Option<Details> {
        let known = self.0.get(model_id).filter(|known| !known.is_stale && known.digest.as_ref() == digest)?;
        Some(known.details.clone())
    }
}

/// What a probe has learned about a model.
#[derive(Debug, Clone, Default)]
struct Learned {
    /// `None` if the query failed.
    details: Option<Details>,
    digest: Option<String>,
    running: Running,
}

/// The context window that a model runs with.
#[derive(Debug, Clone, Copy, Default)]
enum Running {
    /// The model does not run, or its window is the configured one.
    #[default]
    AsConfigured,
    With(u32),
    /// The query failed.
    Unanswered,
}

impl Learned {
    fn details(details: Option<Details>) -> Learned {
        Learned { details, ..Learned::default() }
    }
}

/// Completes the listed models. Returns what is known about them.
pub fn fill_in(kind: Kind, listed: &mut [Listed], probe: &Probe<'_>, known: &KnownModels) -> KnownModels {
    let learned = match kind {
        _ if listed.is_empty() => return KnownModels::default(),
        Kind::LlamaCpp => llamacpp(listed, probe),
        Kind::LmStudio => lmstudio(listed, probe),
        Kind::Ollama => ollama(listed, probe, known),
        Kind::Vllm | Kind::OpenAi => vllm(listed, probe, known),
        Kind::Venice | Kind::OpenRouter => return KnownModels::default(),
    };
    let complete = |(listed, Learned { details, digest, running }): (&mut Listed, Learned)| {
        let before = known.0.get(&listed.model.model_id);
        let is_stale = details.is_none();
        let details = details.or_else(|| Some(before?.details.clone())).unwrap_or_default();
        let window = match running {
            Running::With(tokens) => Some(tokens),
            Running::AsConfigured => details.window,
            Running::Unanswered => before.and_then(|before| before.window).or(details.window),
        };
        listed.model.context_window = window.or(listed.model.context_window);
        listed.exclusion = listed.exclusion.take().or_else(|| details.exclusion.clone());
        (listed.model.model_id.clone(), KnownModel { details, digest, is_stale, window })
    };
    KnownModels(listed.iter_mut().zip(learned).map(complete).collect())
}

/// The window from `/props`. A router reports 0 for itself, so `/props` is queried for each model by name. Only a llama.cpp router
/// respects `autoload=false`; it is recognized by the status of its models and its `/props` without a name. llama-swap would start the
/// model.
fn llamacpp(listed: &[Listed], probe: &Probe<'_>) -> Vec<Learned> {
    const SETTINGS: &str = "default_generation_settings";
    let of_props = |props: Option<Body>| {
        props.map(|props| Details { window: window(&props.fields(&[SETTINGS])[SETTINGS]["n_ctx"]), exclusion: None })
    };
    let own = probe.ask("/props");
    let has_own = own.as_ref().is_some_and(|props| !props.bytes.is_empty());
    let own = of_props(own);
    let of_model = |listed: &Listed| {
        let id = utf8_percent_encode(&listed.model.model_id, QUERY_VALUE);
        of_props(probe.ask(&format!("/props?model={id}&autoload=false")))
    };
    let is_asked = |listed: &&Listed| listed.routed && has_own;
    let mut answers = ask_each(listed.iter().filter(is_asked).collect(), of_model).into_iter();
    let details = |listed: &Listed| if is_asked(&listed) { answers.next().flatten() } else { own.clone() };
    listed.iter().map(details).map(Learned::details).collect()
}

fn lmstudio(listed: &[Listed], probe: &Probe<'_>) -> Vec<Learned> {
    let fields = ["id", "type", "loaded_context_length", "max_context_length"];
    let details = |entry: &Value| Details {
        window: window(&entry["loaded_context_length"]).or_else(|| window(&entry["max_context_length"])),
        exclusion: other_than_chat(entry).map(Exclusion::NotChat),
    };
    let answer = probe.ask("/api/v0/models").map(|models| by_name(&models, "data", &["id"], &fields, details));
    let of_model = |listed: &Listed| Some(answer.as_ref()?.get(&listed.model.model_id).cloned().unwrap_or_default());
    listed.iter().map(of_model).map(Learned::details).collect()
}

/// The window of the running model, else the configured one; never the maximum of the model.
fn ollama(listed: &[Listed], probe: &Probe<'_>, known: &KnownModels) -> Vec<Learned> {
    let names = ["name", "model"];
    let asked = if probe.health_response().is_none() { probe.ask("/api/tags") } else { None };
    let tags = probe.health_response().or(asked.as_ref());
    let tag = |entry: &Value| (text(&entry["digest"]), exclusion_by_ollama(entry));
    let fields = ["name", "model", "digest", "remote_host", "capabilities", "details"];
    let tags = tags.map(|tags| by_name(tags, "models", &names, &fields, tag)).unwrap_or_default();
    let length = |entry: &Value| window(&entry["context_length"]);
    let running = probe.ask("/api/ps");
    let running = running.map(|ps| by_name(&ps, "models", &names, &["name", "model", "context_length"], length));

    let before_asking = |listed: &Listed| {
        let id = &listed.model.model_id;
        let (digest, exclusion) = tags.get(id).cloned().unwrap_or_default();
        let exclusion = exclusion.or_else(|| has_cloud_name(id).then(|| Exclusion::Remote("ollama.com".to_owned())));
        let excluded = exclusion.map(|exclusion| Details { window: None, exclusion: Some(exclusion) });
        let details = excluded.or_else(|| known.current(id, digest.as_ref()));
        let running = match &running {
            None => Running::Unanswered,
            Some(running) => running.get(id).copied().flatten().map_or(Running::AsConfigured, Running::With),
        };
        Learned { details, digest, running }
    };
    let mut learned: Vec<Learned> = listed.iter().map(before_asking).collect();
    let unknown: Vec<usize> = (0..learned.len()).filter(|index| learned[*index].details.is_none()).collect();
    let show = |index: &usize| {
        let request = json!({ "model": listed[*index].model.model_id });
        probe.ask_with("/api/show", &request.to_string().into()).map(|response| shown(&response))
    };
    for (index, details) in unknown.iter().zip(ask_each(unknown.iter().collect(), show)) {
        learned[*index].details = details;
    }
    learned
}

/// The details from `/api/show`.
fn shown(response: &Body) -> Details {
    let fields = response.fields(&["parameters", "capabilities", "remote_host", "details"]);
    let window = fields["parameters"].as_str().and_then(num_ctx);
    Details { window, exclusion: exclusion_by_ollama(&fields) }
}

/// Why a model is not offered, from its entry in `/api/tags` or its `/api/show`. Versions before 0.6.4 state no capabilities.
fn exclusion_by_ollama(fields: &Value) -> Option<Exclusion> {
    if let Some(host) = text(&fields["remote_host"]) {
        return Some(Exclusion::Remote(host));
    }
    if fields["capabilities"].is_array() {
        return other_than_chat(fields).map(Exclusion::NotChat);
    }
    // Models of the BERT families compute embeddings.
    let family = text(&fields["details"]["family"]).filter(|family| family.ends_with("bert"));
    family.map(Exclusion::NotChat)
}

/// Whether Ollama's library names cloud models like this: `gpt-oss:120b-cloud`, `glm-4.6:cloud`.
fn has_cloud_name(id: &str) -> bool {
    id.ends_with("-cloud") || id.ends_with(":cloud")
}

/// `num_ctx` from the parameters of a Modelfile.
fn num_ctx(parameters: &str) -> Option<u32> {
    let mut lines = parameters.lines().map(|line| line.split_whitespace());
    let value = lines.find_map(|mut words| (words.next()? == "num_ctx").then(|| words.next())?)?;
    value.parse().ok().filter(|n| *n > 0)
}

/// vLLM lists pooling models like chat models, but offers only the routes that its model serves.
fn vllm(listed: &[Listed], probe: &Probe<'_>, known: &KnownModels) -> Vec<Learned> {
    let current = |listed: &Listed| known.current(&listed.model.model_id, None);
    let is_asked = listed.iter().any(|listed| listed.is_of_vllm && current(listed).is_none());
    let details = |api: Body| Details { window: None, exclusion: routes_without_chat(&api).map(Exclusion::NotChat) };
    let answer = if is_asked { probe.ask("/openapi.json").map(details) } else { None };
    let of_model = |listed: &Listed| match listed.is_of_vllm {
        true => answer.clone().or_else(|| current(listed)),
        false => Some(Details::default()),
    };
    listed.iter().map(of_model).map(Learned::details).collect()
}

/// What a server with this OpenAPI description serves instead of chat, if it does not serve chat. A proxy may list no routes at all.
fn routes_without_chat(api: &Body) -> Option<String> {
    let routes = api.keys_of("paths", &[&[CHAT_ROUTE], &OTHER_ROUTES[..]].concat());
    let other = routes.first().filter(|_| !routes.contains(&CHAT_ROUTE))?;
    Some(format!("the server has {other}, but no {CHAT_ROUTE}"))
}

/// Queries each item, a few at a time. The results are in the order of the items.
fn ask_each<I: Sync, T: Send>(items: Vec<&I>, ask: impl Fn(&I) -> Option<T> + Sync) -> Vec<Option<T>> {
    let answers: Vec<Mutex<Option<T>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    let ask_the_next = || {
        while let Some(index) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|index| *index < items.len()) {
            *answers[index].lock().unwrap_or_else(PoisonError::into_inner) = ask(items[index]);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..CONCURRENT_QUESTIONS.min(items.len()) {
            // Without another thread, this one queries all of them.
            let _ = threads::spawn_scoped(scope, "probe-model", ask_the_next);
        }
        ask_the_next();
    });
    answers.into_iter().map(|answer| answer.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
}

/// What `read` reads from each entry of a list, by the names of the entry.
fn by_name<T: Clone>(
    response: &Body,
    list: &str,
    names: &[&str],
    fields: &[&str],
    read: impl Fn(&Value) -> T,
) -> HashMap<String, T> {
    let mut map = HashMap::new();
    // A response without the list has no entries.
    let _ = response.for_each_entry(list, fields, |entry| {
        let value = read(&entry);
        for name in names.iter().filter_map(|name| entry[*name].as_str()) {
            map.entry(name.to_owned()).or_insert_with(|| value.clone());
        }
        ControlFlow::Continue(())
    });
    map
}

/// The string, unless it is empty.
fn text(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn num_ctx_is_found_among_other_parameters() {
        assert_eq!(num_ctx("stop \"<|end|>\"\nnum_ctx                        4096\ntemperature 1"), Some(4096));
        assert_eq!(num_ctx("num_ctx 0"), None);
        assert_eq!(num_ctx("num_ctx"), None);
        assert_eq!(num_ctx("stop num_ctx"), None);
        assert_eq!(num_ctx(""), None);
    }

    #[test]
    fn query_value_escapes_what_a_query_value_cannot_contain() {
        assert_eq!(
            utf8_percent_encode("org/Model-1.5:Q4 & x", QUERY_VALUE).to_string(),
            "org%2FModel-1.5%3AQ4%20%26%20x"
        );
    }

    #[test]
    fn ask_each_keeps_the_order() {
        let items: Vec<u32> = (0..50).collect();
        let answers = ask_each(items.iter().collect(), |n| (n % 7 != 0).then_some(n * 2));
        let expected: Vec<_> = items.iter().map(|n| (n % 7 != 0).then_some(n * 2)).collect();
        assert_eq!(answers, expected);
    }
}
