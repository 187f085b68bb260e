//! How failed jobs affect the offer: a backend that fails them is withdrawn, even if its health check passes. What a request may have
//! caused is in `field::health`.

use std::time::Instant;

use serde_json::{Value, json};

use crate::support::*;

/// A healthy vLLM; each job names its own answer, a status or a word.
fn answering_as_asked() -> Backend {
    Backend::vllm_with(&["m"], |request| match &request.json()["answer"] {
        Value::Number(status) => {
            Answer::Raw(response(status.as_u64().expect("a status") as u16, "text/plain", "as you like"))
        }
        Value::String(word) if word == "reset" => Answer::RawThenClose(Vec::new()),
        Value::String(word) if word == "break" => Answer::RawThenClose(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\n: ".into(),
        ),
        Value::String(word) if word == "silence" => Answer::Hold,
        _ => Answer::Raw(response(200, "text/event-stream", sse(1, 2))),
    })
}

fn run(session: &Session, answer: impl Into<Value>) -> Outcome {
    session.outcome(&session.job("m", json!({"answer": answer.into()})))
}

#[test]
fn slow_backend_with_three_failures_in_a_row_is_withdrawn_until_a_probe_succeeds() {
    let cases: [[Value; 3]; 4] = [
        [json!(500), json!(502), json!(504)],
        [json!(503), json!(503), json!(503)],
        [json!("reset"), json!("reset"), json!("reset")],
        [json!("break"), json!("break"), json!(501)],
    ];
    side_by_side(cases, |answers| {
        let backend = answering_as_asked();
        let rig = Rig::new(&backend);
        for answer in &answers[..2] {
            run(&rig.session, answer.clone()).error();
        }
        rig.session.assert_no_frame("another offer after two failures", QUIET, is_offer);
        run(&rig.session, answers[2].clone()).error();
        assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]), "{answers:?}");
        let withdrawn = Instant::now();
        rig.agent.stderr.wait_line(&["warn", &backend.url(), "not offered", "3 jobs"]);
        // The health check passed throughout.
        let back = rig.session.frame("capabilities", secs(20));
        assert_eq!(back["models"][0]["model_id"], "m");
        assert!(withdrawn.elapsed() > secs(3), "{answers:?}: offered again after {:?}", withdrawn.elapsed());
        run(&rig.session, "good").done();
        let posted = backend.seen().iter().filter(|request| request.method != "GET").count();
        // A reset on a kept-alive connection is retried once.
        assert!((4..=7).contains(&posted), "a probe is a GET: {posted} POSTs");
    });
}

#[test]
fn failure_count_ignores_client_errors_cancels_and_deadlines() {
    let backend = answering_as_asked();
    let rig = Rig::new(&backend);
    for _ in 0..2 {
        for answer in [json!("break"), json!("break"), json!("good")] {
            run(&rig.session, answer);
        }
    }
    for answer in
        [json!("break"), json!("break"), json!(400), json!(413), json!(422), json!(429), json!(404), json!(400)]
    {
        run(&rig.session, answer).error();
    }
    for _ in 0..3 {
        let cancelled = rig.session.job("m", json!({"answer": "silence"}));
        let mut held = backend.next();
        rig.session.cancel(&cancelled);
        held.wait_hang_up();
        let mut late = job(&uuid::Uuid::new_v4().to_string(), "m", json!({"answer": "silence"}));
        late["deadline_ms"] = json!(300);
        rig.session.send(&late);
        assert_eq!(rig.session.outcome(late["job_id"].as_str().expect("an id")).error(), "backend_timeout");
        backend.next().wait_hang_up();
    }
    rig.session.assert_no_frame("another offer", QUIET, is_offer);
    run(&rig.session, "break").error();
    assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]), "the third failure in a row");
}

#[test]
fn slow_withdrawn_backend_is_replaced_by_the_next_that_lists_the_model() {
    let (failing, other) = (answering_as_asked(), answering_as_asked());
    let rig = Rig::with(|setup| setup.backend(failing.toml()).backend(other.toml().replace("vllm", "openai")));
    assert_eq!(rig.session.capabilities["models"][0]["backend"], "vllm");
    for _ in 0..3 {
        run(&rig.session, "break").error();
    }
    let offer = rig.session.frame("capabilities", SOON);
    assert_eq!(offer["models"][0]["backend"], "openai", "{offer}");
    let before = failing.seen().iter().filter(|request| request.method == "POST").count();
    run(&rig.session, "good").done();
    assert_eq!(other.seen().iter().filter(|request| request.method == "POST").count(), 1);
    assert_eq!(failing.seen().iter().filter(|request| request.method == "POST").count(), before);
    let back = rig.session.frame("capabilities", secs(20));
    assert_eq!(back["models"][0]["backend"], "vllm", "{back}");
}

/// Jobs above the other backend's capacity are refused, and do not go to the withdrawn one.
#[test]
fn withdrawn_backend_gets_no_job_while_another_serves_the_model() {
    let (busy, failing) = (Backend::vllm(&["m"]), answering_as_asked());
    let rig = Rig::with(|setup| {
        let failing = failing.toml().replace("vllm", "openai");
        setup.backend(format!("{}\nmax_concurrent = 1", busy.toml())).backend(failing)
    });
    let running = rig.session.job("m", json!({}));
    let held = busy.next();
    for _ in 0..3 {
        run(&rig.session, "break").error();
    }
    assert_eq!(rig.session.frame("capabilities", SOON)["models"][0]["max_concurrent"], 1);
    let posts = failing.posts();
    assert_eq!(run(&rig.session, "good").error(), "out_of_capacity");
    assert_eq!(failing.posts(), posts);
    held.finish();
    rig.session.outcome(&running).done();
}
