//! Models listed by several backends: the advertised backend is preferred, the others take the jobs that it cannot.

use std::time::Instant;

use serde_json::{Value, json};

use crate::support::*;

/// Two backends that list `m`; the first is advertised.
fn rig(first: &Backend, second: &Backend) -> Rig {
    Rig::with(|setup| {
        let second = second.toml().replace("vllm", "openai");
        setup.backend(first.toml()).backend(second)
    })
}

#[test]
fn job_that_the_advertised_backend_cannot_take_goes_to_the_next() {
    let loading = r#"{"error":{"message":"Loading model","code":503}}"#;
    let cases: [(&str, Vec<u8>); 5] = [
        ("closed before an answer", Vec::new()),
        ("loading", response(503, "application/json", loading)),
        ("full", response(503, "text/plain", "server busy")),
        ("too many requests", response(429, "text/plain", "")),
        ("bad gateway", response(502, "text/plain", "")),
    ];
    for (what, answer) in cases {
        let (first, second) = (Backend::vllm(&["m"]), Backend::vllm(&["m"]));
        let rig = rig(&first, &second);
        assert_eq!(rig.session.capabilities["models"][0]["backend"], "vllm");
        let id = rig.session.job("m", json!({}));
        first.next().send(&answer);
        if answer.is_empty() {
            // A request on a kept-alive connection is repeated once, as the connection may have been closed before.
            drop(first.next());
        }
        second.next().finish();
        let outcome = rig.session.outcome(&id);
        assert_eq!(outcome.done()["tokens"]["output"], 13, "{what}");
        assert_eq!(outcome.body(), sse(7, 13).as_bytes(), "{what}: of the second backend alone");
    }
}

#[test]
fn job_that_is_at_fault_or_has_begun_does_not_fail_over() {
    let begun =
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 1000\r\n\r\ndata: 1\n\n".to_vec();
    let cases = [
        ("bad request", response(400, "text/plain", "too long"), "internal"),
        ("failed", response(500, "text/plain", ""), "internal"),
        ("refused key", response(401, "text/plain", ""), "auth_rejected_by_backend"),
        ("cut after the first byte", begun, "internal"),
    ];
    for (what, answer, code) in cases {
        let (first, second) = (Backend::vllm(&["m"]), Backend::vllm(&["m"]));
        let rig = rig(&first, &second);
        let id = rig.session.job("m", json!({}));
        first.next().send(&answer);
        assert_eq!(rig.session.outcome(&id).error(), code, "{what}");
        second.assert_none(QUIET);
    }
}

#[test]
fn job_that_no_backend_can_take_ends_once_within_its_deadline() {
    let (first, second) = (Backend::vllm(&["m"]), Backend::vllm(&["m"]));
    let rig = rig(&first, &second);
    let id = rig.session.job("m", json!({}));
    first.next().send(response(503, "text/plain", "server busy"));
    second.next().send(response(429, "text/plain", ""));
    assert_eq!(rig.session.outcome(&id).error(), "out_of_capacity");

    let id = uuid::Uuid::new_v4().to_string();
    let mut frame = job(&id, "m", json!({}));
    frame["deadline_ms"] = json!(1500);
    rig.session.send(&frame);
    let (sent, held) = (Instant::now(), first.next());
    second.assert_none(secs(1));
    drop(held);
    let _silent = second.next();
    assert_eq!(rig.session.outcome(&id).error(), "backend_timeout");
    assert!(sent.elapsed() < ms(2500), "the deadline began again with the second backend: {:?}", sent.elapsed());
}

/// `[[backends]]` for a vLLM with this `max_concurrent`.
fn capped(backend: &Backend, max_concurrent: u32) -> String {
    format!("{}\nmax_concurrent = {max_concurrent}", backend.toml())
}

fn capacity(capabilities: &Value) -> &Value {
    &capabilities["models"][0]["max_concurrent"]
}

