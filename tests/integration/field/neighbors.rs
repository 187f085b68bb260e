//! Other users of the machine, and other clients of the demo.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::time::Instant;

use crossbeam_channel::{Receiver, unbounded};
use serde_json::{Value, json};

use crate::support::*;

/// Clears the screen, colors, reorders and hides: with an escape, as a C1 control, with bidirectional and with zero-width characters.
const HOSTILE: &str = "\u{1b}[2J\u{9b}31m\u{7}\u{202e}\u{2066}\u{61c}\u{200b}\u{200d}\u{feff}\u{2060}\u{e0041}\u{2028}";

/// Nothing in the text makes a terminal do more than show it.
#[track_caller]
fn assert_harmless(what: &str, text: &str) {
    let is_hostile = |c: char| (c.is_control() && c != '\n') || (!c.is_ascii() && HOSTILE.contains(c));
    assert!(!text.contains(is_hostile), "{what}: {text:?}");
}

#[track_caller]
fn assert_harmless_run(what: &str, ran: &Ran) {
    assert_harmless(what, &ran.stdout);
    assert_harmless(what, &ran.stderr);
}

/// The text of an identity file whose provider id is `id`, made by an agent.
fn identity_with(home: &Scratch, config: &str, id: &str) -> String {
    cli(home.path(), &["enroll", "-c", config, "--allow-insecure"], &[]);
    let path = home.join(".usepod-agent/identity.key");
    let text = fs::read_to_string(&path).expect("an identity");
    text.replace("-----END", &format!("provider_id: {id}\n-----END"))
}

#[test]
fn names_that_control_a_terminal_are_shown_escaped_by_every_command() {
    let model = format!("m{HOSTILE}");
    let error = format!("no{HOSTILE}");
    let backend = Backend::vllm_with(&[&model], move |_| {
        let event = json!({"choices": [{"delta": {"content": error}, "finish_reason": "stop"}]});
        Answer::Raw(response(200, "text/event-stream", format!("data: {event}\n\ndata: [DONE]\n\n")))
    });
    let failing = Backend::new(|_| Answer::Raw(response(500, "text/plain", format!("why{HOSTILE}"))));
    let setup = Setup::new("wss://never-dialled.example/").backend(backend.toml()).backend(failing.toml());
    let config = setup.write();
    let config = config.to_str().expect("UTF-8");
    let home = &setup.scratch;
    let identity = identity_with(home, config, &format!("prov{}", HOSTILE.replace(['\u{2028}', '\u{feff}'], "")));
    home.write(".usepod-agent/identity.key", identity);

    let enroll = cli(home.path(), &["enroll", "-c", config], &[]);
    assert!(enroll.stdout.contains("prov\\u{1b}[2J\\u{9b}31m"), "{enroll:?}");
    assert_harmless_run("enroll", &enroll);
    let validate = cli(home.path(), &["validate", "-c", config], &[]);
    assert!(validate.stdout.contains("m\\u{1b}[2J") && validate.stdout.contains("why\\u{1b}[2J"), "{validate:?}");
    assert_harmless_run("validate", &validate);
    let demo = cli(home.path(), &["demo", "--once", "--port=0", "-c", config, "--prompt", HOSTILE], &[]);
    assert!(demo.stdout.contains("m\\u{1b}[2J"), "{demo:?}");
    assert_harmless_run("demo", &demo);
    let doctor = cli(home.path(), &["doctor", "-c", config], &[]);
    assert!(doctor.stdout.contains("m\\u{1b}[2J") && doctor.stdout.contains("prov\\u{1b}"), "{doctor:?}");
    assert_harmless_run("doctor", &doctor);
    // Errors, and what they quote of the command line and of the file.
    let missing = format!("/nowhere/{HOSTILE}");
    let file = home.write("bad.toml", setup.toml().replace("500_000", &format!("\"{HOSTILE}\"")));
    for arguments in [
        &["validate", "-c", &missing][..],
        &["validate", "-c", file.to_str().expect("UTF-8")],
        &["run", HOSTILE],
        &["demo", &format!("--{HOSTILE}")],
    ] {
        let ran = cli(home.path(), arguments, &[]);
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert_harmless_run("an error", &ran);
    }
}

