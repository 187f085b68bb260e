//! Broken responses of a backend: what is relayed, and which error code follows.

use serde_json::{Value, json};

use crate::support::*;

/// Uses a new connection for each request, so that no retry on a kept-alive one distorts the count.
fn without_keep_alive() -> Backend {
    let list = json!({"data": [{"id": "m"}]}).to_string();
    Backend::new(move |request| match request.line().as_str() {
        "GET /health" => Answer::RawThenClose(response(200, "text/plain", "")),
        "GET /v1/models" => Answer::RawThenClose(response(200, "application/json", &list)),
        _ => Answer::Hold,
    })
}

const SSE: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n";
const TEXT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n";

fn chunked(data: &str) -> String {
    format!("Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{data}\r\n", data.len())
}

#[test]
fn broken_stream_is_never_a_success_and_its_bytes_are_relayed_first() {
    let done = "data: [DONE]\n\n";
    let abort = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"abort\"}]}\n\ndata: [DONE]\n\n";
    let error = "data: {\"error\":{\"message\":\"out of memory\",\"code\":500}}\n\n";
    let messages_error = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\"}}\n\n";
    let both = |a: &str, b: &str| format!("{a}{b}");
    // What goes wrong; what follows the head's first two lines; the body that is to arrive; the code.
    let cases: Vec<(&str, String, String, &str)> = vec![
        ("no body at all, chunked", "Transfer-Encoding: chunked\r\n\r\n".into(), "".into(), "backend_unreachable"),
        ("no body at all, with a length", "Content-Length: 9\r\n\r\n".into(), "".into(), "backend_unreachable"),
        ("no body at all, until close", "\r\n".into(), "".into(), "backend_unreachable"),
        ("the head breaks off", "Content-".into(), "".into(), "backend_unreachable"),
        ("truncated between chunks", chunked(TEXT), TEXT.into(), "internal"),
        (
            "truncated within a chunk",
            format!("Transfer-Encoding: chunked\r\n\r\nff\r\n{TEXT}"),
            TEXT.into(),
            "internal",
        ),
        ("short content-length", format!("Content-Length: 999\r\n\r\n{TEXT}"), TEXT.into(), "internal"),
        ("chunked, no terminal mark", format!("{}0\r\n\r\n", chunked(TEXT)), TEXT.into(), "internal"),
        (
            "with a length, no terminal mark",
            format!("Content-Length: {}\r\n\r\n{TEXT}", TEXT.len()),
            TEXT.into(),
            "internal",
        ),
        ("until close, no terminal mark", format!("\r\n{TEXT}"), TEXT.into(), "internal"),
        (
            "finish_reason null is no terminal mark",
            "\r\ndata: {\"choices\":[{\"finish_reason\":null}]}\n\n".into(),
            "data: {\"choices\":[{\"finish_reason\":null}]}\n\n".into(),
            "internal",
        ),
        ("[DONE] in a comment is none", "\r\n: data: [DONE]\n\n".into(), ": data: [DONE]\n\n".into(), "internal"),
        ("an error object", format!("{}0\r\n\r\n", chunked(&both(TEXT, error))), both(TEXT, error), "internal"),
        ("an error object, then [DONE]", format!("\r\n{error}{done}"), both(error, done), "internal"),
        (
            "an error in words",
            "\r\ndata: {\"error\":\"boom\"}\n\n".into(),
            "data: {\"error\":\"boom\"}\n\n".into(),
            "internal",
        ),
        ("an error event", format!("\r\n{TEXT}{messages_error}"), both(TEXT, messages_error), "internal"),
        ("an aborted generation", format!("\r\n{TEXT}{abort}"), both(TEXT, abort), "internal"),
    ];
    let backend = without_keep_alive();
    let rig = Rig::new(&backend);
    for (what, rest, body, code) in cases {
        let id = rig.session.job("m", json!({}));
        let mut held = backend.next();
        held.send(format!("{SSE}{rest}"));
        drop(held);
        let outcome = rig.session.outcome(&id);
        assert_eq!(String::from_utf8_lossy(&outcome.body()), body, "{what}: the bytes relayed");
        assert_eq!(outcome.end["error_code"], code, "{what}: {}", outcome.end);
        rig.session.assert_no_frame("a second end", std::time::Duration::ZERO, |frame| frame["job_id"] == id.as_str());
    }
    backend.assert_none(QUIET);
}

#[test]
fn empty_finish_reason_is_no_end_marker() {
    let backend = without_keep_alive();
    let rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let event = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":\"\"}]}\n\n";
    let mut held = backend.next();
    held.send(format!("{SSE}\r\n{event}"));
    drop(held);
    let outcome = rig.session.outcome(&id);
    assert_eq!((outcome.error(), outcome.body()), ("internal", event.into()));
}

