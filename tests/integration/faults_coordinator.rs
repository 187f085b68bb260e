//! Faults of the coordinator and of the link to it: nothing leaks, and the next job is served.

use std::collections::HashMap;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::*;

fn header(length: u64) -> Vec<u8> {
    [&[0x81, 127][..], &length.to_be_bytes()].concat()
}

/// A job for `m` with this deadline, and the connection that its backend holds.
fn start(session: &Session, backend: &Backend, deadline_ms: u64) -> (String, Held) {
    let id = Uuid::new_v4().to_string();
    let mut frame = job(&id, "m", json!({}));
    frame["deadline_ms"] = json!(deadline_ms);
    session.send(&frame);
    (id, backend.next())
}

#[test]
fn slow_silence_in_the_handshake_leaks_nothing() {
    // Returns what must stay open.
    type Step = fn(&Coordinator) -> Box<dyn std::any::Any>;
    let steps: [Step; 3] = [
        |coordinator| Box::new(coordinator.dialled(SOON)),
        |coordinator| Box::new(coordinator.accept()),
        |coordinator| {
            let session = coordinator.accept();
            session.challenge(b"nonce");
            Box::new(session)
        },
    ];
    side_by_side(steps, |step| {
        let measured = MeasuredAgent::new();
        measured.rig.session.close(1001, "drain:deploy");
        let _silent = step(&measured.rig.coordinator);
        let next = measured.rig.coordinator.dialled(secs(25));
        measured.assert_no_leak_in(&next.upgrade().authenticate(None));
    });
}

#[test]
fn websocket_violation_ends_only_that_session_with_a_warning() {
    let _descriptors = reserve_descriptors(180);
    let open = || encode(TEXT, false, b"{");
    let cases = [
        ("not WebSocket at all", b"SSH-2.0-OpenSSH_9.2\r\n".repeat(1000)),
        ("zeroes", vec![0; 1 << 16]),
        ("a reserved bit", vec![0xc1, 2, b'{', b'}']),
        ("a reserved opcode", encode(5, true, b"")),
        ("a masked frame", vec![0x81, 0x82, 1, 2, 3, 4, b'{', b'}']),
        ("text that is not UTF-8", encode(TEXT, true, b"\"\xff\"")),
        ("a character cut off by the end", encode(TEXT, true, b"\"\xc3")),
        ("fragments that are not UTF-8", [open(), encode(CONTINUATION, true, b"\xff}")].concat()),
        ("a continuation of nothing", encode(CONTINUATION, true, b"{}")),
        ("a message within a message", [open(), encode(TEXT, true, b"{}")].concat()),
        ("a ping that is too long", encode(PING, true, &[b'x'; 126])),
        ("a ping in fragments", encode(PING, false, b"x")),
        ("a close that is too long", encode(CLOSE, true, &[b'x'; 126])),
        ("a close in fragments", encode(CLOSE, false, &close_payload(1001, ""))),
        ("a close of one byte", encode(CLOSE, true, &[3])),
        ("a close whose reason is not UTF-8", encode(CLOSE, true, b"\x03\xe9\xff")),
        ("a frame above 64 MiB", header((64 << 20) + 1)),
        ("a frame of all there is", header(u64::MAX)),
    ];
    side_by_side(cases, |(what, bytes)| {
        let measured = MeasuredAgent::new();
        measured.rig.session.send_raw(&bytes);
        measured.assert_no_leak_after_reconnect();
        assert_ne!(measured.rig.agent.warnings(), [""; 0], "{what} is a reason to warn");
    });
}

#[test]
fn valid_but_useless_frames_change_nothing() {
    let pieces = |opcode, piece: &[u8], count| {
        let more = encode(CONTINUATION, false, piece).repeat(count);
        [encode(opcode, false, piece), more, encode(CONTINUATION, true, piece)].concat()
    };
    let cases = [
        encode(BINARY, true, &[0xff; 1 << 20]),
        pieces(BINARY, &[0xff; 1 << 10], 1 << 10),
        // Thousands of frames, empty or of one byte.
        pieces(TEXT, b"", 10_000),
        pieces(TEXT, b"{", 10_000),
        [encode(TEXT, false, b"{"), encode(PING, true, b"x").repeat(1000), encode(CONTINUATION, true, b"}")].concat(),
    ];
    side_by_side(cases, |bytes| {
        let measured = MeasuredAgent::new();
        measured.rig.session.send_raw(&bytes);
        measured.assert_no_leak();
    });
}

