//! Faults of disks, clocks, descriptors and threads. They are caused by the system itself, or by a preloaded library, and each
//! test checks that its fault occurred.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::support::*;

/// Acts like a full disk: files can be created, but not a byte can be written.
const DISK_FULL: &str = "trap '' XFSZ; ulimit -f 0";

/// A setup whose identity is in its own existing folder.
fn with_folder(url: &str) -> Setup {
    let setup = Setup::new(url).more("[identity]\nkey_path = \"own/identity.key\"");
    fs::create_dir(setup.scratch.join("own")).expect("a folder");
    setup
}

#[test]
fn first_start_without_a_writable_folder_fails_and_leaves_nothing_behind() {
    type Break = fn(Setup) -> Setup;
    let read_only: Break = |setup| {
        set_mode(setup.scratch.join("own"), 0o555);
        setup.bound_by_modes()
    };
    let cases: [(&str, Break, &str, &[&str]); 3] = [
        ("own/identity.key", |setup| setup.after(DISK_FULL), "File too large", &["identity.key.lock"]),
        ("own/identity.key", read_only, "Permission denied", &[]),
        ("own/deeper/identity.key", read_only, "Permission denied", &[]),
    ];
    for (key, fault, why, left) in cases {
        let setup = with_folder("ws://127.0.0.1:1/").more(&format!("[identity]\nkey_path = \"{key}\""));
        let setup = fault(setup);
        let mut agent = setup.start();
        assert_eq!(agent.wait(SOON).code(), Some(1), "{key}: {why}");
        agent.stderr.wait_line(&["error", key, why]);
        assert_eq!(names_in(&setup.scratch.join("own")), left, "{key}: {why}");
    }
}

#[test]
fn unwritable_identity_is_used_and_stays_intact() {
    /// Causes the fault in the folder of the identity.
    type Break = fn(Setup, &Path) -> Setup;
    let cases: [(Break, &str, bool); 3] = [
        (|setup, _| setup.after(DISK_FULL), "File too large", true),
        (
            |setup, folder| {
                fs::write(folder.join("identity.key.lock"), "").expect("a lock file");
                set_mode(folder.join("identity.key.lock"), 0o444);
                set_mode(folder.join("identity.key"), 0o444);
                set_mode(folder, 0o555);
                setup.bound_by_modes()
            },
            "Permission denied",
            true,
        ),
        (
            |setup, folder| {
                set_mode(folder, 0o555);
                setup.bound_by_modes()
            },
            "Permission denied",
            false,
        ),
    ];
    side_by_side(cases, |(fault, why, locks)| {
        let coordinator = Coordinator::new();
        let backend = Backend::vllm(&["m"]);
        let setup = with_folder(&coordinator.url()).coordinator("enrollment_code = \"POD-ENROLL-abc\"");
        let setup = setup.backend(backend.toml());
        let folder = setup.scratch.join("own");
        let config = setup.write();
        cli(setup.scratch.path(), &["enroll", "--allow-insecure", "--config", config.to_str().expect("UTF-8")], &[]);
        let content = fs::read(folder.join("identity.key")).expect("the identity file");
        let setup = fault(setup, &folder);

        let agent = setup.start();
        let greet = |asks: bool| {
            let session = coordinator.accept();
            assert_eq!(session.challenge(b"nonce")["enrollment_code"].is_string(), asks, "{why}");
            session.send(&json!({"type": "auth_ok", "provider_id": "prov_new"}));
            session.frame("capabilities", SOON);
            session
        };
        let session = greet(true);
        agent.stderr.wait_line(&["warn", "provider id", "identity.key", why]);
        let before = ResourceUsage::after_a_job(&agent, &session, &backend);
        session.close(1001, "drain:deploy");
        before.assert_no_leak(&agent, &greet(false), &backend);

        assert!(fs::read(folder.join("identity.key")).expect("the file") == content, "{why}: the file has changed");
        let mut names = names_in(&folder);
        names.retain(|name| name != "identity.key.wake" && name != "identity.key.state");
        let expected: &[&str] = if locks { &["identity.key", "identity.key.lock"] } else { &["identity.key"] };
        assert_eq!(names, expected, "{why}");
        let warned = agent.warnings().iter().any(|line| line.contains("cannot be locked"));
        assert_eq!(warned, !locks, "{why}: a warning for want of a lock: {:?}", agent.warnings());
        if locks {
            assert_eq!(setup.start().wait(SOON).code(), Some(4), "{why}: the lock holds all the same");
        }
        set_mode(&folder, 0o755);
    });
}

