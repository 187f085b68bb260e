//! The workloads. Each starts a fresh process of its subject, and measures figures, whose names end with their unit.

use std::fmt;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::Result;
use crate::backend::BackendEvent;
use crate::client::ClientEvent;
use crate::event::{EVENT_BYTES, TAIL};
use crate::harness::{Harness, Run, TIMEOUT};
use crate::job::{INTERVAL_NS, Script};
use crate::report::{median, quantile};
use crate::subject::Subject;

pub type Figures = Vec<(&'static str, f64)>;

/// Concurrent short streams of [`Workload::Churn`], and the events of each.
const CHURN_STREAMS: u64 = 32;
const CHURN_EVENTS: u64 = 25;

/// Streams that emit at the same instant, as those of an engine that decodes in batches do.
const LOCKSTEP_STREAMS: u64 = 64;

/// Jobs before the measured ones.
const WARM_UP: usize = 8;

/// If a cancelled job's backend connection is still open after this, the figure is this time.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(3);

/// How much is measured, and for how long. Jobs and cancels run one at a time, and stop early after four windows.
pub struct Effort {
    pub rounds: usize,
    pub stream_counts: &'static [u64],
    pub starts: usize,
    pub idle: Duration,
    /// Between the first event of the last stream and the window.
    pub settle: Duration,
    pub window: Duration,
    pub jobs: usize,
    pub cancels: usize,
}

impl Effort {
    pub const FULL: Self = Self {
        rounds: 3,
        stream_counts: &[1, 8, 16, 32, 64, 128, 256],
        starts: 6,
        // Includes a heartbeat of each agent.
        idle: Duration::from_secs(16),
        settle: Duration::from_millis(400),
        window: Duration::from_millis(2500),
        jobs: 400,
        cancels: 40,
    };

    pub const QUICK: Self = Self {
        rounds: 2,
        stream_counts: &[1, 8, 64, 256],
        starts: 3,
        idle: Duration::from_secs(2),
        settle: Duration::from_millis(150),
        window: Duration::from_millis(450),
        jobs: 100,
        cancels: 15,
    };
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    Size,
    Start,
    Idle,
    Job,
    Churn,
    Lockstep,
    Streams(u64),
    Flood { streams: u64, events_per_chunk: u64 },
    Cancel { is_silent: bool },
}

/// The values of `--only`: the [`Workload::group`] of each.
pub const GROUPS: [&str; 9] = ["size", "start", "idle", "job", "churn", "lockstep", "streams", "flood", "cancel"];

/// Events of 180 bytes that fill a chunk of 16 KiB.
const EVENTS_PER_16K_CHUNK: u64 = 91;
const BIG_FLOOD: Workload = Workload::Flood { streams: 8, events_per_chunk: EVENTS_PER_16K_CHUNK };

impl Workload {
    /// All of them, in the order in which they run.
    pub fn all(effort: &Effort) -> Vec<Self> {
        let mut all = vec![Self::Size, Self::Start, Self::Idle, Self::Job, Self::Churn, Self::Lockstep];
        all.extend(effort.stream_counts.iter().map(|streams| Self::Streams(*streams)));
        all.extend([BIG_FLOOD, Self::Flood { streams: 64, events_per_chunk: 1 }]);
        all.extend([false, true].map(|is_silent| Self::Cancel { is_silent }));
        all
    }

    pub fn group(self) -> &'static str {
        match self {
            Self::Size => "size",
            Self::Start => "start",
            Self::Idle => "idle",
            Self::Job => "job",
            Self::Churn => "churn",
            Self::Lockstep => "lockstep",
            Self::Streams(_) => "streams",
            Self::Flood { .. } => "flood",
            Self::Cancel { .. } => "cancel",
        }
    }

    /// Whether the workload applies to a subject.
    pub fn applies_to(self, subject: Subject) -> bool {
        match (self, subject) {
            (_, Subject::Ours | Subject::Peer) => true,
            (Self::Start | Self::Idle | Self::Streams(64), Subject::Wss) => true,
            (_, Subject::Wss) => self == BIG_FLOOD,
            (Self::Size | Self::Cancel { .. }, _) => false,
            (Self::Start | Self::Idle, Subject::Direct) => false,
            _ => true,
        }
    }

    /// Measures one subject after the other. Errors name the workload and the subject.
    pub fn run(self, harness: &Harness, effort: &Effort, subjects: &[Subject]) -> Result<Vec<Figures>> {
        if self == Self::Idle {
            return idle(harness, effort, subjects).map_err(|error| format!("{self}: {error}").into());
        }
        let run = |subject| match self {
            Self::Size => size(harness, subject),
            Self::Start => start(harness, effort, subject),
            _ => {
                let mut run = harness.start(subject)?;
                self.measure(&mut run, effort).map_err(|error| format!("{error}; {}", run.process.state()).into())
            }
        };
        let named = |subject| run(subject).map_err(|error| format!("{self}, {subject}: {error}").into());
        subjects.iter().map(|subject| named(*subject)).collect()
    }

    fn measure(self, run: &mut Run, effort: &Effort) -> Result<Figures> {
        match self {
            Self::Job => jobs(run, effort),
            Self::Churn => churn(run, effort),
            Self::Lockstep => streams(run, effort, [0; LOCKSTEP_STREAMS as usize].to_vec()),
            Self::Streams(count) => streams(run, effort, (0..count).map(|n| n * INTERVAL_NS / count).collect()),
            Self::Flood { streams, events_per_chunk } => flood(run, effort, streams as usize, events_per_chunk),
            Self::Cancel { is_silent } => cancel(run, effort, is_silent),
            Self::Size | Self::Start | Self::Idle => unreachable!("they have processes of their own"),
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Streams(count) => write!(f, "streams/{count}"),
            Self::Lockstep => write!(f, "lockstep/{LOCKSTEP_STREAMS}"),
            Self::Churn => write!(f, "churn/{CHURN_STREAMS}"),
            Self::Flood { streams, events_per_chunk: 1 } => write!(f, "flood/{streams}x180"),
            Self::Flood { streams, .. } => write!(f, "flood/{streams}x16k"),
            Self::Cancel { is_silent: false } => f.write_str("cancel/after-one"),
            Self::Cancel { is_silent: true } => f.write_str("cancel/silent"),
            _ => f.write_str(self.group()),
        }
    }
}