#[test]
fn jobs_spread_over_equal_backends_by_their_free_slots() {
    let (small, large) = (Backend::vllm(&["m"]), Backend::vllm(&["m"]));
    let other = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| {
        let other = other.toml().replace("vllm", "openai");
        setup.backend(capped(&small, 1)).backend(capped(&large, 3)).backend(other)
    });
    assert_eq!(capacity(&rig.session.capabilities), 8, "what all that list it take, and the agent at most");
    // The large one has 3 free slots, then 2, then as many as the small one, which comes first in the file.
    let mut jobs = Vec::new();
    let mut held = Vec::new();
    for (n, backend) in [&large, &large, &small, &large, &other].into_iter().enumerate() {
        jobs.push(rig.session.job("m", json!({"n": n})));
        let taken = backend.next();
        assert_eq!(taken.request.json()["n"], n, "job {n} went elsewhere");
        held.push(taken);
    }
    // A slot is free with the terminal frame, and as soon as the cancel was read.
    held.remove(2).finish();
    rig.session.outcome(&jobs[2]).done();
    jobs.push(rig.session.job("m", json!({})));
    let mut again = small.next();
    rig.session.cancel(&jobs[5]);
    jobs[2] = rig.session.job("m", json!({}));
    held.push(small.next());
    again.wait_hang_up();
    held.into_iter().for_each(Held::finish);
    jobs.remove(5);
    for id in &jobs {
        rig.session.outcome(id).done();
    }
}

#[test]
fn equal_backends_without_limits_share_the_jobs() {
    let (first, second) = (Backend::vllm(&["m"]), Backend::vllm(&["m"]));
    let rig = Rig::with(|setup| setup.backend(first.toml()).backend(second.toml()));
    let jobs: Vec<_> = (0..8).map(|_| rig.session.job("m", json!({}))).collect();
    for backend in [&first, &second] {
        let held: Vec<_> = (0..4).map(|_| backend.next()).collect();
        held.into_iter().for_each(Held::finish);
    }
    for id in &jobs {
        rig.session.outcome(id).done();
    }
}

#[test]
fn job_above_the_capacity_of_its_backends_is_refused_at_once_and_others_are_not() {
    let (capped_one, free) = (Backend::vllm(&["m"]), Backend::vllm(&["n"]));
    let rig = Rig::with(|setup| setup.backend(capped(&capped_one, 2)).backend(free.toml()));
    assert_eq!(capacity(&rig.session.capabilities), 2, "{}", rig.session.capabilities);
    assert_eq!(rig.session.capabilities["models"][1]["max_concurrent"], 8);
    let running = [rig.session.job("m", json!({})), rig.session.job("m", json!({}))];
    let held = [capped_one.next(), capped_one.next()];
    let refused = rig.session.outcome(&rig.session.job("m", json!({})));
    assert_eq!(refused.error(), "out_of_capacity");
    assert!(refused.message().contains("max_concurrent"), "{}", refused.message());
    let id = rig.session.job("n", json!({}));
    free.next().finish();
    rig.session.outcome(&id).done();
    held.into_iter().for_each(Held::finish);
    for id in &running {
        rig.session.outcome(id).done();
    }
    capped_one.assert_none(QUIET);
}

#[test]
fn job_fails_over_to_a_backend_only_while_that_has_a_free_slot() {
    let (first, second) = (Backend::vllm(&["m"]), Backend::vllm(&["m"]));
    let rig = Rig::with(|setup| {
        let second = capped(&second, 1).replace("vllm", "openai");
        setup.backend(first.toml()).backend(second)
    });
    let busy = response(503, "text/plain", "server busy");
    for _ in 0..2 {
        rig.session.job("m", json!({}));
    }
    let mut held = [first.next(), first.next()];
    held[0].send(&busy);
    let taken = second.next();
    held[1].send(&busy);
    held.into_iter().for_each(Held::keep);
    rig.session.wait("the end of the one that found no slot", SOON, |event| match event {
        Event::Frame(frame) if frame["error_code"] == "out_of_capacity" => Some(()),
        _ => None,
    });
    second.assert_none(QUIET);
    taken.finish();
    rig.session.wait("the end of the other", SOON, |event| match event {
        Event::Frame(frame) if frame["type"] == "job_done" => Some(()),
        _ => None,
    });
}
