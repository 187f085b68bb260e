//! Assembles a complete stream into the single document that a non-streaming client expects.
//!
//! The agent always streams, so responses to requests with `"stream": false` are assembled here. Unknown fields are kept.

use serde_json::{Map, Value, json};
use thiserror::Error;

use super::sse;

/// Largest index of a tool call or content block. Lists are padded up to an index, so indexes must be bounded.
const INDEX_MAX: usize = 1023;

/// Why a stream could not be assembled.
#[derive(Debug, Error, PartialEq)]
pub(super) enum AssembleError {
    /// The backend reported an error inside its stream.
    #[error("the backend reported an error: {0}")]
    Reported(String),
    /// The stream contains an invalid event.
    #[error("the backend's stream cannot be read: {0}")]
    Malformed(String),
    /// The stream contains no event.
    #[error("the backend's stream is empty")]
    Empty,
}

/// Assembles an OpenAI chat stream into a `chat.completion`.
pub(super) fn openai_completion(stream: &[u8]) -> Result<Value, AssembleError> {
    if let Some(document) = plain_document(stream)? {
        return Ok(document);
    }
    let mut head = Map::new();
    let mut choices = Vec::new();
    for mut event in parsed_events(stream)? {
        if let Some(Value::Array(parts)) = event.shift_remove("choices") {
            parts.into_iter().try_for_each(|part| merge_choice(&mut choices, part))?;
        }
        extend(&mut head, event);
    }
    if choices.is_empty() {
        return Err(AssembleError::Empty);
    }
    head.insert("object".into(), "chat.completion".into());
    head.insert("choices".into(), choices.into_iter().enumerate().map(finished_choice).collect());
    Ok(Value::Object(head))
}

/// Assembles an Anthropic stream into a `message`.
pub(super) fn anthropic_message(stream: &[u8]) -> Result<Value, AssembleError> {
    if let Some(document) = plain_document(stream)? {
        return Ok(document);
    }
    let mut message: Option<Map<String, Value>> = None;
    let mut blocks = Vec::new();
    let events = parsed_events(stream)?;
    if events.is_empty() {
        return Err(AssembleError::Empty);
    }
    for mut event in events {
        let index = event.shift_remove("index");
        match event.get("type").and_then(Value::as_str).unwrap_or_default() {
            "message_start" => message = Some(taken_object(&mut event, "message")),
            "content_block_start" => *slot(&mut blocks, index)? = taken_object(&mut event, "content_block").into(),
            "content_block_delta" => {
                merge_block(slot(&mut blocks, index)?, taken_object(&mut event, "delta"))?;
            }
            "message_delta" => merge_message(message.get_or_insert_default(), event),
            _ => {} // ping, content_block_stop, message_stop, and unknown events
        }
    }
    let mut message = message.ok_or_else(|| AssembleError::Malformed("no `message_start` in it".to_owned()))?;
    message.insert("content".into(), blocks.into_iter().map(finished_block).collect::<Result<_, _>>()?);
    Ok(Value::Object(message))
}

/// The text that an event of either format adds to the response, including thinking.
pub(super) fn delta_text(event: &Value) -> String {
    let openai = &event["choices"][0]["delta"];
    let anthropic = &event["delta"];
    let pieces = [
        &openai["reasoning_content"],
        &openai["reasoning"],
        &openai["content"],
        &anthropic["thinking"],
        &anthropic["text"],
    ];
    pieces.into_iter().filter_map(Value::as_str).collect()
}

/// The result if a proxy in front of the backend responded with a single JSON document instead of a stream.
fn plain_document(stream: &[u8]) -> Result<Option<Value>, AssembleError> {
    if stream.trim_ascii_start().first() != Some(&b'{') {
        return Ok(None);
    }
    serde_json::from_slice(stream).map(Some).map_err(|error| AssembleError::Malformed(error.to_string()))
}

fn parsed_events(stream: &[u8]) -> Result<Vec<Map<String, Value>>, AssembleError> {
    let mut parsed = Vec::new();
    for data in sse::events(stream) {
        if data.trim() == "[DONE]" {
            continue;
        }
        let event: Map<String, Value> =
            serde_json::from_str(&data).map_err(|error| AssembleError::Malformed(error.to_string()))?;
        match event.get("error") {
            None | Some(Value::Null) => parsed.push(event),
            Some(error) => return Err(AssembleError::Reported(error_text(error))),
        }
    }
    Ok(parsed)
}

fn error_text(error: &Value) -> String {
    let text = error.get("message").unwrap_or(error);
    text.as_str().map_or_else(|| text.to_string(), str::to_owned)
}

fn merge_choice(choices: &mut Vec<Value>, part: Value) -> Result<(), AssembleError> {
    let Value::Object(mut part) = part else {
        return Err(AssembleError::Malformed("a choice is not an object".to_owned()));
    };
    let Value::Object(choice) = slot(choices, part.shift_remove("index"))? else { return Ok(()) };
    for (from, to) in [("delta", "message"), ("logprobs", "logprobs")] {
        let delta = taken_object(&mut part, from);
        if !delta.is_empty() {
            merge(choice.entry(to).or_insert(Value::Null), delta.into())?;
        }
    }
    extend(choice, part);
    Ok(())
}