fn size(harness: &Harness, subject: Subject) -> Result<Figures> {
    let (program, stripped) = (harness.program(subject)?, harness.folder(subject).join("stripped"));
    let status = Command::new("strip").arg("-o").arg(&stripped).arg(&program).status();
    match status {
        Ok(status) if status.success() => {}
        _ => return Err("`strip` failed; it is part of binutils".into()),
    }
    let kib = |file| Ok::<_, std::io::Error>(std::fs::metadata(file)?.len() as f64 / 1024.0);
    Ok(vec![("file_kib", kib(program)?), ("stripped_kib", kib(stripped)?)])
}

fn start(harness: &Harness, effort: &Effort, subject: Subject) -> Result<Figures> {
    let times: Vec<_> = (0..effort.starts).map(|_| Ok(harness.start(subject)?.start_ms)).collect::<Result<_>>()?;
    Ok(vec![("to_capabilities_ms", median(times))])
}

/// All subjects at the same time, in one window.
fn idle(harness: &Harness, effort: &Effort, subjects: &[Subject]) -> Result<Vec<Figures>> {
    let named = |subject: &Subject| harness.start(*subject).map_err(|error| format!("{subject}: {error}"));
    let runs: Vec<_> = subjects.iter().map(named).collect::<Result<_, _>>()?;
    sleep(effort.settle);
    let switches: Vec<_> = runs.iter().map(|run| Ok(run.threads()?.switches)).collect::<Result<_>>()?;
    let began = Instant::now();
    sleep(effort.idle);
    let seconds = began.elapsed().as_secs_f64();
    let figures = |(run, before): (&Run, u64)| {
        let (threads, memory) = (run.threads()?, run.memory()?);
        Ok(vec![
            ("rss_mib", memory.rss),
            ("pss_mib", memory.pss),
            ("threads", threads.count as f64),
            ("wakeups_per_s", threads.switches.saturating_sub(before) as f64 / seconds),
        ])
    };
    runs.iter().zip(switches).map(figures).collect()
}

/// One job at a time; the backend answers at once.
fn jobs(run: &mut Run, effort: &Effort) -> Result<Figures> {
    let (mut first, mut whole) = (Vec::new(), Vec::new());
    let end = Instant::now() + 4 * effort.window;
    for n in 0..WARM_UP + effort.jobs {
        if n > WARM_UP && Instant::now() > end {
            break;
        }
        let (first_us, whole_us) = job(run)?;
        if n >= WARM_UP {
            first.push(first_us);
            whole.push(whole_us);
        }
    }
    Ok(vec![("first_chunk_p50_us", median(first)), ("job_done_p50_us", median(whole))])
}

/// Microseconds from submission to the first bytes, and to the end.
fn job(run: &mut Run) -> Result<(f64, f64)> {
    let (id, mut sent_ns) = run.submit(Script::OneEvent)?;
    let deadline = Instant::now() + TIMEOUT;
    let mut first_us = 0.0;
    loop {
        match run.next_event(deadline)?.ok_or("a job did not end")? {
            ClientEvent::First { job_id, at_ns, began_ns } if job_id == id => {
                sent_ns = began_ns.unwrap_or(sent_ns);
                first_us = (at_ns - sent_ns) as f64 / 1e3;
            }
            ClientEvent::Done { job_id, at_ns, bytes } if job_id == id => {
                check_complete(bytes, 1)?;
                return Ok((first_us, (at_ns - sent_ns) as f64 / 1e3));
            }
            _ => {}
        }
    }
}

/// Fails unless `bytes` are all bytes of a stream of this many events.
fn check_complete(bytes: u64, events: u64) -> Result<()> {
    let sent = events * EVENT_BYTES as u64 + TAIL.len() as u64;
    if bytes == sent { Ok(()) } else { Err(format!("{bytes} bytes were received of a stream of {sent}").into()) }
}