#[test]
fn coordinator_text_that_controls_a_terminal_is_shown_escaped_by_setup_and_status_and_in_the_log() {
    let hostile = |what: &str| format!("{what}{HOSTILE}");
    let issued = json!({"pair_code": hostile("CODE"), "poll_token": "poll-token-0123456789", "expires_at": "soon"});
    let model = json!({"model_id": hostile("m"), "input_per_1m": 1, "output_per_1m": 1, "max_concurrent": 1});
    let active = json!({"status": "active", "host_token": hostile("token-0123456789"), "provider_id": hostile("prov"),
                        "model_config": [model]});
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let server = Backend::new(move |request| match request.target.as_str() {
        "/v1/host/pair/issue" => Answer::Json(200, issued.clone()),
        _ if asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 => {
            Answer::Json(500, json!({"error": {"message": format!("busy{HOSTILE}")}}))
        }
        _ => Answer::Json(200, active.clone()),
    });
    let home = Scratch::new();
    let setup = cli_within(secs(30), home.path(), &["setup", "--coordinator", &server.url()], &[]);
    for word in ["CODE\\u{1b}", "prov\\u{1b}", "busy\\u{1b}", "m\\u{1b}"] {
        assert!(setup.stdout.contains(word), "no {word} in {setup:?}");
    }
    assert_harmless_run("setup", &setup);

    let backend = Backend::vllm(&[&hostile("m")]);
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url()).backend(backend.toml());
    let agent = setup.start();
    let session = coordinator.accept().authenticate(Some(&hostile("prov")));
    session.send(&json!({"type": hostile("type")}));
    session.send_text(&hostile("no JSON"));
    session.close(1008, &hostile("reason"));
    agent.stderr.wait_line(&["reason"]);
    let session = coordinator.session();
    let config = setup.write();
    let config = ["-c", config.to_str().expect("UTF-8")];
    let status = cli(setup.scratch.path(), &[&["status"], &config[..]].concat(), &[]);
    assert!(status.stdout.contains("m\\u{1b}[2J"), "{status:?}");
    assert_harmless_run("status", &status);
    let status = cli(setup.scratch.path(), &[&["status", "--json"], &config[..]].concat(), &[]);
    assert_harmless_run("status --json", &status);
    let state: Value = serde_json::from_str(&status.stdout).expect("JSON");
    assert_eq!(state["models"][0]["model_id"], hostile("m"), "programs get the name as it is");
    assert_harmless("the log", &agent.stderr.text());
    drop(session);
}

/// A demo with its front door, until a signal.
struct Demo {
    _demo: Agent,
    /// `127.0.0.1:PORT`
    door: String,
    _setup: Setup,
}

impl Demo {
    fn new(backend: &Backend) -> Self {
        let setup = Setup::new("wss://never-dialled.example/").backend(backend.toml());
        let config = setup.write();
        let demo = Agent::run(setup.scratch.path(), &["demo", "--port", "0", "-c", config.to_str().expect("UTF-8")]);
        // The last line, after the demo's own request.
        let line = demo.stdout.wait_line(&["curl", "http://"]);
        let door = line.split("http://").nth(1).and_then(|rest| rest.split('/').next()).expect("an address").to_owned();
        Self { _demo: demo, door, _setup: setup }
    }
}

/// Sends a request head and body, and returns the connection.
fn send(address: &str, head: &str, body: &str) -> TcpStream {
    let mut tcp = TcpStream::connect(address).expect("connected");
    tcp.set_read_timeout(Some(SOON)).expect("a read timeout");
    let length = body.len();
    tcp.write_all(format!("{head}Content-Length: {length}\r\n\r\n{body}").as_bytes()).expect("sent");
    tcp
}

/// The response to a request whose connection the server closes.
fn answer(address: &str, head: &str, body: &str) -> String {
    let mut text = String::new();
    let _ = send(address, &format!("{head}Connection: close\r\n"), body).read_to_string(&mut text);
    text
}

/// A backend that sends an event every 5 ms to requests without a message until their connection ends, which it reports.
fn backend_without_end() -> (Backend, Receiver<()>) {
    let (ended, ends) = unbounded();
    let backend = Backend::vllm_with(&["m"], move |request| {
        if request.json()["messages"] != json!([]) {
            return Answer::Raw(response(200, "text/event-stream", sse(7, 13)));
        }
        let ended = ended.clone();
        Answer::Play(Box::new(move |mut tcp: &TcpStream| {
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";
            let mut written = tcp.write_all(head.as_bytes());
            let began = Instant::now();
            while written.is_ok() && began.elapsed() < 3 * SOON {
                written = tcp.write_all(b"data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n");
                std::thread::sleep(ms(5));
            }
            let _ = ended.send(());
            Ok(false)
        }))
    });
    (backend, ends)
}

