//! Tests the demo through real sockets: a scripted agent at the coordinator, HTTP clients at the front door, and the real agent
//! for the whole path.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde_json::value::to_raw_value;
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};
use uuid::Uuid;

use super::coordinator::{Coordinator, CoordinatorError, Format, Job, JobOrder};
use super::job_events::JobEvent;
use super::*;
use crate::discovery::BackendOffer;
use crate::http_server::{self, HttpServer};

/// Time limit of every wait.
const LIMIT: Duration = Duration::from_secs(10);

/// An agent whose frames the test sends and reads itself.
struct ScriptedAgent(WebSocket<TcpStream>);

impl ScriptedAgent {
    /// Connects, signs the challenge, and offers the model `m`.
    fn connected(coordinator: &Coordinator) -> Self {
        let mut agent = Self::dial(coordinator);
        let nonce = STANDARD.decode(agent.frame("auth_challenge")["nonce"].as_str().unwrap()).unwrap();
        agent.authenticate(&nonce);
        assert!(agent.frame("auth_ok")["provider_id"].is_string());
        agent.offer(&["m"]);
        let offer = coordinator.wait_for_offer(LIMIT, |offer| offer.models.len() == 1).unwrap();
        assert_eq!(offer.agent_version, "test");
        agent
    }

    fn dial(coordinator: &Coordinator) -> Self {
        let url = coordinator.url();
        let tcp = TcpStream::connect(url.trim_start_matches("ws://").split('/').next().unwrap()).unwrap();
        tcp.set_read_timeout(Some(LIMIT)).unwrap();
        Self(tungstenite::client(url, tcp).unwrap().0)
    }

    fn authenticate(&mut self, nonce: &[u8]) {
        let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let key = Ed25519KeyPair::from_pkcs8(key.as_ref()).unwrap();
        self.send(&json!({"type": "auth_response", "pubkey": STANDARD.encode(key.public_key()),
                          "signature": STANDARD.encode(key.sign(nonce)), "agent_version": "test"}));
    }

    fn offer(&mut self, models: &[&str]) {
        let models: Vec<Value> = models.iter().map(|id| json!({"model_id": id, "backend": "vllm"})).collect();
        self.send(&json!({"type": "capabilities", "models": models}));
    }

    fn send(&mut self, frame: &Value) {
        self.0.send(Message::text(frame.to_string())).unwrap();
    }

    fn chunk(&mut self, job: &Value, bytes: &str) {
        self.send(&json!({"type": "job_chunk", "job_id": job["job_id"], "data": STANDARD.encode(bytes)}));
    }

    fn done(&mut self, job: &Value) {
        self.send(&json!({"type": "job_done", "job_id": job["job_id"], "tokens": {"input": 1, "output": 2}}));
    }

    fn error(&mut self, job: &Value, code: &str) {
        self.send(&json!({"type": "job_error", "job_id": job["job_id"], "error_code": code, "message": "why"}));
    }

    /// The next frame, which must be of this type.
    fn frame(&mut self, kind: &str) -> Value {
        loop {
            if let Message::Text(text) = self.0.read().unwrap() {
                let frame: Value = serde_json::from_str(&text).unwrap();
                assert_eq!(frame["type"], kind, "{frame}");
                return frame;
            }
        }
    }
}

fn submit(coordinator: &Coordinator) -> Result<Job, CoordinatorError> {
    coordinator.submit(JobOrder {
        job_id: Uuid::new_v4(),
        model_id: "m".to_owned(),
        request: to_raw_value(&json!({"n": 1})).unwrap(),
        format: Format::Anthropic,
        deadline: LIMIT,
    })
}

#[test]
fn last_seen_is_that_of_the_current_agent_whatever_other_connections_do() {
    let coordinator = Coordinator::start().unwrap();
    let mut agent = ScriptedAgent::dial(&coordinator);
    let nonce = STANDARD.decode(agent.frame("auth_challenge")["nonce"].as_str().unwrap()).unwrap();
    agent.authenticate(&nonce);
    agent.frame("auth_ok");
    let seen = coordinator.last_seen();
    assert!(seen.contains("sent no capabilities"), "{seen}");
    let mut stray = ScriptedAgent::dial(&coordinator);
    stray.frame("auth_challenge");
    stray.send(&json!({"type": "nonsense"}));
    // The coordinator closes the connection, then records its end.
    while stray.0.read().is_ok() {}
    let waited = std::time::Instant::now();
    while waited.elapsed() < Duration::from_millis(100) {
        assert_eq!(coordinator.last_seen(), seen);
    }
    drop(agent);
    while coordinator.last_seen() == seen {
        assert!(waited.elapsed() < LIMIT, "the end of the agent itself counts");
    }
}

