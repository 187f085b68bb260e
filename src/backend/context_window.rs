//! The context window that a server really runs, where its listing does not tell. Each kind has a place of its own for
//! it; a question that fails leaves the window unknown, which is honest, and the model offered.

use serde_json::{Value, json};

use super::listing::{Listed, window};
use super::probe::Probe;
use super::{BackendModel, Kind};

/// The listed models, with their windows.
pub fn fill_in(kind: Kind, listed: Vec<Listed>, probe: &Probe<'_>) -> Vec<BackendModel> {
    if listed.is_empty() {
        return Vec::new();
    }
    match kind {
        Kind::LlamaCpp => llamacpp(listed, probe),
        Kind::LmStudio => lmstudio(listed, probe),
        Kind::Ollama => ollama(listed, probe),
        Kind::Vllm | Kind::OpenAi | Kind::Venice | Kind::OpenRouter => listed.into_iter().map(|l| l.model).collect(),
    }
}

/// `/props`; a router answers for itself with 0, and for a model only when it is named.
fn llamacpp(listed: Vec<Listed>, probe: &Probe<'_>) -> Vec<BackendModel> {
    let n_ctx = |props: Value| window(&props["default_generation_settings"]["n_ctx"]);
    let own = n_ctx(get(probe, "/props"));
    let with_window = |mut listed: Listed| {
        listed.model.context_window = if listed.routed || own.is_none() {
            n_ctx(get(probe, &format!("/props?model={}&autoload=false", percent_encoded(&listed.model.model_id))))
        } else {
            own
        };
        listed.model
    };
    listed.into_iter().map(with_window).collect()
}

fn lmstudio(listed: Vec<Listed>, probe: &Probe<'_>) -> Vec<BackendModel> {
    let models = get(probe, "/api/v0/models");
    let with_window = |mut listed: Listed| {
        let entry = find(&models["data"], &["id"], &listed.model.model_id);
        let stated = window(&entry["loaded_context_length"]).or_else(|| window(&entry["max_context_length"]));
        listed.model.context_window = stated.or(listed.model.context_window);
        listed.model
    };
    listed.into_iter().map(with_window).collect()
}

/// What runs, else what the operator configured; never what the model could do on other hardware.
fn ollama(listed: Vec<Listed>, probe: &Probe<'_>) -> Vec<BackendModel> {
    let running = get(probe, "/api/ps");
    let with_window = |mut listed: Listed| {
        let id = &listed.model.model_id;
        let loaded = window(&find(&running["models"], &["name", "model"], id)["context_length"]);
        listed.model.context_window = loaded.or_else(|| {
            let shown = post(probe, "/api/show", &json!({ "model": id }));
            shown["parameters"].as_str().and_then(num_ctx)
        });
        listed.model
    };
    listed.into_iter().map(with_window).collect()
}

/// `num_ctx` in the lines of a Modelfile's parameters.
fn num_ctx(parameters: &str) -> Option<u32> {
    let mut lines = parameters.lines().map(|line| line.split_whitespace());
    let value = lines.find_map(|mut words| (words.next()? == "num_ctx").then(|| words.next())?)?;
    value.parse().ok().filter(|n| *n > 0)
}

/// One of the server's own answers; null where it has none.
pub fn get(probe: &Probe<'_>, path: &str) -> Value {
    probe.get_below_root(path).map_or(Value::Null, |answer| parsed(&answer))
}

fn post(probe: &Probe<'_>, path: &str, question: &Value) -> Value {
    probe.post_below_root(path, question.to_string().as_bytes()).map_or(Value::Null, |answer| parsed(&answer))
}

fn parsed(answer: &[u8]) -> Value {
    serde_json::from_slice(answer).unwrap_or_default()
}

fn find<'a>(entries: &'a Value, keys: &[&str], id: &str) -> &'a Value {
    let entries = entries.as_array().map(Vec::as_slice).unwrap_or_default();
    let found = entries.iter().find(|entry| keys.iter().any(|key| entry[*key] == id));
    found.unwrap_or(&Value::Null)
}

/// For a query value.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || b"-._~".contains(&b) {
            encoded.push(char::from(b));
        } else {
            encoded.push_str(&format!("%{b:02X}"));
        }
    }
    encoded
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
    fn ids_are_made_fit_for_a_query() {
        assert_eq!(percent_encoded("org/Model-1.5:Q4 & x"), "org%2FModel-1.5%3AQ4%20%26%20x");
    }
}
