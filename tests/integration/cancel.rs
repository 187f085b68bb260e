//! How soon a backend's connection is closed: within 20 ms of a cancel, a deadline or the end of the session, in each phase of
//! the job. `--nocapture` shows the figures, one line per round:
//! `cancel: WHAT: n=100 p50=0.21ms p99=0.80ms max=1.02ms load=0.40 limit=20.00ms`, where the load is the number
//! of runnable threads per core, and the limit is 20 ms scaled by the load.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use serde_json::json;

use crate::support::*;

const LIMIT: Duration = ms(20);
/// The highest load that scales the limit: a delay of more than 160 ms is a fault on any machine.
const LOAD_MAX: f64 = 8.0;
const JOBS: u32 = 100;

/// The phase of a job when it is ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    BeforeHeaders,
    MidStream,
    BlockedOnAFullLane,
}

use Phase::{BeforeHeaders, BlockedOnAFullLane, MidStream};

type Watch = JoinHandle<(Held, Option<Instant>)>;

struct Running {
    id: String,
    deadline: Instant,
    watch: Watch,
}

/// Samples the number of runnable threads per core, and averages it.
struct Load {
    stop: Sender<()>,
    sampler: JoinHandle<f64>,
}

impl Load {
    fn start() -> Self {
        let (stop, stopped) = bounded::<()>(0);
        let sampler = std::thread::spawn(move || {
            let cores = std::thread::available_parallelism().expect("the number of cores").get() as f64;
            let mut runnable = Vec::new();
            while stopped.recv_timeout(ms(10)) == Err(RecvTimeoutError::Timeout) {
                let figures = std::fs::read_to_string("/proc/loadavg").expect("the load");
                let (now, _) = figures.split(' ').nth(3).and_then(|field| field.split_once('/')).expect("n/m");
                // Without this thread.
                runnable.push(now.parse::<f64>().expect("a number") - 1.0);
            }
            runnable.iter().sum::<f64>() / runnable.len() as f64 / cores
        });
        Self { stop, sampler }
    }

    fn end(self) -> f64 {
        drop(self.stop);
        self.sampler.join().expect("the sampler")
    }
}

/// Runs up to three rounds of measurements; one within the limit is enough, as noise only adds to the figures. The limit grows
/// with the load. In a round without figures the cancel was lost before it reached the agent, which happens only if the
/// coordinator has left too much unread.
fn assert_prompt(what: &str, may_be_lost: bool, round: impl Fn() -> Option<Vec<Duration>>) {
    let mut figures = String::new();
    for _ in 0..3 {
        let load = Load::start();
        let Some(mut took) = round() else {
            assert!(may_be_lost, "{what}: the end never came to the backend");
            continue;
        };
        let load = load.end();
        took.sort_unstable();
        let percentile = |p: usize| took[(took.len() * p).div_ceil(100) - 1];
        let limit = LIMIT.mul_f64(load.clamp(1.0, LOAD_MAX));
        let text = |time: Duration| format!("{:.2}ms", time.as_secs_f64() * 1e3);
        let [p50, p99, max] = [50, 99, 100].map(|p| text(percentile(p)));
        let n = took.len();
        figures = format!("n={n} p50={p50} p99={p99} max={max} load={load:.2} limit={}", text(limit));
        #[expect(clippy::print_stdout, reason = "figures for whoever runs it with --nocapture")]
        {
            println!("cancel: {what}: {figures}");
        }
        if percentile(99) <= limit {
            return;
        }
    }
    panic!(
        "{what}: the backend heard of it after more than the limit (p99) in each of three rounds, the last: {figures}"
    );
}

fn rig(backend: &Backend) -> Rig {
    Rig::with(|setup| setup.backend(backend.toml()).limits("max_concurrent = 256"))
}

/// Returns the job's id and the instant of its deadline.
fn send_job(session: &Session, model: &str, time: Duration) -> (String, Instant) {
    let sent = Instant::now();
    (session.job_within(time, model, json!({})), sent + time)
}

/// Starts `count` jobs and takes each into this phase. The deadlines are a few milliseconds apart, so that the jobs do not
/// delay each other.
fn start(session: &Session, backend: &Backend, phase: Phase, count: u32, time: Duration) -> Vec<Running> {
    if phase == BlockedOnAFullLane {
        fill_the_lane(session, backend);
    }
    let start_one = |n| {
        let (id, deadline) = send_job(session, "m", time + ms(5) * n);
        let mut held = backend.next();
        match phase {
            BeforeHeaders => {}
            MidStream => {
                held.start_sse();
                held.chunk("data: 1\n\n");
                session.chunk(&id);
            }
            BlockedOnAFullLane => {
                held.start_sse();
                held.chunk([b'x'; 16 << 10]);
                held.chunk([b'x'; 16 << 10]);
            }
        }
        Running { id, deadline, watch: held.watch_hang_up(2 * SOON) }
    };
    (0..count).map(start_one).collect()
}

