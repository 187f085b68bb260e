//! Counts how jobs end. [`JobStats::record`] is called once for each job; its two views are the totals since the agent
//! started, for the state file, and a window over the last minutes, for the heartbeat.
//!
//! The totals count every job. The window counts only jobs that reflect on this agent: those that were answered, and those
//! that failed through no fault of the requester.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::rejection::RejectReason;
use crate::link::protocol::{ErrorCode, Heartbeat};
use crate::sys::moment::Moment;

/// Time that latency and speed cover.
const WINDOW: Duration = Duration::from_secs(300);
/// Time that the error rate covers.
const ERROR_WINDOW: Duration = Duration::from_secs(60);
/// Maximum number of jobs in the window, which keeps the newest: 32 bytes each, so 512 KiB, enough for 55 jobs per second.
const WINDOW_JOBS_MAX: usize = 16 << 10;

const _: () = assert!(ERROR_WINDOW.as_secs() <= WINDOW.as_secs());

/// How a job ended.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// Answered in full.
    Done {
        /// The job's model.
        model_id: &'a str,
        /// From arrival to end.
        latency: Duration,
        /// As the backend reports them, including the cached ones.
        input_tokens: u32,
        /// As the backend reports them.
        output_tokens: u32,
    },
    /// Answered with an error.
    Failed {
        /// The job's model.
        model_id: &'a str,
        /// From arrival to end.
        latency: Duration,
        /// Tokens emitted before the failure.
        output_tokens: u32,
        /// The code that the coordinator received.
        code: ErrorCode,
        /// The reason, for the operator. Contains no text from a backend.
        reason: String,
        /// Whether the request caused the failure, which then says nothing about this agent.
        is_requesters_fault: bool,
    },
    /// Cancelled by the coordinator.
    Cancelled {
        /// Tokens emitted before the cancel.
        output_tokens: u32,
    },
    /// The session ended first, so the answer could not be sent.
    Lost,
    /// Not admitted.
    Rejected(RejectReason),
}

/// The statistics over all sessions.
#[derive(Debug, Default)]
pub struct JobStats {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    totals: Totals,
    window: Window,
}

/// The jobs since the agent started.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// Answered in full.
    pub done: u64,
    /// Answered with an error.
    pub failed: u64,
    /// Cancelled by the coordinator.
    pub cancelled: u64,
    /// Lost with their session.
    pub lost: u64,
    /// Not admitted, by reason.
    pub rejected: Vec<(RejectReason, u64)>,
    /// Input tokens, as reported by the backends, including the cached ones.
    pub input_tokens: u64,
    /// Output tokens, as reported by the backends; for jobs that were not answered in full, as counted in the stream.
    pub output_tokens: u64,
    /// The last job that was answered.
    pub last_job: Option<LastJob>,
    /// The last failure.
    pub last_error: Option<LastError>,
}

/// The last job that was answered.
#[derive(Debug, Clone)]
pub struct LastJob {
    /// When the job ended.
    pub at: Moment,
    /// The job's model.
    pub model_id: String,
    /// The error code; `None` for a job that was answered in full.
    pub error: Option<ErrorCode>,
    /// From arrival to end.
    pub latency: Duration,
}

/// The last failure of a job.
#[derive(Debug, Clone)]
pub struct LastError {
    /// When the job ended.
    pub at: Moment,
    /// The code that the coordinator received.
    pub code: ErrorCode,
    /// The reason, for the operator. Contains no text from a backend.
    pub reason: String,
}

impl JobStats {
    /// Records the end of a job.
    pub fn record(&self, outcome: Outcome<'_>) {
        let Inner { totals, window } = &mut *self.lock();
        window.record(&outcome, Instant::now());
        totals.record(outcome);
    }

    /// The current totals.
    pub fn totals(&self) -> Totals {
        self.lock().totals.clone()
    }

    /// The current figures of the window.
    pub fn heartbeat(&self, queue_depth: u32) -> Heartbeat {
        let now = Instant::now();
        // The link's reader waits for the lock in `record`, so the figures are computed from a copy.
        let window = self.current_window(now);
        window.heartbeat(now, queue_depth)
    }