#[test]
fn unwritable_log_loses_its_lines_and_nothing_else() {
    // The second one is full after the identity and the first lines.
    side_by_side(["exec 2>/dev/full", "trap '' XFSZ; ulimit -f 1; exec 2>agent.log"], |disk| {
        let mut measured = MeasuredAgent::with(|setup| setup.after(disk));
        for _ in 0..2000 {
            measured.rig.session.send_text("not a frame");
        }
        measured.assert_no_leak();
        measured.rig.session.close(1001, "drain:deploy");
        measured.assert_no_leak_after_reconnect();
        measured.rig.agent.signal("TERM");
        assert_eq!(measured.rig.agent.wait(SOON).code(), Some(0), "{disk}");
        let written = fs::metadata(measured.rig.setup.scratch.join("agent.log")).map_or(0, |file| file.len());
        assert!(written <= 1024 && measured.rig.agent.stderr.text().is_empty(), "{disk}: {written} bytes were written");
    });
}

#[test]
fn slow_clock_jump_disturbs_nothing() {
    let (hour, day) = (3600, 86_400);
    side_by_side([-hour, day], |jump| {
        let measured = MeasuredAgent::with(Shim::load);
        let began = Instant::now();
        let session = &measured.rig.session;
        let now = || OffsetDateTime::now_utc() + time::Duration::seconds(jump);
        let text = |at: OffsetDateTime| at.format(&Rfc3339).expect("a date")[..19].to_owned();
        // It is served, so neither its deadline nor its connection has expired.
        let running = session.job("m", json!({}));
        let held = measured.backend.next();
        Shim::of(&measured.rig.setup).set_clock_off_by(jump);
        held.finish();
        session.outcome(&running).done();

        let mut frame = job(&uuid::Uuid::new_v4().to_string(), "m", json!({}));
        frame["deadline_ms"] = json!(500);
        session.send(&frame);
        let (sent, mut late) = (Instant::now(), measured.backend.next());
        assert_eq!(session.outcome(frame["job_id"].as_str().expect("an id")).error(), "backend_timeout");
        assert!(sent.elapsed() > ms(450) && sent.elapsed() < ms(1500), "a deadline of 500 ms: {:?}", sent.elapsed());
        late.wait_hang_up();

        let heartbeat = session.frame("heartbeat", secs(20));
        let came = began.elapsed();
        assert!(came > secs(14) && came < secs(17), "the first heartbeat came after {came:?}");
        assert_eq!(heartbeat["queue_depth"], 0, "{heartbeat}");
        assert!(heartbeat["error_rate_60s"].as_f64().is_some_and(|rate| (0.33..0.34).contains(&rate)), "{heartbeat}");
        assert!(heartbeat["p95_latency_ms"].as_u64().is_some_and(|ms| (450..2000).contains(&ms)), "{heartbeat}");
        // The only date follows the clock.
        let at = &heartbeat["last_error_at"].as_str().expect("a date")[..19];
        let earliest = text(now() - began.elapsed());
        assert!(*earliest <= *at && *at <= *text(now()), "{at} is not between {earliest} and {}", text(now()));

        session.close(1001, "drain:deploy");
        let closed = Instant::now();
        let next = measured.rig.coordinator.dialled(SOON);
        let delay = next.at - closed;
        assert!(delay > ms(780) && delay < ms(1500), "redialled after {delay:?}");
        measured.assert_no_leak_in(&next.upgrade().authenticate(None));
    });
}

#[test]
fn slow_jobs_without_a_descriptor_are_refused_and_the_others_continue() {
    let measured = MeasuredAgent::with(|setup| setup.limits("max_concurrent = 256"));
    let session = &measured.rig.session;
    measured.rig.agent.limit_descriptors(64);
    let jobs: Vec<_> = (0..100).map(|_| session.job("m", json!({}))).collect();
    let (mut held, mut refused) = (Vec::new(), Vec::new());
    let began = Instant::now();
    while held.len() + refused.len() < jobs.len() {
        assert!(began.elapsed() < SOON, "{} held, {} refused, of {}", held.len(), refused.len(), jobs.len());
        held.extend(measured.backend.try_next(ms(20)));
        refused = session.frames(Duration::ZERO, |frame| frame["type"] == "job_error");
    }
    assert!(held.len() > 30 && refused.len() > 30, "{} held, {} refused", held.len(), refused.len());
    for frame in &refused {
        assert_eq!(frame["error_code"], "out_of_capacity", "{frame}");
    }
    held.into_iter().for_each(Held::finish);
    let is_refused = |id: &&String| refused.iter().any(|frame| frame["job_id"] == id.as_str());
    for id in jobs.iter().filter(|id| !is_refused(id)) {
        session.outcome(id).done();
    }
    measured.assert_no_leak();
}

