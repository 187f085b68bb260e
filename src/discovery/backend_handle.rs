//! The slots of a backend, and the outcomes of its recent jobs. A [`BackendHandle`] outlives the catalogs that contain it.
//!
//! Invariant: each [`Slot`] is counted once and released once, when it is dropped.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::{Backend, BackendResult, JobResult};

/// Consecutive failed jobs after which a backend is withdrawn from the offer. Only failures that the backend caused count.
pub const FAILURES_MAX: u32 = 3;
/// Time after a withdrawal during which successful probes do not restore the offer: a backend can be healthy and still fail its
/// jobs.
pub const QUARANTINE: Duration = Duration::from_secs(4);

/// A backend that jobs can be routed to.
pub struct BackendHandle {
    /// Runs the jobs.
    pub backend: Arc<dyn Backend>,
    /// Limit of concurrent jobs.
    pub slots_max: u32,
    taken: AtomicU32,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    /// Consecutive failures that the backend caused.
    failures: u32,
    failing_since: Option<Instant>,
}

impl BackendHandle {
    /// A handle without jobs.
    pub fn new(backend: Arc<dyn Backend>, slots_max: u32) -> Arc<BackendHandle> {
        Arc::new(BackendHandle { backend, slots_max, taken: AtomicU32::new(0), health: Mutex::default() })
    }

    /// Number of free slots.
    pub fn slots_free(&self) -> u32 {
        self.slots_max.saturating_sub(self.taken.load(Ordering::SeqCst))
    }

    /// Acquires a slot, unless all are taken.
    pub fn try_acquire_slot(self: &Arc<Self>) -> Option<Slot> {
        let one_more = |taken| (taken < self.slots_max).then_some(taken + 1);
        self.taken.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).ok()?;
        Some(Slot(self.clone()))
    }

    /// Records the outcome of a job. Returns whether this outcome marked the backend as failing. Failures caused by the request,
    /// the deadline or this machine neither count nor reset the count.
    pub fn record_outcome(&self, outcome: &BackendResult<JobResult>) -> bool {
        let mut health = self.health();
        match outcome {
            Ok(_) => health.failures = 0,
            Err(e) if e.is_backends_fault() => health.failures = health.failures.saturating_add(1),
            Err(_) => {}
        }
        let starts_failing = health.failures >= FAILURES_MAX && health.failing_since.is_none();
        if starts_failing {
            health.failing_since = Some(Instant::now());
        }
        starts_failing
    }

    /// Whether the backend must be withdrawn because its jobs fail.
    pub fn is_failing(&self) -> bool {
        self.health().failing_since.is_some()
    }

    /// Records the success of a probe that began at `started`. Returns whether the backend may be offered.
    pub fn probe_succeeded(&self, started: Instant) -> bool {
        let mut health = self.health();
        match health.failing_since {
            Some(since) if started < since + QUARANTINE => return false,
            Some(_) => *health = Health::default(),
            None => {}
        }
        true
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A slot of a backend, held by a job.
pub struct Slot(Arc<BackendHandle>);

impl Slot {
    /// The backend of the slot.
    pub fn backend(&self) -> &Arc<BackendHandle> {
        &self.0
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{BackendError, HttpBackend, HttpStatus, Kind};

    fn handle(slots_max: u32) -> Arc<BackendHandle> {
        BackendHandle::new(Arc::new(HttpBackend::new(Kind::Vllm, None, None)), slots_max)
    }

    fn status(status: u16) -> BackendResult<JobResult> {
        Err(BackendError::from_status(status, b""))
    }

    #[test]
    fn slots_are_acquired_and_released() {
        let handle = handle(2);
        let first = handle.try_acquire_slot();
        let second = handle.try_acquire_slot();
        assert!(first.is_some() && second.is_some() && handle.try_acquire_slot().is_none());
        assert_eq!(handle.slots_free(), 0);
        drop(first);
        assert_eq!(handle.slots_free(), 1);
        assert!(handle.try_acquire_slot().is_some());
    }

    #[test]
    fn three_consecutive_failures_mark_a_backend_as_failing() {
        let refused = || Err(BackendError::Unreachable("refused".into()));
        let neither = [
            status(400),
            status(413),
            status(422),
            status(429),
            status(404),
            Err(BackendError::Cancelled),
            Err(BackendError::DeadlinePassed),
        ];
        let handle = handle(1);
        assert!(!handle.record_outcome(&status(500)) && !handle.record_outcome(&refused()));
        assert!(!handle.record_outcome(&Ok(JobResult::default())));
        assert!(!handle.record_outcome(&status(502)) && !handle.record_outcome(&refused()));
        for outcome in &neither {
            assert!(!handle.record_outcome(outcome), "{outcome:?}");
        }
        assert!(!handle.is_failing());
        assert!(handle.record_outcome(&status(503)));
        assert!(handle.is_failing());
        assert!(!handle.record_outcome(&status(500)), "reported once");
    }

    #[test]
    fn probe_after_the_quarantine_restores_a_failing_backend() {
        let handle = handle(1);
        for _ in 0..FAILURES_MAX {
            handle.record_outcome(&Err(BackendError::Status(HttpStatus { status: 500, body: String::new() })));
        }
        let now = Instant::now();
        assert!(!handle.probe_succeeded(now));
        assert!(!handle.record_outcome(&Ok(JobResult::default())) && handle.is_failing());
        assert!(handle.probe_succeeded(now + QUARANTINE));
        assert!(!handle.is_failing() && !handle.record_outcome(&status(500)), "the count starts from 0");
    }
}