    fn current_window(&self, now: Instant) -> Window {
        let window = &mut self.lock().window;
        window.drop_expired(now);
        window.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Totals {
    fn record(&mut self, outcome: Outcome<'_>) {
        let at = Moment::now();
        match outcome {
            Outcome::Done { model_id, latency, input_tokens, output_tokens } => {
                self.done += 1;
                self.input_tokens += u64::from(input_tokens);
                self.output_tokens += u64::from(output_tokens);
                self.last_job = Some(LastJob { at, model_id: model_id.to_owned(), error: None, latency });
            }
            Outcome::Failed { model_id, latency, output_tokens, code, reason, .. } => {
                self.failed += 1;
                self.output_tokens += u64::from(output_tokens);
                self.last_job = Some(LastJob { at, model_id: model_id.to_owned(), error: Some(code), latency });
                self.last_error = Some(LastError { at, code, reason });
            }
            Outcome::Cancelled { output_tokens } => {
                self.cancelled += 1;
                self.output_tokens += u64::from(output_tokens);
            }
            Outcome::Lost => self.lost += 1,
            Outcome::Rejected(reason) => match self.rejected.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, count)) => *count += 1,
                None => self.rejected.push((reason, 1)),
            },
        }
    }
}

/// The jobs that ended within [`WINDOW`].
#[derive(Debug, Clone, Default)]
struct Window {
    /// The jobs, ordered by the time of their end.
    jobs: VecDeque<WindowJob>,
    last_error: Option<(Moment, ErrorCode)>,
}

#[derive(Debug, Clone, Copy)]
struct WindowJob {
    ended: Instant,
    latency_ms: u32,
    /// Speed in thousandths; `None` for jobs that emitted no tokens.
    tokens_per_sec: Option<u32>,
    failed: bool,
}

impl WindowJob {
    fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.ended)
    }
}

impl Window {
    fn record(&mut self, outcome: &Outcome<'_>, ended: Instant) {
        match *outcome {
            Outcome::Done { latency, output_tokens, .. } => self.push(ended, latency, output_tokens, false),
            Outcome::Failed { latency, output_tokens, code, is_requesters_fault: false, .. } => {
                self.push(ended, latency, output_tokens, true);
                self.last_error = Some((Moment::now(), code));
            }
            Outcome::Failed { .. } | Outcome::Cancelled { .. } | Outcome::Lost | Outcome::Rejected(_) => {}
        }
    }

    fn push(&mut self, ended: Instant, latency: Duration, output_tokens: u32, failed: bool) {
        let latency_ms = u32::try_from(latency.as_millis()).unwrap_or(u32::MAX);
        let thousandths = u64::from(output_tokens) * 1_000_000 / u64::from(latency_ms.max(1));
        let tokens_per_sec = (output_tokens > 0).then(|| u32::try_from(thousandths).unwrap_or(u32::MAX));
        if self.jobs.len() == WINDOW_JOBS_MAX {
            self.jobs.pop_front();
        }
        self.jobs.push_back(WindowJob { ended, latency_ms, tokens_per_sec, failed });
    }

    /// Drops the jobs that are older than [`WINDOW`].
    fn drop_expired(&mut self, now: Instant) {
        while self.jobs.front().is_some_and(|job| job.age(now) > WINDOW) {
            self.jobs.pop_front();
        }
    }

    fn heartbeat(&self, now: Instant, queue_depth: u32) -> Heartbeat {
        let mut latencies: Vec<u32> = self.jobs.iter().map(|job| job.latency_ms).collect();
        latencies.sort_unstable();
        let mut speeds: Vec<u32> = self.jobs.iter().filter_map(|job| job.tokens_per_sec).collect();
        speeds.sort_unstable();
        let recent = || self.jobs.iter().filter(|job| job.age(now) <= ERROR_WINDOW);
        let (ended, failed) = (recent().count(), recent().filter(|job| job.failed).count());
        Heartbeat {
            queue_depth,
            tokens_per_sec_p50: percentile(&speeds, 50).map_or(0.0, |speed| f64::from(speed) / 1000.0),
            p50_latency_ms: percentile(&latencies, 50).unwrap_or(0),
            p95_latency_ms: percentile(&latencies, 95).unwrap_or(0),
            error_rate_60s: if ended == 0 { 0.0 } else { failed as f64 / ended as f64 },
            last_error_at: self.last_error.map(|(at, _)| at.rfc3339()),
            last_error_code: self.last_error.map(|(_, code)| code.as_str()),
        }
    }
}

