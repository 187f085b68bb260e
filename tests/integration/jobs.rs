//! Jobs from admission to the terminal frame. The relayed bytes are tested in `relay`.

use std::time::Instant;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::*;

fn body() -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}]})
}

fn answering(models: &[&str]) -> Backend {
    Backend::vllm_with(models, |_| Answer::Raw(response(200, "text/event-stream", sse(7, 13))))
}

#[test]
fn job_is_answered_with_its_chunks_then_job_done() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let id = rig.session.job("m", body());
    let mut held = backend.next();
    held.start_sse();
    held.chunk("data: 1\n\n");
    let chunk = rig.session.frame("job_chunk", SOON);
    assert_eq!(chunk, json!({"type": "job_chunk", "job_id": id, "data": base64("data: 1\n\n")}));
    held.chunk(sse(7, 13));
    held.end();
    let outcome = rig.session.outcome(&id);
    assert_eq!(outcome.body(), sse(7, 13).as_bytes());
    let mut done = outcome.done().clone();
    assert!(done["duration_ms"].as_u64().is_some_and(|ms| ms < 10_000), "{done}");
    done["duration_ms"] = json!(0);
    let tokens = json!({"input": 7, "output": 13, "input_tokens": 7, "output_tokens": 13});
    assert_eq!(done, json!({"type": "job_done", "job_id": id, "tokens": tokens, "duration_ms": 0}));
    rig.session.assert_quiet(&id);
}

#[test]
fn job_for_an_unknown_model_is_refused_at_once() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    for model in ["another", "M", ""] {
        let id = rig.session.job(model, body());
        let outcome = rig.session.outcome(&id);
        assert_eq!((outcome.error(), outcome.chunks.len()), ("model_not_loaded", 0));
        assert!(outcome.message().len() < 1000 && outcome.end["tokens_emitted"] == 0, "{}", outcome.end);
        rig.session.assert_quiet(&id);
    }
    backend.assert_none(QUIET);
}

