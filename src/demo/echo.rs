//! The built-in backend for a machine without one. It repeats the last user message word by word, as an OpenAI or Anthropic stream.
//! Its response is a pure function of the request, so every byte can be verified.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::coordinator::Format;
use crate::http_server::connection::{Exchange, error_document};
use crate::http_server::{self, HttpServer};

/// Id of the only listed model.
pub(super) const MODEL: &str = "echo";

/// Pause between words, so that the stream is visible.
const WORD_PAUSE: Duration = Duration::from_millis(10);

/// Serves the echo backend on a free loopback port, until the server is dropped.
pub(super) fn start() -> io::Result<HttpServer> {
    HttpServer::start(http_server::bind(0)?, "demo-echo", Arc::new(handle))
}

/// The exact response to `request`.
pub(super) fn exact_response(request: &Value, format: Format) -> Vec<u8> {
    response_pieces(request, format).concat().into_bytes()
}

fn handle(exchange: &mut Exchange<'_>) {
    let format = match (exchange.method(), exchange.path()) {
        ("GET", "/health") => return exchange.respond_json(200, &json!({"status": "ok"})),
        ("GET", "/v1/models") => return exchange.respond_json(200, &listing()),
        ("POST", "/v1/chat/completions") => Format::Openai,
        ("POST", "/v1/messages") => Format::Anthropic,
        _ => return exchange.respond_json(404, &error_document("no such route")),
    };
    match exchange.read_json() {
        Ok(body) => stream(exchange, &response_pieces(&body, format)),
        Err(bad) => exchange.respond_json(bad.status, &error_document(&bad.message)),
    }
}

fn listing() -> Value {
    json!({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "demo"}]})
}

fn stream(exchange: &mut Exchange<'_>, pieces: &[String]) {
    let sent = exchange.stream("text/event-stream").and_then(|mut body| {
        for (index, piece) in pieces.iter().enumerate() {
            if index > 0 {
                std::thread::sleep(WORD_PAUSE);
            }
            body.send(piece.as_bytes())?;
        }
        body.finish()
    });
    if let Err(error) = sent {
        crate::debug!("a client disconnected from the echo backend: {error}");
    }
}

/// The response, in pieces with a pause after each.
fn response_pieces(request: &Value, format: Format) -> Vec<String> {
    let text = last_user_text(request);
    let words: Vec<&str> = text.split_inclusive(char::is_whitespace).collect();
    let limit = ["max_tokens", "max_completion_tokens"].iter().find_map(|key| request[*key].as_u64());
    let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
    let response = Response {
        model: request["model"].as_str().unwrap_or(MODEL),
        words: &words[..words.len().min(limit)],
        truncated: words.len() > limit,
        input_tokens: words.len(),
    };
    match format {
        Format::Openai => openai_pieces(&response, request["stream_options"]["include_usage"] == true),
        Format::Anthropic => anthropic_pieces(&response),
    }
}

struct Response<'a> {
    model: &'a str,
    words: &'a [&'a str],
    truncated: bool,
    input_tokens: usize,
}