/// Short streams, each replaced when it ends: the agent receives jobs while it sends chunks.
fn churn(run: &mut Run, effort: &Effort) -> Result<Figures> {
    let script =
        |n: u64| Script::Paced { phase_ns: n % CHURN_STREAMS * INTERVAL_NS / CHURN_STREAMS, events: CHURN_EVENTS };
    let mut scripts = (0..).map(script);
    // Staggered, so that the ends are, too.
    for script in scripts.by_ref().take(CHURN_STREAMS as usize) {
        run.submit(script)?;
        sleep(Duration::from_nanos(INTERVAL_NS * CHURN_EVENTS / CHURN_STREAMS));
    }
    run.client.start_recording()?;
    let end = Instant::now() + effort.window;
    while let Some(event) = run.next_event(end)? {
        if let (ClientEvent::Done { bytes, .. }, Some(script)) = (event, scripts.next()) {
            check_complete(bytes, CHURN_EVENTS)?;
            run.submit(script)?;
        }
    }
    let [p50, p99] = quantiles(run.client.take_latencies_us()?)?;
    // A stalled stream shows above as missing events, not as late ones.
    let deadline = Instant::now() + TIMEOUT;
    for _ in 0..CHURN_STREAMS {
        let (_, bytes) = run.wait_done(deadline)?.ok_or("a stream did not end")?;
        check_complete(bytes, CHURN_EVENTS)?;
    }
    Ok(vec![("latency_p50_us", p50), ("latency_p99_us", p99)])
}

/// Streams of 50 events per second; each has a phase within the grid that all share.
fn streams(run: &mut Run, effort: &Effort, phases_ns: Vec<u64>) -> Result<Figures> {
    let count = phases_ns.len();
    run.start_streams(phases_ns.into_iter().map(|phase_ns| Script::Paced { phase_ns, events: u64::MAX }))?;
    sleep(effort.settle);
    run.client.start_recording()?;
    let begin = run.begin_window()?;
    // A few streams make few events.
    sleep(effort.window * if count < 8 { 2 } else { 1 });
    let window = run.since(begin)?;
    // Before the latencies: for the direct client, they cost memory.
    let (rss, threads) = (run.memory()?.rss, run.threads()?.count);
    let [p50, p99] = quantiles(run.client.take_latencies_us()?)?;
    let figures = vec![
        ("cpu_us_per_event", window.cpu_ns as f64 / 1e3 / window.events as f64),
        ("latency_p50_us", p50),
        ("latency_p99_us", p99),
        ("rss_mib", rss),
        ("threads", threads as f64),
    ];
    run.finish(count)?;
    Ok(figures)
}

/// Streams as fast as the subject reads them.
fn flood(run: &mut Run, effort: &Effort, count: usize, events_per_chunk: u64) -> Result<Figures> {
    run.start_streams(vec![Script::Flood { events_per_chunk }; count])?;
    sleep(effort.settle);
    let begin = run.begin_window()?;
    sleep(effort.window);
    let window = run.since(begin)?;
    let figures = vec![("cpu_ms_per_mb", window.cpu_ns as f64 / window.bytes as f64), ("rss_mib", run.memory()?.rss)];
    run.finish(count)?;
    Ok(figures)
}

/// From the cancel to the end of the backend's connection. The p99 of so few values is the slowest.
fn cancel(run: &mut Run, effort: &Effort, is_silent: bool) -> Result<Figures> {
    let mut times_ms = Vec::new();
    let end = Instant::now() + 4 * effort.window;
    for n in 0..effort.cancels {
        if Instant::now() > end {
            break;
        }
        let (id, _) = run.submit(if is_silent { Script::Silence } else { Script::OneEventThenSilence })?;
        if is_silent {
            let received = |event| matches!(event, BackendEvent::Silent { job_id } if job_id == id).then_some(());
            run.wait_backend(TIMEOUT, received).ok_or("the backend received no request")?;
        } else {
            run.wait_first(1)?;
        }
        // Not in step with any timer of the agent.
        sleep(Duration::from_micros(5_000 + (n as u64 * 7919) % 10_000));
        let sent_ns = run.client.cancel(id)?;
        let closed = run.wait_backend(CANCEL_TIMEOUT, |event| match event {
            BackendEvent::Closed { job_id, at_ns } if job_id == id => Some(at_ns),
            _ => None,
        });
        let took_ns = match closed {
            Some(at_ns) => {
                at_ns.checked_sub(sent_ns).ok_or("the backend connection was closed before the cancel")? as f64
            }
            None => CANCEL_TIMEOUT.as_nanos() as f64,
        };
        times_ms.push(took_ns / 1e6);
    }
    let [p50, p99] = quantiles(times_ms)?;
    Ok(vec![("closed_p50_ms", p50), ("closed_p99_ms", p99)])
}

fn quantiles(mut values: Vec<f64>) -> Result<[f64; 2]> {
    if values.is_empty() {
        return Err("nothing was received".into());
    }
    values.sort_by(f64::total_cmp);
    Ok([quantile(&values, 0.5), quantile(&values, 0.99)])
}
