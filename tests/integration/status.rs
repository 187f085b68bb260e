//! `status` names each reason for not serving; the state file is always complete; `pause` and `resume`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::*;

/// `status --json` and its exit code.
fn status(setup: &Setup) -> (Value, i32) {
    let ran = cli(setup.scratch.path(), &["status", "--json", "--config", "agent.toml"], &[]);
    let state = serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e}: {ran:?}"));
    (state, ran.code.expect("an exit"))
}

/// Waits until `status` shows this state, with this exit code in both formats.
fn assert_state(setup: &Setup, name: &str, code: i32) -> Value {
    let began = Instant::now();
    let state = loop {
        let (state, exit) = status(setup);
        if state["state"] == name {
            assert_eq!(exit, code, "{state}");
            assert_eq!(state["serving"], code == 0, "{state}");
            break state;
        }
        assert!(began.elapsed() < SOON, "not `{name}`, but {state}");
        std::thread::sleep(ms(20));
    };
    assert_eq!(page(setup).1, code);
    state
}

/// The text of `status` and its exit code.
fn page(setup: &Setup) -> (String, i32) {
    let ran = cli(setup.scratch.path(), &["status", "--config", "agent.toml"], &[]);
    (ran.stdout, ran.code.expect("an exit"))
}

fn assert_page(setup: &Setup, words: &[&str]) {
    let page = page(setup).0;
    words.iter().for_each(|word| assert!(page.contains(word), "`{word}` is missing:\n{page}"));
}

fn command(setup: &Setup, name: &str) -> String {
    let ran = cli(setup.scratch.path(), &[name, "--config", "agent.toml"], &[]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran.stdout
}

#[test]
fn serving_is_shown_with_the_offer_and_the_totals() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    assert_state(&rig.setup, "serving", 0);
    let run = |id: &str| {
        backend.next().finish();
        rig.session.outcome(id).done();
    };
    run(&rig.session.job("m", json!({})));
    run(&rig.session.job("m", json!({})));
    assert_eq!(rig.session.outcome(&rig.session.job("nobody's", json!({}))).error(), "model_not_loaded");
    let failing = rig.session.job("m", json!({}));
    backend.next().send(response(500, "text/plain", "the prompt was: secret"));
    rig.session.outcome(&failing).error();
    let cancelled = rig.session.job("m", json!({}));
    let mut held = backend.next();
    rig.session.cancel(&cancelled);
    held.wait_hang_up();
    let _in_flight = (rig.session.job("m", json!({})), backend.next());
    let (state, _) = status(&rig.setup);
    let jobs = json!({
        "in_flight": 1, "done": 2, "failed": 1, "cancelled": 1, "lost": 0, "refused": 1,
        "refused_by_cause": {"no_such_model": 1},
    });
    assert_eq!(state["jobs"], jobs, "{state}");
    let tokens_of_one = 2 * 7;
    assert_eq!(state["tokens"]["input"], tokens_of_one, "{state}");
    let offered = json!([{
        "model_id": "m", "input_per_1m": 500_000, "output_per_1m": 750_000, "max_concurrent": 8, "backend": "vllm",
        "context_window": null,
    }]);
    assert_eq!(state["models"], offered, "{state}");
    assert_eq!(state["last_job"]["outcome"], "internal");
    assert_eq!(state["last_error"]["code"], "internal");
    assert!(!state.to_string().contains("secret"), "a backend's words may quote a prompt: {state}");
    assert_eq!(state["pid"], rig.agent.pid());
    assert_eq!(state["backends"][0]["offered"], true);
    assert_page(
        &rig.setup,
        &["serving", "0.50", "0.75", "1 in flight, 2 done, 1 failed, 1 cancelled", "1 no such model"],
    );
}

#[test]
fn page_fits_80_and_60_columns_and_has_no_figure_before_there_is_one() {
    let backend = Backend::vllm(&["m", "a-model-with-a-long-name/and-a-long-suffix-70B-Instruct"]);
    let mut rig = Rig::new(&backend);
    assert_state(&rig.setup, "serving", 0);
    let page_at = |width: usize| {
        let arguments = ["status", "--config", "agent.toml"];
        let page =
            cli(rig.setup.scratch.path(), &arguments, &[("COLUMNS", &width.to_string()), ("LC_ALL", "C")]).stdout;
        assert_fits(&page, width);
        assert!(page.is_ascii(), "{page}");
        page
    };
    for width in [80, 60] {
        let page = page_at(width);
        for line in
            ["\n  jobs         none yet\n", "\n  tokens       none yet\n", "\n  latency      none yet\n", "healthy for"]
        {
            assert!(page.contains(line), "no `{line}` in {page}");
        }
    }
    let id = rig.session.job("m", json!({}));
    backend.next().finish();
    rig.session.outcome(&id).done();
    assert!(page_at(80).contains("1 done") && page_at(80).contains("  latency      p50 "), "{}", page_at(80));
    rig.agent.signal("TERM");
    rig.agent.wait(SOON);
    for width in [80, 60] {
        let page = page_at(width);
        assert!(page.starts_with("not running (last seen "), "{page}");
        assert!(!page.contains("healthy") && !page.contains("latency"), "{page}");
    }
}

