//! From the dial to the first `capabilities`.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::*;

fn keys(frame: &serde_json::Value) -> BTreeSet<&str> {
    frame.as_object().expect("a frame is an object").keys().map(String::as_str).collect()
}

/// An agent without backends, and the coordinator that it dials.
fn agent_without_backends() -> (Coordinator, Agent, Setup) {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    let agent = setup.start();
    (coordinator, agent, setup)
}

#[test]
fn upgrade_request_names_the_configured_path() {
    let coordinator = Coordinator::new();
    let _agent = Setup::new(&format!("ws://{}/some/path?x=1", coordinator.address())).start();
    let request = coordinator.dialled(SOON).request();
    assert_eq!(request.line(), "GET /some/path?x=1");
    assert_eq!(request.header("host"), Some(coordinator.address().to_string().as_str()));
    assert_eq!(request.header("sec-websocket-version"), Some("13"));
    assert!(request.header("upgrade").is_some_and(|value| value.eq_ignore_ascii_case("websocket")), "{request:?}");
}

#[test]
fn agent_waits_for_the_challenge() {
    let (coordinator, _agent, _setup) = agent_without_backends();
    let session = coordinator.accept();
    session.assert_no_frame("a frame before the challenge", QUIET, |_| true);
    session.authenticate(None);
}

#[test]
fn auth_response_signs_the_decoded_nonce() {
    side_by_side([vec![0xfb], vec![0; 32], (0..=255).collect()], |nonce| {
        let (coordinator, _agent, _setup) = agent_without_backends();
        let session = coordinator.accept();
        let auth = session.challenge(&nonce);
        verify_auth(&auth, &nonce);
        assert_eq!(keys(&auth), ["agent_version", "pubkey", "signature", "type"].into());
        assert_eq!(auth["agent_version"], env!("CARGO_PKG_VERSION"));
    });
}

#[test]
fn capabilities_are_not_sent_before_auth_ok() {
    let (coordinator, _agent, _setup) = agent_without_backends();
    let session = coordinator.accept();
    session.challenge(b"nonce");
    session.assert_no_frame("a frame before auth_ok", QUIET, |_| true);
    session.send(&json!({"type": "auth_ok", "provider_id": "prov_1"}));
    session.frame("capabilities", SOON);
}

#[test]
fn job_right_behind_auth_ok_is_served() {
    let backend = Backend::vllm(&["m"]);
    let coordinator = Coordinator::new();
    let _agent = Setup::new(&coordinator.url()).backend(backend.toml()).start();
    let session = coordinator.accept();
    session.challenge(b"nonce");
    let id = uuid::Uuid::new_v4().to_string();
    let frames = [json!({"type": "auth_ok"}), job(&id, "m", json!({}))];
    let bytes: Vec<u8> = frames.iter().flat_map(|frame| encode(TEXT, true, frame.to_string().as_bytes())).collect();
    session.send_raw(&bytes);
    session.frame("capabilities", SOON);
    backend.next().finish();
    session.outcome(&id).done();
}

#[test]
fn auth_ok_with_an_invalid_provider_id_is_accepted() {
    side_by_side([json!(7), json!(null), json!(""), json!(["prov"])], |id| {
        let (coordinator, _agent, setup) = agent_without_backends();
        let session = coordinator.accept();
        session.challenge(b"nonce");
        let before = std::fs::read(setup.identity()).expect("the identity file");
        session.send(&json!({"type": "auth_ok", "provider_id": id}));
        session.frame("capabilities", SOON);
        assert_eq!(std::fs::read(setup.identity()).expect("the identity file"), before, "provider_id {id}");
    });
}

/// Each address of a name is tried: `localhost` is often `::1` first, where nothing listens.
#[test]
fn localhost_reaches_a_coordinator_and_a_backend_on_127_0_0_1() {
    let backend = Backend::vllm(&["m"]);
    let coordinator = Coordinator::new();
    let _agent = Setup::new(&format!("ws://localhost:{}/", coordinator.address().port()))
        .backend(format!("kind = \"vllm\"\nurl = \"http://localhost:{}\"", backend.address().port()))
        .start();
    let session = coordinator.session();
    assert_eq!(session.capabilities["models"][0]["model_id"], "m");
    let id = session.job("m", json!({}));
    backend.next().finish();
    session.outcome(&id).done();
}

