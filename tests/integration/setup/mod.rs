//! `setup`: the pairing, with a scripted coordinator and with the demo's, and its changes to `agent.toml`.

mod agent_toml;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use crate::support::*;

const ISSUE: &str = "POST /v1/host/pair/issue";
const POLL: &str = "POST /v1/host/pair/poll";
const CODE: &str = "WXYZ-2345";
const POLL_TOKEN: &str = "poll-token-0123456789";
const HOST_TOKEN: &str = "host-token-0123456789-abcdef";

fn issued() -> Answer {
    Answer::Json(200, json!({"pair_code": CODE, "poll_token": POLL_TOKEN, "expires_at": "2020-01-01T00:00:00Z"}))
}

fn pending() -> Answer {
    Answer::Json(200, json!({"status": "pending"}))
}

fn active() -> Answer {
    let model = json!({"model_id": "m", "input_per_1m": 300_000, "output_per_1m": 450_000, "max_concurrent": 6});
    let status =
        json!({"status": "active", "host_token": HOST_TOKEN, "provider_id": "prov_7", "model_config": [model]});
    Answer::Json(200, status)
}

/// A coordinator that issues a code; `polls` answers the polls, numbered from 0.
fn coordinator(polls: impl Fn(usize) -> Answer + Send + Sync + 'static) -> Backend {
    let asked = AtomicUsize::new(0);
    Backend::new(move |request| match request.line().as_str() {
        ISSUE => issued(),
        POLL => polls(asked.fetch_add(1, Ordering::SeqCst)),
        line => panic!("setup asked {line}"),
    })
}

fn arguments<'a>(base: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["setup", "--coordinator", base, "--allow-insecure"], more].concat()
}

fn set_up(home: &Scratch, base: &str, more: &[&str]) -> Ran {
    let ran = cli_within(secs(30), home.path(), &arguments(base, more), &[]);
    for secret in [POLL_TOKEN, HOST_TOKEN] {
        assert!(!ran.stdout.contains(secret) && !ran.stderr.contains(secret), "a secret is shown: {}", ran.stdout);
    }
    ran
}

fn assert_done(ran: &Ran) {
    assert_eq!(ran.code, Some(0), "{}\n{}", ran.stdout, ran.stderr);
}

const USUAL: &str = ".config/usepod-agent/agent.toml";

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

#[test]
fn pairing_follows_the_protocol_and_writes_a_valid_file() {
    let server = coordinator(|n| if n < 2 { pending() } else { active() });
    let home = Scratch::new();
    let began = Instant::now();
    let ran = set_up(&home, &server.url(), &[]);
    assert_done(&ran);
    assert!(began.elapsed() >= ms(1600), "three questions, 0.8 s apart");

    let seen = server.seen();
    assert_eq!(seen.iter().map(Request::line).collect::<Vec<_>>(), [ISSUE, POLL, POLL, POLL]);
    let key = seen[0].json()["agent_pubkey"].as_str().expect("a key").to_owned();
    assert_eq!(unbase64(&key).len(), 32);
    for poll in &seen[1..] {
        let poll = poll.json();
        assert_eq!(poll["poll_token"], POLL_TOKEN);
        assert_eq!(poll["capabilities"]["agent_version"], env!("CARGO_PKG_VERSION"));
        assert!(poll["capabilities"]["backends"].is_array(), "{poll}");
    }

    let page = format!("{}/host/pair", server.url());
    for word in [page.as_str(), CODE, "10:00", "prov_7", "host…cdef", USUAL, "usepod-agent service install\n"] {
        assert!(ran.stdout.contains(word), "no `{word}` in {}", ran.stdout);
    }
    assert!(!ran.stdout.contains('\u{1b}'), "escape codes without a terminal: {:?}", ran.stdout);
    let file = home.join(USUAL);
    assert_eq!(mode(&file), 0o600);
    let toml = text(&file);
    let url = server.url().replace("http", "ws") + "/provider/connect";
    for word in ["# provider_id:  prov_7", &format!("url = \"{url}\""), "max_concurrent = 6", "300000", "450000"] {
        assert!(toml.contains(word), "no `{word}` in {toml}");
    }
    assert!(!toml.contains(HOST_TOKEN), "{toml}");
    let enroll = cli(home.path(), &["enroll", "--allow-insecure"], &[]);
    assert!(enroll.code == Some(0) && enroll.stdout.contains(&key), "{enroll:?}");
    assert!(!file.with_file_name("agent.toml.bak").exists(), "there was nothing to keep");
}

