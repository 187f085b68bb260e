//! A live session, apart from jobs: unknown frames, heartbeats, dead links, changes of the offer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::support::*;

fn models(capabilities: &Value) -> Vec<&str> {
    let models = capabilities["models"].as_array().unwrap_or_else(|| panic!("no models in {capabilities}"));
    models.iter().map(|model| model["model_id"].as_str().expect("a model_id")).collect()
}

fn serve_one(session: &Session, backend: &Backend, model: &str) {
    let id = session.job(model, json!({}));
    backend.next().finish();
    session.outcome(&id).done();
}

#[test]
fn capabilities_states_models_limits_and_version() {
    let list = json!({"data": [{"id": "z"}, {"id": "a/b", "max_model_len": 8192}]});
    let backend = Backend::new(move |request| match request.line().as_str() {
        "GET /health" => Answer::Raw(response(200, "text/plain", "")),
        _ => Answer::Json(200, list.clone()),
    });
    let rig = Rig::with(|setup| {
        setup
            .backend(backend.toml())
            .limits("max_concurrent = 3\nmax_tokens_per_minute = 200_000")
            .pricing("[pricing.models]\nz = { input_per_1m = 1, output_per_1m = 2 }")
    });
    let expected = json!({
        "type": "capabilities",
        "models": [
            {"model_id": "a/b", "input_per_1m": 500_000, "output_per_1m": 750_000, "max_concurrent": 3,
             "backend": "vllm", "context_window": 8192},
            {"model_id": "z", "input_per_1m": 1, "output_per_1m": 2, "max_concurrent": 3, "backend": "vllm"},
        ],
        "limits": {"max_concurrent_total": 3, "max_tokens_per_minute": 200_000},
        "metadata": {"agent_version": env!("CARGO_PKG_VERSION")},
    });
    assert_eq!(rig.session.capabilities, expected);
}

#[test]
fn empty_offer_is_sent_with_the_default_limits() {
    let rig = Rig::with(|setup| setup);
    assert_eq!(rig.session.capabilities["models"], json!([]));
    let limits = &rig.session.capabilities["limits"];
    assert_eq!(limits["max_tokens_per_minute"], Value::Null, "null when unset: {limits}");
    assert!(limits.as_object().is_some_and(|limits| limits.contains_key("max_tokens_per_minute")), "{limits}");
}

#[test]
fn unknown_and_invalid_frames_do_not_end_the_session() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let unknown = [
        r#"{"type":"config_update","config":{"a":1}}"#,
        r#"{"type":"auth_challenge","nonce":"AAAA"}"#,
        r#"{"type":"auth_ok","provider_id":"prov_late"}"#,
        r#"{"type":"ping"}"#,
    ];
    let bad = [
        "",
        "{",
        "null",
        "[]",
        "\"job\"",
        "{}",
        r#"{"type":7}"#,
        r#"{"type":"job"}"#,
        r#"{"type":"job","job_id":"x","model_id":"m","request":{}}"#,
        r#"{"type":"job","job_id":7,"model_id":"m","request":{}}"#,
        r#"{"type":"job","job_id":"00000000-0000-4000-8000-000000000001","request":{}}"#,
        r#"{"type":"job","job_id":"00000000-0000-4000-8000-000000000001","model_id":7,"request":{}}"#,
        r#"{"type":"job_cancel"}"#,
        r#"{"type":"job_cancel","job_id":"x"}"#,
        "not json at all, and secret-prompt-text",
    ];
    for text in unknown.iter().chain(&bad) {
        rig.session.send_text(text);
    }
    // Deep nesting could overflow a parser's stack.
    rig.session.send_text(&"[".repeat(200_000));
    serve_one(&rig.session, &backend, "m");
    rig.session.assert_no_frame("an answer to a bad frame", QUIET, |frame| frame["type"] != "heartbeat");
    let log = rig.agent.stderr.text();
    let printed = |line: &&str| line.contains("DEBUG") && line.contains("config_update");
    assert_eq!(log.lines().filter(printed).count(), 1, "an unknown type is printed at debug");
    rig.agent.stderr.wait_line(&["warn", "more like this"]);
    let warnings = rig.agent.warning_count();
    assert!(warnings > bad.len(), "each bad frame counts as a warning, {warnings} were counted");
    assert!(!log.contains("secret-prompt-text"), "a bad frame's content is in the log");
}