/// Stops the coordinator's reading, and has one job fill every buffer up to it.
fn fill_the_lane(session: &Session, backend: &Backend) {
    session.pause(true);
    session.job("m", json!({}));
    let mut held = backend.next();
    held.start_sse();
    held.flood_until_full();
    // Keeps the connection open.
    held.watch_hang_up(secs(60));
}

/// How long after `since` the backend's connection was closed.
fn closed_after(since: Instant, watch: Watch) -> Option<Duration> {
    let (_, closed) = watch.join().expect("a watching thread");
    Some(closed?.checked_duration_since(since).expect("nothing is closed before its time"))
}

/// Checks that the jobs were blocked: none of their frames had been sent, and none is sent now.
fn assert_nothing_was_said(session: &Session, ids: &[String]) {
    session.pause(false);
    session.assert_no_frame("a frame of a cancelled job", QUIET, |frame| {
        ids.iter().any(|id| frame["job_id"] == id.as_str())
    });
}

#[test]
fn slow_cancel_reaches_the_backend_within_20_ms() {
    let _descriptors = reserve_descriptors(130);
    for phase in [BeforeHeaders, MidStream, BlockedOnAFullLane] {
        assert_prompt(&format!("cancel, {phase:?}"), phase == BlockedOnAFullLane, || {
            let backend = Backend::vllm(&["m"]);
            let rig = rig(&backend);
            let jobs = start(&rig.session, &backend, phase, JOBS, secs(60));
            let ids: Vec<_> = jobs.iter().map(|job| job.id.clone()).collect();
            let cancelled = jobs.into_iter().map(|job| {
                let since = Instant::now();
                rig.session.cancel(&job.id);
                closed_after(since, job.watch)
            });
            // Cancels one at a time, until one is lost.
            let took = cancelled.collect::<Option<Vec<_>>>()?;
            assert_nothing_was_said(&rig.session, &ids);
            Some(took)
        });
    }
}

#[test]
fn slow_deadline_reaches_the_backend_within_20_ms() {
    let _descriptors = reserve_descriptors(350);
    // Long enough to take all jobs into their phase, also on a loaded machine.
    const DEADLINE: Duration = secs(3);
    side_by_side([BeforeHeaders, MidStream, BlockedOnAFullLane], |phase| {
        assert_prompt(&format!("deadline, {phase:?}"), phase == BlockedOnAFullLane, || {
            let backend = Backend::vllm(&["m"]);
            let rig = rig(&backend);
            let jobs = start(&rig.session, &backend, phase, JOBS, DEADLINE);
            let ids: Vec<_> = jobs.iter().map(|job| job.id.clone()).collect();
            let passed = jobs.into_iter().map(|job| closed_after(job.deadline, job.watch));
            let took = passed.collect::<Option<Vec<_>>>()?;
            rig.session.pause(false);
            for id in &ids {
                assert_eq!(rig.session.outcome(id).error(), "backend_timeout");
            }
            Some(took)
        });
    });
}

#[test]
fn slow_session_end_reaches_the_backend_within_20_ms_for_all_jobs() {
    let _descriptors = reserve_descriptors(240);
    type End = fn(&Session);
    let ends: [(&str, End); 2] = [("cut", Session::cut), ("closed", |session| session.close(1001, "drain:deploy"))];
    // In sequence: closing 200 connections is load enough.
    for (how, end) in ends {
        let backend = Backend::vllm(&["m"]);
        let Rig { session, agent, setup: _setup, coordinator } = rig(&backend);
        let before = ResourceUsage::after_a_job(&agent, &session, &backend);
        let first = std::cell::Cell::new(Some(session));
        assert_prompt(&format!("session {how}, mixed phases"), true, || {
            let session = first.take().unwrap_or_else(|| coordinator.session());
            // The last phase stops the coordinator's reading.
            let counts = [(BeforeHeaders, 80), (MidStream, 80), (BlockedOnAFullLane, 40)];
            let jobs = counts.map(|(phase, count)| start(&session, &backend, phase, count, secs(60)));
            let watches: Vec<_> = jobs.into_iter().flatten().map(|job| job.watch).collect();
            let since = Instant::now();
            end(&session);
            // All are joined before any is dropped, as closing sockets would distort the figures.
            let ends: Vec<_> = watches.into_iter().map(|watch| watch.join().expect("a watching thread")).collect();
            ends.into_iter().map(|(_, closed)| Some(closed?.duration_since(since))).collect()
        });
        before.assert_no_leak(&agent, &coordinator.session(), &backend);
    }
}