#[test]
fn output_fits_80_and_60_columns_and_is_ascii_without_a_utf8_locale() {
    for width in [80, 60] {
        let server = coordinator(|n| if n == 1 { Answer::Json(500, json!({"error": "at rest"})) } else { active() });
        let home = Scratch::new();
        let environment = [("COLUMNS", &*width.to_string()), ("LC_ALL", "C")];
        let ran = cli_within(secs(30), home.path(), &arguments(&server.url(), &[]), &environment);
        assert_done(&ran);
        let text = ran.stdout;
        assert_fits(&text, width);
        assert!(text.contains(&format!("+{}+", "-".repeat(CODE.len() + 4))), "{text}");
        assert!(text.contains(&format!("|  {CODE}  |")) && text.is_ascii(), "{text}");
    }
}

#[test]
fn unencrypted_coordinator_is_refused_unless_allowed() {
    let home = Scratch::new();
    for base in ["http://192.0.2.7:8787", "ftp://h", "api.usepod.ai", "https://h:x"] {
        let Ran { code, stderr, .. } = cli(home.path(), &["setup", "--coordinator", base], &[]);
        assert_eq!(code, Some(2), "{base}: {stderr}");
        let word = if base.starts_with("http:") { "--allow-insecure" } else { "https://" };
        assert!(stderr.contains(base) && stderr.contains(word), "{base}: {stderr}");
    }
    assert!(fs::read_dir(home.path()).expect("a home").next().is_none());
    // Loopback needs no encryption.
    let server = coordinator(|_| active());
    let ran = cli(home.path(), &["setup", "--coordinator", &server.url()], &[]);
    assert!(ran.code == Some(0) && !ran.stdout.contains("--allow-insecure"), "{ran:?}");
}

#[test]
fn transient_faults_are_reported_once_and_retried() {
    let huge = format!("{{\"status\":\"active\",\"pad\":\"{}\"}}", "x".repeat(2 << 20));
    type Fault = fn(&str) -> Answer;
    let faults: [(&str, Fault, &str); 8] = [
        ("a status of 500", |_| Answer::Json(500, json!({"error": {"message": "at rest"}})), "500: at rest"),
        ("a status of 429", |_| Answer::Json(429, json!({})), "429"),
        ("garbage", |_| Answer::Raw(response(200, "text/html", "<h1>\u{1b}[2J</h1>")), "not a JSON object"),
        ("no HTTP", |_| Answer::RawThenClose(b"hello\r\n\r\n".to_vec()), "no answer from"),
        ("a hang-up", |_| Answer::RawThenClose(Vec::new()), "no answer from"),
        ("no status", |_| Answer::Json(200, json!({"x": 1})), "no `status`"),
        ("a new status", |_| Answer::Json(200, json!({"status": "a\nb"})), "`a\\nb`"),
        ("too much", |huge| Answer::Raw(response(200, "application/json", huge)), "longer than"),
    ];
    side_by_side(faults, |(name, fault, word)| {
        let huge = huge.clone();
        let server = coordinator(move |n| match n {
            1 | 2 => fault(&huge),
            0 | 3 => pending(),
            _ => active(),
        });
        let home = Scratch::new();
        let ran = set_up(&home, &server.url(), &[]);
        assert_done(&ran);
        for word in [word, "trying again", "answers again"] {
            assert_eq!(ran.stdout.matches(word).count(), 1, "{name}: `{word}` in {}", ran.stdout);
        }
        assert!(!ran.stdout.contains('\u{1b}'), "{name}: {:?}", ran.stdout);
        assert!(home.join(USUAL).exists(), "{name}");
    });
}

