//! Proxies, addresses, and coordinators that respond otherwise than expected.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::*;

/// Whether this machine has an IPv6 loopback address.
fn has_ipv6() -> bool {
    std::net::TcpListener::bind("[::1]:0").is_ok()
}

/// A proxy for the whole machine would connect to its own loopback (actions/toolkit PR#1361).
#[test]
fn loopback_is_reached_directly_although_https_proxy_is_set() {
    let hosts = [
        ("127.0.0.1:0", "127.0.0.1"),
        ("127.0.0.1:0", "LocalHost"),
        ("127.0.0.12:0", "127.0.0.12"),
        ("[::1]:0", "[::1]"),
    ];
    side_by_side(hosts.into_iter().filter(|(_, host)| *host != "[::1]" || has_ipv6()), |(address, host)| {
        let (proxy, coordinator) = (Coordinator::new(), Coordinator::on(address));
        let hosted = Backend::vllm_on(address, &["hosted"]);
        let _agent = Setup::new(&format!("ws://{host}:{}/", coordinator.address().port()))
            .backend(format!(
                "kind = \"openrouter\"\nurl = \"http://{host}:{}/v1\"\napi_key_env = \"THE_KEY\"",
                hosted.address().port()
            ))
            .env("THE_KEY", "sk-x")
            .env("HTTPS_PROXY", &format!("http://{}", proxy.address()))
            .start();
        let session = coordinator.session();
        assert_eq!(session.capabilities["models"][0]["model_id"], "hosted", "{host}");
        proxy.assert_not_dialled(Duration::ZERO);
    });
}

/// 0.0.0.0 and :: are no loopback addresses, but reach it: whoever dials them directly reaches the coordinator.
#[test]
fn no_proxy_may_be_a_range_an_ipv6_address_a_host_with_port_or_have_spaces() {
    let direct = ["10.0.0.0/8, 0.0.0.0/8", "0.0.0.0:PORT", " .example.com ,\t0.0.0.0 ", "0.0.0.0/0:PORT"];
    let direct6 = ["::", "[::]", "[::]:PORT", "fd00::/8,::/16"];
    let proxied = ["10.0.0.0/8", "0.0.0.0:1", "0.0.0.0/33x", "::/0"];
    let proxied6 = ["fd00::/8", "[::]:1", "0.0.0.0/0"];
    let v4 = direct.map(|no_proxy| ("0.0.0.0", no_proxy, true)).into_iter();
    let v4 = v4.chain(proxied.map(|no_proxy| ("0.0.0.0", no_proxy, false)));
    let v6 = direct6.map(|no_proxy| ("[::]", no_proxy, true)).into_iter();
    let v6 = v6.chain(proxied6.map(|no_proxy| ("[::]", no_proxy, false)));
    side_by_side(v4.chain(v6.filter(|_| has_ipv6())), |(host, no_proxy, is_direct)| {
        let proxy = Coordinator::new();
        let coordinator = Coordinator::on(if host == "[::]" { "[::1]:0" } else { "127.0.0.1:0" });
        let port = coordinator.address().port();
        let _agent = Setup::new(&format!("wss://{host}:{port}/"))
            .env("HTTPS_PROXY", &format!("http://{}", proxy.address()))
            .env("NO_PROXY", &no_proxy.replace("PORT", &port.to_string()))
            .start();
        let (dialled, other) = if is_direct { (&coordinator, &proxy) } else { (&proxy, &coordinator) };
        assert!(dialled.try_dialled(SOON).is_some(), "NO_PROXY={no_proxy} for {host}");
        other.assert_not_dialled(Duration::ZERO);
    });
}

/// Fills the queue of a listening socket, so that further connects are not answered. They stay so while the result lives.
fn swallowing(address: &str) -> (std::net::TcpListener, Vec<std::net::TcpStream>) {
    let listener = std::net::TcpListener::bind(address).expect("a loopback port");
    let address = listener.local_addr().expect("its address");
    let mut queue = Vec::new();
    while let Ok(tcp) = std::net::TcpStream::connect_timeout(&address, ms(500)) {
        queue.push(tcp);
    }
    (listener, queue)
}

