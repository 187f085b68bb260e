//! `doctor`: the broken layer is named with its fix, the layers above it are skipped, and all others pass.

use std::fs;
use std::io::Read;
use std::time::Duration;

use serde_json::json;
use time::OffsetDateTime;

use crate::support::*;

/// The longest run without the test completion: every check times out.
const LONGEST: Duration = secs(32);

/// A report and its exit code.
struct Report {
    code: Option<i32>,
    text: String,
}

impl Report {
    /// Runs `doctor` to its end.
    fn by(setup: &Setup, options: &[&str]) -> Self {
        let words: Vec<&str> = std::iter::once("doctor").chain(options.iter().copied()).collect();
        let (code, text) = setup.start_command(&words).finish(LONGEST);
        Self { code, text }
    }

    /// The line of a check, and the fix below it, if any.
    fn line(&self, mark: char, name: &str, words: &[&str]) -> (&str, &str) {
        let lines: Vec<&str> = self.text.lines().collect();
        let start = format!("  {mark} {name} ");
        let is_it = |line: &&str| line.starts_with(&start) && words.iter().all(|word| line.contains(word));
        let at = lines.iter().position(is_it);
        let at = at.unwrap_or_else(|| panic!("no `{mark} {name}` with {words:?} in:\n{}", self.text));
        let below = lines.get(at + 1).copied().unwrap_or_default().trim_start();
        (lines[at], below.strip_prefix("fix: ").unwrap_or_default())
    }

    fn assert_passed(&self, names: &[&str]) {
        for name in names {
            self.line('✓', name, &[]);
        }
    }

    fn assert_skipped(&self, names: &[&str]) {
        for name in names {
            self.line('-', name, &[]);
        }
    }

    /// Only this layer is broken, and its fix contains `fix`.
    fn assert_only_broken(&self, name: &str, words: &[&str], fix: &str) {
        let (_, printed) = self.line('✗', name, words);
        assert!(printed.contains(fix), "no `{fix}` in the fix `{printed}` of:\n{}", self.text);
        assert_eq!(self.text.matches("  ✗ ").count(), 1, "{}", self.text);
        let verdict = self.text.lines().last().unwrap_or_default();
        assert!(verdict.starts_with("1 of ") && verdict.contains(&format!("begin with {name}: ")), "{verdict}");
        assert_eq!(self.code, Some(1), "{}", self.text);
    }

    fn assert_well(&self) {
        assert!(!self.text.contains('✗'), "{}", self.text);
        assert!(self.text.lines().last().is_some_and(|verdict| verdict.contains("well: ")), "{}", self.text);
        assert_eq!(self.code, Some(0), "{}", self.text);
    }
}

/// A coordinator whose clock is off by this many seconds. With `None` its upgrade responses have no date, only its other
/// responses.
fn coordinator(off: Option<i64>) -> Coordinator {
    Coordinator::played(move |mut dialled| {
        let Some(request) = dialled.request_if_any() else { return };
        if request.method == "HEAD" {
            let date = http_date(0);
            return dialled
                .send(format!("HTTP/1.1 404 Not Found\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n").as_bytes());
        }
        let date = off.map(|off| format!("Date: {}\r\n", http_date(off))).unwrap_or_default();
        let head = switching_protocols(request.header("sec-websocket-key").expect("a key"), &date);
        let challenge = json!({"type": "auth_challenge", "nonce": base64(b"nonce")}).to_string();
        dialled.send(&[head.as_bytes(), &encode(TEXT, true, challenge.as_bytes())].concat());
        let _ = (&dialled.stream).read_to_end(&mut Vec::new());
    })
}

fn http_date(off: i64) -> String {
    let at = OffsetDateTime::now_utc() + time::Duration::seconds(off);
    let (weekday, month) = (at.weekday().to_string(), at.month().to_string());
    let (year, day) = (at.year(), at.day());
    let (hour, minute, second) = at.to_hms();
    format!("{}, {day:02} {} {year} {hour:02}:{minute:02}:{second:02} GMT", &weekday[..3], &month[..3])
}

/// A backend that lists one model and serves it.
fn backend() -> Backend {
    Backend::vllm_with(&["m"], |_| Answer::Raw(response(200, "text/event-stream", sse(1, 1))))
}

