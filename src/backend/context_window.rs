//! Queries a server for the context windows that it actually runs with, if its model listing does not include them. Each
//! kind reports them on a different route. If a request fails, the window stays unknown, and the model is offered anyway.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

use super::listing::{Listed, window};
use super::probe::Probe;
use super::{BackendModel, Kind};

/// What is escaped in the value of a query.
const QUERY_VALUE: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Returns the listed models with their context windows.
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

/// The window from `/props`. A router reports 0 for itself, so `/props` is queried for each model by name.
fn llamacpp(listed: Vec<Listed>, probe: &Probe<'_>) -> Vec<BackendModel> {
    let n_ctx = |props: Value| window(&props["default_generation_settings"]["n_ctx"]);
    let own = n_ctx(get(probe, "/props"));
    let with_window = |mut listed: Listed| {
        listed.model.context_window = if listed.routed || own.is_none() {
            n_ctx(get(
                probe,
                &format!("/props?model={}&autoload=false", utf8_percent_encode(&listed.model.model_id, QUERY_VALUE)),
            ))
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

/// The window of the running model, else the configured one; never the maximum of the model.
fn ollama(listed: Vec<Listed>, probe: &Probe<'_>) -> Vec<BackendModel> {
    let running = get(probe, "/api/ps");
    let with_window = |mut listed: Listed| {
        let id = &listed.model.model_id;
        let loaded = window(&find(&running["models"], &["name", "model"], id)["context_length"]);
        listed.model.context_window = loaded.or_else(|| {
            let details = post(probe, "/api/show", &json!({ "model": id }));
            details["parameters"].as_str().and_then(num_ctx)
        });
        listed.model
    };
    listed.into_iter().map(with_window).collect()
}

/// `num_ctx` from the parameters of a Modelfile.
fn num_ctx(parameters: &str) -> Option<u32> {
    let mut lines = parameters.lines().map(|line| line.split_whitespace());
    let value = lines.find_map(|mut words| (words.next()? == "num_ctx").then(|| words.next())?)?;
    value.parse().ok().filter(|n| *n > 0)
}

/// `GET` of one of the server's own routes; null if the request fails.
pub fn get(probe: &Probe<'_>, path: &str) -> Value {
    probe.get_below_root(path).map_or(Value::Null, |response| parsed(&response))
}

fn post(probe: &Probe<'_>, path: &str, body: &Value) -> Value {
    probe.post_below_root(path, body.to_string().as_bytes()).map_or(Value::Null, |response| parsed(&response))
}

fn parsed(response: &[u8]) -> Value {
    serde_json::from_slice(response).unwrap_or_default()
}

fn find<'a>(entries: &'a Value, keys: &[&str], id: &str) -> &'a Value {
    let entries = entries.as_array().map(Vec::as_slice).unwrap_or_default();
    let found = entries.iter().find(|entry| keys.iter().any(|key| entry[*key] == id));
    found.unwrap_or(&Value::Null)
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
}