/// Frames with a few characters changed, reproducibly: none may end the session or the agent.
#[test]
fn random_text_frames_do_not_end_the_session() {
    let backend = Backend::vllm_with(&["m", "held"], |request| match request.json()["model"].as_str() {
        Some("held") => Answer::Hold,
        _ => Answer::Raw(response(200, "text/event-stream", sse(1, 2))),
    });
    let rig = Rig::new(&backend);
    let good = [
        job("00000000-0000-4000-8000-000000000001", "m", json!({"messages": [1.5, "é", {"a": null}]})).to_string(),
        json!({"type": "job_cancel", "job_id": "00000000-0000-4000-8000-000000000001"}).to_string(),
        json!({"type": "auth_challenge", "nonce": "AAAA"}).to_string(),
    ];
    let mut numbers = xorshift(0x2545_f491_4f6c_dd1d);
    let mut next = |below: usize| (numbers() % below as u64) as usize;
    for n in 0..600 {
        let mut text: Vec<char> = good[n % good.len()].chars().collect();
        for _ in 0..=next(4) {
            let at = next(text.len());
            match next(4) {
                0 => text[at] = char::from(next(127) as u8 + 1),
                1 => text.truncate(at + 1),
                2 => text.insert(at, ['"', '{', '}', '[', '\\', '-', '9', '\u{10ffff}'][next(8)]),
                _ => drop(text.remove(at)),
            }
            text.push(' ');
        }
        rig.session.send_text(&text.iter().collect::<String>());
    }
    serve_one(&rig.session, &backend, "held");
}

#[test]
fn ping_is_answered_with_its_payload() {
    let rig = Rig::with(|setup| setup);
    for payload in [&b""[..], b"1", &[0xff; 125]] {
        rig.session.send_frame(PING, payload);
        rig.session.wait("the pong", SOON, |event| matches!(event, Event::Pong(p) if p == payload).then_some(()));
    }
}

#[test]
fn session_byte_by_byte_serves() {
    let coordinator = Coordinator::new();
    let proxy = FaultProxy::to(coordinator.address());
    let backend = Backend::vllm(&["m"]);
    let _agent = Setup::new(&format!("ws://{}/", proxy.address())).backend(backend.toml()).start();
    let session = coordinator.accept();
    // The upgrade response passes at once: the agent's WebSocket library rejects one in many pieces.
    session.send_frame(PING, b"");
    session.wait("the pong", SOON, |event| matches!(event, Event::Pong(_)).then_some(()));
    proxy.set(Mode::Trickle);
    let session = session.authenticate(None);
    serve_one(&session, &backend, "m");
}

#[test]
fn job_in_fragments_is_one_job() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let id = uuid::Uuid::new_v4().to_string();
    let text = job(&id, "m", json!({"messages": "é"})).to_string().into_bytes();
    let pieces: Vec<_> = text.chunks(3).collect();
    for (n, piece) in pieces.iter().enumerate() {
        let opcode = if n == 0 { TEXT } else { CONTINUATION };
        rig.session.send_raw(&encode(opcode, n + 1 == pieces.len(), piece));
    }
    let held = backend.next();
    assert_eq!(held.request.json()["messages"], "é");
    held.finish();
    rig.session.outcome(&id).done();
}

/// Waits for the first heartbeat; checks its time and that a ping came with it.
fn first_heartbeat(session: &Session, since: Instant) -> Value {
    let heartbeat = session.frame("heartbeat", secs(20));
    let came = since.elapsed();
    assert!(came > ms(14_500) && came < ms(17_000), "the first heartbeat came {came:?} after capabilities");
    session.wait("a ping with the heartbeat", secs(1), |event| matches!(event, Event::Ping).then_some(()));
    heartbeat
}

