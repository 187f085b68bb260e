//! Signals and the drain.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::*;

fn is_empty_offer(frame: &Value) -> bool {
    frame["type"] == "capabilities" && frame["models"] == json!([])
}

fn assert_empty_offer(session: &Session) {
    let capabilities = session.frame("capabilities", SOON);
    assert!(is_empty_offer(&capabilities), "a stopping agent offers nothing: {capabilities}");
}

/// Sends SIGTERM to an idle agent and expects the empty offer, Close(1000) and exit code 0, all within `limit`.
fn assert_stops_in_order(agent: &mut Agent, session: &Session, limit: Duration) {
    let asked = Instant::now();
    agent.signal("TERM");
    assert_empty_offer(session);
    assert_eq!(session.ended(SOON).map(|(code, _)| code), Some(1000));
    assert_eq!(agent.wait(SOON).code(), Some(0));
    assert!(asked.elapsed() < limit, "SIGTERM took {:?}", asked.elapsed());
}

#[test]
fn each_signal_stops_an_idle_agent_within_a_second() {
    side_by_side(["TERM", "INT", "HUP"], |signal| {
        let backend = Backend::vllm(&["m"]);
        let mut rig = Rig::new(&backend);
        let asked = Instant::now();
        rig.agent.signal(signal);
        assert_empty_offer(&rig.session);
        assert_eq!(rig.session.ended(SOON).map(|(code, _)| code), Some(1000), "the Close after SIG{signal}");
        assert_eq!(rig.agent.wait(SOON).code(), Some(0), "SIG{signal}");
        assert!(asked.elapsed() < secs(1), "SIG{signal} took {:?}", asked.elapsed());
    });
}

#[test]
fn slow_drain_finishes_jobs_refuses_new_ones_and_keeps_the_heartbeat() {
    let backend = Backend::vllm(&["m"]);
    // A loading backend is probed every 5 s; that it becomes ready must not restore the offer.
    let ready = Arc::new(AtomicBool::new(false));
    let is_ready = Arc::clone(&ready);
    let loading = Backend::new(move |request| match request.line().as_str() {
        "GET /v1/models" => Answer::Json(200, json!({"data": [{"id": "late"}]})),
        _ => Answer::Json(if is_ready.load(Ordering::SeqCst) { 200 } else { 503 }, json!({})),
    });
    let mut rig = Rig::with(|setup| setup.backend(backend.toml()).backend(loading.toml()));
    let jobs = [rig.session.job("m", json!({})), rig.session.job("m", json!({}))];
    let mut held = [backend.next(), backend.next()];
    held.iter_mut().for_each(Held::start_sse);
    rig.agent.signal("TERM");
    assert_empty_offer(&rig.session);
    ready.store(true, Ordering::SeqCst);

    let refused = rig.session.job("m", json!({}));
    assert_eq!(rig.session.outcome(&refused).error(), "out_of_capacity");
    held[0].chunk("data: 1\n\n");
    rig.session.wait("a chunk while draining", SOON, |event| match event {
        Event::Frame(frame) if frame["type"] == "job_chunk" => Some(()),
        _ => None,
    });
    let heartbeat = rig.session.frame("heartbeat", secs(20));
    assert_eq!(heartbeat["queue_depth"], 2, "{heartbeat}");
    rig.session.assert_no_frame("an offer", Duration::ZERO, is_offer);
    rig.agent.assert_running();

    for mut held in held {
        held.chunk(sse(7, 13));
        held.end();
    }
    for id in &jobs {
        rig.session.outcome(id).done();
    }
    assert_eq!(rig.session.ended(secs(2)).map(|(code, _)| code), Some(1000));
    assert_eq!(rig.agent.wait(secs(2)).code(), Some(0));
}

#[test]
fn drain_seconds_end_the_remaining_jobs_with_a_job_error() {
    let backend = Backend::vllm(&["m"]);
    let mut rig = Rig::with(|setup| setup.backend(backend.toml()).limits("drain_seconds = 1"));
    let jobs = [rig.session.job("m", json!({})), rig.session.job("m", json!({}))];
    let mut held = [backend.next(), backend.next()];
    held[0].start_sse();
    held[0].chunk("data: 1\n\n");
    let asked = Instant::now();
    rig.agent.signal("TERM");
    for id in &jobs {
        rig.session.outcome(id).error();
    }
    let took = asked.elapsed();
    assert!(took > ms(900) && took < secs(3), "a drain of 1 s took {took:?}");
    held.iter_mut().for_each(|held| {
        held.wait_hang_up();
    });
    assert_eq!(rig.session.ended(secs(2)).map(|(code, _)| code), Some(1000));
    assert_eq!(rig.agent.wait(secs(2)).code(), Some(0));
}

#[test]
fn drain_ends_with_its_last_job() {
    let backend = Backend::vllm(&["m"]);
    let mut rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    rig.agent.signal("TERM");
    assert_empty_offer(&rig.session);
    rig.session.cancel(&id);
    held.wait_hang_up();
    assert_eq!(rig.session.ended(secs(2)).map(|(code, _)| code), Some(1000));
    assert_eq!(rig.agent.wait(secs(2)).code(), Some(0));
    rig.session.assert_quiet(&id);
}

#[test]
fn second_signal_stops_at_once() {
    let backend = Backend::vllm(&["m"]);
    let mut rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    rig.agent.signal("TERM");
    assert_empty_offer(&rig.session);
    let asked = Instant::now();
    rig.agent.signal("TERM");
    let outcome = rig.session.outcome(&id);
    assert_eq!((outcome.error(), outcome.message()), ("internal", "the agent is stopping"));
    assert_eq!(rig.session.ended(secs(2)).map(|(code, _)| code), Some(1000));
    assert_eq!(rig.agent.wait(secs(2)).code(), Some(0));
    assert!(asked.elapsed() < ms(1500), "a second signal took {:?}", asked.elapsed());
    held.wait_hang_up();
}