#[test]
fn fragments_above_64_mib_end_the_session_and_their_memory_is_returned() {
    side_by_side([TEXT, BINARY], |opcode| {
        let measured = MeasuredAgent::new();
        let piece = vec![b'x'; 1 << 20];
        measured.rig.session.send_raw(&encode(opcode, false, &piece));
        for _ in 0..64 {
            measured.rig.session.send_raw(&encode(CONTINUATION, false, &piece));
        }
        measured.assert_no_leak_after_reconnect();
        assert_ne!(measured.rig.agent.warnings(), [""; 0], "it is a reason to warn");
        let peak = measured.rig.agent.peak_kib();
        assert!(peak < 96 << 10, "a message of 64 MiB took {peak} KiB of memory");
    });
}

#[test]
fn reset_ends_only_the_session() {
    let MeasuredAgent { rig: Rig { session, agent, setup: _setup, coordinator }, backend, before } =
        MeasuredAgent::new();
    let (_, mut held) = start(&session, &backend, 30_000);
    session.reset();
    held.wait_hang_up();
    before.assert_no_leak(&agent, &coordinator.session(), &backend);
    agent.stderr.wait_line(&["warn", "session ended", "reset"]);
}

#[test]
fn slow_close_with_any_code_is_followed_by_a_session_and_only_1001_is_not_a_warning() {
    let lawful = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 4000, 4999];
    let unlawful = [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, u16::MAX];
    let payloads = lawful.into_iter().chain(unlawful).map(|code| close_payload(code, "")).chain([Vec::new()]);
    // Three per agent: after more unplanned ends the reconnect delay would grow.
    let cases: Vec<_> = payloads.collect();
    side_by_side(cases.chunks(3), |payloads| {
        let MeasuredAgent { rig: Rig { mut session, agent, setup: _setup, coordinator }, backend, before } =
            MeasuredAgent::new();
        for payload in payloads {
            let warned = agent.warnings().len();
            session.close_with(payload);
            session = coordinator.session();
            let is_planned = payload.is_empty() || *payload == close_payload(1001, "");
            let expected = warned + usize::from(!is_planned);
            assert_eq!(agent.warnings().len(), expected, "after {payload:?}: {:?}", agent.warnings());
        }
        before.assert_no_leak(&agent, &session, &backend);
    });
}

/// The link goes dead in both directions, or in the middle of a frame.
#[test]
fn slow_dead_link_is_given_up_with_all_its_jobs() {
    let swallowed = || {
        let coordinator = Coordinator::new();
        let proxy = FaultProxy::to(coordinator.address());
        let backend = Backend::vllm(&["m"]);
        let agent = Setup::new(&format!("ws://{}/", proxy.address())).backend(backend.toml()).start();
        let session = coordinator.session();
        let before = ResourceUsage::after_a_job(&agent, &session, &backend);
        let (_, mut held) = start(&session, &backend, 120_000);
        held.start_sse();
        proxy.set(Mode::Swallow);
        let took = held.wait_hang_up_within(secs(60));
        assert!(took > secs(44) && took < secs(48), "the job of a dead link was given up after {took:?}");
        proxy.set(Mode::Pass);
        before.assert_no_leak(&agent, &coordinator.session(), &backend);
    };
    let announced = || {
        let measured = MeasuredAgent::new();
        // A pong would be part of the frame.
        measured.rig.session.ignore_pings();
        let (_, mut held) = start(&measured.rig.session, &measured.backend, 120_000);
        measured.rig.session.send_raw(&header(64 << 20));
        held.wait_hang_up_within(secs(60));
        measured.assert_no_leak_after_reconnect();
        let peak = measured.rig.agent.peak_kib();
        assert!(peak < 32 << 10, "a frame of 64 MiB that never came took {peak} KiB of memory");
    };
    let parts: [&(dyn Fn() + Sync); 2] = [&swallowed, &announced];
    side_by_side(parts, |part| part());
}

#[test]
fn slow_reader_of_a_byte_a_second_delays_no_cancel_and_no_deadline() {
    // As in `relay`: with many unread bytes, the kernel may drop the acknowledgement of the cancel, which then never arrives.
    assert!((0..3).any(|_| slowly_read_jobs_end()), "the cancel did not get through to the agent, three times");
}

/// False if the cancel did not reach the agent.
fn slowly_read_jobs_end() -> bool {
    let MeasuredAgent { rig: Rig { session, agent, setup: _setup, coordinator }, backend, before } =
        MeasuredAgent::new();
    session.read_slowly();
    let flood = |deadline_ms| {
        let (id, mut held) = start(&session, &backend, deadline_ms);
        held.start_sse();
        (id, held.flood())
    };
    let [(cancelled, cancelled_flood), (_, first), (_, second)] = [(); 3].map(|()| flood(120_000));
    let (_, late) = flood(3000);
    session.cancel(&cancelled);
    if !agent.stderr.has_line(&[&cancelled, "cancelled"], secs(5)) {
        return false;
    }
    cancelled_flood.join().expect("the flood of the cancelled job");
    late.join().expect("the flood of the job that ran out of time");
    assert!(!first.is_finished() && !second.is_finished(), "the other jobs were to go on");
    let peak = agent.peak_kib();
    assert!(peak < 64 << 10, "four floods took {peak} KiB of memory");
    drop(session);
    for flood in [first, second] {
        flood.join().expect("the flood to end with its session");
    }
    before.assert_no_leak(&agent, &coordinator.session(), &backend);
    true
}