#[test]
fn job_is_sent_and_its_events_arrive_in_order() {
    let coordinator = Coordinator::start().unwrap();
    assert!(matches!(submit(&coordinator), Err(CoordinatorError::NoAgent)));
    let mut agent = ScriptedAgent::connected(&coordinator);
    let mut job = submit(&coordinator).unwrap();
    let frame = agent.frame("job");
    assert_eq!(frame["request"], json!({"n": 1}));
    assert_eq!((&frame["format"], &frame["deadline_ms"]), (&json!("anthropic"), &json!(10_000)));
    agent.chunk(&frame, "one");
    agent.send(&json!({"type": "news"}));
    agent.chunk(&frame, "two");
    agent.done(&frame);
    assert_eq!(job.wait(LIMIT), Some(JobEvent::Chunk(b"one".to_vec())));
    assert_eq!(job.wait(LIMIT), Some(JobEvent::Chunk(b"two".to_vec())));
    assert!(matches!(job.wait(LIMIT), Some(JobEvent::Done(end)) if end.output_tokens == Some(2)));
    assert_eq!(job.wait(LIMIT), None);
}

#[test]
fn job_is_cancelled_when_dropped_before_its_end_only() {
    let coordinator = Coordinator::start().unwrap();
    let mut agent = ScriptedAgent::connected(&coordinator);
    let mut finished = submit(&coordinator).unwrap();
    let frame = agent.frame("job");
    agent.done(&frame);
    assert!(matches!(finished.wait(LIMIT), Some(JobEvent::Done(_))));
    drop(finished);
    let dropped = submit(&coordinator).unwrap();
    let frame = agent.frame("job");
    drop(dropped);
    assert_eq!(agent.frame("job_cancel")["job_id"], frame["job_id"]);
    agent.chunk(&frame, "too late");
    let _next = submit(&coordinator).unwrap();
    agent.frame("job");
}

#[test]
fn agent_with_a_wrong_signature_is_rejected() {
    let coordinator = Coordinator::start().unwrap();
    let mut agent = ScriptedAgent::dial(&coordinator);
    agent.frame("auth_challenge");
    agent.authenticate(b"another nonce");
    assert!(agent.frame("auth_failed")["reason"].as_str().unwrap().contains("signature"));
    let why = |_| coordinator.wait_for_offer(Duration::from_millis(20), |_| true).unwrap_err().to_string();
    assert!((0..500).map(why).any(|why| why.contains("signature")));
}

#[test]
fn newer_agent_replaces_the_previous_one_whose_jobs_are_lost() {
    let coordinator = Coordinator::start().unwrap();
    let mut first = ScriptedAgent::connected(&coordinator);
    let mut job = submit(&coordinator).unwrap();
    first.frame("job");
    let mut second = ScriptedAgent::connected(&coordinator);
    assert!(matches!(job.wait(LIMIT), Some(JobEvent::Failed { code, .. }) if code == "internal"));
    let _job = submit(&coordinator).unwrap();
    second.frame("job");
}

#[test]
fn offer_is_replaced_by_a_newer_one() {
    let coordinator = Coordinator::start().unwrap();
    let mut agent = ScriptedAgent::connected(&coordinator);
    let stages = coordinator.offer().unwrap().stages;
    agent.offer(&["m", "n"]);
    let offer = coordinator.wait_for_offer(LIMIT, |offer| offer.models.len() == 2).unwrap();
    assert_eq!(offer.stages, stages);
    agent.offer(&[]);
    coordinator.wait_for_offer(LIMIT, |offer| offer.models.is_empty()).unwrap();
}