#[test]
fn challenge_in_one_packet_with_the_101_is_not_lost() {
    let (coordinator, _agent, _setup) = agent_without_backends();
    let challenge = json!({"type": "auth_challenge", "nonce": base64("early")}).to_string();
    let session = coordinator.dialled(SOON).upgrade_with(&encode(TEXT, true, challenge.as_bytes()));
    verify_auth(&session.frame("auth_response", SOON), b"early");
}

#[test]
fn challenge_in_fragments_with_a_ping_between_is_one_challenge() {
    let (coordinator, _agent, _setup) = agent_without_backends();
    let session = coordinator.accept();
    let text = json!({"type": "auth_challenge", "nonce": base64("cut")}).to_string();
    let (head, tail) = text.split_at(20);
    session.send_raw(&encode(TEXT, false, head.as_bytes()));
    session.send_frame(PING, b"between");
    session.send_raw(&encode(CONTINUATION, true, tail.as_bytes()));
    verify_auth(&session.frame("auth_response", SOON), b"cut");
    session.wait("a pong", SOON, |event| matches!(event, Event::Pong(payload) if payload == b"between").then_some(()));
}

#[test]
fn enrollment_code_is_sent_until_there_is_a_provider_id() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url()).coordinator("enrollment_code = \"POD-ENROLL-abc\"");
    let agent = setup.start();

    let session = coordinator.accept();
    assert_eq!(session.challenge(b"1")["enrollment_code"], "POD-ENROLL-abc");
    session.send(&json!({"type": "auth_ok"}));
    session.frame("capabilities", SOON);
    session.close(1001, "drain:deploy");

    let session = coordinator.accept();
    assert_eq!(session.challenge(b"2")["enrollment_code"], "POD-ENROLL-abc", "no provider_id was given yet");
    session.send(&json!({"type": "auth_ok", "provider_id": "prov_new"}));
    session.frame("capabilities", SOON);
    session.close(1001, "drain:deploy");

    let session = coordinator.accept();
    assert_eq!(session.challenge(b"3").get("enrollment_code"), None, "the identity has a provider_id");
    drop((session, agent));

    let _agent = setup.start();
    let auth = coordinator.accept().challenge(b"4");
    assert_eq!(auth.get("enrollment_code"), None, "the provider_id was written into the identity file");
}

#[test]
fn auth_failed_is_logged_and_retried_without_capabilities() {
    let (coordinator, mut agent, _setup) = agent_without_backends();
    let session = coordinator.accept();
    session.challenge(b"nonce");
    session.send(&json!({"type": "auth_failed", "reason": "key is not registered"}));
    session.ended(SOON);
    session.assert_no_frame("capabilities", Duration::ZERO, is_offer);
    agent.stderr.wait_line(&["key is not registered"]);
    agent.assert_running();
}