/// Merges a delta: appends text, extends lists, merges list entries that have an index by it, and replaces other values.
fn merge(target: &mut Value, delta: Value) -> Result<(), AssembleError> {
    if target.is_null() {
        *target = match &delta {
            Value::Object(_) => json!({}),
            Value::Array(_) => json!([]),
            _ => Value::Null,
        };
    }
    match (target, delta) {
        (Value::Object(target), Value::Object(delta)) => {
            for (key, value) in delta {
                match key.as_str() {
                    _ if value.is_null() => {}
                    // Some servers repeat these in every event.
                    "role" | "id" | "type" => drop(target.insert(key, value)),
                    _ => merge(target.entry(key).or_insert(Value::Null), value)?,
                }
            }
        }
        (Value::Array(target), Value::Array(parts)) => {
            for mut part in parts {
                let index = part.as_object_mut().and_then(|part| part.shift_remove("index"));
                match index {
                    Some(_) => merge(slot(target, index)?, part)?,
                    None => target.push(part),
                }
            }
        }
        (Value::String(target), Value::String(text)) => target.push_str(&text),
        (target, value) => *target = value,
    }
    Ok(())
}

/// Sets the values that are not null.
fn extend(target: &mut Map<String, Value>, from: Map<String, Value>) {
    target.extend(from.into_iter().filter(|(_, value)| !value.is_null()));
}

fn finished_choice((index, choice): (usize, Value)) -> Value {
    let Value::Object(choice) = choice else { return choice };
    let mut whole = json!({"index": index, "message": {"role": "assistant", "content": null}, "finish_reason": null});
    for (key, value) in choice {
        match (&mut whole[&key], value) {
            (Value::Object(known), Value::Object(value)) => known.extend(value),
            (known, value) => *known = value,
        }
    }
    whole
}

fn merge_block(block: &mut Value, mut delta: Map<String, Value>) -> Result<(), AssembleError> {
    delta.shift_remove("type"); // the delta's own
    if let Some(citation) = delta.shift_remove("citation") {
        delta.insert("citations".into(), json!([citation]));
    }
    merge(block, delta.into())
}

/// Parses the input of a tool call, which arrives as fragments of JSON text.
fn finished_block(mut block: Value) -> Result<Value, AssembleError> {
    let input = block.as_object_mut().and_then(|block| block.shift_remove("partial_json"));
    if let Some(text) = input.as_ref().and_then(Value::as_str).filter(|text| !text.is_empty()) {
        block["input"] = serde_json::from_str(text)
            .map_err(|error| AssembleError::Malformed(format!("the input of a tool is not JSON: {error}")))?;
    }
    Ok(block)
}

fn merge_message(message: &mut Map<String, Value>, mut event: Map<String, Value>) {
    message.extend(taken_object(&mut event, "delta"));
    if let Value::Object(known) = message.entry("usage").or_insert_with(|| json!({})) {
        extend(known, taken_object(&mut event, "usage"));
    }
}

/// The entry of `list` at `index` (default 0), created if missing.
fn slot(list: &mut Vec<Value>, index: Option<Value>) -> Result<&mut Value, AssembleError> {
    let index = index.and_then(|index| index.as_u64()).map_or(0, |index| index.try_into().unwrap_or(usize::MAX));
    if index > INDEX_MAX {
        return Err(AssembleError::Malformed(format!("index {index} is out of range")));
    }
    if list.len() <= index {
        list.resize(index + 1, json!({}));
    }
    Ok(&mut list[index])
}