/// A setup with an enrolled identity and a supervisor, and without backends.
fn setup(coordinator_url: &str) -> Setup {
    let setup = Setup::new(coordinator_url);
    let bin = setup.scratch.join("bin");
    let crontab =
        "#!/bin/sh\ncat <<'.'\n# >>> usepod-agent\n* * * * * exec 'x' run --cron --config 'y'\n# <<< usepod-agent\n.\n";
    set_mode(setup.scratch.write("bin/crontab", crontab), 0o755);
    let setup = setup.env("PATH", &format!("{}:/usr/bin:/bin", bin.display()));
    assert_eq!(setup.start_command(&["enroll"]).finish(SOON).0, Some(0));
    let identity = fs::read_to_string(setup.identity()).expect("the identity");
    fs::write(setup.identity(), identity.replace("-----END", "provider_id: prov_7\n-----END")).expect("written");
    setup
}

#[test]
fn healthy_setup_passes_every_check_and_exits_0() {
    let (coordinator, backend) = (coordinator(Some(0)), backend());
    let setup = setup(&coordinator.url()).backend(backend.toml());
    let report = Report::by(&setup, &[]);
    report.assert_well();
    report.assert_passed(&["config", "identity", "enrollment", "lock", "disk", "dns", "tcp", "websocket", "challenge"]);
    report.assert_passed(&["clock", "health", "models", "window", "completion", "cancel"]);
    report.line('✓', "enrollment", &["prov_7"]);
    report.line('-', "tls", &["ws://"]);
    report.line('✓', "models", &["lists 1, 1 to offer: m"]);
    report.line('✓', "completion", &["first byte after", " ms"]);
    // One to complete and one to cancel, both as small as possible.
    let posts: Vec<Request> = backend.seen().into_iter().filter(|request| request.method == "POST").collect();
    assert_eq!(posts.iter().map(|p| p.json()["max_tokens"].clone()).collect::<Vec<_>>(), [json!(1), json!(64)]);
    // Nothing else is left behind.
    let left = fs::read_dir(setup.scratch.join(".usepod-agent")).expect("the folder").count();
    assert_eq!(left, 1, "the identity alone");

    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_well();
    report.line('-', "completion", &["--no-inference"]);
    assert_eq!(backend.posts(), 2);
}

#[test]
fn config_error_is_reported_with_its_line_and_ends_the_checks() {
    let setup = setup("wss://coordinator.example/").limits("max_concurrent = 0");
    let report = Report::by(&setup, &[]);
    report.assert_only_broken("config", &["agent.toml:", "`[limits] max_concurrent` = 0", "out of range"], "1 to 256");
    let (code, text) = Agent::run(Scratch::new().path(), &["doctor"]).finish(SOON);
    let report = Report { code, text };
    report.assert_only_broken("config", &["no agent.toml found"], "--config FILE");
}

#[test]
fn identity_that_others_can_read_is_broken_and_a_missing_one_is_not_created() {
    let (coordinator, backend) = (coordinator(Some(0)), backend());
    let setup = setup(&coordinator.url()).backend(backend.toml());
    set_mode(setup.identity(), 0o644);
    let report = Report::by(&setup, &["--no-inference"]);
    let fix = format!("chmod 600 '{}'", setup.identity().display());
    report.assert_only_broken("identity", &["0644"], &fix);

    set_mode(setup.identity(), 0o600);
    fs::write(setup.identity(), "no identity").expect("written");
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_only_broken("identity", &["is invalid"], "backup");

    fs::remove_file(setup.identity()).expect("removed");
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_well();
    report.line('!', "identity", &["does not exist"]);
    assert!(!setup.identity().exists(), "the doctor made an identity");
}

#[test]
fn running_agent_is_named_and_not_disturbed() {
    let coordinator = Coordinator::new();
    let backend = Backend::vllm(&["m"]);
    let setup = setup(&coordinator.url()).backend(backend.toml());
    let mut agent = setup.start();
    let session = coordinator.session();
    let mut doctor = setup.start_command(&["doctor", "--no-inference"]);
    let second = coordinator.accept();
    second.send(&json!({"type": "auth_challenge", "nonce": base64(b"nonce")}));
    let (code, text) = doctor.finish(LONGEST);
    let report = Report { code, text };
    report.assert_well();
    report.line('✓', "lock", &[&format!("pid {}", agent.pid()), "last sign of life"]);
    second.assert_no_frame("an answer to the challenge", SOON, |_| true);
    let id = session.job("m", json!({}));
    backend.next().finish();
    session.outcome(&id).done();
    agent.assert_running();
}

