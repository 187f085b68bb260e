//! What an agent costs while nobody needs it, and what it may cost while somebody does. Where a limit holds for release builds
//! alone the test is ignored by itself, and `scripts/promises` runs it with one.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::*;

/// The main thread, the writer, the prober, and the one that waits for signals.
const IDLE_THREADS_MAX: usize = 4;

/// 2.62 MB, a third of the tokio agent 0.3.5, which is the agent itself; the rest is for what its operator types: cron's call,
/// the log file, setting up, asking for its state and for what is wrong with the box.
const BINARY_BYTES_MAX: u64 = 2_800_000;

/// Idle, in KiB; 4200 were measured, of which 1500 are the C library's and 2200 the program file's.
const IDLE_RESIDENT_KIB_MAX: u64 = 4600;

/// Of a call by cron that finds an agent at work, in bytes; 2 800 000 were measured, of which /bin/true takes 1 100 000. With
/// its code scattered over the program it is 3 900 000: see scripts/startup-order.
const CALL_BYTES_MAX: u64 = 3_000_000;

/// Of the same call; a millisecond was measured, and most of that is the start of a process.
const CALL_TIME_MAX: Duration = ms(5);

/// Of each stream that waits for its next event, in KiB; 33 were measured, 24 of them of the stack.
const STREAM_RESIDENT_KIB_MAX: u64 = 40;

/// In Cargo.lock: those of other systems and of the tests are among them; about 70 are linked.
const CRATES_MAX: usize = 132;

#[test]
fn an_idle_agent_has_at_most_four_threads_also_after_work() {
    let backend = Backend::vllm(&["m"]);
    let other = Backend::vllm(&["n"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).backend(other.toml()).limits("max_concurrent = 16"));
    let wait_idle = |what: &str| {
        let began = Instant::now();
        while rig.agent.threads().len() > IDLE_THREADS_MAX {
            assert!(began.elapsed() < secs(30), "{what}: {:?}", rig.agent.threads());
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

#[test]
fn no_crate_comes_in_unnoticed_and_no_async_runtime_at_all() {
    let lock = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock")).expect("Cargo.lock");
    let crates: Vec<&str> = lock.lines().filter_map(|line| line.strip_prefix("name = ")).collect();
    assert!(crates.len() <= CRATES_MAX, "{} crates; if the new ones are worth it, say so in Cargo.toml", crates.len());
    for runtime in ["tokio", "async-std", "smol", "mio", "futures-executor", "hyper"] {
        assert!(!crates.contains(&format!("\"{runtime}\"").as_str()), "{runtime} came in");
    }
}

#[test]
#[ignore = "scripts/promises runs it, with a release build"]
fn the_release_binary_is_little_more_than_a_third_of_its_predecessor() {
    let binary = std::env::var("AGENT").expect("AGENT names a release build");
    let bytes = std::fs::metadata(&binary).expect("the binary").len();
    assert!(bytes <= BINARY_BYTES_MAX, "{binary} has {bytes} bytes, {} too many", bytes - BINARY_BYTES_MAX);
}

#[test]
#[ignore = "scripts/promises runs it, with a release build"]
fn a_call_by_cron_that_finds_an_agent_at_work_costs_next_to_nothing() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| {
        let rest = "[pricing.models]\n\"a/b\" = { input_per_1m = 1_000, output_per_1m = 2_000 }\n[observability]\nlog_level = \"info\"";
        setup.backend(format!("{}\nmodels = [\"m\", \"n\"]", backend.toml())).limits("drain_seconds = 30").more(rest)
    });
    let calls: Vec<_> = (0..20).map(|_| rig.setup.weigh_by_cron()).collect();
    assert!(calls.iter().all(|call| call.exit_code == 0), "{calls:?}");
    let peak = calls.iter().map(|call| call.peak_bytes).max().expect("calls");
    let quickest = calls.iter().map(|call| call.took).min().expect("calls");
    println!("a call takes {peak} bytes and {quickest:?}");
    assert!(peak <= CALL_BYTES_MAX, "a call takes {peak} bytes");
    assert!(quickest <= CALL_TIME_MAX, "a call takes {quickest:?}");
}

#[test]
#[ignore = "scripts/promises runs it, with a release build"]
fn an_idle_agent_and_a_stream_take_little_memory() {
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
