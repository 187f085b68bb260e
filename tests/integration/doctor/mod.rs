//! `doctor`: the broken layer is named with its fix, the layers above it are skipped, and all others pass.

mod backends;
mod coordinator;
mod output;

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
fn config_error_is_reported_with_its_line_and_a_missing_file_ends_the_checks() {
    let (coordinator, backend) = (coordinator(Some(0)), backend());
    let setup = setup(&coordinator.url()).backend(backend.toml()).limits("max_concurrent = 0");
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_only_broken("config", &["agent.toml:", "`[limits] max_concurrent` = 0", "out of range"], "1 to 256");
    report.assert_passed(&["identity", "disk", "challenge", "health", "models"]);
    let (code, text) = Agent::run(Scratch::new().path(), &["doctor"]).finish(SOON);
    let report = Report { code, text };
    report.assert_only_broken("config", &["no agent.toml found"], "--config FILE");
    report.assert_skipped(&["all else"]);
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
