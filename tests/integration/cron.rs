//! `run --cron`, which cron calls each minute.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use crate::support::*;

/// Longer than the 5 s before the recheck and the 15 s that a hung agent has to end.
const TAKEOVER: Duration = secs(30);

fn lock_of(setup: &Setup) -> PathBuf {
    setup.scratch.join(".usepod-agent/identity.key.lock")
}

/// An agent past its handshake, and its session.
fn serving(setup: &Setup, coordinator: &Coordinator) -> (Agent, Session) {
    let agent = setup.start();
    let session = coordinator.session();
    (agent, session)
}

/// The call exits with 0, prints and logs nothing, and does not dial.
fn assert_leaves_alone(setup: &Setup, coordinator: &Coordinator, what: &str) {
    let log = fs::read(setup.log()).ok();
    let mut call = setup.start_by_cron();
    assert_eq!(call.wait(SOON).code(), Some(0), "{what}");
    assert_eq!((call.stdout.whole().as_str(), call.stderr.whole().as_str()), ("", ""), "{what}");
    assert!(fs::read(setup.log()).ok() == log, "{what}: the log has changed");
    coordinator.assert_not_dialled(Duration::ZERO);
}

/// Sets the agent's last liveness, the third line of its lock file, to an old time.
fn age_liveness(setup: &Setup) {
    let path = lock_of(setup);
    let text = fs::read_to_string(&path).expect("the lock file");
    let mut lines: Vec<&str> = text.lines().collect();
    let liveness: u64 = lines[2].trim().parse().expect("milliseconds");
    let older = format!("{:<20}", liveness.checked_sub(200_000).expect("a box that is up for some minutes"));
    lines[2] = &older;
    fs::write(&path, lines.join("\n") + "\n").expect("the lock file");
}

/// Whether a call waits before it rechecks a hung agent.
fn waits(call: &Agent) -> bool {
    fs::read_to_string(format!("/proc/{}/wchan", call.pid())).is_ok_and(|at| at.contains("nanosleep"))
}

/// Whether SIGTERM is pending for a stopped process.
fn has_pending_term(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).expect("pending signals");
    u64::from_str_radix(pending.trim(), 16).expect("a mask") & (1 << 14) != 0
}

#[test]
fn call_without_a_running_agent_serves_and_logs_to_a_file() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    let mut agent = setup.start_by_cron();
    let session = coordinator.session();
    wait_line_in(&setup.log(), &["INFO", "connected as"]);
    assert_eq!(mode(setup.log()), 0o600);
    agent.signal("TERM");
    assert_eq!(session.ended(SOON).map(|(code, _)| code), Some(1000));
    assert_eq!(agent.wait(SOON).code(), Some(0));
    assert_eq!((agent.stdout.whole().as_str(), agent.stderr.whole().as_str()), ("", ""));
    wait_line_in(&setup.log(), &["INFO", "stopped"]);
}

#[test]
fn call_with_closed_outputs_serves() {
    let backend = Backend::vllm(&["m"]);
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url()).backend(backend.toml()).after("exec <&- >&- 2>&-");
    let mut agent = setup.start_by_cron();
    let session = coordinator.session();
    let id = session.job("m", serde_json::json!({}));
    backend.next().finish();
    session.outcome(&id).done();
    agent.assert_running();
    wait_line_in(&setup.log(), &["connected as"]);
}

#[test]
fn running_agent_is_left_alone_and_the_call_prints_nothing() {
    let coordinator = Coordinator::new();
    // Every start logs a warning.
    let setup = Setup::new(&coordinator.url()).more("[observability]\nlog_level = \"loud\"");
    for by_cron in [false, true] {
        let mut agent = if by_cron { setup.start_by_cron() } else { setup.start() };
        let session = coordinator.session();
        if by_cron {
            // Its last line for a while.
            wait_line_in(&setup.log(), &["offering"]);
        }
        for _ in 0..3 {
            assert_leaves_alone(&setup, &coordinator, "an agent at work");
        }
        agent.assert_running();
        drop((agent, session));
    }
}