#[test]
fn client_that_leaves_the_front_door_while_tokens_come_fast_frees_its_slot_within_a_second() {
    let (backend, ends) = backend_without_end();
    let demo = Demo::new(&backend);
    let ask = |stream: bool, more: &str| {
        let body = json!({"model": "m", "stream": stream, "messages": []}).to_string();
        let seen = backend.posts();
        let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
        let mut tcp = send(&demo.door, head, &body);
        wait_until("the job is at the backend", || backend.posts() > seen);
        tcp.write_all(more.as_bytes()).expect("sent");
        // Time for some events.
        std::thread::sleep(ms(150));
        tcp
    };
    // A client may have sent a line end, or its next request, behind the body.
    for (stream, more) in [(false, ""), (false, "\r\n"), (true, ""), (true, "GET /health HTTP/1.1\r\n\r\n")] {
        let tcp = ask(stream, more);
        assert!(ends.try_recv().is_err(), "the client is still there");
        drop(tcp);
        assert!(ends.recv_timeout(secs(1)).is_ok(), "stream {stream}, more {more:?}: the job outlives its client");
    }
}

#[test]
fn request_that_the_backend_rejects_keeps_its_status_at_the_front_door() {
    let backend = Backend::vllm_with(&["m"], |request| {
        let status = request.json()["status"].as_u64().unwrap_or(200) as u16;
        match status {
            200 => Answer::Raw(response(200, "text/event-stream", sse(7, 13))),
            status => Answer::Json(status, json!({"error": {"message": "HTTP 200: `n` is not supported"}})),
        }
    });
    let demo = Demo::new(&backend);
    for (path, stream, status) in [
        ("/v1/chat/completions", false, 400),
        ("/v1/chat/completions", true, 422),
        ("/v1/messages", false, 413),
        ("/v1/messages", true, 400),
        ("/v1/chat/completions", true, 500),
        ("/v1/chat/completions", false, 451),
        // The operator's key, not the client's.
        ("/v1/chat/completions", false, 401),
    ] {
        let body = json!({"model": "m", "stream": stream, "status": status, "messages": []}).to_string();
        let answer = answer(&demo.door, &format!("POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"), &body);
        let expected = if status == 401 { 502 } else { status };
        assert!(answer.starts_with(&format!("HTTP/1.1 {expected} ")), "{path} {status}: {answer}");
        assert!(status == 500 || answer.contains("`n` is not supported"), "{answer}");
    }
}

#[test]
fn web_page_of_another_site_gets_nothing_from_the_demo() {
    let backend = Backend::vllm_with(&["m"], |_| Answer::Raw(response(200, "text/event-stream", sse(7, 13))));
    let demo = Demo::new(&backend);
    let home = Scratch::new();
    let awaiting = Agent::run(home.path(), &["demo", "--await-agent", "--port", "0"]);
    let coordinator = awaiting.stdout.wait_line(&["http://"]);
    let coordinator = coordinator.split("http://").nth(1).expect("an address");
    let coordinator = coordinator.split(|c: char| c != '.' && c != ':' && !c.is_ascii_digit()).next().expect("one");
    let ask = |address: &str, line: &str, headers: &str| answer(address, &format!("{line} HTTP/1.1\r\n{headers}"), "");

    let asked = backend.posts();
    for (address, line) in [
        (&*demo.door, "GET /v1/models"),
        (&demo.door, "POST /v1/chat/completions"),
        (&demo.door, "OPTIONS /v1/chat/completions"),
        (coordinator, "GET /host/pair"),
        (coordinator, "POST /v1/host/pair/issue"),
        (coordinator, "GET /provider/connect"),
    ] {
        for headers in [
            "Host: evil.example\r\n".to_owned(),
            "Host: 127.0.0.1.evil.example:8788\r\n".to_owned(),
            "Host: 0.0.0.0\r\n".to_owned(),
            format!("Host: {address}\r\nOrigin: http://evil.example\r\n"),
            format!("Host: {address}\r\nOrigin: null\r\n"),
            format!("Host: {address}\r\nOrigin: http://{address}.evil.example\r\n"),
            format!("Host: {address}\r\nOrigin: http://localhost:1\r\n"),
            format!(
                "Host: {address}\r\nOrigin: https://x\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eDEyMzQ1Njc4OTAxMjM0NQ==\r\n"
            ),
        ] {
            let answer = ask(address, line, &headers);
            assert!(answer.starts_with("HTTP/1.1 403 "), "{line}, {headers}: {answer}");
            assert!(!answer.to_lowercase().contains("access-control-"), "{answer}");
        }
        let answer = ask(address, line, &format!("Host: {address}\r\nHost: {address}\r\n"));
        assert!(answer.starts_with("HTTP/1.1 400 "), "{line}: {answer}");
    }
    assert_eq!(backend.posts(), asked);
    // This machine, by each of its names, and the page of the pairing itself.
    let port = demo.door.rsplit(':').next().expect("a port");
    for host in [demo.door.clone(), format!("LocalHost:{port}"), "localhost".into(), format!("[::1]:{port}")] {
        let answer = ask(&demo.door, "GET /v1/models", &format!("Host: {host}\r\n"));
        assert!(answer.starts_with("HTTP/1.1 200 "), "{host}: {answer}");
    }
    let own = format!("Host: {coordinator}\r\nOrigin: http://{coordinator}\r\n");
    let answer = ask(coordinator, "POST /host/pair", &own);
    assert!(answer.starts_with("HTTP/1.1 404 ") && answer.contains("unknown or has expired"), "{answer}");
}