#[test]
fn slow_heartbeat_carries_the_true_figures() {
    let idle = || {
        let rig = Rig::with(|setup| setup);
        let heartbeat = first_heartbeat(&rig.session, Instant::now());
        let figures = |name: &str| heartbeat[name].as_f64();
        for name in ["queue_depth", "tokens_per_sec_p50", "p50_latency_ms", "p95_latency_ms", "error_rate_60s"] {
            assert_eq!(figures(name), Some(0.0), "{name} of an idle agent: {heartbeat}");
        }
        assert_eq!((&heartbeat["last_error_at"], &heartbeat["last_error_code"]), (&Value::Null, &Value::Null));
        let keys = heartbeat.as_object().expect("an object").len();
        assert_eq!(keys, 8, "type and seven figures: {heartbeat}");
    };
    let busy = || {
        let backend = Backend::vllm(&["m"]);
        let rig = Rig::new(&backend);
        let began = Instant::now();
        let started = OffsetDateTime::now_utc().format(&Rfc3339).expect("a date");
        let answer = |bytes: Vec<u8>, after| {
            let id = rig.session.job("m", json!({}));
            let mut held = backend.next();
            std::thread::sleep(ms(after));
            held.send(bytes);
            held.keep();
            rig.session.outcome(&id)
        };
        // Client errors and cancels are not counted.
        for status in [400, 413, 422] {
            answer(response(status, "text/plain", "your fault"), 0).error();
        }
        let cancelled = rig.session.job("m", json!({}));
        let mut held = backend.next();
        rig.session.cancel(&cancelled);
        held.wait_hang_up();
        // Two succeed, one fails, one is running.
        answer(response(200, "text/event-stream", sse(7, 13)), 200).done();
        answer(response(200, "text/event-stream", sse(7, 13)), 400).done();
        answer(response(500, "text/plain", "boom"), 300).error();
        rig.session.job("m", json!({}));
        let _running = backend.next();

        let heartbeat = first_heartbeat(&rig.session, began);
        let figure = |name: &str| heartbeat[name].as_f64().unwrap_or_else(|| panic!("no {name} in {heartbeat}"));
        let between = |name, least, most| {
            let value = figure(name);
            assert!((least..=most).contains(&value), "{name} should be in {least}..={most}: {heartbeat}");
        };
        between("queue_depth", 1.0, 1.0);
        between("error_rate_60s", 0.33, 0.34);
        between("p50_latency_ms", 195.0, 600.0);
        between("p95_latency_ms", 390.0, 1500.0);
        // 13 tokens in 200 to 400 ms, as a rate over the whole job or over the part after the first token.
        between("tokens_per_sec_p50", 10.0, 100_000.0);
        assert_eq!(heartbeat["last_error_code"], "internal", "{heartbeat}");
        let at = heartbeat["last_error_at"].as_str().expect("a date");
        let now = OffsetDateTime::now_utc().format(&Rfc3339).expect("a date");
        assert!(at.ends_with('Z') || at.ends_with("+00:00"), "not UTC: {at}");
        assert!(started[..19] <= at[..19] && at[..19] <= now[..19], "{at} is not between {started} and {now}");
    };
    let parts: [&(dyn Fn() + Sync); 2] = [&idle, &busy];
    side_by_side(parts, |part| part());
}