#[test]
fn session_end_during_the_drain_stops_the_agent_without_a_reconnect() {
    let backend = Backend::vllm(&["m"]);
    let mut rig = Rig::new(&backend);
    rig.session.job("m", json!({}));
    let mut held = backend.next();
    rig.agent.signal("TERM");
    assert_empty_offer(&rig.session);
    rig.session.cut();
    held.wait_hang_up();
    assert_eq!(rig.agent.wait(secs(3)).code(), Some(0));
    rig.coordinator.assert_not_dialled(Duration::ZERO);
}

/// A coordinator that stops reading must not keep the process alive: unsent frames are dropped.
#[test]
fn slow_drain_does_not_outlast_its_limit_if_the_coordinator_is_stuck() {
    let backend = Backend::vllm(&["m"]);
    let mut rig = Rig::with(|setup| setup.backend(backend.toml()).limits("drain_seconds = 1"));
    rig.session.pause(true);
    rig.session.job("m", json!({}));
    let mut held = backend.next();
    held.start_sse();
    let flood =
        std::thread::spawn(move || while held.try_send(&[b"10000\r\n", &[b'x'; 1 << 16][..], b"\r\n"].concat()) {});
    rig.agent.signal("TERM");
    assert_eq!(rig.agent.wait(SOON).code(), Some(0));
    flood.join().expect("the flood to end with its job");
}

#[test]
fn signal_stops_the_agent_in_every_state_of_connecting() {
    // Returns what must stay open.
    type Get = fn(&Coordinator) -> Box<dyn Any>;
    let states: [(&str, Get); 4] = [
        ("between two dials", |coordinator| {
            drop(coordinator.dialled(SOON));
            drop(coordinator.dialled(SOON));
            Box::new(())
        }),
        ("waiting for the upgrade", |coordinator| Box::new(coordinator.dialled(SOON))),
        ("waiting for the challenge", |coordinator| Box::new(coordinator.accept())),
        ("waiting for the verdict", |coordinator| {
            let session = coordinator.accept();
            session.challenge(b"nonce");
            Box::new(session)
        }),
    ];
    side_by_side(states, |(what, get)| {
        let coordinator = Coordinator::new();
        let mut agent = Setup::new(&coordinator.url()).start();
        let _open = get(&coordinator);
        let asked = Instant::now();
        agent.signal("TERM");
        assert_eq!(agent.wait(SOON).code(), Some(0), "{what}");
        assert!(asked.elapsed() < secs(1), "{what}: SIGTERM took {:?}", asked.elapsed());
    });
}

#[test]
fn signal_stops_the_agent_while_the_first_offer_is_gathered() {
    let hung = Backend::new(|_| Answer::Hold);
    let coordinator = Coordinator::new();
    let mut agent = Setup::new(&coordinator.url()).backend(hung.toml()).start();
    let session = coordinator.accept();
    session.challenge(b"nonce");
    session.send(&json!({"type": "auth_ok"}));
    let _held = hung.next();
    agent.stderr.wait_line(&["connected as"]);
    assert_stops_in_order(&mut agent, &session, secs(1));
}

#[test]
fn unread_log_does_not_keep_the_agent_from_serving_and_stopping() {
    let backend = Backend::vllm(&["m"]);
    let coordinator = Coordinator::new();
    let mut agent = Setup::new(&coordinator.url()).backend(backend.toml()).start_with_unread_outputs();
    let session = coordinator.session();
    // Each logs a warning; together many times the size of a pipe.
    for _ in 0..5000 {
        session.send_text("not a frame");
    }
    let id = session.job("m", json!({}));
    backend.next().finish();
    session.outcome(&id).done();
    assert_stops_in_order(&mut agent, &session, secs(2));
}

#[test]
fn second_signal_does_not_wait_for_a_coordinator_that_does_not_read() {
    let backend = Backend::vllm(&["m"]);
    let mut rig = Rig::new(&backend);
    rig.session.pause(true);
    // Fills every buffer; when the second job's deadline has passed, the writer is blocked.
    let start = |deadline_ms: u64| {
        let mut frame = job(&uuid::Uuid::new_v4().to_string(), "m", json!({}));
        frame["deadline_ms"] = json!(deadline_ms);
        rig.session.send(&frame);
        let mut held = backend.next();
        held.start_sse();
        held.flood()
    };
    let (flood, late) = (start(60_000), start(1500));
    late.join().expect("the flood of the job that ran out of time");
    rig.agent.signal("TERM");
    rig.agent.stderr.wait_line(&["stopping"]);
    let asked = Instant::now();
    rig.agent.signal("TERM");
    assert_eq!(rig.agent.wait(SOON).code(), Some(0));
    assert!(asked.elapsed() < secs(2), "a second signal took {:?}", asked.elapsed());
    flood.join().expect("the flood to end with its job");
}

#[test]
fn job_cut_off_at_the_end_of_the_drain_reports_the_tokens_sent() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("drain_seconds = 1"));
    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    held.start_sse();
    let event = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}],\"usage\":{\"completion_tokens\":5}}\n\n";
    held.chunk(event);
    assert_eq!(rig.session.chunk(&id), event.as_bytes());
    rig.agent.signal("TERM");
    let outcome = rig.session.outcome(&id);
    assert_eq!((outcome.error(), &outcome.end["tokens_emitted"]), ("internal", &json!(5)), "{}", outcome.end);
}