#[test]
fn stream_with_an_end_marker_is_a_success() {
    let bodies = [
        "data: [DONE]\n\n",
        "data:[DONE]\r\n\r\n",
        "data: [DONE]",
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":\"length\"}]}",
        "data: {\"choices\":[{\"finish_reason\":\"tool_calls\"}]}\n\n: bye\n\n",
        "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
        // The word in a text, and null, are no error.
        "data: {\"choices\":[{\"delta\":{\"content\":\"{\\\"error\\\":1} finish_reason: abort\"}}],\"error\":null}\n\ndata: [DONE]\n\n",
    ];
    let backend = without_keep_alive();
    let rig = Rig::new(&backend);
    for body in bodies {
        for framing in ["\r\n".to_owned(), format!("Content-Length: {}\r\n\r\n", body.len())] {
            let id = rig.session.job("m", json!({}));
            let mut held = backend.next();
            held.send(format!("{SSE}{framing}{body}"));
            drop(held);
            let outcome = rig.session.outcome(&id);
            assert_eq!(outcome.end["type"], "job_done", "{body:?} after {framing:?}: {}", outcome.end);
            assert_eq!(String::from_utf8_lossy(&outcome.body()), body);
        }
    }
}

#[test]
fn reset_is_backend_unreachable_before_the_first_byte_and_internal_after_it() {
    let backend = without_keep_alive();
    let rig = Rig::new(&backend);
    backend.reset_on_close();
    let id = rig.session.job("m", json!({}));
    drop(backend.next());
    let outcome = rig.session.outcome(&id);
    assert_eq!((outcome.error(), outcome.chunks.len()), ("backend_unreachable", 0));

    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    held.start_sse();
    held.chunk(TEXT);
    assert_eq!(rig.session.chunk(&id), TEXT.as_bytes());
    drop(held);
    assert_eq!(rig.session.outcome(&id).error(), "internal");
    backend.assert_none(QUIET);
}

#[test]
fn garbage_between_two_chunks_ends_the_stream_as_internal() {
    let backend = without_keep_alive();
    let rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    held.start_sse();
    held.chunk(TEXT);
    assert_eq!(rig.session.chunk(&id), TEXT.as_bytes());
    held.send("not a size\r\n");
    let outcome = rig.session.outcome(&id);
    assert_eq!((outcome.error(), outcome.chunks.len()), ("internal", 0));
    held.wait_hang_up();
}

/// It takes neither the whole deadline nor unbounded memory.
#[test]
fn endless_head_is_given_up() {
    let backend = without_keep_alive();
    let rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    held.send("HTTP/1.1 200 OK\r\n");
    let line = format!("X-Filler: {}\r\n", "x".repeat(1000));
    let flood = std::thread::spawn(move || while held.try_send(line.as_bytes()) {});
    let outcome = rig.session.outcome_within(&id, SOON);
    assert!(["internal", "backend_unreachable"].contains(&outcome.error()), "{}", outcome.end);
    flood.join().expect("the flood to end with its job");
    assert!(rig.agent.peak_kib() < 32 << 10, "an endless head took {} KiB of memory", rig.agent.peak_kib());
}