/// No request reaches the backend, even when it accepts connections again.
#[test]
fn slow_cancel_while_connecting_prevents_the_request_and_frees_the_slot_at_once() {
    let _descriptors = reserve_descriptors(240);
    let stuck = Backend::vllm(&["stuck"]);
    let healthy = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| {
        setup.backend(stuck.toml()).backend(healthy.toml()).limits(&format!("max_concurrent = {JOBS}"))
    });
    let before = ResourceUsage::after_a_job(&rig.agent, &rig.session, &healthy);
    let queue = stuck.swallow_connects();
    let cancelled: Vec<_> = (0..JOBS).map(|_| rig.session.job("stuck", json!({}))).collect();
    stuck.wait_for_connects(cancelled.len());
    for id in &cancelled {
        rig.session.cancel(id);
    }
    let (late, deadline) = send_job(&rig.session, "stuck", secs(1));
    let next: Vec<_> = (1..JOBS).map(|_| rig.session.job("m", json!({}))).collect();
    let held: Vec<_> = next.iter().map(|_| healthy.next()).collect();
    held.into_iter().for_each(Held::finish);
    for id in &next {
        rig.session.outcome(id).done();
    }
    assert_eq!(rig.session.outcome(&late).error(), "backend_timeout");
    let late_by = deadline.elapsed();
    assert!(late_by < ms(1500), "a deadline while connecting was late by {late_by:?}");

    stuck.accept_again(queue);
    stuck.wait_for_connects(0);
    stuck.assert_none(QUIET);
    assert_eq!(stuck.posts(), 0);
    for id in &cancelled {
        rig.session
            .assert_no_frame("a frame of a cancelled job", Duration::ZERO, |frame| frame["job_id"] == id.as_str());
    }
    before.assert_no_leak(&rig.agent, &rig.session, &healthy);
}

/// A slot has two workers, as a blocking connect cannot be interrupted; while both are blocked, jobs wait in the queue.
fn make_jobs_queue(rig: &Rig, stuck: &Backend) -> Vec<std::net::TcpStream> {
    let queue = stuck.swallow_connects();
    for connects in [1, 2] {
        let id = rig.session.job("stuck", json!({}));
        stuck.wait_for_connects(connects);
        rig.session.cancel(&id);
    }
    queue
}

#[test]
fn slow_deadline_ends_a_queued_job_in_time() {
    let _descriptors = reserve_descriptors(160);
    let stuck = Backend::vllm(&["stuck"]);
    let healthy = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(stuck.toml()).backend(healthy.toml()).limits("max_concurrent = 1"));
    let _queue = make_jobs_queue(&rig, &stuck);
    // Connects are given up after 5 s.
    for _ in 0..3 {
        let (late, deadline) = send_job(&rig.session, "m", ms(500));
        assert_eq!(rig.session.outcome(&late).error(), "backend_timeout");
        assert!(Instant::now() >= deadline && deadline.elapsed() < ms(500), "late by {:?}", deadline.elapsed());
    }
    let next = rig.session.job("m", json!({"next": true}));
    let held = healthy.next();
    assert_eq!(held.request.json()["next"], true, "the others are not sent");
    held.finish();
    rig.session.outcome(&next).done();
}

#[test]
fn slow_cancel_of_a_queued_job_prevents_its_request_and_the_next_job_is_served() {
    let _descriptors = reserve_descriptors(160);
    let stuck = Backend::vllm(&["stuck"]);
    let healthy = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(stuck.toml()).backend(healthy.toml()).limits("max_concurrent = 1"));
    let before = ResourceUsage::after_a_job(&rig.agent, &rig.session, &healthy);
    let _queue = make_jobs_queue(&rig, &stuck);
    let posts = healthy.posts();
    let cancelled: Vec<_> = (0..JOBS)
        .map(|_| {
            let id = rig.session.job("m", json!({}));
            rig.session.cancel(&id);
            id
        })
        .collect();
    let next = rig.session.job("m", json!({"next": true}));
    let held = healthy.next();
    assert_eq!(held.request.json()["next"], true);
    held.finish();
    rig.session.outcome(&next).done();
    healthy.assert_none(QUIET);
    assert_eq!(healthy.posts(), posts + 1, "of all that were queued only the one that nobody cancelled is sent");
    for id in &cancelled {
        rig.session
            .assert_no_frame("a frame of a cancelled job", Duration::ZERO, |frame| frame["job_id"] == id.as_str());
    }
    before.assert_no_leak(&rig.agent, &rig.session, &healthy);
}

/// A cancelled request is freed before a worker takes it.
#[test]
fn slow_cancel_of_a_queued_job_frees_the_memory_of_its_request() {
    let _descriptors = reserve_descriptors(160);
    let stuck = Backend::vllm(&["stuck"]);
    let rig = Rig::with(|setup| setup.backend(stuck.toml()).limits("max_concurrent = 1"));
    let _queue = make_jobs_queue(&rig, &stuck);
    let before = rig.agent.status_kib("VmRSS");
    let large = "x".repeat(1 << 20);
    // Before the connects are given up.
    for _ in 0..50 {
        let id = rig.session.job("stuck", json!({"messages": [large]}));
        rig.session.cancel(&id);
    }
    assert_eq!(rig.session.outcome(&rig.session.job("nobody", json!({}))).error(), "model_not_loaded");
    let after = rig.agent.status_kib("VmRSS");
    assert!(after < before + (24 << 10), "{before} KiB, then {after} KiB");
}
