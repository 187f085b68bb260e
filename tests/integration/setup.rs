//! `setup`: the pairing, with a scripted coordinator and with the demo's, and its changes to `agent.toml`.

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
    for word in
        [page.as_str(), CODE, "10:00", "prov_7", "host…cdef", USUAL, "usepod-agent service install --allow-insecure"]
    {
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
    // Loopback needs no encryption for the pairing; the agent still needs the option.
    let server = coordinator(|_| active());
    let ran = cli(home.path(), &["setup", "--coordinator", &server.url()], &[]);
    assert!(ran.code == Some(0) && ran.stdout.contains("service install --allow-insecure"), "{ran:?}");
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
fn handwritten_settings_survive_and_are_sent_to_the_coordinator() {
    let backend = Backend::vllm(&["m", "not-offered"]);
    let server = coordinator(|_| active());
    let home = Scratch::new();
    let old = format!(
        "# mine\n[operator]\ndisplay_name = \"Rig\"\n[coordinator]\nurl = \"wss://old.example/\"\n\
         enrollment_code = \"POD-ENROLL-OLD\"\n[identity]\nkey_path = \"{}\"\n\
         [[backends]]\n{}\nmodels = [\"m\"]\nmax_concurrent = 3\n\
         [[backends]]\nkind = \"venice\"\napi_key_env = \"NOT_SET\"\nmarkup = 0.05\n\
         [pricing]\ndefault_input_per_1m = 111\ndefault_output_per_1m = 222\n\
         [pricing.models]\nm = {{ input_per_1m = 1 }}\nother = {{ input_per_1m = 5 }}\n\
         [limits]\nmax_concurrent = 99 # mine, too\ndrain_seconds = 7\n[my.own]\nkey = [1, 2]\n",
        home.join("keys/id.key").display(),
        backend.toml(),
    );
    let file = home.write("conf/agent.toml", &old);
    set_mode(&file, 0o644);
    let named = file.to_str().expect("UTF-8");
    let ran = set_up(&home, &server.url(), &["--config", named]);
    assert_done(&ran);
    assert!(home.join("keys/id.key").exists() && !home.join(".usepod-agent").exists());

    let printed = server.seen()[1].json()["capabilities"]["backends"].clone();
    let ours = printed.as_array().expect("a list").iter().find(|b| b["url"] == backend.url().as_str());
    assert_eq!(ours, Some(&json!({"kind": "vllm", "url": backend.url(), "models": ["m"]})), "{printed}");

    let new = text(&file);
    for kept in [
        "display_name = \"Rig\"",
        "models = [\"m\"]",
        "max_concurrent = 3\n",
        "api_key_env = \"NOT_SET\"",
        "markup = 0.05",
        "default_input_per_1m = 111\n",
        "other = { input_per_1m = 5 }",
        "drain_seconds = 7",
        "[my.own]\nkey = [1, 2]",
        "m = { input_per_1m = 300000, output_per_1m = 450000 }",
        "max_concurrent = 6 # mine, too\n",
        "# mine\n[operator]\n",
    ] {
        assert!(new.contains(kept), "no `{kept}` in {new}");
    }
    for gone in ["old.example", "POD-ENROLL", "max_concurrent = 99"] {
        assert!(!new.contains(gone), "`{gone}` in {new}");
    }
    assert!(ran.stdout.contains("m  input 0.30  output 0.45"), "{}", ran.stdout);
    assert!(
        ran.stdout.contains(&format!("usepod-agent service install --config {named} --allow-insecure")),
        "{}",
        ran.stdout
    );
    let bak = home.join("conf/agent.toml.bak");
    assert_eq!(text(&bak), old);
    assert_eq!((mode(&file), mode(&bak)), (0o600, 0o600));

    // A second, identical pairing writes nothing.
    assert_done(&set_up(&home, &server.url(), &["--config", named]));
    assert_eq!((text(&file), text(&bak)), (new.clone(), old.clone()));
    // A third one keeps the first backup.
    let edited = format!("{}# edited\n", new.replace("max_concurrent = 6", "max_concurrent = 7"));
    fs::write(&file, &edited).expect("an edit");
    assert_done(&set_up(&home, &server.url(), &["--config", named]));
    assert_eq!(text(&file), format!("{new}# edited\n"));
    assert_eq!((text(&bak), text(home.join("conf/agent.toml.bak.1"))), (edited, old));
}

#[test]
fn edit_during_the_pairing_is_not_lost() {
    let home = Scratch::new();
    let pricing = "[coordinator]\nurl = \"wss://h/\"\n[pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = ";
    let (old, edited) = (format!("{pricing}2\n"), format!("{pricing}3\n# mine\n"));
    let file = home.write(USUAL, &old);
    let (edit, place) = (edited.clone(), file.clone());
    let server = coordinator(move |_| {
        fs::write(&place, &edit).expect("an edit");
        active()
    });
    assert_done(&set_up(&home, &server.url(), &[]));
    for kept in ["default_output_per_1m = 3\n", "# mine\n"] {
        assert!(text(&file).contains(kept), "{}", text(&file));
    }
    assert_eq!(text(file.with_file_name("agent.toml.bak")), edited);
}

#[test]
fn error_of_a_backend_is_escaped_before_it_is_printed() {
    let backend = Backend::new(|_| Answer::Json(500, json!("\u{9b}31m\u{202e}gone")));
    let server = coordinator(|_| active());
    let home = Scratch::new();
    let old = format!(
        "[coordinator]\nurl = \"wss://h/\"\n[[backends]]\n{}\n\
         [pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 2\n",
        backend.toml()
    );
    home.write(USUAL, &old);
    let ran = set_up(&home, &server.url(), &[]);
    assert_done(&ran);
    // Before the pairing, and with the offer after it.
    assert_eq!(ran.stdout.matches("\\u{9b}31m\\u{202e}gone").count(), 2, "{}", ran.stdout);
    assert!(!(ran.stdout + &ran.stderr).contains(['\u{9b}', '\u{202e}']));
}

#[test]
fn setup_changes_only_what_the_pairing_decides_however_the_file_is_spelled() {
    let server = coordinator(|_| active());
    let url = server.url().replace("http", "ws") + "/provider/connect";
    let head = format!("# paired with:  {}\n# provider_id:  prov_7\n# host token:   host…cdef\n\n", server.url());
    // A server on a default port of this machine would be added if the file did not name it.
    let usual = [("vllm", 8000), ("llamacpp", 8080), ("llamacpp", 9931), ("lmstudio", 1234), ("ollama", 11434)];
    let listed =
        usual.map(|(kind, port)| format!("  {{kind = '{kind}',url=\"http://localhost:{port}\"}}, # one\n")).concat();
    let headed =
        usual.map(|(kind, port)| format!("[[backends]]#one\nkind='{kind}'\nurl = \"http://localhost:{port}\"\n"));
    let tables = "# dotted\ncoordinator . url=\"URL\"#here\n  pricing.default_input_per_1m = 1_0 # in\n\
                  pricing.\"default_output_per_1m\" = 0x2\n\n# each of its own\n[pricing.models.\"m\"]\t# ours\n\
                  output_per_1m=OUTPUT\ninput_per_1m =  INPUT\n[limits]\nmax_concurrent=JOBS\n# the end";
    let braces = "coordinator = {url=\"URL\"} # here\n\
                  pricing = { default_input_per_1m = 1, default_output_per_1m = 2, models = { \n\
                  m = { input_per_1m = INPUT, # in\n output_per_1m = OUTPUT } } }\n\
                  limits = {max_concurrent = JOBS, \"odd\" = [ 1,2 ]}\nunknown = '''\n  text'''\n";
    let files = [format!("backends = [\n{listed}]\n{tables}"), format!("{braces}{}", headed.concat())];
    let filled = |text: &str, [url, input, output, jobs]: [&str; 4]| {
        text.replace("URL", url).replace("INPUT", input).replace("OUTPUT", output).replace("JOBS", jobs)
    };
    let spellings: [fn(String) -> String; 3] =
        [|text| text, |text| text.replace('\n', "\r\n"), |text| format!("\u{feff}{text}")];
    side_by_side(spellings, |spelled| {
        for template in &files {
            let home = Scratch::new();
            let old = spelled(filled(template, ["wss://old/", "1", "0o7", "2"]));
            let file = home.write(USUAL, &old);
            assert_done(&set_up(&home, &server.url(), &[]));
            let body = filled(template, [&url, "300000", "450000", "6"]);
            assert_eq!(text(&file), spelled(format!("{head}{body}")));
            let bak = file.with_file_name("agent.toml.bak");
            assert_eq!(text(&bak), old);

            // A second, identical pairing writes nothing.
            fs::remove_file(&bak).expect("a copy");
            let modified = || fs::metadata(&file).and_then(|file| file.modified()).expect("a time");
            let before = modified();
            assert_done(&set_up(&home, &server.url(), &[]));
            assert_eq!((modified(), bak.exists()), (before, false));
        }
    });
}

#[test]
fn invalid_file_is_named_and_left_unchanged() {
    let server = coordinator(|_| active());
    let home = Scratch::new();
    for broken in ["[coordinator]\nurl = 7\n", "not toml", "\u{0}"] {
        let file = home.write(USUAL, broken);
        let ran = set_up(&home, &server.url(), &[]);
        assert_eq!(ran.code, Some(2), "{}", ran.stdout);
        assert!(ran.stderr.contains("agent.toml:"), "{}", ran.stderr);
        assert_eq!(text(&file), broken);
    }
    assert!(server.seen().is_empty());
    assert_eq!(fs::read_dir(home.join(".config/usepod-agent")).expect("the folder").count(), 1);
}

#[test]
fn symlink_stays_and_an_unwritable_path_is_named_before_the_pairing() {
    let server = coordinator(|_| active());
    let home = Scratch::new();
    let old = "[coordinator]\nurl = \"wss://h/\"\n[pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 2\n";
    let real = home.write("dotfiles/agent.toml", old);
    let link = home.join("link.toml");
    std::os::unix::fs::symlink(&real, &link).expect("a link");
    // The shell does not expand `~` after `=`.
    assert_done(&set_up(&home, &server.url(), &["--config=~/link.toml"]));
    assert!(fs::symlink_metadata(&link).expect("a link").is_symlink());
    assert!(text(&real).contains("provider_id:  prov_7"));
    assert_eq!(text(home.join("link.toml.bak")), old);

    let asked = server.seen().len();
    home.write("a-file", "");
    for place in [home.join("a-file/agent.toml"), "/proc/self/agent.toml".into()] {
        let place = place.to_str().expect("UTF-8");
        let ran = set_up(&home, &server.url(), &["--config", place]);
        assert!(matches!(ran.code, Some(1 | 2)), "{place}: {:?}", ran.code);
        assert!(ran.stderr.contains(place), "{place}: {}", ran.stderr);
    }
    assert_eq!(server.seen().len(), asked);
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
    market.stdout.wait_line(&["usepod-agent setup --coordinator", &base, "--allow-insecure"]);
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

    let mut agent = Agent::run(home.path(), &["run", "--allow-insecure"]);
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
