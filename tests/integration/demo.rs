//! `usepod-agent demo`: the whole path on one machine, and a front door to it.

use serde_json::{Value, json};

use crate::support::*;

/// A scripted vLLM that answers each job with the same small stream, and a config that names it.
fn backend_and_setup() -> (Backend, Setup) {
    let backend = Backend::vllm_with(&["m"], |request| match request.target.as_str() {
        "/v1/messages" => Answer::Raw(response(200, "text/event-stream", messages_stream())),
        _ => Answer::Raw(response(200, "text/event-stream", sse(7, 13))),
    });
    let setup = Setup::new("wss://never-dialled.example/").backend(backend.toml());
    (backend, setup)
}

fn messages_stream() -> String {
    let events = [
        json!({"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant",
               "content": [], "model": "m", "usage": {"input_tokens": 7, "output_tokens": 1}}}),
        json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello world"}}),
        json!({"type": "content_block_stop", "index": 0}),
        json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 13}}),
        json!({"type": "message_stop"}),
    ];
    events
        .iter()
        .map(|event| format!("event: {}\ndata: {event}\n\n", event["type"].as_str().expect("a type")))
        .collect()
}

const STAGES: [&str; 6] = ["connect", "auth", "discovery", "first byte", "total", "overhead"];

#[test]
fn demo_once_without_any_set_up_answers_and_exits_0() {
    let home = Scratch::new();
    let output = cli(home.path(), &["demo", "--once", "--port", "0"], &[]);
    let stdout = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(output.status.code(), Some(0), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    for stage in STAGES {
        assert!(stdout.lines().any(|line| line.trim_start().starts_with(stage)), "no line for `{stage}`: {stdout}");
    }
    assert!(std::fs::read_dir(home.path()).expect("the home").next().is_none(), "a demo leaves nothing behind");
}

#[test]
fn demo_once_asks_the_backends_of_the_config_and_prints_their_answer() {
    let (backend, setup) = backend_and_setup();
    let config = setup.write();
    let arguments =
        ["demo", "--once", "--port=0", "--prompt", "a prompt of our own", "-c", config.to_str().expect("UTF-8")];
    let output = cli(setup.scratch.path(), &arguments, &[]);
    let stdout = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(output.status.code(), Some(0), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(stdout.contains("hello world") && stdout.contains("a prompt of our own"), "{stdout}");
    let asked = backend.seen();
    assert!(
        asked.iter().any(|request| request.body_text().contains("a prompt of our own")),
        "the backend was not asked"
    );
}

#[test]
fn demo_once_fails_when_the_answer_does() {
    let backend = Backend::vllm_with(&["m"], |_| Answer::Raw(response(500, "text/plain", "boom")));
    let setup = Setup::new("wss://never-dialled.example/").backend(backend.toml());
    let config = setup.write();
    let output = cli(setup.scratch.path(), &["demo", "--once", "--port=0", "-c", config.to_str().expect("UTF-8")], &[]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn the_front_door_serves_both_formats_until_a_signal() {
    let (backend, setup) = backend_and_setup();
    let config = setup.write();
    let mut demo = Agent::run(setup.scratch.path(), &["demo", "--port", "0", "-c", config.to_str().expect("UTF-8")]);
    let curl = demo.stdout.wait_line(&["curl", "http://127.0.0.1:"]);
    let at = curl.find("http://").expect("an address");
    let door = curl[at..].split("/v1").next().expect("an address").to_owned();
    let client: ureq::Agent = ureq::Agent::config_builder().proxy(None).timeout_global(Some(SOON)).build().into();
    let post = |path: &str, body: Value| {
        let sent =
            client.post(format!("{door}{path}")).header("content-type", "application/json").send(body.to_string());
        let mut answer = sent.unwrap_or_else(|e| panic!("POST {path}: {e}"));
        answer.body_mut().read_to_string().expect("a text")
    };
    let json =
        |text: &str| -> Value { serde_json::from_str(text).unwrap_or_else(|e| panic!("not JSON ({e}): {text}")) };

    let mut models = client.get(format!("{door}/v1/models")).call().expect("GET /v1/models");
    assert_eq!(json(&models.body_mut().read_to_string().expect("a text"))["data"][0]["id"], "m");

    let ask = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    let whole = json(&post("/v1/chat/completions", ask.clone()));
    assert_eq!(whole["choices"][0]["message"]["content"], "hello world", "{whole}");
    assert_eq!((&whole["usage"]["prompt_tokens"], &whole["usage"]["completion_tokens"]), (&json!(7), &json!(13)));

    let mut streamed = ask.clone();
    streamed["stream"] = json!(true);
    assert_eq!(post("/v1/chat/completions", streamed), sse(7, 13));

    let mut message = ask;
    message["max_tokens"] = json!(5);
    let whole = json(&post("/v1/messages", message.clone()));
    assert_eq!(whole["content"][0]["text"], "hello world", "{whole}");
    message["stream"] = json!(true);
    assert_eq!(post("/v1/messages", message), messages_stream());

    demo.signal("INT");
    assert_eq!(demo.wait(secs(3)).code(), Some(0));
    drop(backend);
}
