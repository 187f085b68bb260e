//! Assembles a complete stream into the single document that a non-streaming client expects.
//!
//! The agent always streams, so requests with `"stream": false` are served this way. Unknown fields are kept.

use serde_json::{Map, Value, json};
use thiserror::Error;

use super::sse;

/// Largest index of a tool call or content block. The lists are padded up to an index, so it has to be bounded.
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
    let mut choices: Vec<Map<String, Value>> = Vec::new();
    for event in parsed_events(stream)? {
        for (key, value) in event {
            match (key.as_str(), value) {
                ("choices", Value::Array(parts)) => {
                    parts.into_iter().try_for_each(|p| merge_choice(&mut choices, p))?
                }
                (_, Value::Null) => {}
                (_, value) => {
                    head.insert(key, value);
                }
            }
        }
    }
    if choices.is_empty() {
        return Err(AssembleError::Empty);
    }
    head.insert("object".into(), "chat.completion".into());
    let choices = choices.into_iter().enumerate().map(|(index, choice)| finished_choice(index, choice)).collect();
    head.insert("choices".into(), Value::Array(choices));
    Ok(Value::Object(head))
}

/// Assembles an Anthropic stream into a `message`.
pub(super) fn anthropic_message(stream: &[u8]) -> Result<Value, AssembleError> {
    if let Some(document) = plain_document(stream)? {
        return Ok(document);
    }
    let mut message: Option<Map<String, Value>> = None;
    let mut blocks: Vec<Map<String, Value>> = Vec::new();
    let mut events = 0_usize;
    for mut event in parsed_events(stream)? {
        events += 1;
        let kind = event.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
        match kind.as_str() {
            "message_start" => message = Some(taken_object(&mut event, "message")),
            "content_block_start" => *slot(&mut blocks, &event)? = taken_object(&mut event, "content_block"),
            "content_block_delta" => {
                let delta = taken_object(&mut event, "delta");
                merge_block(slot(&mut blocks, &event)?, delta);
            }
            "message_delta" => merge_message(message.get_or_insert_default(), event),
            _ => {} // ping, content_block_stop, message_stop, and unknown events
        }
    }
    let Some(mut message) = message else {
        let found = AssembleError::Malformed("no `message_start` in it".to_owned());
        return Err(if events == 0 { AssembleError::Empty } else { found });
    };
    let blocks = blocks.into_iter().map(finished_block).collect::<Result<_, _>>()?;
    message.insert("content".into(), Value::Array(blocks));
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

/// A proxy in front of a backend may have responded with a single JSON document, which is the result.
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

fn merge_choice(choices: &mut Vec<Map<String, Value>>, part: Value) -> Result<(), AssembleError> {
    let Value::Object(part) = part else {
        return Err(AssembleError::Malformed("a choice is not an object".to_owned()));
    };
    let choice = slot(choices, &part)?;
    for (key, value) in part {
        match (key.as_str(), value) {
            ("delta", Value::Object(delta)) => {
                let message = choice.entry("message").or_insert_with(|| json!({}));
                merge_delta(message, delta)?;
            }
            ("logprobs", Value::Object(logprobs)) => append_lists(choice, "logprobs", logprobs),
            ("index", _) | (_, Value::Null) => {}
            (_, value) => {
                choice.insert(key, value);
            }
        }
    }
    Ok(())
}

/// Appends text, merges tool calls by index, and replaces other values.
fn merge_delta(target: &mut Value, delta: Map<String, Value>) -> Result<(), AssembleError> {
    let Value::Object(target) = target else { return Ok(()) };
    for (key, value) in delta {
        match (key.as_str(), value) {
            (_, Value::Null) => {}
            ("tool_calls", Value::Array(calls)) => {
                let Value::Array(known) = target.entry("tool_calls").or_insert_with(|| json!([])) else { continue };
                calls.into_iter().try_for_each(|call| merge_tool_call(known, call))?;
            }
            // Some servers repeat these in every event.
            ("role" | "id" | "type", value) => {
                target.insert(key, value);
            }
            (_, Value::String(text)) => append(target, &key, &text),
            (_, Value::Object(inner)) => merge_delta(target.entry(key).or_insert_with(|| json!({})), inner)?,
            (_, value) => {
                target.insert(key, value);
            }
        }
    }
    Ok(())
}

fn merge_tool_call(known: &mut Vec<Value>, call: Value) -> Result<(), AssembleError> {
    let Value::Object(mut call) = call else {
        return Err(AssembleError::Malformed("a tool call is not an object".to_owned()));
    };
    let index = index_of(&call)?.unwrap_or(known.len());
    call.shift_remove("index");
    while known.len() <= index {
        known.push(json!({}));
    }
    merge_delta(&mut known[index], call)
}

fn finished_choice(index: usize, mut choice: Map<String, Value>) -> Value {
    let mut message = match choice.shift_remove("message") {
        Some(Value::Object(message)) => message,
        _ => Map::new(),
    };
    message.entry("role").or_insert_with(|| "assistant".into());
    message.entry("content").or_insert(Value::Null);
    let mut whole = Map::new();
    whole.insert("index".into(), index.into());
    whole.insert("message".into(), Value::Object(message));
    whole.insert("finish_reason".into(), choice.shift_remove("finish_reason").unwrap_or(Value::Null));
    whole.extend(choice);
    Value::Object(whole)
}

fn merge_block(block: &mut Map<String, Value>, delta: Map<String, Value>) {
    for (key, value) in delta {
        match (key.as_str(), value) {
            ("type", _) => {}
            ("citation", citation) => {
                if let Value::Array(list) = block.entry("citations").or_insert_with(|| json!([])) {
                    list.push(citation);
                }
            }
            (_, Value::String(text)) => append(block, &key, &text),
            (_, value) => {
                block.insert(key, value);
            }
        }
    }
}

/// Parses the input of a tool call, which arrives as fragments of JSON text.
fn finished_block(mut block: Map<String, Value>) -> Result<Value, AssembleError> {
    if let Some(Value::String(text)) = block.shift_remove("partial_json")
        && !text.is_empty()
    {
        let input = serde_json::from_str(&text)
            .map_err(|error| AssembleError::Malformed(format!("the input of a tool is not JSON: {error}")))?;
        block.insert("input".into(), input);
    }
    Ok(Value::Object(block))
}

fn merge_message(message: &mut Map<String, Value>, mut event: Map<String, Value>) {
    message.extend(taken_object(&mut event, "delta"));
    let usage = taken_object(&mut event, "usage");
    if let Value::Object(known) = message.entry("usage").or_insert_with(|| json!({})) {
        known.extend(usage.into_iter().filter(|(_, value)| !value.is_null()));
    }
}

/// The entry of `list` at the `index` of `part` (default 0), created if missing.
fn slot<'a>(
    list: &'a mut Vec<Map<String, Value>>,
    part: &Map<String, Value>,
) -> Result<&'a mut Map<String, Value>, AssembleError> {
    let index = index_of(part)?.unwrap_or(0);
    if list.len() <= index {
        list.resize_with(index + 1, Map::new);
    }
    Ok(&mut list[index])
}

fn index_of(part: &Map<String, Value>) -> Result<Option<usize>, AssembleError> {
    let Some(index) = part.get("index").and_then(Value::as_u64) else { return Ok(None) };
    match usize::try_from(index) {
        Ok(index) if index <= INDEX_MAX => Ok(Some(index)),
        _ => Err(AssembleError::Malformed(format!("index {index} is out of range"))),
    }
}

fn taken_object(event: &mut Map<String, Value>, key: &str) -> Map<String, Value> {
    match event.shift_remove(key) {
        Some(Value::Object(object)) => object,
        _ => Map::new(),
    }
}

fn append(target: &mut Map<String, Value>, key: &str, text: &str) {
    match target.get_mut(key) {
        Some(Value::String(known)) => known.push_str(text),
        _ => {
            target.insert(key.to_owned(), text.into());
        }
    }
}

fn append_lists(choice: &mut Map<String, Value>, key: &str, lists: Map<String, Value>) {
    let Value::Object(known) = choice.entry(key).or_insert_with(|| json!({})) else { return };
    for (name, value) in lists {
        match (known.get_mut(&name), value) {
            (Some(Value::Array(old)), Value::Array(new)) => old.extend(new),
            (_, value) => {
                known.insert(name, value);
            }
        }
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