#[test]
fn agent_without_a_sign_of_life_is_reported_as_hung() {
    let setup = setup("wss://nowhere.invalid/");
    // The owner is this process, whose last liveness is the boot of the machine.
    let stat = fs::read_to_string("/proc/self/stat").expect("our own state");
    let started = stat.rsplit(')').next().and_then(|fields| fields.split_whitespace().nth(19)).expect("a start");
    let lock = format!("{:<10}\n{started:<20}\n{:<20}\n", std::process::id(), 0);
    setup.scratch.write(".usepod-agent/identity.key.lock", lock);
    let report = Report::by(&setup, &["--no-inference"]);
    let pid = format!("pid {}", std::process::id());
    let (_, fix) = report.line('✗', "lock", &[&pid, "hangs"]);
    assert!(fix.contains(&format!("kill -KILL {}", std::process::id())), "{fix}");
}

#[test]
fn disk_that_cannot_be_written_is_broken() {
    let full = setup("wss://nowhere.invalid/").after("trap '' XFSZ; ulimit -f 0");
    Report::by(&full, &["--no-inference"]).line('✗', "disk", &["File too large"]);
    let locked = setup("wss://nowhere.invalid/").bound_by_modes();
    set_mode(locked.scratch.join(".usepod-agent"), 0o555);
    let report = Report::by(&locked, &["--no-inference"]);
    set_mode(locked.scratch.join(".usepod-agent"), 0o755);
    let (_, fix) = report.line('✗', "disk", &["Permission denied"]);
    assert!(fix.contains("chown") && fix.contains(".usepod-agent"), "{fix}");
}

#[test]
fn unresolvable_name_and_closed_port_are_distinguished() {
    let backend = backend();
    let no_name = setup("wss://coordinator.invalid/").backend(backend.toml());
    let report = Report::by(&no_name, &["--no-inference"]);
    report.assert_only_broken("dns", &["coordinator.invalid"], "resolv.conf");
    report.assert_skipped(&["tcp", "tls", "websocket", "challenge", "clock"]);

    let nobody = nobody_at("127.0.0.73");
    let closed = setup(&format!("wss://{nobody}/")).backend(backend.toml());
    let report = Report::by(&closed, &["--no-inference"]);
    report.assert_only_broken("tcp", &[&nobody, "refused"], "check host and port");
    report.assert_passed(&["dns"]);
    report.assert_skipped(&["tls", "websocket", "challenge", "clock"]);
}

#[test]
fn certificate_faults_are_reported_with_issuer_and_cause() {
    let cases = [
        (Flaw::None, false, "unknown authority", "ca_file"),
        (Flaw::Expired, true, "to 2021-01-01", "timedatectl"),
        (Flaw::NotYet, true, "from 2090-01-01", "timedatectl"),
        (Flaw::WrongName, true, "`localhost`: issued for another name", "check the host"),
    ];
    side_by_side(cases, |(flaw, is_trusted, words, fix)| {
        let (coordinator, backend, authority) = (coordinator(Some(0)), backend(), Authority::new());
        let proxy = TlsProxy::new(&authority, flaw, coordinator.address());
        let mut setup = setup(&proxy.url()).backend(backend.toml());
        if is_trusted {
            let ca_file = authority.write(&setup.scratch);
            setup = setup.coordinator(&format!("ca_file = {ca_file:?}"));
        }
        let report = Report::by(&setup, &["--no-inference"]);
        report.assert_only_broken("tls", &[words, "rcgen self signed cert"], fix);
        report.assert_passed(&["dns", "tcp"]);
        report.assert_skipped(&["websocket", "challenge", "clock"]);
    });
}

#[test]
fn certificate_without_fault_is_reported_with_issuer_expiry_and_version() {
    for (flaw, mark, words) in [(Flaw::None, '✓', "on 4096-01-01"), (Flaw::EndsSoon, '!', "expires in 5 day(s)")] {
        let (coordinator, backend, authority) = (coordinator(Some(0)), backend(), Authority::new());
        let proxy = TlsProxy::new(&authority, flaw, coordinator.address());
        let setup = setup(&proxy.url()).backend(backend.toml());
        let ca_file = authority.write(&setup.scratch);
        let setup = setup.coordinator(&format!("ca_file = {ca_file:?}"));
        let report = Report::by(&setup, &["--no-inference"]);
        report.assert_well();
        report.line(mark, "tls", &["TLS 1.3", "rcgen self signed cert", words]);
        report.assert_passed(&["websocket", "challenge", "clock"]);
    }
}

