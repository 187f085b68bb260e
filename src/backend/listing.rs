//! Parses a backend's model listing.

use serde_json::Value;

use super::{BackendError, BackendModel, BackendResult, Kind};

/// An entry of the listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The model, with its context window if the listing contains one.
    pub model: BackendModel,
    /// Whether a llama.cpp router lists the model, which also lists models that it has not loaded.
    pub routed: bool,
}

/// Parses the models of `body`, in order, without those that a llama.cpp router has not loaded.
pub fn parse(kind: Kind, body: &[u8]) -> BackendResult<Vec<Listed>> {
    let root: Value = serde_json::from_slice(body)
        .map_err(|e| BackendError::BadAnswer(format!("the model listing is not JSON ({e})")))?;
    let entries = match &root["data"] {
        Value::Array(entries) => entries.as_slice(),
        entry @ Value::Object(_) => std::slice::from_ref(entry),
        // Older llama.cpp builds return a single object.
        _ if root["id"].is_string() => std::slice::from_ref(&root),
        _ => match &root {
            Value::Array(entries) => entries.as_slice(),
            _ => return Err(BackendError::BadAnswer("the model listing has no `data`".into())),
        },
    };
    Ok(entries.iter().filter_map(|entry| listed(kind, entry)).collect())
}

fn listed(kind: Kind, entry: &Value) -> Option<Listed> {
    let model_id = entry["id"].as_str().filter(|id| !id.is_empty())?.to_owned();
    let status = entry["status"]["value"].as_str().filter(|_| kind == Kind::LlamaCpp);
    if status.is_some_and(|s| s != "loaded" && s != "sleeping") {
        return None;
    }
    // llama.cpp lists the training context only.
    let context_window = if kind == Kind::LlamaCpp { None } else { stated_window(entry) };
    let model = BackendModel { model_id, context_window, native: !kind.is_hosted() };
    Some(Listed { model, routed: status.is_some() })
}

/// The context window of an entry: the first of these keys that is a number. 0 means unknown.
fn stated_window(entry: &Value) -> Option<u32> {
    ["context_length", "max_model_len", "context_window"]
        .into_iter()
        .find_map(|key| entry[key].is_number().then(|| window(&entry[key])))
        .flatten()
}

/// The context window in `value`: a positive integer.
pub fn window(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(kind: Kind, body: &str) -> Vec<String> {
        parse(kind, body.as_bytes()).expect(body).into_iter().map(|l| l.model.model_id).collect()
    }

    #[test]
    fn parse_reads_every_shape_that_servers_send() {
        for body in [
            r#"{"data":[{"id":"a"},{"id":"b"}]}"#,
            r#"{"object":"list","models":[],"data":[{"id":"a"},{"x":1},{"id":7},{"id":""},{"id":"b"}]}"#,
            r#"[{"id":"a"},{"id":"b"}]"#,
        ] {
            assert_eq!(ids(Kind::Vllm, body), ["a", "b"]);
        }
        assert_eq!(ids(Kind::LlamaCpp, r#"{"id":"a","object":"model"}"#), ["a"]);
        assert_eq!(ids(Kind::LlamaCpp, r#"{"data":{"id":"a"}}"#), ["a"]);
        assert!(ids(Kind::Ollama, r#"{"data":[]}"#).is_empty());
    }

    #[test]
    fn parse_skips_models_that_a_router_has_not_loaded() {
        let body = r#"{"data":[{"id":"a","status":{"value":"loaded"}},{"id":"b","status":{"value":"unloaded"}},
            {"id":"c","status":{"value":"sleeping"}},{"id":"d","status":{"value":"loading"}},{"id":"e"}]}"#;
        assert_eq!(ids(Kind::LlamaCpp, body), ["a", "c", "e"]);
        assert_eq!(ids(Kind::Vllm, body), ["a", "b", "c", "d", "e"]);
    }

    #[test]
    fn stated_window_is_the_first_number() {
        for (entry, want) in [
            (r#"{"context_length":1,"max_model_len":2,"context_window":3}"#, Some(1)),
            (r#"{"context_length":"1","max_model_len":2,"context_window":3}"#, Some(2)),
            (r#"{"context_length":null,"context_window":3}"#, Some(3)),
            (r#"{"context_length":0}"#, None),
            (r#"{"context_length":99999999999}"#, None),
            (r#"{}"#, None),
        ] {
            assert_eq!(stated_window(&serde_json::from_str(entry).expect("JSON")), want, "{entry}");
        }
    }

    #[test]
    fn parse_rejects_what_is_no_listing() {
        for body in ["", "null", "7", "{}", "<html>", r#"{"data":7}"#] {
            assert!(matches!(parse(Kind::Vllm, body.as_bytes()), Err(BackendError::BadAnswer(_))), "{body}");
        }
    }
}
