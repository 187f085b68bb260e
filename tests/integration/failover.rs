//! A model that several backends list: the advertised one is preferred, the others are there when it cannot take a job.

use serde_json::json;

use crate::support::*;

/// Two backends that list `m`; the first is advertised.
fn rig(first: &Backend, second: &Backend) -> Rig {
    Rig::with(|setup| {
        let second = second.toml().replace("vllm", "openai");
        setup.backend(first.toml()).backend(second)
    })
}

#[test]
fn a_job_that_the_advertised_backend_cannot_take_goes_to_the_next() {
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
            // On a kept-alive connection that may have been closed before; so it is asked once more.
            drop(first.next());
        }
        second.next().finish();
        let outcome = rig.session.outcome(&id);
        assert_eq!(outcome.done()["tokens"]["output"], 13, "{what}");
        assert_eq!(outcome.body(), sse(7, 13).as_bytes(), "{what}: of the second backend alone");
    }
}

#[test]
fn what_is_the_jobs_own_fault_or_has_begun_stays_where_it_is() {
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
fn when_no_backend_can_take_a_job_it_ends_once_within_its_deadline() {
    let (first, second) = (Backend::vllm(&["m"]), Backend::vllm(&["m"]));
    let rig = rig(&first, &second);
    let id = rig.session.job("m", json!({}));
    first.next().send(response(503, "text/plain", "server busy"));
    second.next().send(response(429, "text/plain", ""));
    assert_eq!(rig.session.outcome(&id).error(), "out_of_capacity");

    let id = uuid::Uuid::new_v4().to_string();
    let mut frame = job(&id, "m", json!({}));
    frame["deadline_ms"] = json!(600);
    rig.session.send(&frame);
    let held = first.next();
    std::thread::sleep(ms(400));
    drop(held);
    let _silent = second.next();
    assert_eq!(rig.session.outcome(&id).error(), "backend_timeout");
}