#[test]
fn connecting_is_shown_with_since_when_and_why() {
    let coordinator = nobody_at("127.0.0.61");
    let setup = Setup::new(&format!("ws://user:password@{coordinator}/x?token=token"));
    setup.write();
    let mut agent = setup.start();
    let state = assert_state(&setup, "connecting", 1);
    assert!(state["since"].is_string());
    agent.stderr.wait_line(&["not connected"]);
    let (state, _) = status(&setup);
    assert!(state["reason"].as_str().is_some_and(|why| why.contains("Connection refused")), "{state}");
    assert_eq!(state["coordinator"], format!("ws://{coordinator}/x"), "no secrets");
    assert_page(&setup, &["not serving: connecting", "Connection refused"]);
    agent.signal("TERM");
    agent.wait(SOON);
    assert_state(&setup, "not_running", 3);
    assert_page(&setup, &["not running (last seen"]);
}

#[test]
fn rejection_is_shown_with_the_coordinators_reason_until_it_is_lifted() {
    let backend = Backend::vllm(&["m"]);
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url()).backend(backend.toml());
    let _agent = setup.start();
    let session = coordinator.accept();
    session.challenge(b"nonce");
    session.send(&json!({"type": "auth_failed", "reason": "unknown \u{1b}[2J key"}));
    let state = assert_state(&setup, "rejected", 1);
    assert!(state["reason"].as_str().is_some_and(|why| why.contains("unknown") && !why.contains('\u{1b}')), "{state}");
    assert_page(&setup, &["not serving: rejected by the coordinator", "unknown"]);
    let _session = coordinator.session();
    assert_state(&setup, "serving", 0);
}

#[test]
fn slow_backends_that_are_down_or_loading_are_shown_with_their_errors() {
    let is_up = Arc::new(AtomicBool::new(false));
    let answers = is_up.clone();
    let loading = Backend::new(move |request| match (answers.load(Ordering::SeqCst), request.line().as_str()) {
        (false, _) => Answer::Json(503, json!({"error": {"message": "Loading model"}})),
        (true, "GET /v1/models") => Answer::Json(200, json!({"data": [{"id": "late"}]})),
        (true, _) => Answer::Json(200, json!({})),
    });
    let down = nobody_at("127.0.0.62");
    let rig =
        Rig::with(|setup| setup.backend(format!("kind = \"ollama\"\nurl = \"http://{down}\"")).backend(loading.toml()));
    let state = assert_state(&rig.setup, "no_healthy_backend", 1);
    let reason = state["reason"].as_str().expect("a reason");
    for part in [down.as_str(), "Connection refused", "loading its model"] {
        assert!(reason.contains(part), "{part}: {reason}");
    }
    assert_page(&rig.setup, &["not serving: no healthy backend", "not offered for"]);
    is_up.store(true, Ordering::SeqCst);
    let state = assert_state(&rig.setup, "serving", 0);
    assert!(
        state["backends"][1]["last_error"]["message"].as_str().is_some_and(|why| why.contains("loading")),
        "{state}"
    );
}

#[test]
fn key_that_the_backend_repeats_is_not_shown() {
    let backend = Backend::new(|_| Answer::Json(401, json!({"error": "no such key: sk-secret"})));
    let rig = Rig::new(&backend);
    let state = assert_state(&rig.setup, "no_healthy_backend", 1);
    assert!(!state.to_string().contains("secret"), "{state}");
    assert_page(&rig.setup, &["the backend rejected the API key: HTTP 401"]);
}

#[test]
fn missing_backends_and_models_are_shown() {
    let agent_without_backends = Rig::with(|setup| setup);
    let state = assert_state(&agent_without_backends.setup, "no_healthy_backend", 1);
    assert!(state["reason"].as_str().is_some_and(|why| why.contains("[[backends]]")), "{state}");
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(format!("{}\nmodels = [\"other\"]", backend.toml())));
    assert_state(&rig.setup, "no_models", 1);
}

#[test]
fn token_limit_that_is_used_up_is_shown() {
    let backend = Backend::vllm_with(&["m"], |_| Answer::Raw(response(200, "text/event-stream", sse(7, 13))));
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_tokens_per_minute = 20"));
    assert_state(&rig.setup, "serving", 0);
    rig.session.outcome(&rig.session.job("m", json!({}))).done();
    assert_eq!(rig.session.outcome(&rig.session.job("m", json!({}))).error(), "out_of_capacity");
    let state = assert_state(&rig.setup, "throttled", 1);
    assert_eq!(state["jobs"]["refused_by_cause"]["token_limit"], 1);
    assert_page(&rig.setup, &["throttled by the token limit", "max_tokens_per_minute"]);
}

