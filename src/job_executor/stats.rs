//! The figures of the heartbeat, over the jobs that really ended.
//!
//! Cancelled jobs and those that were the requester's own fault are never recorded, so no figure can count them.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::link::protocol::{ErrorCode, Heartbeat};
use crate::sys::datetime::rfc3339;

/// Latency and speed are taken over the jobs that ended in this time.
const WINDOW: Duration = Duration::from_secs(300);
/// The error rate over this one.
const ERROR_WINDOW: Duration = Duration::from_secs(60);
/// The most jobs that the window remembers, the newest: 32 bytes each, so 512 KiB for 55 jobs a second.
const ENDED_MAX: usize = 16 << 10;

const _: () = assert!(ERROR_WINDOW.as_secs() <= WINDOW.as_secs());

/// The jobs that ended of late.
#[derive(Debug, Default)]
pub struct Statistics {
    recent: Mutex<Recent>,
}

#[derive(Debug, Default)]
struct Recent {
    /// By the time of their end.
    ended: VecDeque<Ended>,
    last_error: Option<(SystemTime, ErrorCode)>,
}

#[derive(Debug, Clone, Copy)]
struct Ended {
    at: Instant,
    latency_ms: u32,
    /// In thousandths; `None` for jobs that emitted no tokens, which have no speed.
    tokens_per_sec: Option<u32>,
    failed: bool,
}

impl Statistics {
    /// A job that went well.
    pub fn done(&self, latency: Duration, output_tokens: u32) {
        self.ended(Instant::now(), latency, output_tokens, false);
    }

    /// A job that failed, by no fault of its requester.
    pub fn failed(&self, latency: Duration, output_tokens: u32, code: ErrorCode) {
        self.ended(Instant::now(), latency, output_tokens, true);
        self.lock().last_error = Some((SystemTime::now(), code));
    }

    fn ended(&self, at: Instant, latency: Duration, output_tokens: u32, failed: bool) {
        let latency_ms = u32::try_from(latency.as_millis()).unwrap_or(u32::MAX);
        let thousandths = u64::from(output_tokens) * 1_000_000 / u64::from(latency_ms.max(1));
        let job = Ended {
            at,
            latency_ms,
            tokens_per_sec: (output_tokens > 0).then(|| u32::try_from(thousandths).unwrap_or(u32::MAX)),
            failed,
        };
        let mut recent = self.lock();
        if recent.ended.len() == ENDED_MAX {
            recent.ended.pop_front();
        }
        recent.ended.push_back(job);
    }

    /// The figures as of now.
    pub fn heartbeat(&self, queue_depth: u32) -> Heartbeat {
        self.figures(Instant::now(), queue_depth)
    }

    fn figures(&self, now: Instant, queue_depth: u32) -> Heartbeat {
        let mut recent = self.lock();
        let age = |job: &Ended| now.saturating_duration_since(job.at);
        while recent.ended.front().is_some_and(|job| age(job) > WINDOW) {
            recent.ended.pop_front();
        }
        let mut latencies: Vec<u32> = recent.ended.iter().map(|j| j.latency_ms).collect();
        latencies.sort_unstable();
        let mut speeds: Vec<u32> = recent.ended.iter().filter_map(|j| j.tokens_per_sec).collect();
        speeds.sort_unstable();
        let lately = || recent.ended.iter().filter(|job| age(job) <= ERROR_WINDOW);
        let (ended, failed) = (lately().count(), lately().filter(|j| j.failed).count());
        Heartbeat {
            queue_depth,
            tokens_per_sec_p50: percentile(&speeds, 50).map_or(0.0, |s| f64::from(s) / 1000.0),
            p50_latency_ms: percentile(&latencies, 50).unwrap_or(0),
            p95_latency_ms: percentile(&latencies, 95).unwrap_or(0),
            error_rate_60s: if ended == 0 { 0.0 } else { failed as f64 / ended as f64 },
            last_error_at: recent.last_error.map(|(at, _)| rfc3339(at)),
            last_error_code: recent.last_error.map(|(_, code)| code.as_str()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nearest rank: the smallest value that at least `percent` of them do not exceed.
fn percentile(sorted: &[u32], percent: usize) -> Option<u32> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn nothing_ended_is_nothing_claimed() {
        let h = Statistics::default().heartbeat(3);
        assert_eq!(
            h.to_frame(),
            r#"{"type":"heartbeat","queue_depth":3,"tokens_per_sec_p50":0.0,"p50_latency_ms":0,"p95_latency_ms":0,"error_rate_60s":0.0,"last_error_at":null,"last_error_code":null}"#
        );
    }

    #[test]
    fn percentiles_are_of_the_jobs_that_ended() {
        let s = Statistics::default();
        for n in 1..=100 {
            s.done(MS * n, 0);
        }
        let h = s.heartbeat(0);
        assert_eq!((h.p50_latency_ms, h.p95_latency_ms, h.tokens_per_sec_p50), (50, 95, 0.0));
        s.done(MS * 500, 100);
        assert_eq!(s.heartbeat(0).tokens_per_sec_p50, 200.0);
    }

    #[test]
    fn figures_leave_with_their_window() {
        let s = Statistics::default();
        let start = Instant::now();
        s.ended(start, MS * 10, 1, true);
        s.ended(start + ERROR_WINDOW, MS * 20, 1, false);
        assert_eq!(s.figures(start + ERROR_WINDOW, 0).error_rate_60s, 0.5);
        let later = s.figures(start + ERROR_WINDOW + MS, 0);
        assert_eq!((later.error_rate_60s, later.p50_latency_ms), (0.0, 10));
        assert_eq!(s.figures(start + WINDOW + MS, 0).p50_latency_ms, 20);
        assert_eq!(s.figures(start + WINDOW * 2, 0).p50_latency_ms, 0);
    }

    #[test]
    fn the_last_error_is_dated() {
        let s = Statistics::default();
        s.failed(MS, 0, ErrorCode::BackendTimeout);
        let h = s.heartbeat(0);
        assert_eq!(h.last_error_code, Some("backend_timeout"));
        assert!(h.last_error_at.is_some_and(|at| at.ends_with('Z') && at.len() == 20));
    }

    #[test]
    fn memory_is_bounded() {
        let s = Statistics::default();
        for _ in 0..ENDED_MAX + 10 {
            s.done(MS, 1);
        }
        assert_eq!(s.lock().ended.len(), ENDED_MAX);
    }
}