#[test]
fn stop_marker_keeps_cron_from_starting_the_agent_but_not_the_operator() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    setup.scratch.write(".usepod-agent/identity.key.stopped", "");
    assert_leaves_alone(&setup, &coordinator, "stopped");
    assert!(!setup.identity().exists() && !setup.log().exists());
    let _by_hand = serving(&setup, &coordinator);
    fs::remove_file(setup.scratch.join(".usepod-agent/identity.key.stopped")).expect("removed");
}

#[test]
fn slow_hung_agent_is_killed_and_replaced_by_one_of_several_calls() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    let (mut hung, _session) = serving(&setup, &coordinator);
    hung.signal("STOP");
    assert_leaves_alone(&setup, &coordinator, "stopped a moment ago");
    age_liveness(&setup);
    let mut calls = [setup.start_by_cron(), setup.start_by_cron()];
    let status = hung.wait(TAKEOVER);
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    let _next = coordinator.session();
    let mut ended = None;
    wait_until("one of the two leaves", || {
        ended = calls.iter_mut().position(|call| !call.is_running());
        ended.is_some()
    });
    let left = ended.expect("one");
    let serves = 1 - left;
    assert_eq!(calls[left].wait(SOON).code(), Some(0));
    calls[serves].assert_running();
    wait_line_in(&setup.log(), &["offering"]);
    assert_leaves_alone(&setup, &coordinator, "the new one");
    let (old, new) = (hung.pid().to_string(), calls[serves].pid().to_string());
    wait_line_in(&setup.log(), &["WARN", &old, "has shown no sign of life for 20"]);
    wait_line_in(&setup.log(), &["WARN", &old, "ended after", &new]);
}

/// `service stop` is called before the recheck, or while the hung agent is being ended.
#[test]
fn slow_stop_during_a_takeover_prevents_the_start() {
    let moments: [fn(&Setup, &Agent); 2] = [
        |_, call| wait_until("the call looks again", || waits(call)),
        |setup, _| drop(wait_line_in(&setup.log(), &["WARN", "no sign of life"])),
    ];
    side_by_side(moments, |wait| {
        let coordinator = Coordinator::new();
        let setup = Setup::new(&coordinator.url());
        let (mut hung, _session) = serving(&setup, &coordinator);
        hung.signal("STOP");
        age_liveness(&setup);
        let mut call = setup.start_by_cron();
        wait(&setup, &call);
        setup.scratch.write(".usepod-agent/identity.key.stopped", "");
        hung.signal("KILL");
        hung.wait(SOON);
        assert_eq!(call.wait(TAKEOVER).code(), Some(0));
        coordinator.assert_not_dialled(Duration::ZERO);
    });
}

/// As after the resume of a suspended machine.
#[test]
fn slow_agent_that_recovers_before_the_recheck_is_left_alone() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    let (mut agent, _session) = serving(&setup, &coordinator);
    let fresh = fs::read(lock_of(&setup)).expect("the lock file");
    age_liveness(&setup);
    let mut call = setup.start_by_cron();
    // It waits after the first check.
    wait_until("the call waits", || waits(&call));
    fs::write(lock_of(&setup), fresh).expect("the lock file");
    assert_eq!(call.wait(SOON).code(), Some(0));
    assert_eq!(call.stderr.whole(), "");
    assert!(!setup.log().exists());
    agent.assert_running();
}

#[test]
fn slow_hung_agent_that_reacts_to_sigterm_ends_in_order() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    let (mut hung, session) = serving(&setup, &coordinator);
    hung.signal("STOP");
    age_liveness(&setup);
    let mut call = setup.start_by_cron();
    wait_until("SIGTERM is sent", || has_pending_term(hung.pid()));
    hung.signal("CONT");
    assert_eq!(session.ended(SOON).map(|(code, _)| code), Some(1000));
    assert_eq!(hung.wait(SOON).code(), Some(0));
    let _next = coordinator.session();
    call.assert_running();
    wait_line_in(&setup.log(), &["WARN", &hung.pid().to_string(), "ended after SIGTERM"]);
}