/// 1.9 million frames in 5 s once wrote 173 MB.
#[test]
fn warnings_that_a_coordinator_repeats_are_counted_and_take_one_line_a_second() {
    const ROUNDS: usize = 12;
    const FRAMES: usize = 500;
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let running = rig.session.job("m", json!({}));
    let mut held = backend.next();
    let texts = [
        "no JSON".to_owned(),
        json!({"type": "job", "job_id": "00000000-0000-4000-8000-000000000001", "request": {}}).to_string(),
        job(&running, "m", json!({})).to_string(),
    ];
    let mut frames: Vec<u8> = texts.iter().flat_map(|text| encode(TEXT, true, text.as_bytes())).collect();
    frames.extend(encode(BINARY, true, b"binary"));
    let frames = frames.repeat(FRAMES);
    let began = Instant::now();
    let before = rig.agent.warning_count();
    for _ in 0..ROUNDS {
        rig.session.send_raw(&frames);
        std::thread::sleep(ms(100));
    }
    let sent = 4 * ROUNDS * FRAMES;
    wait_until("every frame is counted", || rig.agent.warning_count() - before >= sent);
    assert_eq!(rig.agent.warning_count() - before, sent);
    let lines = rig.agent.warnings().len();
    let seconds = began.elapsed().as_secs() as usize;
    assert!(lines <= 4 * (seconds + 2), "{lines} lines in {seconds} s: {:?}", rig.agent.warnings());
    held.start_sse();
    held.chunk(sse(7, 13));
    held.end();
    rig.session.outcome(&running).done();
}

/// The count of the last second is not lost.
#[test]
fn warnings_that_are_only_counted_are_logged_before_the_agent_ends() {
    let rig = Rig::new(&Backend::vllm(&["m"]));
    for _ in 0..100 {
        rig.session.send_text("no JSON");
    }
    let id = rig.session.job("unknown", json!({}));
    rig.session.outcome(&id);
    let mut agent = rig.agent;
    agent.signal("TERM");
    agent.wait(SOON);
    agent.stderr.whole();
    assert_eq!(agent.warning_count(), 100, "{:?}", agent.warnings());
}