#[test]
fn peer_without_tls_is_not_reported_as_a_bad_certificate() {
    let backend = backend();
    let setup = setup(&format!("wss://{}/", backend.address())).backend(backend.toml());
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_only_broken("tls", &[], "check host and port");
}

#[test]
fn clock_is_compared_with_the_coordinators() {
    for (off, mark, words) in
        [(3600, '✗', "behind"), (-3600, '✗', "ahead of"), (120, '!', "behind"), (-5, '✓', "within")]
    {
        let (coordinator, backend) = (coordinator(Some(off)), backend());
        let setup = setup(&coordinator.url()).backend(backend.toml());
        let report = Report::by(&setup, &["--no-inference"]);
        report.line(mark, "clock", &[words]);
        if mark == '✗' {
            report.assert_only_broken("clock", &[" min"], "timedatectl set-ntp true");
        } else {
            report.assert_well();
        }
    }
}

/// The agent's own clock is off, and the date comes from a separate request.
#[test]
fn clock_check_asks_for_the_date_if_the_upgrade_has_none() {
    let (coordinator, backend) = (coordinator(None), backend());
    let setup = Shim::load(setup(&coordinator.url()).backend(backend.toml()));
    Report::by(&setup, &["--no-inference"]).assert_well();
    Shim::of(&setup).set_clock_off_by(-2 * 86400);
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_only_broken("clock", &["behind", "2 d 0 h"], "timedatectl");
}

#[test]
fn slow_coordinator_that_refuses_or_is_silent_is_the_broken_layer() {
    let refusing = Coordinator::played(|mut dialled| {
        dialled.request_if_any();
        dialled.send(format!("HTTP/1.1 502 Bad Gateway\r\nDate: {}\r\n\r\n", http_date(-7200)).as_bytes());
    });
    let silent = Coordinator::new();
    let mute = Coordinator::played(|dialled| {
        dialled.upgrade().ends_within(LONGEST);
    });
    let cases = [
        (&refusing, "websocket", "HTTP 502", "wait"),
        (&silent, "websocket", "no connection within 15 s", "does not respond"),
        (&mute, "challenge", "auth_challenge", "[coordinator] url"),
    ];
    side_by_side(cases, |(coordinator, layer, words, fix)| {
        // A silent backend does not prolong the run.
        let backend = Backend::new(|_| Answer::Hold);
        let setup = setup(&coordinator.url()).backend(backend.toml());
        let report = Report::by(&setup, &["--no-inference"]);
        let (_, printed_fix) = report.line('✗', layer, &[words]);
        assert!(printed_fix.contains(fix), "{}", report.text);
        report.line('✗', "health", &["no response within 3 s"]);
        if words == "HTTP 502" {
            // This response has a date.
            report.line('✗', "clock", &["2 h 0 min ahead of"]);
        }
    });
}