#[test]
fn agent_that_cannot_record_its_liveness_is_left_alone() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    let (mut agent, session) = serving(&setup, &coordinator);
    agent.limit_files();
    age_liveness(&setup);
    // Reconnecting records its liveness.
    session.close(1001, "drain:deploy");
    let _next = coordinator.session();
    wait_until("nothing is left", || fs::read(lock_of(&setup)).is_ok_and(|content| content.is_empty()));
    assert_leaves_alone(&setup, &coordinator, "one at work");
    agent.assert_running();
}

/// A process that is killed at the end of the test.
struct Bystander(Child);

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn lock_that_identifies_no_owner_ends_no_process() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    let (mut agent, _session) = serving(&setup, &coordinator);
    let mut bystander = Bystander(Command::new("sleep").arg("600").spawn().expect("sleep"));
    let started = "1".repeat(20);
    for content in [
        String::new(),
        format!("{}\n", agent.pid()),
        "\u{0}garbage".to_owned(),
        format!("{:<10}\n{started}\n{:<20}\n", bystander.0.id(), 0),
        format!("{:<10}\n{started}\n{:<20}\n", 0, 0),
    ] {
        fs::write(lock_of(&setup), &content).expect("the lock file");
        assert_leaves_alone(&setup, &coordinator, &content);
    }
    agent.assert_running();
    assert!(bystander.0.try_wait().expect("its state").is_none(), "a bystander was ended");
}

#[test]
fn error_before_the_log_file_is_known_is_in_the_default_one() {
    let home = Scratch::new();
    let log = home.join(".usepod-agent/agent.log");
    let path = home.write("agent.toml", "[coordinator]\nurl = \"nowhere\"\n");
    let arguments = ["run", "--cron", "--config", path.to_str().expect("UTF-8")];
    for calls in 1..=2 {
        let Ran { code, stderr, .. } = cli(home.path(), &arguments, &[]);
        assert_eq!(code, Some(2));
        assert!(stderr.starts_with("error: ") && stderr.contains("agent.toml:2"), "{stderr}");
        let text = fs::read_to_string(&log).expect("the log");
        assert_eq!(text.lines().count(), calls, "{text}");
        assert!(text.lines().all(|line| line.contains("ERROR") && line.contains("agent.toml:2")), "{text}");
    }
}

#[test]
fn identity_error_is_in_the_log() {
    let setup = Setup::new("ws://127.0.0.1:1/").more("[observability]\nlog_file = \"own.log\"");
    setup.scratch.write(".usepod-agent/identity.key", "no identity");
    let mut call = setup.start_by_cron();
    assert_eq!(call.wait(SOON).code(), Some(1));
    call.stderr.wait_line(&["error", "identity.key"]);
    wait_line_in(&setup.scratch.join("own.log"), &["ERROR", "identity.key"]);
    assert!(!setup.log().exists());
}

/// Started by hand, the agent runs with a warning; cron would start one more each minute.
#[test]
fn missing_lock_keeps_cron_from_starting_the_agent() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url()).more("[observability]\nlog_file = \"own.log\"").bound_by_modes();
    let folder = setup.scratch.join(".usepod-agent");
    fs::create_dir(&folder).expect("a folder");
    set_mode(&folder, 0o555);
    let mut call = setup.start_by_cron();
    assert_eq!(call.wait(SOON).code(), Some(1));
    call.stderr.wait_line(&["error", "cannot be locked", "identity.key.lock"]);
    wait_line_in(&setup.scratch.join("own.log"), &["ERROR", "cannot be locked"]);
    coordinator.assert_not_dialled(Duration::ZERO);
    set_mode(&folder, 0o755);
}