/// `localhost` has two addresses. A firewall that drops the packets to one of them must not delay the other by seconds.
#[test]
fn slow_address_that_swallows_connects_delays_the_next_by_a_quarter_of_a_second() {
    if !has_ipv6() {
        return left_out("there is no IPv6 loopback");
    }
    let (_silent, _queue) = swallowing("127.0.0.1:0");
    let port = _silent.local_addr().expect("its address").port();
    let coordinator = Coordinator::on(&format!("[::1]:{port}"));
    let started = Instant::now();
    let _agent = Setup::new(&format!("ws://localhost:{port}/")).start();
    let took = coordinator.dialled(SOON).at - started;
    assert!(took > ms(200) && took < ms(1500), "dialled after {took:?}");
    drop(coordinator);

    let backend = Backend::vllm_on(&format!("[::1]:{port}"), &["m"]);
    let coordinator = Coordinator::new();
    let _agent =
        Setup::new(&coordinator.url()).backend(format!("kind = \"vllm\"\nurl = \"http://localhost:{port}\"")).start();
    let session = coordinator.session();
    assert_eq!(session.capabilities["models"][0]["model_id"], "m");
    let sent = Instant::now();
    let id = session.job("m", json!({}));
    backend.next().finish();
    session.outcome(&id).done();
    assert!(sent.elapsed() < ms(1500), "a job took {:?}", sent.elapsed());
}

/// A lookup cannot be interrupted, so it outlives a job that gives up.
#[test]
fn jobs_for_a_name_that_resolves_slowly_share_one_lookup() {
    let coordinator = Coordinator::new();
    let backend = Backend::vllm(&["m"]);
    let setup = Setup::new(&coordinator.url())
        .backend(format!("kind = \"vllm\"\nurl = \"http://gpu.test:{}\"", backend.address().port()));
    let setup = Shim::load(setup);
    let shim = Shim::of(&setup);
    let agent = setup.start();
    let session = coordinator.session();
    assert_eq!(session.capabilities["models"][0]["model_id"], "m");
    shim.hang_lookups();
    backend.hang_up();
    for _ in 0..40 {
        let id = session.job_within(ms(30), "m", json!({}));
        assert_eq!(session.outcome(&id).error(), "backend_timeout");
    }
    assert_eq!(shim.hanging_lookups(), 1);
    let threads = agent.threads();
    assert!(threads.iter().filter(|name| *name == "resolve").count() == 1, "{threads:?}");
    let waiting = session.job("m", json!({"waiting": true}));
    shim.end_lookups();
    let held = backend.next();
    assert_eq!(held.request.json()["waiting"], true);
    held.finish();
    session.outcome(&waiting).done();
}

/// A session whose first offer waits for the backend's listing, and the held listing. Probes take at most 3 s.
pub fn session_before_the_first_offer() -> (Coordinator, Backend, Agent, Session, Held) {
    let coordinator = Coordinator::new();
    let backend = Backend::new(|request| match request.line().as_str() {
        "GET /health" => Answer::Json(200, json!({})),
        _ => Answer::Hold,
    });
    let agent = Setup::new(&coordinator.url()).backend(backend.toml()).limits("max_concurrent = 2").start();
    let session = coordinator.accept();
    let listing = backend.next();
    assert_eq!(listing.request.line(), "GET /v1/models");
    session.challenge(b"nonce");
    session.send(&json!({"type": "auth_ok"}));
    (coordinator, backend, agent, session, listing)
}

pub fn finish_listing(mut listing: Held) {
    listing.send(response(200, "application/json", json!({"data": [{"id": "m"}]}).to_string()));
    listing.keep();
}

