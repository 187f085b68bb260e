//! `[observability] log_file`: the log file, and faults of the disk, which never stop the agent.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::*;

const LOG_FILE: &str = "[observability]\nlog_file = \"~/logs/agent.log\"";

/// Makes the agent log one line.
fn provoke(session: &Session) {
    session.send_text("not a frame");
}

fn limit_file_size(pid: u32, limit: &str) {
    let limit = format!("--fsize={limit}:");
    let status = Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]).status();
    assert!(status.expect("prlimit, of util-linux").success(), "the limit of file sizes was not set");
}

fn warnings_in(log: &Path) -> usize {
    fs::read_to_string(log).unwrap_or_default().lines().filter(|line| line.contains("WARN")).count()
}

/// An agent that has opened its log file, and that file.
fn measured_agent() -> (MeasuredAgent, PathBuf) {
    let mut measured = MeasuredAgent::with(|setup| setup.more(LOG_FILE));
    let log = measured.rig.setup.scratch.join("logs/agent.log");
    wait_line_in(&log, &["connected as"]);
    measured.before = ResourceUsage::after_a_job(&measured.rig.agent, &measured.rig.session, &measured.backend);
    (measured, log)
}

#[test]
fn log_file_gets_the_lines_instead_of_stderr() {
    let mut measured = MeasuredAgent::with(|setup| setup.more(LOG_FILE));
    let log = measured.rig.setup.scratch.join("logs/agent.log");
    wait_line_in(&log, &["INFO", "usepod-agent"]);
    wait_line_in(&log, &["INFO", "connected as"]);
    provoke(&measured.rig.session);
    wait_line_in(&log, &["WARN"]);
    measured.rig.agent.signal("TERM");
    assert_eq!(measured.rig.agent.wait(SOON).code(), Some(0));
    wait_line_in(&log, &["INFO", "stopped"]);
    assert_eq!(measured.rig.agent.stderr.whole(), "");
}

#[test]
fn log_file_that_is_invalid_is_an_error_that_names_the_key() {
    let folder = Scratch::new();
    let folder = folder.path().to_str().expect("UTF-8");
    for (value, what) in [
        ("\"\"", "it is empty"),
        ("\" \"", "it is empty"),
        (&*format!("\"{folder}\""), "it is a directory"),
        ("\"~\"", "it is a directory"),
        ("\"/nowhere/\"", "it is a directory"),
        ("\"~nobody/agent.log\"", "the home directory is unknown"),
        ("\"~/.usepod-agent/identity.key\"", "it is the identity file"),
        ("7", "it is not a string"),
    ] {
        let setup = Setup::new("ws://127.0.0.1:1/").more(&format!("[observability]\nlog_file = {value}"));
        let mut agent = setup.start();
        assert_eq!(agent.wait(SOON).code(), Some(2), "{value}");
        agent.stderr.wait_line(&["agent.toml:", "[observability] log_file", what, "log_file ="]);
    }
}

#[test]
fn log_that_others_rotate_continues_in_a_new_file() {
    let (measured, log) = measured_agent();
    let rotations: [fn(&Path); 3] = [
        |log| fs::rename(log, log.with_file_name("agent.log.old")).expect("renamed"),
        |log| fs::remove_file(log).expect("removed"),
        |log| drop(fs::File::create(log).expect("truncated")),
    ];
    for rotate in rotations {
        provoke(&measured.rig.session);
        wait_line_in(&log, &["WARN"]);
        rotate(&log);
        provoke(&measured.rig.session);
        wait_line_in(&log, &["WARN"]);
        assert_eq!(warnings_in(&log), 1);
        fs::write(&log, "").expect("truncated");
    }
    let old = fs::read_to_string(log.with_file_name("agent.log.old")).expect("the renamed one");
    assert!(old.contains("connected as") && old.ends_with('\n'), "{old}");
    measured.assert_no_leak();
}

#[test]
fn log_file_that_cannot_be_used_is_a_warning_and_the_agent_serves() {
    type Break = fn(&Scratch);
    let nothing: Break = |_| {};
    let cases: [(&str, Break, &str); 4] = [
        (
            "pipe",
            |home| assert!(Command::new("mkfifo").arg(home.join("pipe")).status().expect("mkfifo").success()),
            "not a regular file",
        ),
        ("/dev/full", nothing, "not a regular file"),
        (
            "link",
            |home| std::os::unix::fs::symlink("nowhere/agent.log", home.join("link")).expect("a link"),
            "No such file",
        ),
        ("file/agent.log", |home| drop(home.write("file", "")), "Not a directory"),
    ];
    side_by_side(cases, |(log_file, fault, why)| {
        let mut measured = MeasuredAgent::with(|setup| {
            fault(&setup.scratch);
            setup.more(&format!("[observability]\nlog_file = \"{log_file}\""))
        });
        measured.rig.agent.stderr.wait_line(&["warning: ", log_file, why]);
        for _ in 0..2000 {
            provoke(&measured.rig.session);
        }
        measured.assert_no_leak();
        measured.rig.agent.signal("TERM");
        assert_eq!(measured.rig.agent.wait(SOON).code(), Some(0), "{log_file}");
        assert_eq!(measured.rig.agent.stderr.whole().lines().count(), 1, "{log_file}");
    });
}

/// The limit of the file size acts like a full disk with room later. Its SIGXFSZ does not end the agent.
#[test]
fn log_lines_lost_on_a_full_disk_are_counted_and_reported_later() {
    let (measured, log) = measured_agent();
    let room = fs::metadata(&log).expect("the log").len() + 10;
    limit_file_size(measured.rig.agent.pid(), &room.to_string());
    provoke(&measured.rig.session);
    measured.rig.agent.stderr.wait_line(&["warning: log lines are lost", "agent.log", "File too large"]);
    assert_eq!(fs::metadata(&log).expect("the log").len(), room, "the limit was not met");
    limit_file_size(measured.rig.agent.pid(), "unlimited");
    provoke(&measured.rig.session);
    let note = wait_line_in(&log, &["log lines were lost: File too large"]);
    assert!(note.starts_with('['), "the half line goes on: {note}");
    wait_line_in(&log, &["WARN"]);
    measured.assert_no_leak();
}