#[test]
fn jobs_above_the_limit_are_refused_at_once_and_the_others_continue() {
    let backend = Backend::vllm(&["m", "n"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_concurrent = 2"));
    let admitted = [rig.session.job("m", body()), rig.session.job("n", body())];
    let mut held: Vec<_> = admitted.iter().map(|_| backend.next()).collect();
    for _ in 0..3 {
        let refused = rig.session.job("m", body());
        assert_eq!(rig.session.outcome(&refused).error(), "out_of_capacity");
    }
    held.drain(..).for_each(Held::finish);
    for id in &admitted {
        rig.session.outcome(id).done();
    }
}

#[test]
fn max_concurrent_of_256_runs_256_jobs_in_parallel() {
    let _descriptors = reserve_descriptors(300);
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_concurrent = 256"));
    let jobs: Vec<_> = (0..256).map(|_| rig.session.job("m", body())).collect();
    let held: Vec<_> = jobs.iter().map(|_| backend.next()).collect();
    let refused = rig.session.job("m", body());
    assert_eq!(rig.session.outcome(&refused).error(), "out_of_capacity");
    held.into_iter().for_each(Held::finish);
    for id in &jobs {
        assert_eq!(rig.session.outcome(id).done()["tokens"]["output"], 13);
    }
}

/// The slot is free by the time the coordinator receives the terminal frame.
#[test]
fn job_right_behind_a_terminal_frame_is_admitted() {
    let backend = answering(&["m"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_concurrent = 1"));
    for _ in 0..100 {
        rig.session.outcome(&rig.session.job("m", body())).done();
    }
}

#[test]
fn job_right_behind_a_cancel_is_admitted() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_concurrent = 1"));
    let mut running = rig.session.job("m", body());
    for _ in 0..20 {
        let mut held = backend.next();
        let next = Uuid::new_v4().to_string();
        // In one segment: the agent reads both before the first job can end.
        let cancel = json!({"type": "job_cancel", "job_id": running}).to_string();
        let job = job(&next, "m", body()).to_string();
        rig.session.send_raw(&[encode(TEXT, true, cancel.as_bytes()), encode(TEXT, true, job.as_bytes())].concat());
        held.wait_hang_up();
        running = next;
    }
    backend.next().finish();
    rig.session.outcome(&running).done();
    rig.session.assert_no_frame("a frame of another job", QUIET, |frame| frame["job_id"] != running.as_str());
}

#[test]
fn cancel_closes_the_backend_request_and_no_frame_follows() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    type Progress = fn(&mut Held);
    // The moment, the answer so far, and whether a chunk was relayed.
    let cases: [(&str, Progress, bool); 5] = [
        ("before the backend answers at all", |_| {}, false),
        ("in the middle of the head", |held| held.send("HTTP/1.1 200 OK\r\nContent-"), false),
        ("before the first byte of the body", Held::start_sse, false),
        (
            "in a chunked stream",
            |held| {
                held.start_sse();
                held.chunk("data: 1\n\n");
            },
            true,
        ),
        (
            "in a body that lasts until the connection ends",
            |held| held.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n"),
            true,
        ),
    ];
    for (when, progress, begun) in cases {
        let id = rig.session.job("m", body());
        let mut held = backend.next();
        progress(&mut held);
        if begun {
            rig.session.chunk(&id);
        }
        rig.session.cancel(&id);
        let took = held.wait_hang_up();
        assert!(took < secs(1), "cancelled {when}, the backend saw it after {took:?}");
        rig.session.assert_quiet(&id);
    }
}

#[test]
fn cancel_of_an_unknown_or_finished_job_does_nothing() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let running = rig.session.job("m", body());
    let mut held = backend.next();
    rig.session.cancel(&Uuid::new_v4().to_string());
    rig.session.cancel("not-a-uuid");
    rig.session.send(&json!({"type": "job_cancel"}));
    held.assert_connected();
    held.finish();
    rig.session.outcome(&running).done();
    rig.session.cancel(&running);
    let next = rig.session.job("m", body());
    backend.next().finish();
    rig.session.outcome(&next).done();
    rig.session.assert_quiet(&running);
}

/// A wrong counter shows in the number of jobs admitted afterwards.
#[test]
fn max_concurrent_is_kept_through_300_races_of_cancel_and_completion() {
    let backend = Backend::vllm_with(&["m", "held"], |request| match request.json()["model"].as_str() {
        Some("held") => Answer::Hold,
        _ => Answer::Raw(response(200, "text/event-stream", sse(1, 2))),
    });
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_concurrent = 3"));
    for n in 0..300 {
        let id = rig.session.job("m", body());
        // Between at once and after the end.
        let until = Instant::now() + ms(n % 7) / 2;
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        rig.session.cancel(&id);
    }
    // Frames are handled in order: once this is answered, every cancel was read.
    let unknown = rig.session.job("unknown", body());
    rig.session.outcome(&unknown);
    let admitted: Vec<_> = (0..3).map(|_| rig.session.job("held", body())).collect();
    let held: Vec<_> = admitted.iter().map(|_| backend.next()).collect();
    let refused = rig.session.job("held", body());
    assert_eq!(rig.session.outcome(&refused).error(), "out_of_capacity");
    held.into_iter().for_each(Held::finish);
    for id in &admitted {
        rig.session.outcome(id).done();
    }
}

#[test]
fn deadline_covers_the_whole_job() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let start = |deadline_ms: u64| {
        let id = Uuid::new_v4().to_string();
        let mut frame = job(&id, "m", body());
        frame["deadline_ms"] = json!(deadline_ms);
        rig.session.send(&frame);
        (id, Instant::now(), backend.next())
    };
    let expect_timeout = |id: &str, began: Instant, held: &mut Held| {
        let outcome = rig.session.outcome(id);
        let took = began.elapsed();
        assert_eq!(outcome.error(), "backend_timeout");
        assert!(took > ms(450) && took < ms(1500), "a deadline of 500 ms ran out after {took:?}");
        held.wait_hang_up();
        rig.session.assert_quiet(id);
        outcome
    };

    let (id, began, mut held) = start(500);
    expect_timeout(&id, began, &mut held);

    let (id, began, mut held) = start(500);
    held.start_sse();
    held.chunk("data: 1\n\n");
    let outcome = expect_timeout(&id, began, &mut held);
    assert_eq!(outcome.body(), b"data: 1\n\n");

    // Progress does not extend it.
    let (id, began, mut held) = start(500);
    held.start_sse();
    while began.elapsed() < ms(700) {
        held.chunk("data: 1\n\n");
        std::thread::sleep(ms(20));
    }
    expect_timeout(&id, began, &mut held);
}

#[test]
fn deadline_of_0_or_1_ms_ends_the_job_at_once() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    for deadline_ms in [0, 1] {
        let id = Uuid::new_v4().to_string();
        let mut frame = job(&id, "m", body());
        frame["deadline_ms"] = json!(deadline_ms);
        rig.session.send(&frame);
        assert_eq!(rig.session.outcome_within(&id, secs(2)).error(), "backend_timeout");
    }
}

/// Each of these is a deadline of a minute or more, which a backend that takes half a second meets.
#[test]
fn deadline_that_is_invalid_is_the_default_and_a_huge_one_is_kept() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let deadlines =
        ["\"10\"", "-5", "1.5", "null", "[]", "true", "4294967296", "4294967297", "1e300", "18446744073709551616"];
    let mut jobs = Vec::new();
    for deadline in deadlines {
        let id = Uuid::new_v4().to_string();
        rig.session.send_text(&format!(
            r#"{{"type":"job","job_id":"{id}","model_id":"m","request":{{}},"deadline_ms":{deadline}}}"#
        ));
        jobs.push((id, deadline));
        if jobs.len() == 5 {
            expect_served_after(&backend, &rig.session, std::mem::take(&mut jobs));
        }
    }
    assert!(jobs.is_empty(), "deadlines come in groups of five");
    let absent = Uuid::new_v4().to_string();
    rig.session.send(&json!({"type": "job", "job_id": absent, "model_id": "m", "request": {}}));
    expect_served_after(&backend, &rig.session, vec![(absent, "absent")]);
}