/// A coordinator that pings right after `auth_ok` drops an agent that does not answer.
#[test]
fn ping_is_answered_and_jobs_wait_while_the_first_probe_hangs() {
    let (_coordinator, backend, _agent, session, listing) = session_before_the_first_offer();
    session.send_frame(PING, b"early");
    session.wait("a pong", secs(1), |event| matches!(event, Event::Pong(payload) if payload == b"early").then_some(()));
    let waiting = session.job("m", json!({"n": 1}));
    let cancelled = session.job("m", json!({"n": 2}));
    let refused = session.job("m", json!({"n": 3}));
    assert_eq!(session.outcome_within(&refused, secs(1)).error(), "out_of_capacity");
    session.cancel(&cancelled);
    // The reply shows that the cancel was read.
    session.send_frame(PING, b"read");
    session.wait("a pong", secs(1), |event| matches!(event, Event::Pong(payload) if payload == b"read").then_some(()));
    let hurried = session.job_within(ms(1), "m", json!({"n": 4}));
    session.assert_no_frame("an offer without a listing", Duration::ZERO, is_offer);
    finish_listing(listing);
    assert_eq!(session.frame("capabilities", SOON)["models"][0]["model_id"], "m");
    let job = backend.next();
    assert_eq!(job.request.json()["n"], 1);
    job.finish();
    session.outcome(&waiting).done();
    assert_eq!(session.outcome(&hurried).error(), "backend_timeout", "the wait counts towards the deadline");
    backend.assert_none(QUIET);
    session.assert_quiet(&cancelled);
}

#[test]
fn stop_or_end_of_the_session_does_not_wait_for_the_first_probe() {
    let (_coordinator, _backend, mut agent, session, _listing) = session_before_the_first_offer();
    let waiting = session.job("m", json!({}));
    session.send_frame(PING, b"read");
    session.wait("a pong", secs(1), |event| matches!(event, Event::Pong(payload) if payload == b"read").then_some(()));
    agent.signal("TERM");
    assert_eq!(session.outcome_within(&waiting, secs(1)).end["type"], "job_error");
    assert_eq!(agent.wait(secs(2)).code(), Some(0));

    let (coordinator, backend, _agent, session, listing) = session_before_the_first_offer();
    session.job("m", json!({"of": "the first session"}));
    session.cut();
    let session = coordinator.accept();
    session.challenge(b"nonce");
    session.send(&json!({"type": "auth_ok"}));
    finish_listing(listing);
    finish_listing(backend.next());
    session.frame("capabilities", SOON);
    backend.assert_none(QUIET);
}