/// A front door, with its coordinator and agent.
fn door() -> (HttpServer, Arc<Coordinator>, ScriptedAgent) {
    let coordinator = Arc::new(Coordinator::start().unwrap());
    let agent = ScriptedAgent::connected(&coordinator);
    (front_door::start(http_server::bind(0).unwrap(), coordinator.clone()).unwrap(), coordinator, agent)
}

fn sent(door: &HttpServer, path: &str, body: &Value) -> TcpStream {
    let mut tcp = TcpStream::connect(door.address).unwrap();
    tcp.set_read_timeout(Some(LIMIT)).unwrap();
    let body = body.to_string();
    let head = format!("POST {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    tcp.write_all((head + &body).as_bytes()).unwrap();
    tcp
}

fn answer(mut tcp: TcpStream) -> String {
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).unwrap();
    answer
}

const EVENT: &str = "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"hi\"}}]}\n\n";

#[test]
fn front_door_relays_a_stream_as_it_arrives() {
    let (door, _coordinator, mut agent) = door();
    let mut client = sent(&door, "/v1/chat/completions", &json!({"model": "m", "stream": true}));
    let job = agent.frame("job");
    assert_eq!(job["format"], "openai");
    agent.chunk(&job, EVENT);
    let mut first = [0; 4096];
    let mut read = client.read(&mut first).unwrap();
    if !first[..read].ends_with(b"\n\n\r\n") {
        read += client.read(&mut first[read..]).unwrap();
    }
    let first = String::from_utf8_lossy(&first[..read]).into_owned();
    assert!(first.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"), "{first}");
    assert!(first.contains(EVENT), "the first chunk did not come before the second was sent: {first}");
    agent.chunk(&job, "data: [DONE]\n\n");
    agent.done(&job);
    assert!(answer(client).ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"));
}

#[test]
fn front_door_assembles_a_response() {
    let (door, _coordinator, mut agent) = door();
    let client = sent(&door, "/v1/chat/completions", &json!({"model": "m"}));
    let job = agent.frame("job");
    agent.chunk(&job, &EVENT[..20]);
    agent.chunk(&job, &EVENT[20..]);
    agent.done(&job);
    let got = answer(client);
    let document: Value = serde_json::from_str(got.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(document["choices"][0]["message"]["content"], "hi", "{got}");
}

#[test]
fn front_door_reports_errors_by_status_before_the_first_byte_and_by_event_after_it() {
    let (door, _coordinator, mut agent) = door();
    for (code, status) in [("model_not_loaded", 404), ("out_of_capacity", 429), ("backend_timeout", 504)] {
        let client = sent(&door, "/v1/messages", &json!({"model": "m", "stream": true}));
        let job = agent.frame("job");
        agent.error(&job, code);
        let got = answer(client);
        assert!(got.starts_with(&format!("HTTP/1.1 {status} ")) && got.contains(code), "{got}");
    }
    let client = sent(&door, "/v1/chat/completions", &json!({"model": "m", "stream": true}));
    let job = agent.frame("job");
    agent.chunk(&job, "data: {\"cu");
    agent.error(&job, "internal");
    let got = answer(client);
    assert!(got.contains("\n\ndata: {\"type\":\"error\"") && !got.contains("[DONE]"), "{got}");
    let client = sent(&door, "/v1/chat/completions", &json!({"model": "m"}));
    let job = agent.frame("job");
    agent.chunk(&job, EVENT);
    agent.error(&job, "internal");
    assert!(answer(client).starts_with("HTTP/1.1 500 "));
}

#[test]
fn front_door_cancels_the_job_of_a_client_that_disconnects_even_before_the_first_byte() {
    let (door, _coordinator, mut agent) = door();
    for chunks in [0, 1] {
        for streaming in [true, false] {
            let client = sent(&door, "/v1/chat/completions", &json!({"model": "m", "stream": streaming}));
            let job = agent.frame("job");
            (0..chunks).for_each(|_| agent.chunk(&job, EVENT));
            drop(client);
            assert_eq!(agent.frame("job_cancel")["job_id"], job["job_id"]);
        }
    }
}

#[test]
fn front_door_reports_that_no_agent_is_connected() {
    let (door, coordinator, agent) = door();
    drop(agent);
    while coordinator.offer().is_some() {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(answer(sent(&door, "/v1/chat/completions", &json!({"model": "m"}))).starts_with("HTTP/1.1 503 "));
}

fn config_for(urls: &[String]) -> Config {
    let backends: String =
        urls.iter().map(|url| format!("[[backends]]\nkind = \"openai\"\nurl = \"{url}\"\n")).collect();
    let text = format!(
        "[coordinator]\nurl = \"wss://coordinator.invalid/\"\n{backends}\
         [pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 1\n"
    );
    Config::parse(&text, Path::new("agent.toml"), false).unwrap()
}

#[test]
fn demo_shows_the_response_and_every_stage() {
    let echo = echo::start().unwrap();
    let config = config_for(&[format!("http://{}", echo.address)]);
    let options = Options {
        port: Some(0),
        prompt: Some("a b c".to_owned()),
        once: true,
        config: Some(config),
        ..Options::default()
    };
    let mut out = Vec::new();
    run(options, &Arc::new(Stop::default()), &mut out).unwrap();
    let out = String::from_utf8(out).unwrap();
    assert!(out.contains("\na b c\n"), "{out}");
    for stage in ["connect", "auth", "discovery", "first byte", "total", "overhead", "bytes"] {
        assert!(
            out.lines().any(|line| line.trim_start().starts_with(stage) && !line.contains("not measured")),
            "{out}"
        );
    }
}

#[test]
fn demo_without_a_model_names_each_backend_that_failed() {
    let unused = http_server::bind(0).unwrap().local_addr().unwrap();
    let options = Options {
        port: Some(0),
        once: true,
        config: Some(config_for(&[format!("http://{unused}")])),
        ..Options::default()
    };
    let error = run(options, &Arc::new(Stop::default()), &mut Vec::new()).unwrap_err();
    assert!(matches!(&error, DemoError::NoModels(why) if why.len() == 1), "{error}");
    assert!(error.to_string().contains(&unused.to_string()), "{error}");
}

#[test]
fn demo_escapes_the_error_of_a_backend() {
    let handler = Arc::new(|exchange: &mut http_server::connection::Exchange<'_>| {
        exchange.respond_json(500, &json!("\u{9b}31m\u{202e}no memory"));
    });
    let server = HttpServer::start(http_server::bind(0).unwrap(), "failing", handler).unwrap();
    let why = backends::diagnose(&[BackendOffer::configured(
        &config_for(&[format!("http://{}", server.address)]).backends[0],
    )]);
    assert!(why[0].contains("\\u{9b}31m\\u{202e}no memory"), "{why:?}");
}

#[test]
fn demo_fails_if_the_requested_port_is_taken() {
    let taken = http_server::bind(0).unwrap();
    let port = taken.local_addr().unwrap().port();
    let options = Options { port: Some(port), once: true, config: Some(config_for(&[])), ..Options::default() };
    let error = run(options, &Arc::new(Stop::default()), &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("--port"), "{error}");
}

#[test]
fn compare_finds_wrong_bytes() {
    assert!(compare(b"abc", b"abc", None).is_ok());
    assert!(compare(b"abc", b"abc", Some(b"abc")).is_ok());
    for (arrived, given, expected) in
        [(&b""[..], &b""[..], None), (b"abc", b"abd", None), (b"abc", b"ab", None), (b"ab", b"ab", Some(&b"abc"[..]))]
    {
        assert!(matches!(compare(arrived, given, expected), Err(DemoError::WrongBytes(_))));
    }
}

#[test]
fn model_to_ask_is_a_chat_model() {
    let model = |id: &str, context_window| OfferedModel {
        model_id: id.to_owned(),
        backend: String::new(),
        context_window,
        max_concurrent: 1,
    };
    let stages = agent_sessions::Stages { connect: LIMIT, auth: LIMIT, discovery: LIMIT };
    let models = vec![model("a-embed", Some(1)), model("b-cold", None), model("c-warm", Some(1))];
    let mut offer = Offer { models, stages, agent_version: String::new(), provider_id: String::new() };
    assert_eq!(model_to_ask(&offer), offer.models.last());
    offer.models.truncate(1);
    assert_eq!(model_to_ask(&offer), offer.models.first());
    offer.models.clear();
    assert_eq!(model_to_ask(&offer), None);
}