#[test]
fn truncated_body_that_is_no_event_stream_fails_too() {
    let backend = without_keep_alive();
    let rig = Rig::new(&backend);
    for framing in ["Content-Length: 99\r\n\r\n{\"a\":1}", "Transfer-Encoding: chunked\r\n\r\n7\r\n{\"a\":1}\r\n"] {
        let id = rig.session.job("m", json!({}));
        let mut held = backend.next();
        held.send(format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{framing}"));
        drop(held);
        let outcome = rig.session.outcome(&id);
        assert_eq!((outcome.error(), outcome.body()), ("internal", b"{\"a\":1}".to_vec()), "{framing:?}");
    }
}

#[test]
fn tokens_emitted_counts_the_output_tokens_of_the_broken_stream() {
    let backend = without_keep_alive();
    let rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    let usage = |n: u32| {
        format!(
            "data: {{\"choices\":[{{\"delta\":{{\"content\":\"long text\"}}}}],\"usage\":{{\"completion_tokens\":{n}}}}}\n\n"
        )
    };
    held.send(format!("{SSE}\r\n{}{}", usage(1), usage(2)));
    drop(held);
    let outcome = rig.session.outcome(&id);
    assert_eq!((outcome.error(), &outcome.end["tokens_emitted"]), ("internal", &json!(2)));
}

#[test]
fn http_error_maps_to_its_error_code_and_the_message_names_it() {
    let openai = |text: &str, kind: &str| json!({"error": {"message": text, "type": kind}}).to_string();
    let cases: Vec<(u16, String, &str)> = vec![
        (
            400,
            openai("request (9000 tokens) exceeds the available context size", "exceed_context_size_error"),
            "internal",
        ),
        (400, openai("temperature must be a number", "invalid_request_error"), "internal"),
        (400, openai("model 'm' not found", "invalid_request_error"), "model_not_loaded"),
        (401, openai("wrong key", "auth"), "auth_rejected_by_backend"),
        (403, "forbidden".into(), "auth_rejected_by_backend"),
        (404, openai("The model `m` does not exist.", "NotFoundError"), "model_not_loaded"),
        (404, r#"{"object":"error","message":"The model `m` does not exist."}"#.into(), "model_not_loaded"),
        (404, openai("model \"m\" not found, try pulling it first", "not_found_error"), "model_not_loaded"),
        (404, openai("No models loaded. Please load a model", "invalid_request_error"), "model_not_loaded"),
        (409, "conflict".into(), "internal"),
        (413, "too large".into(), "internal"),
        (422, "unprocessable".into(), "internal"),
        (429, "slow down".into(), "out_of_capacity"),
        (500, openai("CUDA error", "server_error"), "internal"),
        (501, "".into(), "internal"),
        (502, "<html>Bad Gateway</html>".into(), "backend_unreachable"),
        (503, openai("Loading model", "unavailable_error"), "model_not_loaded"),
        (503, openai("server busy, please try again", "api_error"), "out_of_capacity"),
        (503, "".into(), "out_of_capacity"),
        (504, "timeout".into(), "backend_unreachable"),
    ];
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    for (status, body, code) in cases {
        let id = rig.session.job("m", json!({}));
        let mut held = backend.next();
        held.send(response(status, "application/json", &body));
        held.keep();
        let outcome = rig.session.outcome(&id);
        assert_eq!((outcome.error(), outcome.chunks.len()), (code, 0), "{status} {body}: {}", outcome.end);
        assert!(outcome.message().contains(&status.to_string()), "no {status} in {:?}", outcome.message());
        let said = body.get(..20).unwrap_or(&body);
        assert!(outcome.message().contains(said), "{body:?} is not in {:?}", outcome.message());
    }
}

#[test]
fn hosted_backend_that_asks_for_money_or_time_is_out_of_capacity() {
    let backend = Backend::new(|request| match request.target.as_str() {
        "/models" => Answer::Json(200, json!({"data": [{"id": "m"}]})),
        _ => Answer::Hold,
    });
    let toml = format!("kind = \"openrouter\"\nurl = \"{}\"\napi_key_env = \"THE_KEY\"", backend.url());
    let rig = Rig::with(|setup| setup.backend(toml).env("THE_KEY", "sk-hosted"));
    for status in [402, 429, 503] {
        let id = rig.session.job("m", json!({}));
        let mut held = backend.next();
        held.send(response(status, "application/json", "{}"));
        held.keep();
        assert_eq!(rig.session.outcome(&id).error(), "out_of_capacity", "{status}");
    }
}

/// A valid response with a few bytes changed, cut or repeated; reproducible.
fn spoilt(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let stream = sse(7, 13);
    let mut bytes = match next(2) {
        0 => response(200, "text/event-stream", stream),
        _ => format!("{SSE}{}0\r\n\r\n", chunked(&stream)).into_bytes(),
    };
    for _ in 0..=next(4) {
        let at = next(bytes.len());
        match next(4) {
            0 => bytes[at] = next(256) as u8,
            1 => bytes.truncate(at + 1),
            2 => bytes.extend_from_within(at..),
            _ => drop(bytes.remove(at)),
        }
    }
    bytes
}

#[test]
fn slow_corrupted_responses_end_the_job_once_and_the_agent_survives() {
    let backend = Backend::vllm_with(&["m"], |request| {
        Answer::RawThenClose(spoilt(request.json()["seed"].as_u64().expect("a seed")))
    });
    let rig = Rig::new(&backend);
    for seed in 1..=300 {
        let id = rig.session.job("m", json!({"seed": seed}));
        let end = rig.session.outcome(&id).end;
        assert!(end["type"] == "job_done" || end["type"] == "job_error", "seed {seed}: {end}");
    }
    rig.session.assert_no_frame("a second end", QUIET, |frame| frame.get("job_id").is_some());
}

#[test]
fn error_message_quotes_at_most_512_bytes_of_the_body() {
    let bodies: [Vec<u8>; 4] = [
        vec![b'A'; 1 << 20],
        "é".repeat(2000).into_bytes(),
        vec![0xff; 2000],
        b"x".iter().copied().chain("𝄞".repeat(500).bytes()).collect(),
    ];
    for body in bodies {
        // An agent for each: after three failures, it would try the model.
        let backend = Backend::vllm(&["m"]);
        let rig = Rig::new(&backend);
        let id = rig.session.job("m", json!({}));
        let mut held = backend.next();
        held.send(response(500, "text/plain", &body));
        held.keep();
        let outcome = rig.session.outcome(&id);
        assert_eq!(outcome.error(), "internal");
        // Besides the body, the message has a few words of its own.
        let (length, least) = (outcome.message().len(), if body[0] == 0xff { 0 } else { 400 });
        assert!((least..600).contains(&length), "{length} bytes of {:?}…: {}", &body[..4], outcome.message());
    }
}

/// Following a redirect would send the prompt to another server.
#[test]
fn redirects_are_not_followed() {
    let elsewhere = Backend::vllm(&["m"]);
    let backend = without_keep_alive();
    let rig = Rig::new(&backend);
    for status in [301, 302, 303, 307, 308] {
        let id = rig.session.job("m", json!({}));
        let mut held = backend.next();
        held.send(format!(
            "HTTP/1.1 {status} Moved\r\nLocation: {}/v1/chat/completions\r\nContent-Length: 0\r\n\r\n",
            elsewhere.url()
        ));
        drop(held);
        let outcome = rig.session.outcome(&id);
        assert_eq!((outcome.error(), outcome.chunks.len()), ("internal", 0), "{status}: {}", outcome.end);
    }
    assert_eq!(elsewhere.connections(), 0, "the redirect's target was contacted");
}

#[test]
fn unreachable_backend_is_reported_as_such() {
    let address = nobody_at("127.0.0.5");
    let backend = Backend::vllm_on(&address, &["m"]);
    let rig = Rig::new(&backend);
    drop(backend);
    let id = rig.session.job("m", json!({}));
    let outcome = rig.session.outcome(&id);
    assert_eq!((outcome.error(), outcome.chunks.len()), ("backend_unreachable", 0));
}

/// A job on a kept-alive connection, which the backend may have closed meanwhile.
fn second_job(rig: &Rig, backend: &Backend) -> (String, Held) {
    let first = rig.session.job("m", json!({}));
    let held = backend.next();
    let connection = held.request.connection;
    held.finish();
    rig.session.outcome(&first).done();
    let id = rig.session.job("m", json!({"second": true}));
    let held = backend.next();
    assert_eq!(held.request.connection, connection, "the test needs the connection to be used again");
    (id, held)
}

#[test]
fn kept_alive_connection_that_turns_out_closed_is_retried_once() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let (id, held) = second_job(&rig, &backend);
    let body = held.request.body.clone();
    drop(held);
    let held = backend.next();
    assert_eq!(held.request.body, body);
    held.finish();
    let outcome = rig.session.outcome(&id);
    assert_eq!(outcome.body(), sse(7, 13).as_bytes());
    outcome.done();
}

#[test]
fn retry_is_not_retried() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let (id, held) = second_job(&rig, &backend);
    drop(held);
    drop(backend.next());
    assert_eq!(rig.session.outcome(&id).error(), "backend_unreachable");
    backend.assert_none(QUIET);
}