/// The agent must not wait for a handshake that cannot succeed, because a portal or another service answers.
#[test]
fn garbage_instead_of_a_handshake_frame_ends_the_attempt_at_once_with_the_reason() {
    let challenge = r#"{"type":"auth_challenge","nonce":"bm9uY2U="}"#;
    let cases = [
        (None, "hello", "not a JSON object"),
        (None, "[]", "not a JSON object"),
        (None, r#"{"nonce":"AAAA"}"#, "not a JSON object with a `type`"),
        (None, r#"{"type":"auth_challenge"}"#, "without a valid `nonce`"),
        (None, r#"{"type":"auth_challenge","nonce":"*"}"#, "without a valid `nonce`"),
        (None, r#"{"type":"auth_challenge","nonce":["AAAA"]}"#, "without a valid `nonce`"),
        (None, r#"{"type":"auth_ok"}"#, "`auth_ok` instead of `auth_challenge`"),
        (None, r#"{"type":"auth_failed","reason":"banned"}"#, "rejected this agent: banned"),
        (Some(challenge), "<html>", "not a JSON object"),
        (Some(challenge), r#"{"type":7}"#, "not a JSON object"),
        (Some(challenge), challenge, "`auth_challenge` instead of `auth_ok`"),
    ];
    side_by_side(cases, |(first, garbage, reason)| {
        let coordinator = Coordinator::new();
        let agent = Setup::new(&coordinator.url()).start();
        let session = coordinator.accept();
        if let Some(first) = first {
            session.send_text(first);
            session.frame("auth_response", SOON);
        }
        session.send_text(garbage);
        session.ended(secs(2));
        agent.stderr.wait_line(&["not connected", reason]);
    });
    // Frames of an unknown type are ignored.
    let coordinator = Coordinator::new();
    let _agent = Setup::new(&coordinator.url()).start();
    let session = coordinator.accept();
    session.send(&json!({"type": "welcome"}));
    session.authenticate(None);
}

/// Answers every request with `response`, and closes.
fn refusing(response: &str) -> Coordinator {
    let response = response.to_owned();
    Coordinator::played(move |mut dialled| {
        dialled.request_if_any();
        dialled.send(response.as_bytes());
    })
}

/// The body comes after the head, and the connection stays open.
fn refusing_slowly(head: &'static str, body: &'static str) -> Coordinator {
    Coordinator::played(move |mut dialled| {
        dialled.request_if_any();
        dialled.send(head.as_bytes());
        std::thread::sleep(ms(50));
        dialled.send(body.as_bytes());
        dialled.drain_until_hang_up(SOON);
    })
}

#[test]
fn refused_upgrade_is_named_in_log_status_and_doctor() {
    let portal = "something in between answers: log in there";
    let cases = [
        (
            refusing(
                "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 302 Found\r\nLocation: http://portal.test/login?\u{9b}2J\r\nContent-Length: 0\r\n\r\n",
            ),
            vec!["302 Found", "http://portal.test/login", portal],
        ),
        (
            refusing_slowly(
                "HTTP/1.1 511 Network Authentication Required\r\nContent-Length: 42\r\n\r\n",
                "<html>\n<p>Please <b>accept the terms</b>.\n",
            ),
            vec!["511 Network", "accept the terms", portal],
        ),
        (
            refusing_slowly("HTTP/1.1 200 OK\r\n\r\n", "<title>Hotel \"Ritz\"</title>"),
            vec!["200 OK", "Hotel \"Ritz\"", portal],
        ),
        (
            refusing_slowly(
                "HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n",
                "21\r\n{\"error\":\"this machine's banned\"}\r\n0\r\n\r\n",
            ),
            vec!["403 Forbidden", "{\"error\":\"this machine's banned\"}"],
        ),
        (refusing("HTTP/1.1 401\r\n\r\nno\u{1b}[31m key"), vec!["HTTP 401", "key"]),
        (refusing("HTTP/1.1 503 Busy\r\nRetry-After: 120\r\n\r\n"), vec!["503 Busy", "tried again after 120 s"]),
    ];
    side_by_side(cases, |(coordinator, words)| {
        let setup = Setup::new(&coordinator.url());
        // Over TLS, too.
        let authority = Authority::new();
        let proxy = TlsProxy::new(&authority, Flaw::None, coordinator.address());
        let secure = Setup::new(&proxy.url());
        let ca_file = authority.write(&secure.scratch);
        secure.coordinator(&format!("ca_file = {ca_file:?}")).start().stderr.wait_line(&words);
        let agent = setup.start();
        let mut in_log = words.clone();
        in_log.push("not connected");
        let line = agent.stderr.wait_line(&in_log);
        assert!(!line.contains(['\u{1b}', '\u{9b}']), "{line:?}");
        let (_, status) = setup.start_command(&["status"]).finish(SOON);
        let (_, doctor) = setup.start_command(&["doctor"]).finish(secs(30));
        for (what, text) in [("status", status), ("doctor", doctor)] {
            assert!(
                words.iter().all(|word| text.contains(word)) && !text.contains(['\u{1b}', '\u{9b}']),
                "{what}: {text}"
            );
        }
    });
}

/// A coordinator that is being deployed asks for time; the next delays would be 1, 2 and 4 s.
#[test]
fn slow_retry_after_is_the_least_delay_before_the_next_dial() {
    let date = |seconds: u64| httpdate::fmt_http_date(std::time::SystemTime::now() + secs(seconds));
    let cases = [
        ("HTTP/1.1 503 Busy\r\nRetry-After: 3\r\n\r\n".to_owned(), 3),
        ("HTTP/1.1 429 Slow\r\nretry-after:  3 \r\nContent-Length: 0\r\n\r\n".to_owned(), 3),
        // The server's clock is an hour ahead.
        (format!("HTTP/1.1 503 Busy\r\nDate: {}\r\nRetry-After: {}\r\n\r\n", date(3600), date(3603)), 3),
        ("HTTP/1.1 503 Busy\r\nRetry-After: soon\r\n\r\n".to_owned(), 1),
        ("HTTP/1.1 503 Busy\r\nRetry-After: 0\r\n\r\n".to_owned(), 1),
    ];
    side_by_side(cases, |(response, seconds)| {
        let coordinator = Coordinator::new();
        let _agent = Setup::new(&coordinator.url()).start();
        let mut dialled = coordinator.dialled(SOON);
        dialled.request();
        dialled.send(response.as_bytes());
        drop(dialled);
        let refused = Instant::now();
        let delay = coordinator.dialled(SOON).at - refused;
        assert!(
            delay > secs(seconds).mul_f64(0.8) - ms(50) && delay < secs(seconds) + ms(1500),
            "{response}: {delay:?}"
        );
    });
    // The delay is at most 5 minutes, and a proxy may request it too.
    let proxy = refusing("HTTP/1.1 503 Busy\r\nRetry-After: 86400\r\n\r\nmaintenance");
    let waiting = Setup::new("wss://coordinator.example/").env("HTTPS_PROXY", &format!("http://{}", proxy.address()));
    let agent = waiting.start();
    agent.stderr.wait_line(&["the proxy in HTTPS_PROXY", "503 Busy", "maintenance"]);
    agent.stderr.wait_line(&["reconnecting in 300000 ms"]);
    // `run --cron` ends an agent that shows no sign of life for three minutes.
    let silent = || {
        let (_, json) = waiting.start_command(&["status", "--json"]).finish(SOON);
        let status: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        status["silent_seconds"].as_u64().expect("a number")
    };
    assert!(silent() < 5);
    std::thread::sleep(secs(17));
    assert!(silent() < 5, "{} s without a sign of life", silent());
}

/// Each text is escaped once, wherever it is shown.
#[test]
fn quotes_in_a_close_reason_a_refusal_and_a_backend_error_are_shown_as_sent() {
    let reason = "it's \"over\", see C:\\log";
    let coordinator = Coordinator::new();
    let backend = Backend::new(move |_| Answer::Json(500, json!({"error": {"message": "the \"GPU\" isn't there"}})));
    let setup = Setup::new(&coordinator.url()).backend(backend.toml());
    let agent = setup.start();
    let session = coordinator.session();
    session.close(4000, reason);
    agent.stderr.wait_line(&["session ended", reason]);
    let session = coordinator.accept();
    session.challenge(b"nonce");
    session.send(&json!({"type": "auth_failed", "reason": reason}));
    agent.stderr.wait_line(&["rejected", reason]);
    let (_, status) = setup.start_command(&["status"]).finish(SOON);
    let (_, json) = setup.start_command(&["status", "--json"]).finish(SOON);
    let (_, validate) = setup.start_command(&["validate"]).finish(SOON);
    assert!(status.contains(reason), "{status}");
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert!(json["reason"].as_str().is_some_and(|shown| shown.contains(reason)), "{json}");
    // A JSON body, as sent.
    for text in [status, validate] {
        assert!(text.contains(r#"the \"GPU\" isn't there"#), "{text}");
    }
}

/// The installed command line must not contain a flag that it does not need.
#[test]
fn ws_to_loopback_needs_no_flag_in_any_command() {
    let urls = ["ws://127.0.0.1:PORT/", "WS://LocalHost:PORT/", "ws://127.9.9.9:PORT/", "ws://[::1]:PORT/x"];
    side_by_side(urls.into_iter().filter(|url| !url.contains("::1") || has_ipv6()), |url| {
        let host = if url.contains("::1") { "[::1]:0" } else { "0.0.0.0:0" };
        let coordinator = Coordinator::on(host);
        let setup = Setup::new(&url.replace("PORT", &coordinator.address().port().to_string()));
        let crontab = "#!/bin/sh\n[ $1 = -l ] && cat tab 2>/dev/null || cat >tab\n";
        set_mode(setup.scratch.write("bin/crontab", crontab), 0o755);
        let path = format!("{}:/usr/bin:/bin", setup.scratch.join("bin").display());
        let config = setup.write();
        let config = config.to_str().expect("UTF-8");
        for command in [&["validate"][..], &["enroll"], &["service", "install"], &["service", "uninstall"]] {
            let ran = cli(setup.scratch.path(), &[command, &["--config", config]].concat(), &[("PATH", &path)]);
            assert_eq!(ran.code, Some(0), "{url} {command:?}: {ran:?}");
            if command == ["service", "install"] {
                let tab = std::fs::read_to_string(setup.scratch.join("tab")).expect("the crontab");
                assert!(tab.contains("run --cron") && !tab.contains("--allow-insecure"), "{tab}");
            }
        }
        let mut agent = Agent::run(setup.scratch.path(), &["run", "--config", config]);
        coordinator.session();
        agent.signal("TERM");
        assert_eq!(agent.wait(SOON).code(), Some(0));
    });
    for url in ["ws://192.0.2.7/", "ws://localhost.example/", "ws://0.0.0.0:1/"] {
        let setup = Setup::new(url);
        let ran = cli(setup.scratch.path(), &["validate", "--config", setup.write().to_str().expect("UTF-8")], &[]);
        assert_eq!(ran.code, Some(2), "{url}: {ran:?}");
        assert!(ran.stderr.contains("--allow-insecure"), "{url}: {ran:?}");
    }
}

#[test]
fn scheme_of_the_coordinator_may_be_in_capitals() {
    let (coordinator, authority) = (Coordinator::new(), Authority::new());
    let proxy = TlsProxy::new(&authority, Flaw::None, coordinator.address());
    let setup = Setup::new(&proxy.url().replace("wss://", "WsS://"));
    let ca_file = authority.write(&setup.scratch);
    let _agent = setup.coordinator(&format!("ca_file = {ca_file:?}")).start();
    coordinator.session();
}

/// 0.3.5 accepts unknown keys, so they are not errors.
#[test]
fn misspelt_key_outside_the_backends_is_accepted_with_a_warning_that_names_the_meant_one() {
    let cases = [
        ("max_concurrent = 3\n[limts]\nmax_concurrent = 4", "`limts`", "did you mean `limits`?"),
        ("max_concurent = 3", "`[limits] max_concurent`", "did you mean `max_concurrent`?"),
        ("MAX_TOKENS_PER_MINUTE = 9", "`[limits] MAX_TOKENS_PER_MINUTE`", "`max_tokens_per_minute`?"),
        ("[observability]\nlog-level = \"info\"", "`[observability] log-level`", "did you mean `log_level`?"),
        ("[identity]\nkey = \"x\"", "`[identity] key`", "did you mean `key_path`?"),
        ("[coordinator.tls]\nca = \"x\"", "`[coordinator] tls`", "url, enrollment_code, ca_file"),
        ("log_file = \"x\"", "`[limits] log_file`", "move it to [observability]"),
        ("[pricing.models.m]\ninput_per_1k = 7", "`[pricing.models.m] input_per_1k`", "did you mean `input_per_1m`?"),
        ("[pricing.model.m]\ninput_per_1m = 7", "`[pricing] model`", "did you mean `models`?"),
        ("[[backend]]\nkind = \"vllm\"", "`backend`", "did you mean `backends`?"),
        ("[secrets]\ntoken = \"hunter2\"", "`secrets`", "the known keys here are: operator"),
    ];
    side_by_side(cases, |(toml, key, fix)| {
        let coordinator = Coordinator::new();
        let setup = Setup::new(&coordinator.url()).limits(toml);
        let config = setup.write();
        let line = |at: &str| {
            let text = std::fs::read_to_string(&config).expect("the file");
            1 + text.lines().position(|line| line.contains(at)).unwrap_or_else(|| panic!("no `{at}` in {text}"))
        };
        let agent = setup.start();
        coordinator.session();
        let name = key.trim_matches('`').rsplit(' ').next().expect("a name");
        let place = format!("agent.toml:{}: {key}: unknown key", line(name));
        let warning = agent.stderr.wait_line(&["WARN", &place, fix]);
        assert!(!warning.contains("hunter2"), "{warning}");
        let ran = cli(setup.scratch.path(), &["validate", "--config", config.to_str().expect("UTF-8")], &[]);
        assert!(ran.code == Some(0) && ran.stderr.contains(&place), "{ran:?}");
        coordinator.assert_not_dialled(Duration::ZERO);
    });
    let setup = Setup::new("ws://127.0.0.1:9/").limits("max_concurent = 3");
    let (_, report) = setup.start_command(&["doctor"]).finish(secs(30));
    let has = |line: &&str| line.starts_with("  ! config ") && line.contains("`[limits] max_concurent`");
    let at = report.lines().position(|line| has(&line)).unwrap_or_else(|| panic!("no warning: {report}"));
    assert!(report.lines().nth(at + 1).is_some_and(|fix| fix.contains("did you mean `max_concurrent`?")), "{report}");
}

/// An operator who corrects one error wants to see the others as well.
#[test]
fn doctor_goes_on_after_an_invalid_part_of_agent_toml() {
    let backend = Backend::vllm_with(&["m"], |_| Answer::Raw(response(200, "text/event-stream", sse(1, 1))));
    let coordinator = refusing("HTTP/1.1 404 Not Found\r\n\r\n");
    let url = coordinator.url();
    let invalid: [(&str, String, &str, &[&str]); 5] = [
        ("ws://192.0.2.7/", backend.toml(), "", &["identity", "lock", "disk", "health", "models"]),
        (&url, backend.toml(), "max_concurrent = 0", &["identity", "lock", "disk", "dns", "tcp", "health", "models"]),
        (&url, backend.toml(), "[pricing.models.m]\ninput_per_1m = -1", &["identity", "dns", "tcp", "health"]),
        (&url, backend.toml(), "[identity]\nkey_path = \"\"", &["dns", "tcp", "health", "models"]),
        (
            &url,
            format!("kind = \"vlm\"\nurl = \"http://h\"\n[[backends]]\n{}", backend.toml()),
            "",
            &["identity", "dns", "tcp", "health", "models"],
        ),
    ];
    side_by_side(invalid, |(url, backend, toml, passed)| {
        let setup = Setup::new(url).backend(backend).more(toml);
        let setup = if toml.starts_with("max") { setup.more("").limits(toml) } else { setup };
        setup.scratch.write(".usepod-agent/none", "");
        let config = setup.write();
        let config = config.to_str().expect("UTF-8");
        // Without --allow-insecure.
        let ran = cli_within(secs(30), setup.scratch.path(), &["doctor", "--no-inference", "--config", config], &[]);
        let report = ran.stdout;
        assert_eq!(ran.code, Some(1), "{report}");
        assert_eq!(report.matches("  \u{2717} config ").count(), 1, "{report}");
        for name in passed {
            let is_checked = |mark: char| report.contains(&format!("  {mark} {name} "));
            assert!(is_checked('\u{2713}') || is_checked('!'), "`{name}` was not checked: {report}");
        }
        assert!(report.trim_end().contains("begin with config: "), "{report}");
    });
}

/// A mistyped path that works with the demo fails with the market.
#[test]
fn local_coordinator_answers_only_its_own_path() {
    let home = Scratch::new();
    let market = Agent::run(home.path(), &["demo", "--await-agent", "--port", "0", "--listen", "127.0.0.1:0"]);
    let line = market.stdout.wait_line(&["  coordinator "]);
    let base = line[line.find("http://").expect("an address")..].trim().replace("http", "ws");
    for path in ["/", "", "/provider/conect", "/provider/connect/", "/PROVIDER/CONNECT", "/provider", "/host/pair"] {
        let agent = Setup::new(&format!("{base}{path}")).start();
        agent.stderr.wait_line(&["not connected", "HTTP "]);
    }
    for path in ["/provider/connect", "/provider/connect?x=1"] {
        let agent = Setup::new(&format!("{base}{path}")).start();
        agent.stderr.wait_line(&["connected as demo-"]);
    }
}

/// A full disk must not look like success: scripts redirect the output of these commands.
#[test]
fn output_that_cannot_be_written_is_exit_1_and_a_closed_pipe_is_not() {
    let coordinator = refusing("HTTP/1.1 404 Not Found\r\n\r\n");
    let backend = Backend::vllm_with(&["m"], |_| Answer::Raw(response(200, "text/event-stream", sse(1, 1))));
    let setup = Setup::new(&coordinator.url()).backend(backend.toml()).after("exec >/dev/full");
    setup.write();
    setup.scratch.write(".usepod-agent/agent.log", "a line without an end");
    let commands: [&[&str]; 12] = [
        &["enroll"],
        &["validate"],
        &["version"],
        &["--version"],
        &["--help"],
        &["setup", "--help"],
        &["pause"],
        &["resume"],
        &["doctor", "--no-inference"],
        &["service", "logs"],
        &["service", "logs", "-f"],
        &["demo", "--once", "--port", "0"],
    ];
    side_by_side(commands, |command| {
        let mut agent = setup.start_command(command);
        assert_eq!(agent.wait(secs(30)).code(), Some(1), "{command:?}: {}", agent.stderr.text());
        // The doctor has failed checks of its own to report.
        let is_named = agent.stderr.whole().contains("stdout: No space left on device");
        assert!(is_named || command[0] == "doctor", "{command:?}: {}", agent.stderr.text());
    });
    for command in ["version", "--help"] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let status = std::process::Command::new(binary()).arg(command).stdout(writer).status();
        assert_eq!(status.expect("the binary").code(), Some(0), "{command}");
    }
}

/// A server that is started with `--api-key`: vLLM and LM Studio do not list their models then, llama.cpp does.
#[test]
fn server_on_a_usual_port_that_wants_a_key_is_named_by_setup() {
    let lists = |request: &Request| match request.line().as_str() {
        "GET /v1/models" => Answer::Json(200, json!({"data": [{"id": "m"}]})),
        "GET /health" => Answer::Json(200, json!({"status": "ok"})),
        _ => Answer::Json(401, json!({"error": {"message": "Invalid API Key", "code": 401}})),
    };
    let hides = |_: &Request| Answer::Json(401, json!({"error": "Unauthorized"}));
    let forbids = |request: &Request| match request.target.as_str() {
        "/health" => Answer::Json(200, json!({})),
        _ => Answer::Json(403, json!({"detail": "no"})),
    };
    type Routes = fn(&Request) -> Answer;
    let cases: [(u16, &str, Routes); 4] =
        [(9931, "llamacpp", lists), (8080, "llamacpp", hides), (1234, "lmstudio", hides), (8000, "vllm", forbids)];
    side_by_side(cases, |(port, kind, routes)| {
        let server = Backend::new(routes);
        let market = Backend::new(|request| match request.line().as_str() {
            "POST /v1/host/pair/issue" => {
                let issued = json!({"pair_code": "AB-12", "poll_token": "t", "expires_at": "2020-01-01T00:00:00Z"});
                Answer::Json(200, issued)
            }
            _ => Answer::Json(
                200,
                json!({"status": "active", "host_token": "t", "provider_id": "p", "model_config": []}),
            ),
        });
        let setup = Shim::redirect(Setup::new("ws://127.0.0.1:9/"), port, server.address().port());
        let mut paired = setup.start_command(&["setup", "--coordinator", &market.url()]);
        assert_eq!(paired.wait(SOON).code(), Some(0), "{}", paired.stderr.text());
        let line = paired.stdout.wait_line(&[&format!("a server at :{port} wants a key: api_key_env"), kind]);
        assert!(line.contains(&format!("http://localhost:{port}")), "{line}");
        let file = std::fs::read_to_string(setup.scratch.join("agent.toml")).expect("agent.toml");
        assert!(!file.contains(&format!(":{port}")), "it could not serve yet: {file}");
    });
}

/// In a hotel, setup meets the portal before the agent does.
#[test]
fn captive_portal_is_named_by_setup() {
    let portal = |status: u16, more: &str| {
        let head = format!("HTTP/1.1 {status} Portal\r\nContent-Type: text/html\r\nContent-Length: 20\r\n{more}\r\n");
        format!("{head}<html>Sign in</html>").into_bytes()
    };
    let responses = [
        portal(200, ""),
        portal(511, ""),
        portal(302, "Location: http://portal.test/\r\n"),
        portal(307, "Location: /\r\n"),
    ];
    side_by_side(responses, |response| {
        let market = Backend::new(move |_| Answer::RawThenClose(response.clone()));
        let home = Scratch::new();
        let setup = Agent::run(home.path(), &["setup", "--coordinator", &market.url()]);
        // A redirect ends setup with an error, anything else is retried.
        wait_until("the portal is named", || {
            (setup.stdout.text() + &setup.stderr.text()).contains("something in between answers: log in there")
        });
    });
}