#[test]
fn draining_is_shown_with_the_jobs_in_flight() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let held = backend.next();
    rig.agent.signal("TERM");
    let state = assert_state(&rig.setup, "draining", 1);
    assert_eq!(state["jobs"]["in_flight"], 1);
    held.finish();
    rig.session.outcome(&id).done();
    assert_state(&rig.setup, "not_running", 3);
}

#[test]
fn agent_without_liveness_is_hung_whatever_its_state_file_says() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    assert_state(&rig.setup, "serving", 0);
    rig.agent.signal("STOP");
    let lock = rig.setup.identity().with_file_name("identity.key.lock");
    let text = std::fs::read_to_string(&lock).expect("the lock file");
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let recorded: u64 = lines[2].trim().parse().expect("milliseconds");
    lines[2] = format!("{:<20}", recorded - 200_000);
    std::fs::write(&lock, lines.join("\n") + "\n").expect("an older liveness");
    let state = assert_state(&rig.setup, "hung", 1);
    assert!(state["silent_seconds"].as_u64().is_some_and(|silent| silent >= 200), "{state}");
    rig.agent.signal("CONT");
}

#[test]
fn slow_liveness_needs_both_directions_of_the_link() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let lock = rig.setup.identity().with_file_name("identity.key.lock");
    // `status` makes the agent record its liveness first.
    let liveness = || {
        status(&rig.setup);
        let text = std::fs::read_to_string(&lock).expect("the lock file");
        text.lines().nth(2).expect("a third line").trim().parse::<u64>().expect("milliseconds")
    };
    let first = liveness();
    rig.session.frame("heartbeat", secs(20));
    let second = liveness();
    assert_ne!(second, first, "no liveness with the first heartbeat");
    // The pong of this ping is the last thing that the agent receives.
    rig.session.wait("the ping behind the heartbeat", SOON, |event| matches!(event, Event::Ping).then_some(()));
    rig.session.ignore_pings();
    rig.session.frame("heartbeat", secs(20));
    let before = liveness();
    assert_ne!(before, second, "no liveness for the pong");
    rig.session.frame("heartbeat", secs(20));
    assert_eq!(liveness(), before, "a heartbeat without anything heard is no sign of life");
    // A large message may take minutes: this is the start of one of 60 KiB.
    rig.session.send_raw(&[0x81, 126, 0xf0, 0x00, b' ']);
    rig.session.frame("heartbeat", secs(20));
    assert_ne!(liveness(), before, "no liveness while a message comes");
}

#[test]
fn pause_empties_the_offer_at_once_lets_jobs_finish_and_survives_a_restart() {
    let backend = Backend::vllm(&["m"]);
    let mut rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let held = backend.next();
    let asked = Instant::now();
    let printed = command(&rig.setup, "pause");
    assert!(printed.contains("1 job(s) in flight"), "{printed}");
    let offer = rig.session.frame("capabilities", SOON);
    assert_eq!(offer["models"], json!([]), "{offer}");
    assert!(asked.elapsed() < secs(2), "the pause took {:?}", asked.elapsed());
    let refused = rig.session.outcome(&rig.session.job("m", json!({})));
    assert_eq!(refused.error(), "out_of_capacity");
    assert!(refused.message().contains("paused"), "{}", refused.message());
    let state = assert_state(&rig.setup, "paused", 1);
    assert_eq!((&state["models"], &state["jobs"]["refused_by_cause"]["paused"]), (&json!([]), &json!(1)), "{state}");
    held.finish();
    rig.session.outcome(&id).done();
    // A second pause changes nothing; after a restart the first offer is empty.
    command(&rig.setup, "pause");
    rig.agent.signal("TERM");
    rig.agent.wait(SOON);
    let _agent = rig.setup.start();
    let session = rig.coordinator.session();
    assert_eq!(session.capabilities["models"], json!([]));
    command(&rig.setup, "resume");
    assert_eq!(session.frame("capabilities", SOON)["models"][0]["model_id"], "m");
    assert_state(&rig.setup, "serving", 0);
    session.assert_no_frame("another offer", Duration::ZERO, is_offer);
}

/// For example, if the path of the socket is too long.
#[test]
fn slow_pause_without_a_wake_socket_takes_effect_with_the_next_heartbeat() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    std::fs::remove_file(rig.setup.identity().with_file_name("identity.key.wake")).expect("a socket");
    let ran = cli_within(secs(30), rig.setup.scratch.path(), &["pause", "--config", "agent.toml"], &[]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]));
}