fn openai_pieces(response: &Response, with_usage: bool) -> Vec<String> {
    let chunk = |choices: Value| {
        let (id, object) = ("chatcmpl-echo", "chat.completion.chunk");
        json!({"id": id, "object": object, "created": 0, "model": response.model, "choices": choices})
    };
    let event = |chunk: Value| format!("data: {chunk}\n\n");
    let delta = |delta: Value, finish: Option<&str>| {
        event(chunk(json!([{"index": 0, "delta": delta, "finish_reason": finish}])))
    };
    let start = delta(json!({"role": "assistant", "content": ""}), None);
    let words = response.words.iter().map(|word| delta(json!({"content": word}), None));
    let mut end = delta(json!({}), Some(if response.truncated { "length" } else { "stop" }));
    if with_usage {
        let (input, output) = (response.input_tokens, response.words.len());
        let mut last = chunk(json!([]));
        last["usage"] = json!({"prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output});
        end += &event(last);
    }
    stream_pieces(start, words, end + "data: [DONE]\n\n")
}

fn anthropic_pieces(response: &Response) -> Vec<String> {
    let event = |data: Value| format!("event: {}\ndata: {data}\n\n", data["type"].as_str().unwrap_or_default());
    let start = event(json!({"type": "message_start", "message": {
        "id": "msg_echo", "type": "message", "role": "assistant", "content": [], "stop_reason": null, "stop_sequence": null,
        "model": response.model, "usage": {"input_tokens": response.input_tokens, "output_tokens": 0},
    }}));
    let block =
        event(json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}));
    let delta = |word: &&str| {
        event(json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}))
    };
    let (reason, output) = (if response.truncated { "max_tokens" } else { "end_turn" }, response.words.len());
    let ends = [
        json!({"type": "content_block_stop", "index": 0}),
        json!({"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": null},
               "usage": {"output_tokens": output}}),
        json!({"type": "message_stop"}),
    ];
    stream_pieces(start + &block, response.words.iter().map(delta), ends.map(event).concat())
}

/// Prepends the start of the stream to its first piece, and appends the end to its last.
fn stream_pieces(start: String, words: impl Iterator<Item = String>, end: String) -> Vec<String> {
    let mut pieces = vec![start];
    for (index, word) in words.enumerate() {
        match index {
            0 => pieces[0] += &word,
            _ => pieces.push(word),
        }
    }
    if let Some(last) = pieces.last_mut() {
        *last += &end;
    }
    pieces
}

/// The text of the last user message: a string, or the text parts of a list.
fn last_user_text(request: &Value) -> String {
    let messages = request["messages"].as_array().map_or(&[][..], Vec::as_slice);
    let Some(last) = messages.iter().rev().find(|message| message["role"] == "user") else { return String::new() };
    match &last["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::assemble;
    use super::*;

    fn request(content: &Value) -> Value {
        json!({"model": "echo", "messages": [{"role": "user", "content": "old"}, {"role": "assistant", "content": "x"},
               {"role": "user", "content": content}], "stream_options": {"include_usage": true}})
    }

    #[test]
    fn openai_echo_is_a_whole_stream() {
        let request = request(&json!("grüße an  alle\n"));
        let stream = exact_response(&request, Format::Openai);
        assert!(stream.ends_with(b"data: [DONE]\n\n"));
        let whole = assemble::openai_completion(&stream).unwrap();
        assert_eq!(whole["choices"][0]["message"]["content"], "grüße an  alle\n");
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        assert_eq!(whole["usage"], json!({"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}));
    }

    #[test]
    fn anthropic_echo_is_a_whole_stream() {
        let request = request(&json!([{"type": "text", "text": "one two"}, {"type": "image"}]));
        let whole = assemble::anthropic_message(&exact_response(&request, Format::Anthropic)).unwrap();
        assert_eq!(whole["content"], json!([{"type": "text", "text": "one two"}]));
        assert_eq!(whole["stop_reason"], "end_turn");
        assert_eq!(whole["usage"], json!({"input_tokens": 2, "output_tokens": 2}));
    }

    #[test]
    fn max_tokens_truncates_and_usage_is_sent_on_request_only() {
        let mut request = request(&json!("one two three"));
        request["max_tokens"] = json!(1);
        request["stream_options"] = Value::Null;
        let stream = exact_response(&request, Format::Openai);
        let whole = assemble::openai_completion(&stream).unwrap();
        assert_eq!(whole["choices"][0]["message"]["content"], "one ");
        assert_eq!(whole["choices"][0]["finish_reason"], "length");
        assert_eq!(whole["usage"], Value::Null);
        request["max_tokens"] = json!(0);
        assert!(assemble::openai_completion(&exact_response(&request, Format::Openai)).is_ok());
        assert!(assemble::anthropic_message(&exact_response(&json!({}), Format::Anthropic)).is_ok());
        assert!(assemble::openai_completion(&exact_response(&json!(7), Format::Openai)).is_ok());
    }
}
