//! What an agent costs while nobody needs it, and what it may cost while somebody does.

use std::time::Instant;

use serde_json::json;

use crate::support::*;

#[test]
fn an_idle_agent_has_at_most_five_threads_also_after_work() {
    let backend = Backend::vllm(&["m"]);
    let other = Backend::vllm(&["n"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).backend(other.toml()).limits("max_concurrent = 16"));
    let wait_idle = |what: &str| {
        let began = Instant::now();
        while rig.agent.threads().len() > 5 {
            assert!(began.elapsed() < secs(20), "{what}: {:?}", rig.agent.threads());
            std::thread::sleep(ms(50));
        }
    };
    wait_idle("connected");
    let jobs: Vec<_> = (0..16).map(|_| rig.session.job("m", json!({}))).collect();
    let held: Vec<_> = jobs.iter().map(|_| backend.next()).collect();
    held.into_iter().for_each(Held::finish);
    for id in &jobs {
        rig.session.outcome(id).done();
    }
    wait_idle("after 16 jobs");
    // The first is the process's own.
    for thread in &rig.agent.threads()[1..] {
        assert_ne!(thread, "usepod-agent", "every thread has a name of its own: {:?}", rig.agent.threads());
    }
}

#[test]
fn a_large_frame_of_an_unknown_type_costs_little_more_than_its_text() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let values = "0,".repeat(12_000_000);
    rig.session.send_text(&format!("{{\"type\":\"from_the_future\",\"x\":[{values}0]}}"));
    let id = rig.session.job("m", json!({}));
    backend.next_within(3 * SOON).finish();
    rig.session.outcome(&id).done();
    let peak = rig.agent.peak_kib();
    assert!(peak < 64 << 10, "an ignored frame of 24 MB took {peak} KiB of memory");
}

#[test]
fn lines_without_end_cost_a_job_no_memory_worth_mentioning() {
    const JOBS: usize = 48;
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_concurrent = 64"));
    let line = "x".repeat(1_000_000);
    let (jobs, mut held): (Vec<_>, Vec<_>) =
        (0..JOBS).map(|_| (rig.session.job("m", json!({})), backend.next())).unzip();
    for held in &mut held {
        held.start_sse();
        held.chunk("data: {\"choices\":[{\"delta\":{\"content\":\"");
        held.chunk(&line);
    }
    for (id, mut held) in jobs.iter().zip(held) {
        held.chunk("\"}}],\"usage\":{\"input\":7,\"output\":13}}\n\ndata: [DONE]\n\n");
        held.end();
        assert_eq!(rig.session.outcome(id).done()["tokens"]["output"], 13);
    }
    let peak = rig.agent.peak_kib();
    assert!(peak < 40 << 10, "{JOBS} lines of a megabyte took {peak} KiB of memory");
}