#[test]
fn slow_burst_of_10_000_jobs_is_answered_once_each() {
    let backend = Backend::vllm_with(&["m", "quick"], |request| match request.json()["model"].as_str() {
        Some("quick") => Answer::Raw(response(200, "text/event-stream", sse(7, 13))),
        _ => Answer::Hold,
    });
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_concurrent = 8"));
    let before = ResourceUsage::after_a_job(&rig.agent, &rig.session, &backend);
    let mut answers: HashMap<String, Vec<Value>> =
        (0..10_000).map(|_| (Uuid::new_v4().to_string(), Vec::new())).collect();
    let frames = answers.keys().map(|id| encode(TEXT, true, job(id, "quick", json!({})).to_string().as_bytes()));
    rig.session.send_raw(&frames.collect::<Vec<_>>().concat());
    let mut left = answers.len();
    rig.session.each("an answer to each job", 6 * SOON, |event| match event {
        Event::Frame(frame) if frame["type"] == "job_done" || frame["type"] == "job_error" => {
            let id = frame["job_id"].as_str().expect("a job_id");
            answers.get_mut(id).expect("a job that was sent").push(frame.clone());
            left -= 1;
            if left == 0 { Take::Stop } else { Take::Eat }
        }
        Event::Frame(frame) if frame["type"] == "job_chunk" => Take::Eat,
        _ => Take::Leave,
    });
    rig.session.assert_no_frame("a second answer", QUIET, |frame| frame["job_id"].is_string());
    assert!(answers.values().all(|answers| answers.len() == 1), "some job was answered twice, and another never");
    let of = |kind: &str| answers.values().filter(|answers| answers[0]["type"] == kind).count();
    let refused = answers.values().filter(|answers| answers[0]["error_code"] == "out_of_capacity").count();
    assert_eq!(of("job_done") + refused, answers.len(), "each is served or refused for want of a place");
    assert!(of("job_done") >= 8 && refused > 5000, "{} served, {refused} refused", of("job_done"));
    let peak = rig.agent.peak_kib();
    assert!(peak < 32 << 10, "10 000 jobs took {peak} KiB of memory");
    before.assert_no_leak(&rig.agent, &rig.session, &backend);
}

#[test]
fn job_sent_a_thousand_times_runs_once() {
    let measured = MeasuredAgent::new();
    let session = &measured.rig.session;
    let id = session.job("m", json!({}));
    let held = measured.backend.next();
    session.send_raw(&encode(TEXT, true, job(&id, "m", json!({})).to_string().as_bytes()).repeat(999));
    // Frames are handled in order: once this is answered, all of them were read.
    session.outcome(&session.job("unknown", json!({})));
    held.finish();
    session.outcome(&id).done();
    session.assert_quiet(&id);
    measured.backend.assert_none(QUIET);
    measured.assert_no_leak();
}

#[test]
fn slow_sessions_that_end_right_after_auth_ok_leak_nothing() {
    let measured = MeasuredAgent::new();
    measured.rig.session.close(1001, "drain:deploy");
    let goodbye = encode(CLOSE, true, &close_payload(1001, "drain:deploy"));
    for _ in 0..50 {
        let session = measured.rig.coordinator.accept();
        session.challenge(b"nonce");
        session.send_raw(&[encode(TEXT, true, br#"{"type":"auth_ok"}"#), goodbye.clone()].concat());
        assert!(session.ends_within(SOON), "the agent did not end a session that was over");
    }
    measured.assert_no_leak_after_reconnect();
}

/// Every slot is taken, and every buffer between the backends and the coordinator is full.
#[test]
fn slow_memory_of_256_jobs_blocked_by_the_coordinator_stays_below_64_mb() {
    let _descriptors = reserve_descriptors(300);
    let measured = MeasuredAgent::with(|setup| setup.limits("max_concurrent = 256"));
    let session = &measured.rig.session;
    session.pause(true);
    let mut held: Vec<_> = (0..256).map(|_| start(session, &measured.backend, 120_000).1).collect();
    side_by_side(held.iter_mut(), |held| {
        held.start_sse();
        held.flood_until_full();
    });
    let peak = measured.rig.agent.peak_kib();
    assert!(peak < 64 << 10, "256 blocked jobs took {peak} KiB of memory");
    session.cut();
    for held in &mut held {
        held.wait_hang_up();
    }
    measured.assert_no_leak_after_reconnect();
}