#[test]
fn response_is_not_retried_after_its_first_byte() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let (id, mut held) = second_job(&rig, &backend);
    held.send("H");
    drop(held);
    assert_eq!(rig.session.outcome(&id).error(), "backend_unreachable");
    backend.assert_none(QUIET);
}

#[test]
fn idle_connections_that_the_backend_closed_fail_no_job() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    for _ in 0..10 {
        let id = rig.session.job("m", json!({}));
        backend.next().finish();
        rig.session.outcome(&id).done();
        backend.hang_up();
    }
    let posts = backend.seen().iter().filter(|request| request.method == "POST").count();
    assert_eq!(posts, 10, "each job is posted once");
}

#[test]
fn error_message_shows_no_key_and_no_prompt() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| {
        setup.backend(format!("{}\napi_key_env = \"THE_KEY\"", backend.toml())).env("THE_KEY", "sk-secret-123")
    });
    let prompt: Value = json!({"messages": [{"role": "user", "content": "my-private-prompt"}]});
    for answer in
        ["HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: my-private-answer\n\n", "garbage\r\n\r\n"]
    {
        let id = rig.session.job("m", prompt.clone());
        let mut held = backend.next();
        held.send(answer);
        drop(held);
        rig.session.outcome(&id).error();
    }
    let log = rig.agent.stderr.text();
    for secret in ["sk-secret-123", "my-private-prompt", "my-private-answer"] {
        assert!(!log.contains(secret), "`{secret}` is in the log, which is at level debug");
    }
}
