//! `usepod-agent demo`: coordinator, agent and backend on one machine, with a front door.

use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::support::*;

/// A scripted vLLM that answers each job with the same small stream, and a config for it.
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
fn demo_once_without_a_config_answers_and_exits_0() {
    let home = Scratch::new();
    let Ran { code, stdout, stderr } = cli(home.path(), &["demo", "--once", "--port", "0"], &[]);
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
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
    let Ran { code, stdout, stderr } = cli(setup.scratch.path(), &arguments, &[]);
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    assert!(stdout.contains("hello world") && stdout.contains("a prompt of our own"), "{stdout}");
    let asked = backend.seen();
    assert!(
        asked.iter().any(|request| request.body_text().contains("a prompt of our own")),
        "the backend was not asked"
    );
}

#[test]
fn demo_once_fails_if_the_answer_does() {
    let backend = Backend::vllm_with(&["m"], |_| Answer::Raw(response(500, "text/plain", "boom")));
    let setup = Setup::new("wss://never-dialled.example/").backend(backend.toml());
    let config = setup.write();
    let ran = cli(setup.scratch.path(), &["demo", "--once", "--port=0", "-c", config.to_str().expect("UTF-8")], &[]);
    assert_eq!(ran.code, Some(1), "{}", ran.stdout);
}

/// The words that `demo --bench` printed after a row's name, such as `first byte`.
fn row<'a>(stdout: &'a str, name: &str) -> Vec<&'a str> {
    let row = stdout.lines().rfind(|line| line.trim_start().starts_with(name));
    let row = row.unwrap_or_else(|| panic!("no line for `{name}`: {stdout}")).trim_start();
    row[name.len()..].split_whitespace().collect()
}

/// Parses a median and its quartiles, and checks their order.
fn spread(words: &[&str]) -> f64 {
    let number = |word: &str| word.parse::<f64>().unwrap_or_else(|e| panic!("{word}: {e}"));
    let quartiles = words[1].trim_matches(['(', ')']).split_once('-').expect("two quartiles");
    let [low, median, high] = [quartiles.0, words[0], quartiles.1].map(number);
    assert!(0.0 <= low && low <= median && median <= high, "{words:?}");
    median
}

fn run_bench(home: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
    cli_within(secs(60), home, &[&["demo", "--bench", "--port=0"], arguments].concat(), environment)
}

#[test]
fn bench_without_a_config_measures_the_echo() {
    let home = Scratch::new();
    let Ran { code, stdout, stderr } = run_bench(home.path(), &["--prompt", "one two three"], &[]);
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    for name in ["first byte", "last byte"] {
        let words = row(&stdout, name);
        let [direct, through, added] = [0, 2, 4].map(|at| spread(&words[at..]));
        assert!(direct > 0.0 && through > 0.0 && added > 0.0, "{stdout}");
        assert_eq!(words[6..], ["20", "pairs"], "{stdout}");
    }
    // Role, three words, finish, usage, the end: seven events; 20 answers alone, 5 times 8 together.
    assert_eq!(row(&stdout, "each event")[..2], ["-", "-"], "{stdout}");
    assert!(stdout.contains("; 140 events\n") && stdout.contains("; 280 events, at most "), "{stdout}");
    assert_eq!(row(&stdout, "answers")[..7], ["ok", "60", "through", "the", "agent,", "420", "events,"], "{stdout}");
    assert!(stdout.contains("The medians of the first byte differ by "), "{stdout}");
    assert!(!stdout.contains("overhead") && !stdout.contains("curl"), "{stdout}");
}