#[test]
fn coordinator_that_is_not_up_yet_is_awaited() {
    let address = nobody_at("127.0.0.93");
    let home = Scratch::new();
    let base = format!("http://{address}");
    let mut setup = Agent::run(home.path(), &arguments(&base, &[]));
    setup.stdout.wait_line(&["no answer from", &base]);
    let asked = AtomicUsize::new(0);
    let server = Backend::on(&address, move |request| match request.line().as_str() {
        ISSUE if asked.fetch_add(1, Ordering::SeqCst) == 0 => Answer::Json(200, json!({"pair_code": ""})),
        ISSUE => issued(),
        _ => active(),
    });
    assert_eq!(setup.wait(secs(20)).code(), Some(0), "{}", setup.stdout.text());
    setup.stdout.wait_line(&["answers again"]);
    assert_eq!(server.seen().iter().filter(|request| request.line() == ISSUE).count(), 2);
}

#[test]
fn permanent_faults_end_the_pairing_with_the_reason_and_leave_the_file_unchanged() {
    let elsewhere = Backend::new(|request| panic!("followed to {}", request.line()));
    let target = format!("{}/v1/host/pair/issue", elsewhere.url());
    let redirect = format!("HTTP/1.1 307 Moved\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n").into_bytes();
    let refusal = |more: &str| Answer::Json(403, json!({"error": {"message": format!("this key is banned{more}")}}));
    // The coordinator quotes the token, which must not be shown.
    let quoting = move || refusal(&format!(": {POLL_TOKEN}"));
    let soon = json!({"pair_code": CODE, "poll_token": POLL_TOKEN, "expires_at": now() + 2});
    type Play = Box<dyn Fn(&str) -> Answer + Send + Sync>;
    let cases: Vec<(&str, Play)> = vec![
        ("403: this key is banned", Box::new(move |_| refusal(""))),
        ("403: this key is banned", Box::new(move |line| if line == ISSUE { issued() } else { quoting() })),
        ("redirect", Box::new(move |_| Answer::Raw(redirect.clone()))),
        (
            "expired",
            Box::new(|line| if line == ISSUE { issued() } else { Answer::Json(200, json!({"status": "expired"})) }),
        ),
        // Expired by the clock, whatever the server answers.
        ("expired", Box::new(move |line| if line == ISSUE { Answer::Json(200, soon.clone()) } else { pending() })),
    ];
    side_by_side(cases, |(word, play)| {
        let server = Backend::new(move |request| play(&request.line()));
        let home = Scratch::new();
        let ran = set_up(&home, &server.url(), &[]);
        assert_eq!(ran.code, Some(1), "{word}: {}", ran.stdout);
        assert!(ran.stderr.contains(word) && ran.stderr.contains("again"), "{word}: {}", ran.stderr);
        assert!(!home.join(USUAL).exists(), "{word}");
    });
    assert!(elsewhere.seen().is_empty());
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_secs()
}

#[test]
fn signal_ends_the_pairing_at_once_even_during_a_request() {
    let server = coordinator(|_| Answer::Hold);
    let home = Scratch::new();
    let base = server.url();
    let mut setup = Agent::run(home.path(), &arguments(&base, &[]));
    let _held = server.next();
    setup.signal("INT");
    assert_eq!(setup.wait(secs(3)).code(), Some(1));
    setup.stderr.wait_line(&["stopped", "unchanged"]);
    assert!(!home.join(USUAL).exists());
}