fn taken_object(event: &mut Map<String, Value>, key: &str) -> Map<String, Value> {
    match event.shift_remove(key) {
        Some(Value::Object(object)) => object,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sse_of(events: &[Value]) -> Vec<u8> {
        let mut stream = String::new();
        for event in events {
            stream.push_str(&format!("data: {event}\n\n"));
        }
        stream.push_str("data: [DONE]\n\n");
        stream.into_bytes()
    }

    #[test]
    fn openai_text_is_joined_and_the_envelope_kept() {
        let stream = sse_of(&[
            json!({"id":"c1","object":"chat.completion.chunk","created":7,"model":"m","usage":null,
                   "choices":[{"index":0,"delta":{"role":"assistant","content":null},"finish_reason":null}]}),
            json!({"id":"c1","choices":[{"index":0,"delta":{"reasoning_content":"hm "}}]}),
            json!({"id":"c1","choices":[{"index":0,"delta":{"content":"hel"}}]}),
            json!({"id":"c1","choices":[{"index":0,"delta":{"content":"lo"},"finish_reason":null}]}),
            json!({"id":"c1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}),
            json!({"id":"c1","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}),
        ]);
        let want = json!({"id":"c1","object":"chat.completion","created":7,"model":"m",
            "usage":{"prompt_tokens":3,"completion_tokens":2},
            "choices":[{"index":0,"message":{"role":"assistant","reasoning_content":"hm ","content":"hello"},
                        "finish_reason":"stop"}]});
        assert_eq!(openai_completion(&stream), Ok(want));
    }

    #[test]
    fn openai_tool_calls_are_merged_by_index() {
        let call = |call: Value| json!({"choices":[{"index":0,"delta":{"tool_calls":[call]}}]});
        let stream = sse_of(&[
            call(json!({"index":0,"id":"a","type":"function","function":{"name":"f","arguments":""}})),
            call(json!({"index":1,"id":"b","type":"function","function":{"name":"g","arguments":"{}"}})),
            call(json!({"index":0,"function":{"arguments":"{\"x\":"}})),
            call(json!({"index":0,"function":{"arguments":"1}"}})),
            json!({"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}),
        ]);
        let whole = openai_completion(&stream).unwrap();
        let want = json!([{"id":"a","type":"function","function":{"name":"f","arguments":"{\"x\":1}"}},
                          {"id":"b","type":"function","function":{"name":"g","arguments":"{}"}}]);
        assert_eq!(whole["choices"][0]["message"]["tool_calls"], want);
        assert_eq!(whole["choices"][0]["message"]["content"], Value::Null);
        assert_eq!(whole["choices"][0]["finish_reason"], "tool_calls");
    }

    #[test]
    fn openai_choices_stay_separate_and_logprobs_are_joined() {
        let stream = sse_of(&[
            json!({"choices":[{"index":1,"delta":{"content":"b"},"logprobs":{"content":[{"token":"b"}]}}]}),
            json!({"choices":[{"index":0,"delta":{"content":"a"}}]}),
            json!({"choices":[{"index":1,"delta":{"content":"B"},"logprobs":{"content":[{"token":"B"}]}}]}),
        ]);
        let whole = openai_completion(&stream).unwrap();
        assert_eq!(whole["choices"][0]["message"]["content"], "a");
        assert_eq!(whole["choices"][1]["message"]["content"], "bB");
        assert_eq!(whole["choices"][1]["logprobs"], json!({"content":[{"token":"b"},{"token":"B"}]}));
    }

    #[test]
    fn a_plain_document_is_the_result_itself() {
        let document = json!({"object":"chat.completion","choices":[]});
        assert_eq!(openai_completion(format!(" {document}").as_bytes()), Ok(document));
    }

    #[test]
    fn broken_streams_are_errors() {
        let reported =
            sse_of(&[json!({"choices":[{"index":0,"delta":{}}]}), json!({"error":{"message":"out of memory"}})]);
        assert_eq!(openai_completion(&reported), Err(AssembleError::Reported("out of memory".to_owned())));
        assert_eq!(openai_completion(b""), Err(AssembleError::Empty));
        assert_eq!(openai_completion(b"data: [DONE]\n\n"), Err(AssembleError::Empty));
        assert!(matches!(openai_completion(b"data: {oops\n\n"), Err(AssembleError::Malformed(_))));
        assert!(matches!(openai_completion(b"data: 7\n\n"), Err(AssembleError::Malformed(_))));
        let far = sse_of(&[json!({"choices":[{"index":4_000_000_000_u64,"delta":{}}]})]);
        assert!(matches!(openai_completion(&far), Err(AssembleError::Malformed(_))));
        assert!(matches!(anthropic_message(b"data: {\"type\":\"ping\"}\n\n"), Err(AssembleError::Malformed(_))));
        assert_eq!(anthropic_message(b""), Err(AssembleError::Empty));
    }

    #[test]
    fn anthropic_blocks_usage_and_stop_reason() {
        let stream = sse_of(&[
            json!({"type":"message_start","message":{"id":"m1","type":"message","role":"assistant","content":[],
                   "model":"m","stop_reason":null,"usage":{"input_tokens":5,"output_tokens":0}}}),
            json!({"type":"ping"}),
            json!({"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}),
            json!({"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"hi "}}),
            json!({"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"you"}}),
            json!({"type":"content_block_stop","index":0}),
            json!({"type":"content_block_start","index":1,
                   "content_block":{"type":"tool_use","id":"t","name":"f","input":{}}}),
            json!({"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{\"x\":"}}),
            json!({"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"1}"}}),
            json!({"type":"content_block_stop","index":1}),
            json!({"type":"message_delta","delta":{"stop_reason":"tool_use"},"usage":{"output_tokens":9}}),
            json!({"type":"message_stop"}),
        ]);
        let want = json!({"id":"m1","type":"message","role":"assistant",
            "content":[{"type":"text","text":"hi you"},{"type":"tool_use","id":"t","name":"f","input":{"x":1}}],
            "model":"m","stop_reason":"tool_use","usage":{"input_tokens":5,"output_tokens":9}});
        assert_eq!(anthropic_message(&stream), Ok(want));
    }

    #[test]
    fn delta_text_of_both_formats() {
        assert_eq!(delta_text(&json!({"choices":[{"delta":{"content":"a"}}]})), "a");
        assert_eq!(delta_text(&json!({"choices":[],"usage":{}})), "");
        assert_eq!(delta_text(&json!({"type":"content_block_delta","delta":{"type":"text_delta","text":"b"}})), "b");
    }
}