#[test]
fn bench_measures_the_pace_of_the_backend_within_max_concurrent() {
    const WAIT: u64 = 20;
    const PACE: u64 = 10;
    let backend = Backend::vllm_with(&["m"], |_| {
        Answer::Play(Box::new(|mut tcp: &TcpStream| {
            tcp.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            std::thread::sleep(ms(WAIT - PACE));
            for event in sse(7, 13).split_inclusive("\n\n") {
                std::thread::sleep(ms(PACE));
                tcp.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes())?;
            }
            tcp.write_all(b"0\r\n\r\n").map(|()| true)
        }))
    });
    let setup = Setup::new("wss://never-dialled.example/").backend(format!("{}\nmax_concurrent = 2", backend.toml()));
    let config = setup.write();
    let Ran { code, stdout, stderr } = run_bench(setup.scratch.path(), &["-c", config.to_str().expect("UTF-8")], &[]);
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    let figures = |name: &str| [0, 2].map(|at| spread(&row(&stdout, name)[at..]));
    assert!(figures("first byte").iter().all(|ms| *ms >= WAIT as f64), "{stdout}");
    assert!(figures("last byte").iter().all(|ms| *ms >= (WAIT + 3 * PACE) as f64), "{stdout}");
    // A late event is followed by an early one, so that the median is exact.
    assert!(figures("gap").iter().all(|ms| (0.5..5.0).contains(&(ms / PACE as f64))), "{stdout}");
    assert_eq!(row(&stdout, "2 at once")[..2], ["-", "-"], "{stdout}");
    assert!(
        stdout.contains("; 80 events\n") && stdout.contains("; 40 events, at most 2 answers at a time"),
        "{stdout}"
    );
    // One that is shown, one to warm up, 20 pairs, and 5 times 2 in parallel.
    assert_eq!(backend.posts(), 1 + 1 + 40 + 10);
    let last = backend.seen().last().expect("a request").json();
    assert_eq!((&last["max_tokens"], &last["temperature"]), (&json!(32), &json!(0)));
}

#[test]
fn bench_fails_if_an_answer_does() {
    let asked = AtomicUsize::new(0);
    let backend = Backend::vllm_with(&["m"], move |_| {
        let whole = asked.fetch_add(1, Ordering::SeqCst) < 20;
        let stream = sse(7, 13);
        let events = stream.split_inclusive("\n\n").take(if whole { 4 } else { 1 });
        Answer::Raw(response(200, "text/event-stream", events.collect::<String>()))
    });
    let setup = Setup::new("wss://never-dialled.example/").backend(backend.toml());
    let config = setup.write();
    let Ran { code, stdout, stderr } = run_bench(setup.scratch.path(), &["-c", config.to_str().expect("UTF-8")], &[]);
    assert_eq!(code, Some(1), "{stdout}\n{stderr}");
    assert!(stdout.contains("\nBench") && !stdout.contains("first byte differ by"), "{stdout}");
}

#[test]
fn bench_refuses_to_spend_money_on_hosted_backends() {
    let backend = Backend::new(|request| match request.method.as_str() {
        "GET" => Answer::Json(200, json!({"data": [{"id": "m"}]})),
        _ => Answer::Raw(response(200, "text/event-stream", sse(7, 13))),
    });
    let toml = format!("kind = \"openrouter\"\nurl = \"{}\"\napi_key_env = \"THE_KEY\"", backend.url());
    let setup = Setup::new("wss://never-dialled.example/").backend(toml);
    let config = setup.write();
    let arguments = ["-c", config.to_str().expect("UTF-8")];
    let Ran { code, stdout, stderr } = run_bench(setup.scratch.path(), &arguments, &[("THE_KEY", "k")]);
    assert_eq!(code, Some(1), "{stdout}\n{stderr}");
    assert!(stderr.contains("costs money"), "{stderr}");
    assert_eq!(backend.posts(), 1, "the one that is shown");
}

#[test]
fn bench_does_not_overflow_to_a_hosted_backend() {
    let play = |request: &Request| match request.method.as_str() {
        "GET" => Answer::Json(200, json!({"data": [{"id": "m"}]})),
        _ => Answer::Raw(response(200, "text/event-stream", sse(7, 13))),
    };
    let (local, hosted) = (Backend::new(play), Backend::new(play));
    let hosted_toml = format!("kind = \"openrouter\"\nurl = \"{}\"\napi_key_env = \"THE_KEY\"", hosted.url());
    let setup = Setup::new("wss://never-dialled.example/")
        .backend(format!("kind = \"openai\"\nurl = \"{}\"\nmax_concurrent = 1", local.url()))
        .backend(hosted_toml);
    let config = setup.write();
    let arguments = ["-c", config.to_str().expect("UTF-8")];
    let Ran { code, stdout, stderr } = run_bench(setup.scratch.path(), &arguments, &[("THE_KEY", "k")]);
    assert_eq!(code, Some(1), "{stdout}\n{stderr}");
    assert!(stderr.contains("costs money"), "{stderr}");
    assert_eq!((local.posts(), hosted.posts()), (1, 0), "the one that is shown");
}

#[test]
fn front_door_serves_both_formats_until_a_signal() {
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