/// Each of these instead of a challenge ends the connection, and the next handshake succeeds.
#[test]
fn slow_handshake_that_fails_is_followed_by_another() {
    let text = |text: &str| encode(TEXT, true, text.as_bytes());
    let cases = [
        ("a binary frame", encode(BINARY, true, br#"{"type":"auth_challenge","nonce":"AAAA"}"#)),
        ("a challenge without nonce", text(r#"{"type":"auth_challenge"}"#)),
        ("a nonce that is not base64", text(r#"{"type":"auth_challenge","nonce":"*"}"#)),
        ("a nonce that is no text", text(r#"{"type":"auth_challenge","nonce":7}"#)),
        ("a close", encode(CLOSE, true, &close_payload(1008, "go away"))),
        ("text that is not UTF-8", encode(TEXT, true, &[0xff, 0xfe])),
        ("a reserved opcode", encode(5, true, b"?")),
        ("a masked frame", vec![0x81, 0x82, 0, 0, 0, 0, b'{', b'}']),
    ];
    side_by_side(cases, |(what, bytes)| {
        let (coordinator, mut agent, _setup) = agent_without_backends();
        let session = coordinator.accept();
        session.send_raw(&bytes);
        session.ended(secs(12));
        session.assert_no_frame(what, Duration::ZERO, |_| true);
        coordinator.session();
        agent.assert_running();
    });
}

#[test]
fn refused_upgrade_is_retried() {
    let cases = [
        "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 301 Moved\r\nLocation: ws://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n",
        "SSH-2.0-OpenSSH_9.2\r\n\r\n",
    ];
    side_by_side(cases, |answer| {
        let (coordinator, mut agent, _setup) = agent_without_backends();
        let mut dialled = coordinator.dialled(SOON);
        dialled.request();
        dialled.send(answer.as_bytes());
        drop(dialled);
        coordinator.session();
        agent.assert_running();
    });
}

/// The coordinator is silent, or sends a byte often enough to reset a timeout per read.
#[test]
fn slow_handshake_timeouts_bound_every_wait() {
    let patience = secs(25);
    let upgrade_never_answered = |trickles: bool| {
        let (coordinator, _agent, _setup) = agent_without_backends();
        let mut dialled = coordinator.dialled(SOON);
        let mut line = b"HTTP/1.1 101 ".iter().chain(std::iter::repeat(&b'S'));
        while trickles && dialled.stream.write_all(&[*line.next().expect("an endless line")]).is_ok() {
            std::thread::sleep(ms(500));
        }
        let hung_up = dialled.drain_until_hang_up(patience);
        assert_between(hung_up - dialled.at, 15, "the upgrade");
    };
    let challenge_never_whole = |trickles: bool| {
        let (coordinator, _agent, _setup) = agent_without_backends();
        let session = coordinator.accept();
        let began = Instant::now();
        let mut frame = encode(TEXT, true, &[b' '; 100]).into_iter();
        while trickles && !session.ends_within(ms(500)) {
            session.send_raw(&[frame.next().expect("a frame of 50 s")]);
        }
        session.ended(patience);
        assert_between(began.elapsed(), 10, "the challenge");
    };
    let verdict_never_given = |_| {
        let (coordinator, _agent, _setup) = agent_without_backends();
        let session = coordinator.accept();
        let began = Instant::now();
        session.challenge(b"nonce");
        session.ended(patience);
        assert_between(began.elapsed(), 10, "the verdict");
    };
    let tls_never_answered = |_| {
        let coordinator = Coordinator::new();
        let _agent = Setup::new(&format!("wss://{}/", coordinator.address())).start();
        let dialled = coordinator.dialled(SOON);
        let hung_up = dialled.drain_until_hang_up(patience);
        assert_between(hung_up - dialled.at, 15, "TLS");
    };
    let proxy_never_answers = |_| {
        let proxy = Coordinator::new();
        let address = format!("http://{}", proxy.address());
        let _agent = Setup::new("wss://coordinator.example/").env("HTTPS_PROXY", &address).start();
        let dialled = proxy.dialled(SOON);
        let hung_up = dialled.drain_until_hang_up(patience);
        assert_between(hung_up - dialled.at, 15, "the proxy");
    };
    let cases: [(&(dyn Fn(bool) + Sync), bool); 7] = [
        (&tls_never_answered, false),
        (&proxy_never_answers, false),
        (&upgrade_never_answered, false),
        (&upgrade_never_answered, true),
        (&challenge_never_whole, false),
        (&challenge_never_whole, true),
        (&verdict_never_given, false),
    ];
    side_by_side(cases, |(wait, trickles)| wait(trickles));
}

fn assert_between(took: Duration, bound_seconds: u64, what: &str) {
    let bound = secs(bound_seconds);
    assert!(took > bound - ms(300) && took < bound + secs(2), "{what} was waited for {took:?}, not {bound:?}");
}

#[test]
fn first_connect_that_fails_is_retried() {
    let address = nobody_at("127.0.0.2");
    let mut agent = Setup::new(&format!("ws://{address}/")).start();
    agent.stderr.wait_line(&["refused"]);
    agent.assert_running();
    Coordinator::on(&address).session();
}

#[test]
fn auth_failed_reason_is_one_short_line_of_the_log() {
    side_by_side([50_000, 100_000], |length| {
        let (coordinator, agent, _setup) = agent_without_backends();
        let session = coordinator.accept();
        session.challenge(b"nonce");
        let reason = format!("the-reason\n2026-01-01 forged line\r\u{1b}[2J{}", "x".repeat(length));
        session.send(&json!({"type": "auth_failed", "reason": reason}));
        // The second dial comes after all log lines about the first.
        coordinator.dialled(SOON);
        let line = agent.stderr.wait_line(&["rejected"]);
        assert!(line.contains("the-reason") || length > 64 << 10, "a reason that is not absurd is shown: {line}");
        let log = agent.stderr.text();
        assert!(!log.contains('\u{1b}') && !log.contains('\r'), "control characters are in the log");
        assert!(!log.lines().any(|line| line.starts_with("2026-01-01 forged")), "the log was forged");
        let longest = log.lines().map(str::len).max().expect("a line");
        assert!(longest < 500, "a line of {longest} bytes");
    });
}