#[test]
fn pause_persists_if_its_marker_becomes_unreadable() {
    let backend = Backend::vllm(&["m"]);
    let mut rig = Rig::with(|setup| setup.backend(backend.toml()).bound_by_modes());
    command(&rig.setup, "pause");
    let folder = rig.setup.scratch.join(".usepod-agent");
    set_mode(&folder, 0o000);
    // A new session makes the agent check the marker.
    rig.session.close(1001, "drain:deploy");
    rig.session = rig.coordinator.session();
    set_mode(&folder, 0o700);
    assert_eq!(rig.session.capabilities["models"], json!([]));
    rig.session.assert_no_frame("an offer", QUIET, is_offer);
}

#[test]
fn pause_does_not_wait_for_a_hung_backend() {
    let hangs = Arc::new(AtomicBool::new(false));
    let hanging = hangs.clone();
    let backend = Backend::new(move |request| match (hanging.load(Ordering::SeqCst), request.line().as_str()) {
        (true, _) => Answer::Hold,
        (false, "GET /v1/models") => Answer::Json(200, json!({"data": [{"id": "m"}]})),
        (false, _) => Answer::Json(200, json!({})),
    });
    let mut rig = Rig::new(&backend);
    assert_state(&rig.setup, "serving", 0);
    hangs.store(true, Ordering::SeqCst);
    // A new session probes the backends.
    rig.session.close(1001, "drain:deploy");
    rig.session = rig.coordinator.session();
    let _held = backend.next();
    let asked = Instant::now();
    command(&rig.setup, "pause");
    assert!(asked.elapsed() < secs(2), "the pause took {:?}", asked.elapsed());
}

#[test]
fn pause_and_resume_work_without_an_agent_and_without_a_sound_config() {
    let setup = Setup::new("wss://x.invalid/").limits("max_concurrent = 0");
    setup.write();
    assert!(command(&setup, "pause").contains("no agent is running"));
    for spoilt in ["[]", "7", "{", ""] {
        setup.scratch.write(".usepod-agent/identity.key.state", spoilt);
        assert_state(&setup, "not_running", 3);
    }
    assert_eq!(status(&setup).0["paused"], true);
    assert!(command(&setup, "resume").contains("not paused"));
    assert!(command(&setup, "resume").contains("not paused"));
    assert_eq!(status(&setup).0["paused"], false);
    setup.scratch.write(".usepod-agent/identity.key.stopped", "");
    assert_state(&setup, "stopped", 3);
    assert_page(&setup, &["not running: stopped by the operator", "usepod-agent service start"]);
}

#[test]
fn state_file_is_complete_whenever_it_is_read() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    assert_state(&rig.setup, "serving", 0);
    let path = rig.setup.identity().with_file_name("identity.key.state");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = std::collections::BTreeSet::new();
            while !over.load(Ordering::SeqCst) {
                let state: Value = serde_json::from_slice(&std::fs::read(&path).expect("the file")).expect("whole");
                seen.insert(state["written"].as_u64().expect("a number"));
            }
            seen.len()
        });
        (0..20).for_each(|_| drop(status(&rig.setup)));
        over.store(true, Ordering::SeqCst);
        assert!(reader.join().expect("no panic") > 5, "it is renewed for whoever asks");
    });
}

#[test]
fn state_file_that_is_out_of_date_is_not_trusted() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).bound_by_modes());
    assert_state(&rig.setup, "serving", 0);
    let folder = rig.setup.scratch.join(".usepod-agent");
    set_mode(&folder, 0o500);
    assert_state(&rig.setup, "serving", 0);
    let state = std::fs::File::options().write(true).open(folder.join("identity.key.state")).expect("the file");
    state.set_modified(std::time::SystemTime::now() - secs(200)).expect("an older date");
    assert_state(&rig.setup, "unknown", 1);
    assert_page(&rig.setup, &["whether it serves is unknown", "is the disk full?"]);
    set_mode(&folder, 0o700);
    assert_state(&rig.setup, "serving", 0);
}

#[test]
fn state_file_that_cannot_be_written_is_a_warning_and_the_agent_serves() {
    let backend = Backend::vllm(&["m"]);
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url()).backend(backend.toml());
    std::fs::create_dir_all(setup.identity().with_file_name("identity.key.state")).expect("a folder in its place");
    let agent = setup.start();
    let session = coordinator.session();
    agent.stderr.wait_line(&["WARN", "identity.key.state"]);
    let id = session.job("m", json!({}));
    backend.next().finish();
    session.outcome(&id).done();
    assert_eq!(agent.warnings().iter().filter(|line| line.contains("identity.key.state")).count(), 1);
    assert_eq!(status(&setup).1, 1, "it runs, and nobody knows how");
}
