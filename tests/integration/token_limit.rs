//! `max_tokens_per_minute`: which tokens count, and what happens when it is used up.

use serde_json::json;

use crate::support::*;

fn rig(backend: &Backend, limit: u32) -> Rig {
    Rig::with(|setup| setup.backend(backend.toml()).limits(&format!("max_tokens_per_minute = {limit}")))
}

fn answering(input: u32, output: u32) -> Backend {
    Backend::vllm_with(&["m"], move |_| Answer::Raw(response(200, "text/event-stream", sse(input, output))))
}

#[test]
fn slow_jobs_are_refused_while_the_tokens_of_the_last_minute_reach_the_limit() {
    let backend = answering(7, 13);
    let rig = rig(&backend, 60);
    let run = || rig.session.outcome(&rig.session.job("m", json!({})));
    // Prompt and answer both count: 20, 40, 60.
    for _ in 0..3 {
        run().done();
    }
    let began = std::time::Instant::now();
    for _ in 0..3 {
        let refused = run();
        assert_eq!(refused.error(), "out_of_capacity");
        assert!(refused.message().contains("max_tokens_per_minute"), "{}", refused.message());
    }
    // A new session does not reset the count.
    rig.session.close(1001, "drain:deploy");
    let session = rig.coordinator.session();
    let run = || session.outcome(&session.job("m", json!({})));
    assert_eq!(run().error(), "out_of_capacity");
    while run().end["type"] == "job_error" {
        assert!(began.elapsed() < secs(65), "refused for {:?}", began.elapsed());
        std::thread::sleep(ms(500));
    }
    assert!(began.elapsed() > secs(55), "a minute was over after {:?}", began.elapsed());
}

#[test]
fn tokens_count_as_they_pass_even_of_a_cancelled_answer() {
    let backend = Backend::vllm(&["m"]);
    let rig = rig(&backend, 5);
    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    held.start_sse();
    for _ in 0..5 {
        held.chunk("data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n");
        rig.session.chunk(&id);
    }
    rig.session.cancel(&id);
    held.wait_hang_up();
    assert_eq!(rig.session.outcome(&rig.session.job("m", json!({}))).error(), "out_of_capacity");
    backend.assert_none(QUIET);
}

#[test]
fn jobs_below_the_limit_or_without_one_all_run() {
    let backend = answering(1000, u32::MAX);
    for limits in ["", "max_tokens_per_minute = 9_000_000_000_000"] {
        let rig = Rig::with(|setup| setup.backend(backend.toml()).limits(limits));
        for _ in 0..10 {
            rig.session.outcome(&rig.session.job("m", json!({}))).done();
        }
    }
}