#[test]
fn ca_file_applies_to_the_pairing_too() {
    let server = coordinator(|_| active());
    let authority = Authority::new();
    let proxy = TlsProxy::new(&authority, Flaw::None, server.address());
    let home = Scratch::new();
    let ca_file = authority.write(&home);
    home.write(
        USUAL,
        format!(
            "[coordinator]\nurl = \"{}\"\nca_file = {ca_file:?}\n[pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 2\n",
            proxy.url()
        ),
    );
    // The coordinator's WebSocket URL is accepted, too.
    let Ran { code, stdout, stderr } =
        cli_within(secs(30), home.path(), &["setup", "--coordinator", &proxy.url()], &[]);
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    let next = "  usepod-agent service install\n  usepod-agent service start\n  usepod-agent status --watch\n";
    assert!(stdout.ends_with(next), "{stdout}");
    let new = text(home.join(USUAL));
    assert!(new.contains(&format!("url = \"{}\"", proxy.url())) && new.contains("ca_file = "), "{new}");
}

/// The steps of a new operator, with the demo in place of the market.
#[test]
fn paired_agent_serves_the_demos_front_door() {
    let backend = Backend::vllm_with(&["m"], |_| Answer::Raw(response(200, "text/event-stream", sse(7, 13))));
    let home = Scratch::new();
    let market = Agent::run(home.path(), &["demo", "--await-agent", "--port", "0", "--listen", "127.0.0.1:0"]);
    let address = |line: String| line[line.find("http://").expect("an address")..].trim().to_owned();
    let base = address(market.stdout.wait_line(&["  coordinator "]));
    let door = address(market.stdout.wait_line(&["  front door "]));
    let command = market.stdout.wait_line(&["usepod-agent setup --coordinator", &base]);
    assert!(!command.contains("--allow-insecure"), "{command}");
    let old = format!(
        "[coordinator]\nurl = \"wss://h/\"\n[[backends]]\n{}\n[pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 2\n",
        backend.toml()
    );
    home.write(USUAL, old);

    let mut setup = Agent::run(home.path(), &arguments(&base, &[]));
    let line = setup.stdout.wait_line(&["│"]);
    let code = line.trim_matches(['│', ' ']);
    let client: ureq::Agent =
        ureq::Agent::config_builder().proxy(None).http_status_as_error(false).timeout_global(Some(SOON)).build().into();
    let page = format!("{base}/host/pair");
    let mut shown = client.get(&page).call().expect("the page");
    assert!(shown.headers().contains_key("date"));
    assert!(shown.body_mut().read_to_string().expect("a text").contains("name=\"code\""));
    assert_eq!(client.post(&page).send("code=AAAA-AAAA").expect("an answer").status(), 404);
    assert_eq!(client.post(&page).send(format!("code={code}")).expect("an answer").status(), 200);
    assert_eq!(setup.wait(SOON).code(), Some(0), "{}", setup.stdout.text());
    setup.stdout.wait_line(&["m  input 0.10  output 0.10"]);

    let mut agent = Agent::run(home.path(), &["run"]);
    market.stdout.wait_line(&["agent", "demo-", "offers", "m"]);
    let ask = json!({"model": "m", "messages": []}).to_string();
    let mut answer = client.post(format!("{door}/chat/completions")).send(ask).expect("an answer");
    let answer: Value = serde_json::from_str(&answer.body_mut().read_to_string().expect("a text")).expect("JSON");
    assert_eq!(answer["choices"][0]["message"]["content"], "hello world", "{answer}");
    agent.signal("TERM");
    assert_eq!(agent.wait(SOON).code(), Some(0));
    market.stdout.wait_line(&["agent", "disconnected"]);
    let mut market = market;
    market.signal("INT");
    assert_eq!(market.wait(SOON).code(), Some(0));
}

#[test]
fn await_agent_refuses_options_that_run_an_agent_or_leave_this_machine() {
    let home = Scratch::new();
    for (arguments, word) in [
        (&["demo", "--await-agent", "--once"][..], "--once"),
        (&["demo", "--await-agent", "--listen", "0.0.0.0:0"], "127.0.0.1"),
        (&["demo", "--await-agent", "--listen", "8080"], "8080"),
        (&["demo", "--listen", "127.0.0.1:0"], "--await-agent"),
    ] {
        let Ran { code, stderr, .. } = cli(home.path(), arguments, &[]);
        assert_eq!(code, Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains(word), "{arguments:?}: {stderr}");
    }
}
