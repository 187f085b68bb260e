//! The clock, the disk, locks, cron and systemd, as they are on real machines.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use serde_json::{Value, json};

use crate::support::*;

/// Runs a command to its end, with the files and the environment of the setup.
fn run(setup: &Setup, words: &[&str]) -> Ran {
    let mut command = setup.start_command(words);
    let code = command.wait(2 * SOON).code();
    Ran { code, stdout: command.stdout.whole(), stderr: command.stderr.whole() }
}

/// The output of `status --json`, and its exit code.
fn status(setup: &Setup) -> (Value, i32) {
    let ran = run(setup, &["status", "--json"]);
    let state = serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e}: {ran:?}"));
    (state, ran.code.expect("an exit"))
}

/// A setup with the same files, whose coordinator refuses the connection at once. The doctor waits for one that says nothing.
fn with_refusing_coordinator(setup: &Setup) -> Setup {
    let mut other = Setup::new(&format!("ws://{}/", nobody_at("127.0.0.77")));
    other.scratch = setup.scratch.clone();
    other
}

/// What the doctor prints.
fn doctor(setup: &Setup) -> String {
    run(setup, &["doctor", "--no-inference"]).stdout
}

fn lock_of(setup: &Setup) -> PathBuf {
    setup.identity().with_file_name("identity.key.lock")
}

/// Moves the last sign of life in the lock file 200 s back.
fn age_liveness(setup: &Setup) {
    let text = fs::read_to_string(lock_of(setup)).expect("the lock file");
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let liveness: u64 = lines[2].trim().parse().expect("milliseconds");
    lines[2] = format!("{:<20}", liveness.checked_sub(200_000).expect("a machine that is up for some minutes"));
    fs::write(lock_of(setup), lines.join("\n") + "\n").expect("the lock file");
}

/// As on SD cards that turn read-only, and on disks that fail.
#[test]
fn slow_disk_that_turns_read_only_ends_no_agent_and_its_status_is_unknown() {
    side_by_side([Errno::EROFS, Errno::EIO, Errno::ENOSPC], |errno| {
        let backend = Backend::vllm(&["m"]);
        let coordinator = Coordinator::new();
        let setup = Shim::load(Setup::new(&coordinator.url()).backend(backend.toml()));
        let mut agent = setup.start();
        let session = coordinator.session();
        assert_eq!(status(&setup).0["state"], "serving");
        Shim::of(&setup).fail_writes(errno as i32);
        age_liveness(&setup);
        let (state, code) = status(&setup);
        assert_eq!(
            (&state["state"], &state["running"], code),
            (&json!("unknown"), &json!(true), 1),
            "{errno}: {state}"
        );
        assert!(state["silent_seconds"].as_u64().is_some_and(|silent| silent < 100), "{errno}: {state}");
        let mut call = setup.start_by_cron();
        assert_eq!(call.wait(SOON).code(), Some(0), "{errno}");
        assert_eq!(call.stderr.whole(), "", "{errno}");
        agent.assert_running();
        let id = session.job("m", json!({}));
        backend.next().finish();
        session.outcome(&id).done();
        let report = doctor(&Shim::load(with_refusing_coordinator(&setup)));
        assert!(
            report.contains("held by the running agent") && report.contains("cannot write to"),
            "{errno}: {report}"
        );
        // What does not answer is hung, on such a disk too.
        agent.signal("STOP");
        assert_eq!(status(&setup).0["state"], "hung", "{errno}");
        agent.signal("CONT");
    });
}

/// A full or failing disk may lose the content of the lock file.
#[test]
fn agent_whose_lock_file_lost_its_content_is_found_by_its_answer() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    fs::write(lock_of(&rig.setup), "").expect("an empty lock file");
    let (state, code) = status(&rig.setup);
    assert_eq!((&state["state"], &state["pid"], code), (&json!("serving"), &json!(rig.agent.pid()), 0), "{state}");
}