fn expect_served_after(backend: &Backend, session: &Session, jobs: Vec<(String, &str)>) {
    let held: Vec<_> = jobs.iter().map(|_| backend.next()).collect();
    session.assert_no_frame("an early end", ms(500), |frame| frame["type"] == "job_error");
    held.into_iter().for_each(Held::finish);
    for (id, deadline) in jobs {
        let outcome = session.outcome(&id);
        assert_eq!(outcome.end["type"], "job_done", "deadline_ms {deadline}: {}", outcome.end);
    }
}

#[test]
fn job_id_of_any_spelling_is_echoed_in_lower_case_with_hyphens() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let uuid = Uuid::new_v4();
    let plain = uuid.to_string();
    for spelling in [
        plain.to_uppercase(),
        uuid.simple().to_string(),
        uuid.braced().to_string(),
        uuid.urn().to_string(),
        uuid.simple().to_string().to_uppercase(),
    ] {
        rig.session.send(&job(&spelling, "m", body()));
        let held = backend.next();
        held.finish();
        rig.session.outcome(&plain).done();

        rig.session.send(&job(&plain, "m", body()));
        let mut held = backend.next();
        rig.session.cancel(&spelling);
        held.wait_hang_up();
    }
}

#[test]
fn job_with_the_id_of_a_running_one_is_ignored() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let id = rig.session.job("m", body());
    let first = backend.next();
    rig.session.send(&job(&id, "m", body()));
    rig.session.send(&job(&id, "unknown", body()));
    rig.agent.stderr.wait_line(&["warn", &id]);
    backend.assert_none(QUIET);
    first.finish();
    assert_eq!(rig.session.outcome(&id).body(), sse(7, 13).as_bytes());
    rig.session.assert_quiet(&id);
}

/// 0.3.5 deadlocks here: its reader blocks on a queue that only it empties.
#[test]
fn burst_of_5000_refusals_is_answered_once_each() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let running = rig.session.job("m", body());
    let held = backend.next();
    let ids: Vec<_> = (0..5000).map(|_| Uuid::new_v4().to_string()).collect();
    let burst: Vec<u8> =
        ids.iter().flat_map(|id| encode(TEXT, true, job(id, "unknown", body()).to_string().as_bytes())).collect();
    rig.session.send_raw(&burst);
    let mut refused = Vec::new();
    rig.session.each("5000 refusals", 3 * SOON, |event| match event {
        Event::Frame(frame) if frame["error_code"] == "model_not_loaded" => {
            refused.push(frame["job_id"].as_str().expect("a job_id").to_owned());
            if refused.len() == ids.len() { Take::Stop } else { Take::Eat }
        }
        _ => Take::Leave,
    });
    refused.sort_unstable();
    let mut asked = ids;
    asked.sort_unstable();
    assert!(refused == asked, "every refusal has its own job");
    held.finish();
    rig.session.outcome(&running).done();
}

#[test]
fn session_end_ends_its_jobs_at_the_backend() {
    let backend = Backend::vllm(&["m"]);
    let Rig { session, agent: _agent, setup: _setup, coordinator } = Rig::new(&backend);
    type End = fn(&Session);
    let ends: [(&str, End); 2] = [("cut", Session::cut), ("closed", |session| session.close(1001, "drain:deploy"))];
    let mut session = session;
    for (how, end) in ends {
        let jobs: Vec<_> = (0..2).map(|_| session.job("m", body())).collect();
        let mut held: Vec<_> = jobs.iter().map(|_| backend.next()).collect();
        held[0].start_sse();
        held[0].chunk("data: 1\n\n");
        session.wait("a chunk", SOON, |event| match event {
            Event::Frame(frame) if frame["type"] == "job_chunk" => Some(()),
            _ => None,
        });
        end(&session);
        for held in &mut held {
            let took = held.wait_hang_up();
            assert!(took < secs(2), "the session was {how}, and the backend saw it after {took:?}");
        }
        let next = coordinator.session();
        for id in &jobs {
            next.assert_quiet(id);
        }
        // The slots are free again.
        let id = next.job("m", body());
        backend.next().finish();
        next.outcome(&id).done();
        session = next;
    }
}

/// A worker cannot be interrupted in a connect, and the next job must not wait for it.
#[test]
fn cancelled_job_that_still_connects_delays_no_other() {
    let _descriptors = reserve_descriptors(160);
    let stuck = Backend::vllm(&["stuck"]);
    let healthy = answering(&["m"]);
    let rig = Rig::with(|setup| setup.backend(stuck.toml()).backend(healthy.toml()).limits("max_concurrent = 1"));
    let _queue = stuck.swallow_connects();
    let id = rig.session.job("stuck", body());
    stuck.wait_for_connects(1);
    rig.session.cancel(&id);
    let next = rig.session.job("m", body());
    rig.session.outcome_within(&next, secs(3)).done();
    rig.session.assert_quiet(&id);
}