/// The link discards all bytes without closing. Any received byte keeps a session alive.
#[test]
fn slow_silence_of_45_s_ends_a_session_and_any_byte_prevents_it() {
    let silent = || {
        let coordinator = Coordinator::new();
        let proxy = FaultProxy::to(coordinator.address());
        let _agent = Setup::new(&format!("ws://{}/", proxy.address())).start();
        let _session = coordinator.session();
        proxy.set(Mode::Swallow);
        let began = Instant::now();
        let redialled = coordinator.dialled(secs(60)).at - began;
        // The delay before the new dial is up to 1.2 s.
        assert!(redialled > secs(44) && redialled < secs(50), "a dead link was noticed after {redialled:?}");
    };
    let pongs_only = || {
        let rig = Rig::with(|setup| setup);
        let began = Instant::now();
        for n in 1..=3 {
            rig.session.frame("heartbeat", secs(17));
            let at = began.elapsed();
            assert!(at > secs(15 * n - 1) && at < secs(15 * n + 2), "heartbeat {n} came after {at:?}");
        }
        assert!(!rig.session.ends_within(secs(4)), "the session was ended although each ping was answered");
    };
    let frames_only = || {
        let rig = Rig::with(|setup| setup);
        rig.session.ignore_pings();
        for _ in 0..2 {
            assert!(!rig.session.ends_within(secs(25)), "the session was ended although the coordinator spoke");
            rig.session.send(&json!({"type": "something_new"}));
        }
    };
    // The agent's writer blocks in a socket that is not read when the timeout expires.
    let wedged = || {
        let backend = Backend::vllm(&["m"]);
        let rig = Rig::new(&backend);
        rig.session.pause(true);
        let began = Instant::now();
        rig.session.job("m", json!({}));
        let mut held = backend.next();
        held.start_sse();
        let flood = held.flood();
        let redialled = rig.coordinator.dialled(secs(60)).at - began;
        assert!(redialled > secs(44) && redialled < secs(52), "a wedged session was given up after {redialled:?}");
        flood.join().expect("the flood to end with its session");
    };
    let parts: [&(dyn Fn() + Sync); 4] = [&silent, &pongs_only, &frames_only, &wedged];
    side_by_side(parts, |part| part());
}

#[test]
fn slow_offer_is_sent_again_if_it_changes_and_only_then() {
    let address = nobody_at("127.0.0.6");
    let fleeting = Backend::vllm_on(&address, &["fleeting"]);
    let steady = Backend::vllm(&["steady"]);
    let rig = Rig::with(|setup| setup.backend(fleeting.toml()).backend(steady.toml()));
    assert_eq!(models(&rig.session.capabilities), ["fleeting", "steady"]);

    // A job that finds its backend unreachable causes a probe at once.
    drop(fleeting);
    let id = rig.session.job("fleeting", json!({}));
    assert_eq!(rig.session.outcome(&id).error(), "backend_unreachable");
    assert_eq!(models(&rig.session.frame("capabilities", SOON)), ["steady"]);

    // The next round of probes, every 30 s, finds it again.
    let back = Backend::vllm_on(&address, &["fleeting", "new"]);
    assert_eq!(models(&rig.session.frame("capabilities", secs(45))), ["fleeting", "new", "steady"]);
    serve_one(&rig.session, &back, "new");
    serve_one(&rig.session, &steady, "steady");
    rig.session.assert_no_frame("an unchanged offer", QUIET, is_offer);
}

#[test]
fn slow_backend_that_is_loading_is_offered_once_it_is_ready() {
    let kinds = ["vllm", "llamacpp"];
    side_by_side(kinds, |kind| {
        let ready = Arc::new(AtomicBool::new(false));
        let is_ready = Arc::clone(&ready);
        let loading = json!({"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}});
        let backend = Backend::new(move |request| match request.line().as_str() {
            _ if !is_ready.load(Ordering::SeqCst) => Answer::Json(503, loading.clone()),
            "GET /v1/models" => Answer::Json(200, json!({"data": [{"id": "m"}]})),
            "POST /v1/chat/completions" => Answer::Hold,
            _ => Answer::Json(200, json!({})),
        });
        let rig = Rig::with(|setup| setup.backend(format!("kind = \"{kind}\"\nurl = \"{}\"", backend.url())));
        assert_eq!(models(&rig.session.capabilities), [""; 0], "{kind}");
        ready.store(true, Ordering::SeqCst);
        assert_eq!(models(&rig.session.frame("capabilities", secs(12))), ["m"], "{kind}");
        serve_one(&rig.session, &backend, "m");
    });
}