/// An agent in another container or on another host: its lock is held, and the pid in it means nothing here.
#[test]
fn lock_held_by_nobody_visible_is_an_agent_elsewhere() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    let path = format!("{}:/usr/bin:/bin", setup.scratch.join("bin").display());
    set_mode(setup.scratch.write("bin/crontab", "#!/bin/sh\necho no crontab for you >&2\nexit 1\n"), 0o755);
    let setup = setup.env("PATH", &path);
    run(&setup, &["enroll"]);
    let text = format!("{:<10}\n{:<20}\n{:<20}\n", 7, 7, 7);
    let lock = File::open(setup.scratch.write(".usepod-agent/identity.key.lock", text)).expect("the lock file");
    lock.lock().expect("the lock");
    const WHERE: &str = "another container or on another host";

    let (state, code) = status(&setup);
    assert_eq!((&state["state"], &state["running"], code), (&json!("unknown"), &json!(true), 1), "{state}");
    run(&setup, &["status"]).fails(1, &[WHERE]);
    run(&setup, &["run"]).fails(4, &[WHERE]);
    assert_eq!(run(&setup, &["run", "--cron"]).code, Some(0));
    run(&setup, &["service", "stop"]).fails(1, &[WHERE]);
    assert!(run(&setup, &["pause"]).ok().contains(WHERE));
    coordinator.assert_not_dialled(Duration::ZERO);

    let report = doctor(&with_refusing_coordinator(&setup));
    assert!(report.contains("! lock") && report.contains(WHERE), "{report}");

    fs::remove_file(setup.identity().with_file_name("identity.key.stopped")).expect("the marker of the stop");
    drop(lock);
    assert_eq!(status(&setup).0["state"], "not_running");
    run(&setup, &["resume"]).ok();
    let _agent = setup.start();
    coordinator.session();
}

/// A lock file that root has left behind, and NFS without a lock manager.
#[test]
fn lock_that_cannot_be_tried_is_a_failure_with_the_chown_and_no_start() {
    type Break = fn(Setup) -> Setup;
    fn without_locks(setup: Setup, errno: Errno) -> Setup {
        let setup = Shim::load(setup);
        Shim::of(&setup).fail_locks(errno as i32);
        setup
    }
    let cases: [(Break, &str); 3] = [
        (
            |setup| {
                set_mode(setup.scratch.write(".usepod-agent/identity.key.lock", ""), 0);
                setup.bound_by_modes()
            },
            "chown ",
        ),
        (|setup| without_locks(setup, Errno::ENOLCK), "supports locking"),
        (|setup| without_locks(setup, Errno::EOPNOTSUPP), "supports locking"),
    ];
    side_by_side(cases, |(fault, fix)| {
        let coordinator = Coordinator::new();
        let setup = Setup::new(&coordinator.url());
        run(&setup, &["enroll"]);
        setup.scratch.write(".usepod-agent/identity.key.lock", "");
        let setup = fault(setup);
        for words in [&["run"][..], &["run", "--cron"], &["service", "stop"], &["status"]] {
            run(&setup, words).fails(1, &["identity.key.lock", "cannot be locked", fix, "chown "]);
        }
        coordinator.assert_not_dialled(Duration::ZERO);
        let (state, _) = status(&setup);
        assert_eq!((&state["state"], &state["running"]), (&json!("unknown"), &json!(false)), "{state}");
        let report = doctor(&fault(with_refusing_coordinator(&setup)));
        assert!(report.contains("✗ lock") && report.contains("fix: ") && report.contains(fix), "{report}");
    });
}

/// `status` and the start try the lock at the same moment.
#[test]
fn start_succeeds_while_others_ask_for_the_status() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    run(&setup, &["enroll"]);
    setup.scratch.write(".usepod-agent/identity.key.lock", "");
    let lock = lock_of(&setup);
    for _ in 0..3 {
        let asking = File::open(&lock).expect("the lock file");
        asking.lock_shared().expect("the lock");
        let _agent = setup.start();
        std::thread::sleep(ms(30));
        drop(asking);
        coordinator.session();
    }
}