#[test]
fn links_planted_beside_the_identity_are_not_followed() {
    let (backend, coordinator) = (Backend::vllm(&["m"]), Coordinator::new());
    // Named by the pid that the doctor will have: the shell becomes the doctor.
    let plant = "ln -s ../precious .usepod-agent/.usepod-doctor-$$";
    let setup = Setup::new(&coordinator.url()).backend(backend.toml());
    let home = &setup.scratch;
    let precious = home.write("precious", "a file of this user");
    let beside = |name: &str| home.join(&format!(".usepod-agent/identity.key{name}"));
    fs::create_dir(home.join(".usepod-agent")).expect("a folder");
    for name in [".lock", ".state", ".state.new", ".wake"] {
        symlink("../precious", beside(name)).expect("a link");
    }
    let mut agent = setup.start();
    agent.wait(SOON);
    assert!(agent.stderr.whole().contains("symlink"), "the lock is not on the target: {}", agent.stderr.text());
    fs::remove_file(beside(".lock")).expect("removed");
    // A lock that others can write to could name any process.
    set_mode(home.write(".usepod-agent/identity.key.lock", ""), 0o666);
    let _agent = setup.start();
    let _session = coordinator.session();
    wait_until("the state is written", || fs::read_to_string(beside(".state")).is_ok_and(|text| text.contains("pid")));
    assert!(fs::symlink_metadata(beside(".state")).expect("the state").is_file());
    assert_eq!(mode(beside(".lock")), 0o600);
    let config = setup.write();
    let doctor = format!("{plant}; exec \"$0\" doctor --allow-insecure --no-inference -c '{}'", config.display());
    let ran = std::process::Command::new("sh").args(["-c", &doctor]).arg(binary()).current_dir(home.path()).output();
    let ran = Ran::from(ran.expect("a shell"));
    assert!(ran.stdout.contains("is writable"), "{ran:?}");
    symlink("../nowhere", beside(".paused")).expect("a link");
    cli(home.path(), &["pause", "-c", config.to_str().expect("UTF-8")], &[]);
    assert!(fs::symlink_metadata(beside(".paused")).expect("the marker").is_file() && !home.join("nowhere").exists());
    let left = names_in(&home.join(".usepod-agent"));
    assert_eq!(left.iter().filter(|name| name.starts_with(".usepod")).count(), 1, "only the link is left: {left:?}");
    assert_eq!(fs::read_to_string(&precious).expect("the file"), "a file of this user");
    assert_eq!(mode(&precious), 0o644);
}

/// As ssh refuses a key in such a folder.
#[test]
fn doctor_fails_for_an_identity_folder_that_other_users_can_write_to() {
    let setup = Setup::new(&format!("ws://{}/", nobody_at("127.0.0.94")));
    let config = setup.write();
    let home = &setup.scratch;
    identity_with(home, config.to_str().expect("UTF-8"), "x");
    let folder = home.join(".usepod-agent");
    let doctor =
        || cli(home.path(), &["doctor", "-c", config.to_str().expect("UTF-8"), "--allow-insecure"], &[]).stdout;
    assert!(!doctor().contains("✗ folder"), "a private folder");
    // A key elsewhere is looked for where it is.
    let away = home.join("away");
    fs::create_dir(&away).expect("a folder");
    for (exposed, mode) in [(&folder, 0o777), (&folder, 0o1777), (&away, 0o703)] {
        if exposed == &away {
            fs::rename(folder.join("identity.key"), away.join("identity.key")).expect("moved");
            symlink(away.join("identity.key"), folder.join("identity.key")).expect("a link");
        }
        set_mode(exposed, mode);
        let text = doctor();
        assert!(text.contains("✗ folder") && text.contains("chmod go-w"), "{mode:o}: {text}");
        assert!(text.contains(exposed.to_str().expect("UTF-8")), "{mode:o}: {text}");
        set_mode(exposed, 0o700);
        assert!(!doctor().contains("✗ folder"), "{mode:o}");
    }
    set_mode(home.join(".usepod-agent"), 0o750);
    assert!(!doctor().contains("✗ folder"), "others may read the folder");
}

#[test]
fn hosted_backend_over_http_beyond_loopback_is_refused() {
    let home = Scratch::new();
    let of = |kind: &str, url: &str| {
        let toml = format!(
            "[coordinator]\nurl = \"wss://c.example/\"\n[[backends]]\nkind = \"{kind}\"\nurl = \"{url}\"\napi_key_env = \"KEY\"\n\
             [pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 1\n"
        );
        let path = home.write("agent.toml", toml);
        cli(home.path(), &["enroll", "-c", path.to_str().expect("UTF-8")], &[])
    };
    for (kind, url) in [
        ("openrouter", "http://openrouter.ai/api/v1"),
        ("venice", "HTTP://api.venice.ai/api/v1"),
        ("venice", "http://192.0.2.7:8080"),
        ("openrouter", "http://localhost.example"),
    ] {
        let printed = of(kind, url).fails(2, &["agent.toml:5", "not encrypted", "https://"]);
        assert!(printed.contains(url), "{printed}");
    }
    for (kind, url) in [
        ("openrouter", "https://openrouter.ai/api/v1"),
        ("venice", "http://127.0.0.1:8080"),
        ("openrouter", "http://[::1]:8080"),
        // A server of the operator's own network.
        ("vllm", "http://192.0.2.7:8000"),
    ] {
        assert_eq!(of(kind, url).code, Some(0), "{kind} {url}");
    }
}