/// A probe that cannot be made says nothing about the backend.
#[test]
fn probe_without_a_descriptor_withdraws_no_offer() {
    let measured = MeasuredAgent::new();
    let session = &measured.rig.session;
    // Closes the last connection, and causes a probe at once.
    measured.rig.agent.limit_descriptors(3);
    let id = session.job("m", json!({}));
    let mut held = measured.backend.next();
    held.send("HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    drop(held);
    assert_eq!(session.outcome(&id).error(), "model_not_loaded");
    measured.rig.agent.stderr.wait_line(&["vllm", "Too many open files"]);
    session.assert_no_frame("a changed offer", QUIET, is_offer);
    measured.rig.agent.limit_descriptors(1024);
    measured.assert_no_leak();
}

#[test]
fn agent_without_descriptors_dials_again_once_there_are_some() {
    let measured = MeasuredAgent::new();
    measured.rig.agent.limit_descriptors(3);
    measured.rig.session.cut();
    measured.rig.agent.stderr.wait_line(&["not connected", "Too many open files"]);
    measured.rig.agent.limit_descriptors(1024);
    measured.assert_no_leak_after_reconnect();
}

#[test]
fn slow_jobs_without_a_thread_are_refused_and_the_next_ones_are_served() {
    let measured = MeasuredAgent::with(Shim::load);
    let (shim, session) = (Shim::of(&measured.rig.setup), &measured.rig.session);
    shim.refuse_threads();
    // Runs on the worker of the first job, which is still alive.
    let running = session.job("m", json!({}));
    let held = measured.backend.next();
    for _ in 0..3 {
        let refused = session.job("m", json!({}));
        assert_eq!(session.outcome(&refused).error(), "out_of_capacity");
    }
    shim.wait_refused();
    held.finish();
    session.outcome(&running).done();
    shim.allow_threads();
    let jobs = [session.job("m", json!({})), session.job("m", json!({}))];
    for held in [measured.backend.next(), measured.backend.next()] {
        held.finish();
    }
    for id in &jobs {
        session.outcome(id).done();
    }
    measured.assert_no_leak();
}

#[test]
fn slow_session_that_cannot_start_a_thread_is_followed_by_one_that_can() {
    let no_dial = || {
        let measured = MeasuredAgent::with(Shim::load);
        let shim = Shim::of(&measured.rig.setup);
        shim.refuse_threads();
        measured.rig.session.cut();
        measured.rig.coordinator.assert_not_dialled(secs(3));
        shim.wait_refused();
        shim.allow_threads();
        measured.assert_no_leak_after_reconnect();
    };
    let no_writer = || {
        let measured = MeasuredAgent::with(Shim::load);
        let shim = Shim::of(&measured.rig.setup);
        measured.rig.session.close(1001, "drain:deploy");
        let session = measured.rig.coordinator.accept();
        session.challenge(b"nonce");
        shim.refuse_threads();
        session.send(&json!({"type": "auth_ok"}));
        session.ended(SOON);
        session.assert_no_frame("an offer", Duration::ZERO, is_offer);
        shim.allow_threads();
        measured.assert_no_leak_after_reconnect();
    };
    let parts: [&(dyn Fn() + Sync); 2] = [&no_dial, &no_writer];
    side_by_side(parts, |part| part());
}

#[test]
fn agent_that_cannot_start_a_thread_ends_in_order() {
    let asked = || {
        let mut measured = MeasuredAgent::with(Shim::load);
        measured.rig.session.job("m", json!({}));
        let mut held = measured.backend.next();
        Shim::of(&measured.rig.setup).refuse_threads();
        measured.rig.agent.signal("TERM");
        held.wait_hang_up();
        assert_eq!(measured.rig.agent.wait(SOON).code(), Some(0));
    };
    let at_once = || {
        let setup = Shim::load(Setup::new("ws://127.0.0.1:1/"));
        Shim::of(&setup).refuse_threads();
        let mut agent = setup.start();
        assert_eq!(agent.wait(SOON).code(), Some(1));
        agent.stderr.wait_line(&["error", "Resource temporarily unavailable"]);
    };
    let parts: [&(dyn Fn() + Sync); 2] = [&asked, &at_once];
    side_by_side(parts, |part| part());
}
