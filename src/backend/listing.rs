//! Parses a backend's model listing.
//!
//! Invariant: at most [`MODELS_MAX`] models, with ids of at most [`MODEL_ID_BYTES_MAX`] bytes.

use std::collections::HashMap;
use std::ops::ControlFlow;

use serde_json::Value;

use super::exclusion::{Exclusion, ListingLimit, MODEL_ID_BYTES_MAX, MODELS_MAX};
use super::probe_json::Body;
use super::purpose::{PURPOSE_FIELDS, other_than_chat};
use super::{BackendError, BackendModel, BackendResult, Kind};

/// The fields of an entry that are read, besides [`PURPOSE_FIELDS`].
const FIELDS: [&str; 9] =
    ["id", "status", "parent", "root", "owned_by", "remote_host", "context_length", "max_model_len", "context_window"];
/// Maximum length of a chain of models that are based on one another.
const ANCESTORS_MAX: usize = 4;

/// A parsed listing.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// The models, in order.
    pub models: Vec<Listed>,
    /// The limit that the listing exceeds.
    pub limit: Option<ListingLimit>,
}

/// An entry of the listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The model, with its context window if the listing contains one.
    pub model: BackendModel,
    /// Why the model is not offered, if the listing says so.
    pub exclusion: Option<Exclusion>,
    /// Whether a llama.cpp router lists the model, which also lists models that it has not loaded.
    pub routed: bool,
    /// Whether the entry is one of vLLM's.
    pub is_of_vllm: bool,
}

/// Parses the models of a listing, without those that a llama.cpp router has not loaded.
pub fn parse(kind: Kind, body: &Body) -> BackendResult<Listing> {
    let mut listing = Listing { models: Vec::new(), limit: body.is_cut.then_some(ListingLimit::Bytes) };
    let mut bases = Vec::new();
    let wanted = [&FIELDS[..], &PURPOSE_FIELDS].concat();
    let walked = body.for_each_entry("data", &wanted, |entry| {
        let Some(listed) = listed(kind, &entry) else { return ControlFlow::Continue(()) };
        if listed.model.model_id.len() > MODEL_ID_BYTES_MAX {
            listing.limit = listing.limit.or(Some(ListingLimit::IdLength));
            return ControlFlow::Continue(());
        }
        if listing.models.len() == MODELS_MAX {
            listing.limit = Some(ListingLimit::Models);
            return ControlFlow::Break(());
        }
        listing.models.push(listed);
        bases.push(Base { names: ["id", "root"].map(|key| text(&entry[key])), parent: text(&entry["parent"]) });
        ControlFlow::Continue(())
    });
    walked.map_err(|e| BackendError::BadAnswer(format!("the model listing {e}")))?;
    inherit_windows(&mut listing.models, &bases);
    Ok(listing)
}

fn listed(kind: Kind, entry: &Value) -> Option<Listed> {
    let model_id = text(&entry["id"])?;
    let status = entry["status"]["value"].as_str().filter(|_| kind == Kind::LlamaCpp);
    if status.is_some_and(|s| s != "loaded" && s != "sleeping") {
        return None;
    }
    // llama.cpp lists the training context only.
    let context_window = if kind == Kind::LlamaCpp { None } else { stated_window(entry) };
    let purpose = || other_than_chat(entry).or_else(|| started_for(&entry["status"]["args"]));
    let exclusion = text(&entry["remote_host"]).map(Exclusion::Remote).or_else(|| purpose().map(Exclusion::NotChat));
    Some(Listed {
        model: BackendModel { model_id, context_window, native: !kind.is_hosted() },
        exclusion,
        routed: status.is_some(),
        is_of_vllm: entry["owned_by"] == "vllm" || (kind == Kind::Vllm && entry["max_model_len"].is_number()),
    })
}

/// The option with which a llama.cpp router starts a model that cannot chat.
fn started_for(args: &Value) -> Option<String> {
    const OPTIONS: [&str; 4] = ["--embedding", "--embeddings", "--rerank", "--reranking"];
    let mut args = args.as_array()?.iter().filter_map(Value::as_str);
    args.find(|arg| OPTIONS.contains(arg)).map(str::to_owned)
}

/// The string, unless it is empty.
fn text(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}

/// The names that other entries call a model by, and the name of the model that it is based on.
struct Base {
    names: [Option<String>; 2],
    parent: Option<String>,
}

/// Gives a LoRA adapter, which vLLM lists without a window, the window of the model that it is based on.
fn inherit_windows(models: &mut [Listed], bases: &[Base]) {
    let mut by_name: HashMap<&str, usize> = HashMap::new();
    for nth in 0..2 {
        for (index, base) in bases.iter().enumerate() {
            if let Some(name) = &base.names[nth] {
                by_name.entry(name).or_insert(index);
            }
        }
    }
    let parent = |index: &usize| bases[*index].parent.as_deref().and_then(|name| by_name.get(name).copied());
    for index in 0..models.len() {
        let mut line = std::iter::successors(Some(index), parent).take(ANCESTORS_MAX);
        models[index].model.context_window = line.find_map(|ancestor| models[ancestor].model.context_window);
    }
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

    fn parse(kind: Kind, text: &str) -> BackendResult<Listing> {
        super::parse(kind, &Body { bytes: text.into(), is_cut: false })
    }

    fn ids(kind: Kind, body: &str) -> Vec<String> {
        parse(kind, body).expect(body).models.into_iter().map(|l| l.model.model_id).collect()
    }

    #[test]
    fn parse_reads_every_shape_that_servers_send() {
        for body in [
            r#"{"data":[{"id":"a"},{"id":"b"}]}"#,
            r#"{"object":"list","models":[],"data":[{"id":"a"},{"x":1},{"id":7},{"id":""},{"id":"b"}]}"#,
            r#"{"data":[7,null,{"id":"a"},[],{"id":"b"}],"data":[{"id":"c"}]}"#,
            r#"[{"id":"a"},{"id":"b"}]"#,
        ] {
            assert_eq!(ids(Kind::Vllm, body), ["a", "b"]);
        }
        assert_eq!(ids(Kind::LlamaCpp, r#"{"id":"a","object":"model"}"#), ["a"]);
        assert_eq!(ids(Kind::LlamaCpp, r#"{"data":{"id":"a"}}"#), ["a"]);
        for empty in [r#"{"data":[]}"#, r#"{"data":null}"#, r#"{"object":"list"}"#, "[]"] {
            assert!(ids(Kind::Ollama, empty).is_empty(), "{empty}");
        }
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
        for body in ["", "null", "7", "{}", "<html>", r#"{"data":7}"#, r#"{"data":[{"id":"a"}"#] {
            assert!(matches!(parse(Kind::Vllm, body), Err(BackendError::BadAnswer(_))), "{body}");
        }
    }
}