#[test]
fn proxy_is_its_own_layer_and_its_password_is_not_shown() {
    let backend = backend();
    let proxy = Coordinator::played(|mut dialled| {
        dialled.request_if_any();
        dialled.send(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n");
    });
    let url = format!("http://me:s3cret@{}", proxy.address());
    let setup = setup("wss://coordinator.example/").backend(backend.toml()).env("HTTPS_PROXY", &url);
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_only_broken("proxy", &["407"], "NO_PROXY");
    report.line('✓', "dns", &["HTTPS_PROXY"]);
    report.assert_skipped(&["tls", "websocket"]);
    assert!(!report.text.contains("s3cret"), "{}", report.text);
}

/// A healthy server that lists `m`, except for the requests that `other` answers.
fn server(other: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> Backend {
    Backend::new(move |request| {
        other(request).unwrap_or_else(|| match request.line().as_str() {
            "GET /v1/models" => Answer::Json(200, json!({"data": [{"id": "m"}, {"id": "n"}]})),
            line if line.starts_with("GET") => Answer::Json(200, json!({})),
            _ => Answer::Raw(response(200, "text/event-stream", sse(1, 1))),
        })
    })
}

#[test]
fn backend_faults_are_reported_by_their_cause() {
    let loading = || server(|r| (r.target == "/health").then(|| Answer::Json(503, json!({"error": "Loading model"}))));
    let failing = || server(|r| (r.method == "POST").then(|| Answer::Json(500, json!({"error": "out of memory"}))));
    let refusing = || server(|r| (r.target == "/v1/models").then(|| Answer::Json(401, json!({"error": "no key"}))));
    let empty = || server(|r| (r.target == "/v1/models").then(|| Answer::Json(200, json!({"data": []}))));
    let garbage = || server(|r| (r.target == "/health").then(|| Answer::RawThenClose(b"220 smtp\r\n".to_vec())));
    let fine = || server(|_| None);
    let cases: [(Backend, &str, &str, &str, &str, &str); 9] = [
        (loading(), "llamacpp", "", "health", "loading its model", "wait"),
        (garbage(), "vllm", "", "health", "HTTP", "correct `url`"),
        (refusing(), "llamacpp", "", "models", "rejected the API key", "api_key_env"),
        (empty(), "ollama", "", "models", "lists 0 model", "ollama pull"),
        (failing(), "vllm", "", "completion", "out of memory", "log"),
        (fine(), "vllm", "models = [\"m\", \"N\"]", "models", "model unknown: the server does not list `N`", "\"n\""),
        (fine(), "vllm", "models = [\"other-model\"]\n#", "models", "other-model", "it lists: m, n"),
        (fine(), "vllm", "models = []", "models", "none of them to offer", "remove `models`"),
        (fine(), "vllm", "api_key_env = \"NO_SUCH_KEY\"", "key", "NO_SUCH_KEY", "export NO_SUCH_KEY="),
    ];
    let coordinator = coordinator(Some(0));
    side_by_side(cases, |(backend, kind, more, layer, words, fix)| {
        let toml = format!("kind = \"{kind}\"\nurl = \"{}\"\n{more}", backend.url());
        let report = Report::by(&setup(&coordinator.url()).backend(toml), &[]);
        let (_, printed_fix) = report.line('✗', layer, &[words]);
        assert!(printed_fix.contains(fix), "no `{fix}` for {layer}:\n{}", report.text);
        assert_eq!(report.code, Some(1));
        assert!(report.text.lines().last().is_some_and(|verdict| verdict.contains(&format!("begin with {layer}: "))));
    });
}

#[test]
fn backend_that_is_down_is_reported_with_its_address_and_start_command() {
    let coordinator = coordinator(Some(0));
    let cases =
        [("vllm", "vllm serve"), ("llamacpp", "llama-server"), ("lmstudio", "lms server"), ("ollama", "ollama serve")];
    side_by_side(cases, |(kind, start)| {
        let nobody = nobody_at("127.0.0.74");
        let toml = format!("kind = \"{kind}\"\nurl = \"http://{nobody}\"");
        let report = Report::by(&setup(&coordinator.url()).backend(toml), &[]);
        report.assert_only_broken("health", &["refused"], start);
        assert!(report.text.contains(&format!("backend {kind} at http://{nobody}")), "{}", report.text);
        report.assert_skipped(&["models", "completion"]);
    });
}

#[test]
fn backend_that_dies_of_a_cancel_is_broken() {
    let is_dead = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let dies = is_dead.clone();
    let backend = server(move |request| {
        let is_long = request.method == "POST" && request.json()["max_tokens"] != 1;
        if is_long {
            dies.store(true, std::sync::atomic::Ordering::SeqCst);
        } else if dies.load(std::sync::atomic::Ordering::SeqCst) {
            return Some(Answer::Json(500, json!({"error": "CUDA error"})));
        }
        None
    });
    let coordinator = coordinator(Some(0));
    let report = Report::by(&setup(&coordinator.url()).backend(backend.toml()), &[]);
    report.assert_only_broken("cancel", &["cancelled job", "CUDA error"], "log");
    report.assert_passed(&["completion"]);
}

#[test]
fn context_window_is_that_of_the_loaded_model_and_an_unloaded_model_is_a_warning() {
    let ollama = server(|request| {
        let ps = json!({"models": [{"name": "n", "context_length": 4096}]});
        (request.target == "/api/ps").then(|| Answer::Json(200, ps))
    });
    let lmstudio = server(|request| {
        let models = json!({"data": [{"id": "m", "state": "not-loaded", "max_context_length": 9},
            {"id": "n", "state": "loaded", "loaded_context_length": 2048}]});
        (request.target == "/api/v0/models").then(|| Answer::Json(200, models))
    });
    let router = server(|request| {
        let models =
            json!({"data": [{"id": "m", "status": {"value": "unloaded"}}, {"id": "n", "status": {"value": "loaded"}}]});
        let props = json!({"default_generation_settings": {"n_ctx": 512}});
        match request.target.as_str() {
            "/v1/models" => Some(Answer::Json(200, models)),
            target if target.starts_with("/props?model=n") => Some(Answer::Json(200, props)),
            _ => None,
        }
    });
    let coordinator = coordinator(Some(0));
    let cases = [
        (ollama, "ollama", "m unknown, n 4096", "first job", "ollama run"),
        (lmstudio, "lmstudio", "m 9, n 2048", "first job", "lms load"),
        (router, "llamacpp", "n 512", "not offered", "load it"),
    ];
    side_by_side(cases, |(backend, kind, windows, words, fix)| {
        let toml = format!("kind = \"{kind}\"\nurl = \"{}\"", backend.url());
        let report = Report::by(&setup(&coordinator.url()).backend(toml), &[]);
        report.assert_well();
        report.line('✓', "window", &[windows]);
        let (_, printed_fix) = report.line('!', "loaded", &[words, ": m"]);
        assert!(printed_fix.contains(fix), "{}", report.text);
        // The test completion uses the loaded model.
        report.line('✓', "completion", &["n: first byte"]);
    });
}

#[test]
fn price_of_0_is_a_warning() {
    let (coordinator, backend) = (coordinator(Some(0)), server(|_| None));
    let setup = setup(&coordinator.url()).backend(backend.toml());
    let setup = setup.pricing("[pricing.models]\nn = { input_per_1m = 0, output_per_1m = 1 }");
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_well();
    report.line('!', "prices", &["not offered: n"]);
    report.line('✓', "models", &["lists 2, 1 to offer: m"]);
}

#[test]
fn hosted_backend_gets_no_test_completion() {
    let (coordinator, backend) = (coordinator(Some(0)), server(|_| None));
    let toml = format!("kind = \"openrouter\"\nurl = \"{}/v1\"\napi_key_env = \"THE_KEY\"", backend.url());
    let setup = setup(&coordinator.url()).backend(toml).env("THE_KEY", "sk-secret-123");
    let report = Report::by(&setup, &[]);
    report.assert_well();
    report.line('-', "completion", &["costs money"]);
    report.line('✓', "key", &["`THE_KEY`"]);
    assert_eq!(backend.posts(), 0);
}

#[test]
fn supervisor_that_is_missing_is_broken_and_a_stop_or_pause_is_a_warning() {
    let (coordinator, backend) = (coordinator(Some(0)), backend());
    let setup = setup(&coordinator.url()).backend(backend.toml());
    setup.scratch.write(".usepod-agent/identity.key.stopped", "");
    setup.scratch.write(".usepod-agent/identity.key.paused", "");
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_well();
    assert!(report.line('!', "stopped", &[]).1.contains("usepod-agent service start"));
    assert!(report.line('!', "paused", &[]).1.contains("usepod-agent resume"));

    // Foreign crontab lines are no supervisor.
    setup.scratch.write("bin/crontab", "#!/bin/sh\necho '@daily usepod-agent-backup'\n");
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_only_broken("supervisor", &["nothing restarts"], "usepod-agent service install");

    for (crontab, words) in [
        ("echo 'not allowed' >&2; exit 1", "not allowed"),
        ("exec sleep 60", "does not respond"),
        ("printf '# >>> usepod-agent\\n0 3 * * * mine\\n'", "line 2"),
    ] {
        setup.scratch.write("bin/crontab", format!("#!/bin/sh\n{crontab}\n"));
        let report = Report::by(&setup, &["--no-inference"]);
        report.assert_only_broken("supervisor", &["crontab", words], "service status");
    }

    setup.scratch.write(".config/systemd/user/usepod-agent.service", "[Service]\n");
    fs::remove_file(setup.scratch.join(".usepod-agent/identity.key.stopped")).expect("removed");
    // Root has no user unit.
    let setup = setup.after(
        "[ \"$(id -u)\" != 0 ] || { chown -R 65534 \"$HOME\"; exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$0\" \"$@\"; }",
    );
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_well();
    report.line('!', "supervisor", &["no agent is running"]);
}

/// The report of a machine on which most checks fail, with these variables set.
fn broken_report(variables: &[(&str, &str)]) -> String {
    let setup = setup(&format!("wss://{}/", nobody_at("127.0.0.75")));
    let setup = setup.backend(format!("kind = \"ollama\"\nurl = \"http://{}\"", nobody_at("127.0.0.76")));
    let setup = variables.iter().fold(setup, |setup, (name, value)| setup.env(name, value));
    Report::by(&setup, &[]).text
}

#[test]
fn report_fits_80_and_60_columns() {
    for width in [80, 60] {
        assert_fits(&broken_report(&[("COLUMNS", &width.to_string())]), width);
    }
}

#[test]
fn marks_are_words_without_a_utf8_locale() {
    for locale in [[("LC_ALL", "C"), ("LANG", "en_US.UTF-8")], [("LC_CTYPE", "POSIX"), ("LANG", "")]] {
        let text = broken_report(&locale);
        assert!(text.is_ascii(), "{text}");
        for line in ["\n  ok   config ", "\n  FAIL tcp ", "\n  skip tls ", "skipped: needs tcp"] {
            assert!(text.contains(line), "no `{line}` in:\n{text}");
        }
    }
}

/// On a terminal of `script`, of util-linux.
#[test]
fn color_needs_a_terminal_and_the_absence_of_no_color() {
    let home = Scratch::new();
    for (variables, is_colored) in [
        (&[("TERM", "xterm")][..], true),
        (&[("TERM", "xterm"), ("NO_COLOR", "1")], false),
        (&[("TERM", "dumb")], false),
    ] {
        let mut script = std::process::Command::new("script");
        script.arg("-qec").arg(format!("'{}' doctor", binary().display())).arg("/dev/null").current_dir(home.path());
        script.env_clear().env("HOME", home.path()).envs(variables.iter().copied());
        let output = script.stdin(std::process::Stdio::null()).output().expect("script, of util-linux");
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text.contains("\u{1b}[31mFAIL\u{1b}[0m config"), is_colored, "{variables:?}: {text}");
        assert!(text.contains("config "), "{variables:?}: {text}");
    }
    let (_, text) = Agent::run(home.path(), &["doctor"]).finish(SOON);
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn output_shows_no_secret() {
    let coordinator = coordinator(Some(0));
    let code = "POD-ENROLL-0123-4567-89ab";
    let echo = server(|request| {
        let key = request.header("authorization").unwrap_or_default().to_owned();
        (request.method == "POST").then(|| Answer::Json(401, json!({"error": format!("bad key {key}")})))
    });
    let setup = setup(&coordinator.url())
        .coordinator(&format!("enrollment_code = \"{code}\""))
        .backend(format!("{}\napi_key_env = \"THE_KEY\"", echo.toml()))
        .env("THE_KEY", "sk-secret-123");
    let report = Report::by(&setup, &["--log-level", "trace"]);
    report.assert_only_broken("completion", &["rejected the API key"], "api_key_env");
    let identity = fs::read_to_string(setup.identity()).expect("the identity");
    let seed = identity.lines().find_map(|line| line.strip_prefix("secret: ")).expect("the seed");
    for secret in [code, "sk-secret-123", seed] {
        assert!(!report.text.contains(secret), "`{secret}` is in the output:\n{}", report.text);
    }
}

#[test]
fn output_shows_no_control_characters_of_others() {
    let coordinator = coordinator(Some(0));
    let backend = server(|request| {
        let models = json!({"data": [{"id": "a\u{1b}[2Jb\nc"}]});
        (request.target == "/v1/models").then(|| Answer::Json(200, models))
    });
    let report = Report::by(&setup(&coordinator.url()).backend(backend.toml()), &["--no-inference"]);
    report.assert_well();
    assert!(!report.text.chars().any(|c| c.is_control() && c != '\n'), "{:?}", report.text);
    report.line('✓', "models", &["a", "b", "c"]);
}