/// Nearest rank: the smallest value that at least `percent` of the values do not exceed.
fn percentile(sorted: &[u32], percent: usize) -> Option<u32> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn done(latency: Duration, output_tokens: u32) -> Outcome<'static> {
        Outcome::Done { model_id: "m", latency, input_tokens: 7, output_tokens }
    }

    fn failed(latency: Duration, output_tokens: u32, is_requesters_fault: bool) -> Outcome<'static> {
        let (code, reason) = (ErrorCode::BackendTimeout, "the deadline passed".to_owned());
        Outcome::Failed { model_id: "m", latency, output_tokens, code, reason, is_requesters_fault }
    }

    #[test]
    fn heartbeat_without_jobs_is_zeroes_and_nulls() {
        let heartbeat = JobStats::default().heartbeat(3);
        assert_eq!(
            heartbeat.to_frame(),
            r#"{"type":"heartbeat","queue_depth":3,"tokens_per_sec_p50":0.0,"p50_latency_ms":0,"p95_latency_ms":0,"error_rate_60s":0.0,"last_error_at":null,"last_error_code":null}"#
        );
    }

    #[test]
    fn heartbeat_percentiles_cover_the_jobs_that_ended() {
        let stats = JobStats::default();
        for n in 1..=100 {
            stats.record(done(MS * n, 0));
        }
        let heartbeat = stats.heartbeat(0);
        assert_eq!((heartbeat.p50_latency_ms, heartbeat.p95_latency_ms, heartbeat.tokens_per_sec_p50), (50, 95, 0.0));
        stats.record(done(MS * 500, 100));
        assert_eq!(stats.heartbeat(0).tokens_per_sec_p50, 200.0);
    }

    #[test]
    fn window_forgets_jobs_that_ended_before_it() {
        let stats = JobStats::default();
        let start = Instant::now();
        let heartbeat_at = |now| stats.current_window(now).heartbeat(now, 0);
        stats.lock().window.record(&failed(MS * 10, 1, false), start);
        stats.lock().window.record(&done(MS * 20, 1), start + ERROR_WINDOW);
        assert_eq!(heartbeat_at(start + ERROR_WINDOW).error_rate_60s, 0.5);
        let later = heartbeat_at(start + ERROR_WINDOW + MS);
        assert_eq!((later.error_rate_60s, later.p50_latency_ms), (0.0, 10));
        assert_eq!(heartbeat_at(start + WINDOW + MS).p50_latency_ms, 20);
        assert_eq!(heartbeat_at(start + WINDOW * 2).p50_latency_ms, 0);
    }

    #[test]
    fn heartbeat_figures_are_computed_without_the_lock() {
        let stats = JobStats::default();
        stats.record(done(MS * 10, 1));
        let now = Instant::now();
        let window = stats.current_window(now);
        let _recording = stats.lock();
        assert_eq!(window.heartbeat(now, 0).p50_latency_ms, 10);
    }

    #[test]
    fn window_memory_is_bounded() {
        let mut window = Window::default();
        for _ in 0..WINDOW_JOBS_MAX + 10 {
            window.record(&done(MS, 1), Instant::now());
        }
        assert_eq!(window.jobs.len(), WINDOW_JOBS_MAX);
    }

    #[test]
    fn heartbeat_dates_the_last_error() {
        let stats = JobStats::default();
        stats.record(failed(MS, 0, false));
        let heartbeat = stats.heartbeat(0);
        assert_eq!(heartbeat.last_error_code, Some("backend_timeout"));
        assert!(heartbeat.last_error_at.is_some_and(|at| at.ends_with('Z') && at.len() == 20));
    }

    #[test]
    fn totals_count_every_job_and_the_window_those_that_speak_of_the_agent() {
        let stats = JobStats::default();
        stats.record(done(MS, 1));
        stats.record(failed(MS, 2, true));
        stats.record(Outcome::Cancelled { output_tokens: 4 });
        stats.record(Outcome::Lost);
        for reason in [RejectReason::Paused, RejectReason::AtCapacity, RejectReason::Paused] {
            stats.record(Outcome::Rejected(reason));
        }
        let totals = stats.totals();
        assert_eq!((totals.done, totals.failed, totals.cancelled, totals.lost), (1, 1, 1, 1));
        assert_eq!(totals.rejected, [(RejectReason::Paused, 2), (RejectReason::AtCapacity, 1)]);
        assert_eq!((totals.input_tokens, totals.output_tokens), (7, 7));
        assert_eq!(totals.last_job.and_then(|job| job.error), Some(ErrorCode::BackendTimeout));
        let heartbeat = stats.heartbeat(0);
        assert_eq!((heartbeat.error_rate_60s, heartbeat.last_error_code), (0.0, None));
    }
}
