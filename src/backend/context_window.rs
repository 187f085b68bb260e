//! The context window that a server really runs, where its listing does not tell. Each kind has a place of its own for
//! it; a question that fails leaves the window unknown, which is honest, and the model offered.

use serde_json::{Value, json};

use super::listing::{Listed, window};
use super::{BackendModel, BackendResult, Kind};

/// How the server is asked: paths are below its root.
pub struct Questions<'a> {
    /// `GET`.
    pub get: &'a dyn Fn(&str) -> BackendResult<Vec<u8>>,
    /// `POST` of JSON.
    pub post: &'a dyn Fn(&str, &[u8]) -> BackendResult<Vec<u8>>,
}

impl Questions<'_> {
    fn get(&self, path: &str) -> Value {
        (self.get)(path).ok().and_then(|body| serde_json::from_slice(&body).ok()).unwrap_or_default()
    }

    fn post(&self, path: &str, question: &Value) -> Value {
        let answer = (self.post)(path, question.to_string().as_bytes()).ok();
        answer.and_then(|body| serde_json::from_slice(&body).ok()).unwrap_or_default()
    }
}

/// The listed models, with their windows.
pub fn fill_in(kind: Kind, listed: Vec<Listed>, ask: &Questions<'_>) -> Vec<BackendModel> {
    if listed.is_empty() {
        return Vec::new();
    }
    match kind {
        Kind::LlamaCpp => llamacpp(listed, ask),
        Kind::LmStudio => lmstudio(listed, ask),
        Kind::Ollama => ollama(listed, ask),
        Kind::Vllm | Kind::OpenAi | Kind::Venice | Kind::OpenRouter => listed.into_iter().map(|l| l.model).collect(),
    }
}

/// `/props`; a router answers for itself with 0, and for a model only when it is named.
fn llamacpp(listed: Vec<Listed>, ask: &Questions<'_>) -> Vec<BackendModel> {
    let n_ctx = |props: Value| window(&props["default_generation_settings"]["n_ctx"]);
    let own = n_ctx(ask.get("/props"));
    let with_window = |mut listed: Listed| {
        listed.model.context_window = if listed.routed || own.is_none() {
            n_ctx(ask.get(&format!("/props?model={}&autoload=false", percent_encoded(&listed.model.model_id))))
        } else {
            own
        };
        listed.model
    };
    listed.into_iter().map(with_window).collect()
}

fn lmstudio(listed: Vec<Listed>, ask: &Questions<'_>) -> Vec<BackendModel> {
    let models = ask.get("/api/v0/models");
    let with_window = |mut listed: Listed| {
        let entry = find(&models["data"], &["id"], &listed.model.model_id);
        let stated = window(&entry["loaded_context_length"]).or_else(|| window(&entry["max_context_length"]));
        listed.model.context_window = stated.or(listed.model.context_window);
        listed.model
    };
    listed.into_iter().map(with_window).collect()
}

/// What runs, else what the operator configured; never what the model could do on other hardware.
fn ollama(listed: Vec<Listed>, ask: &Questions<'_>) -> Vec<BackendModel> {
    let running = ask.get("/api/ps");
    let with_window = |mut listed: Listed| {
        let id = &listed.model.model_id;
        let loaded = window(&find(&running["models"], &["name", "model"], id)["context_length"]);
        listed.model.context_window = loaded.or_else(|| {
            let shown = ask.post("/api/show", &json!({ "model": id }));
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
