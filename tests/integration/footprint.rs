//! The threads and the memory of an idle and of a busy agent, and the wake-ups of an idle one. The ignored tests hold for release
//! builds alone:
//!
//!     AGENT=$PWD/target/release/usepod-agent cargo test --test integration footprint:: -- --ignored

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::*;

/// The main thread, the writer, the housekeeping thread, and the one that waits for signals.
const IDLE_THREADS_MAX: usize = 4;

/// Idle, in KiB; 4460 were measured, of which 1500 are the C library's and 2300 the program file's.
const IDLE_RESIDENT_KIB_MAX: u64 = 5 << 10;

/// Of an idle agent, in [`IDLE_WINDOW`]; 4 were measured, all of them for the heartbeat that falls into it.
const IDLE_WAKE_UPS_MAX: u64 = 10;

/// As long as the interval of the heartbeats, so that one falls into it.
const IDLE_WINDOW: Duration = secs(15);

/// Of each stream that waits for its next event, in KiB; 33 were measured, 24 of them of the stack.
const STREAM_RESIDENT_KIB_MAX: u64 = 40;

#[test]
fn slow_threads_of_an_idle_agent_are_at_most_four_also_after_work() {
    let backend = Backend::vllm(&["m"]);
    let other = Backend::vllm(&["n"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).backend(other.toml()).limits("max_concurrent = 16"));
    wait_idle(&rig, "connected");
    let jobs: Vec<_> = (0..16).map(|_| rig.session.job("m", json!({}))).collect();
    let held: Vec<_> = jobs.iter().map(|_| backend.next()).collect();
    held.into_iter().for_each(Held::finish);
    for id in &jobs {
        rig.session.outcome(id).done();
    }
    wait_idle(&rig, "after 16 jobs");
    // The first is the process's own.
    for thread in &rig.agent.threads()[1..] {
        assert_ne!(thread, "usepod-agent", "every thread has a name of its own: {:?}", rig.agent.threads());
    }
}

fn wait_idle(rig: &Rig, what: &str) {
    let began = Instant::now();
    while rig.agent.threads().len() > IDLE_THREADS_MAX {
        assert!(began.elapsed() < secs(30), "{what}: {:?}", rig.agent.threads());
        std::thread::sleep(ms(50));
    }
}

#[test]
fn slow_memory_of_a_large_unknown_frame_is_little_more_than_its_text() {
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
fn slow_memory_of_endless_lines_is_bounded() {
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

#[test]
#[ignore = "needs a release build; .ci/run has one"]
fn idle_agent_sleeps() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    wait_idle(&rig, "connected");
    let before = rig.agent.wake_ups();
    std::thread::sleep(IDLE_WINDOW);
    let wake_ups = rig.agent.wake_ups() - before;
    println!("{wake_ups} wake-ups in {IDLE_WINDOW:?}");
    assert!(wake_ups <= IDLE_WAKE_UPS_MAX, "idle, the agent woke up {wake_ups} times in {IDLE_WINDOW:?}");
}

#[test]
#[ignore = "needs a release build; .ci/run has one"]
fn memory_of_an_idle_agent_and_of_a_stream_is_small() {
    const STREAMS: u64 = 256;
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_concurrent = 256"));
    let resident = || rig.agent.status_kib("VmRSS");
    let idle = resident();
    assert!(idle <= IDLE_RESIDENT_KIB_MAX, "idle, the agent takes {idle} KiB");
    let jobs: Vec<_> = (0..STREAMS).map(|_| rig.session.job("m", json!({}))).collect();
    let mut held: Vec<_> = jobs.iter().map(|_| backend.next()).collect();
    for held in &mut held {
        held.start_sse();
        held.chunk("data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n");
    }
    for id in &jobs {
        rig.session.chunk(id);
    }
    let each = (resident() - idle) / STREAMS;
    for mut held in held {
        held.chunk("data: [DONE]\n\n");
        held.end();
    }
    for id in &jobs {
        rig.session.outcome(id).done();
    }
    println!("idle {idle} KiB, a stream {each} KiB");
    assert!(each <= STREAM_RESIDENT_KIB_MAX, "a stream takes {each} KiB");
}
