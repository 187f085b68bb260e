//! How sessions end, and the delay before the next one.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::*;

/// Checks a reconnect delay, with its jitter of 0.8 to 1.2 and an allowance for a loaded machine.
fn assert_delay(delay: Duration, seconds: u32, what: &str) {
    let (least, most) = (secs(1).mul_f64(0.8) * seconds, secs(1).mul_f64(1.2) * seconds + ms(300));
    assert!(delay >= least - ms(20) && delay <= most, "{what}: redialled after {delay:?}, not about {seconds} s");
}

#[test]
fn planned_closes_are_logged_at_info_and_reconnect_from_the_shortest_delay() {
    let closes: [(&str, Vec<u8>); 4] = [
        ("drain:deploy", close_payload(1001, "drain:deploy")),
        ("drain:operator", close_payload(1001, "drain:operator")),
        ("another 1001", close_payload(1001, "bye")),
        ("no close frame", Vec::new()),
    ];
    side_by_side(closes, |(what, payload)| {
        let backend = Backend::vllm(&["m"]);
        let rig = Rig::new(&backend);
        let closed = Instant::now();
        rig.session.close_with(&payload);
        let answer = rig.session.ended(secs(2));
        assert_eq!(answer.map(|(code, _)| code), payload.first().map(|_| 1001), "the Close in answer to {what}");
        let next = rig.coordinator.dialled(SOON);
        assert_delay(next.at - closed, 1, what);
        let next = next.upgrade().authenticate(None);
        assert_eq!(next.capabilities["models"][0]["model_id"], "m");
        assert_eq!(rig.agent.warnings(), [""; 0], "{what} is no reason to warn");
    });
}

#[test]
fn unplanned_ends_are_warnings_and_reconnect_too() {
    type End = fn(&Session);
    let ends: [(&str, End); 7] = [
        ("the connection is cut", Session::cut),
        ("Close(1000)", |session| session.close(1000, "")),
        ("Close(1011)", |session| session.close(1011, "internal error")),
        ("Close(4000)", |session| session.close(4000, "drain:deploy")),
        ("a masked frame", |session| session.send_raw(&[0x81, 0x82, 1, 2, 3, 4, b'{', b'}'])),
        ("a reserved opcode", |session| session.send_frame(5, b"")),
        ("a message above 64 MiB", |session| {
            session.send_raw(&[&[0x81, 127][..], &(65_u64 << 20).to_be_bytes()].concat())
        }),
    ];
    side_by_side(ends, |(what, end)| {
        let backend = Backend::vllm(&["m"]);
        let rig = Rig::new(&backend);
        let ended = Instant::now();
        end(&rig.session);
        let next = rig.coordinator.dialled(SOON);
        assert_delay(next.at - ended, 1, what);
        next.upgrade().authenticate(None);
        assert_ne!(rig.agent.warnings(), [""; 0], "{what} is a reason to warn");
    });
}

#[test]
fn slow_delay_doubles_with_each_failed_handshake_and_a_session_resets_it() {
    let coordinator = Coordinator::new();
    let _agent = Setup::new(&coordinator.url()).start();
    let mut ended = None;
    for (n, seconds) in [(1, 0), (2, 1), (3, 2)] {
        let dialled = coordinator.dialled(SOON);
        if let Some(ended) = ended {
            assert_delay(dialled.at - ended, seconds, &format!("dial {n}"));
        }
        ended = Some(Instant::now());
        drop(dialled);
    }
    // A refused handshake is a failure, too.
    let session = coordinator.accept();
    assert_delay(session.dialled_at - ended.expect("a dial before"), 4, "dial 4");
    let session = session.authenticate(None);
    session.close(1001, "drain:deploy");
    let ended = Instant::now();
    assert_delay(coordinator.dialled(SOON).at - ended, 1, "the dial after a session");
}

#[test]
fn slow_delay_is_no_longer_reset_after_three_short_sessions() {
    let coordinator = Coordinator::new();
    let _agent = Setup::new(&coordinator.url()).start();
    let mut session = coordinator.session();
    for (n, seconds) in [(1, 1), (2, 1), (3, 2), (4, 4)] {
        let ended = Instant::now();
        session.cut();
        let next = coordinator.dialled(SOON);
        assert_delay(next.at - ended, seconds, &format!("after short session {n}"));
        session = next.upgrade().authenticate(None);
    }
}

#[test]
fn discovery_runs_again_on_every_connection() {
    let address = nobody_at("127.0.0.7");
    let first = Backend::vllm_on(&address, &["before"]);
    let rig = Rig::new(&first);
    assert_eq!(rig.session.capabilities["models"][0]["model_id"], "before");
    drop(first);
    let _second = Backend::vllm_on(&address, &["after"]);
    rig.session.close(1001, "drain:deploy");
    let session = rig.coordinator.session();
    assert_eq!(session.capabilities["models"].as_array().map(Vec::len), Some(1));
    assert_eq!(session.capabilities["models"][0]["model_id"], "after");
}

#[test]
fn slow_sessions_serve_five_times_in_a_row() {
    let backend = Backend::vllm(&["m"]);
    let Rig { mut session, coordinator, agent: _agent, setup: _setup } = Rig::new(&backend);
    for _ in 0..5 {
        let id = session.job("m", json!({}));
        backend.next().finish();
        session.outcome(&id).done();
        session.close(1001, "drain:deploy");
        session = coordinator.session();
    }
}
