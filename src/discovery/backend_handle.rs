//! A backend as its jobs know it: how many it runs, how many it may, and how the last ones went. Outlives the catalogs that
//! name it.
//!
//! Invariant: a [`Slot`] is counted once, and given back once, when it is dropped.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::{Backend, BackendResult, JobResult};

/// So many jobs running that failed by the backend's fault, and it is not offered any more.
pub const FAILURES_MAX: u32 = 3;
/// A probe that began sooner after that proves nothing: the health check may be fine where the jobs are not.
pub const QUARANTINE: Duration = Duration::from_secs(4);

/// One of the backends that share the jobs.
pub struct BackendHandle {
    /// Where its jobs go.
    pub backend: Arc<dyn Backend>,
    /// Jobs that it may run at a time.
    pub slots_max: u32,
    taken: AtomicU32,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    /// In a row, by the backend's fault.
    failures: u32,
    failing_since: Option<Instant>,
}

impl BackendHandle {
    /// Idle and healthy.
    pub fn new(backend: Arc<dyn Backend>, slots_max: u32) -> Arc<BackendHandle> {
        Arc::new(BackendHandle { backend, slots_max, taken: AtomicU32::new(0), health: Mutex::default() })
    }

    /// Jobs that it could take now.
    pub fn slots_free(&self) -> u32 {
        self.slots_max.saturating_sub(self.taken.load(Ordering::SeqCst))
    }

    /// A place for a job, unless all are taken.
    pub fn try_acquire_slot(self: &Arc<Self>) -> Option<Slot> {
        let one_more = |taken| (taken < self.slots_max).then_some(taken + 1);
        self.taken.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).ok()?;
        Some(Slot(self.clone()))
    }

    /// Takes note of how a job went; true when this was the failure that makes it failing. What is the fault of the request,
    /// of the deadline or of the box counts neither way.
    pub fn record_outcome(&self, outcome: &BackendResult<JobResult>) -> bool {
        let mut health = self.health();
        match outcome {
            Ok(_) => health.failures = 0,
            Err(e) if e.is_backends_fault() => health.failures = health.failures.saturating_add(1),
            Err(_) => {}
        }
        let fails_now = health.failures >= FAILURES_MAX && health.failing_since.is_none();
        if fails_now {
            health.failing_since = Some(Instant::now());
        }
        fails_now
    }

    /// Whether it is to be left out of the offer for what its jobs met.
    pub fn is_failing(&self) -> bool {
        self.health().failing_since.is_some()
    }

    /// A probe that began then went well: true when that is all it takes to be offered.
    pub fn probe_succeeded(&self, began: Instant) -> bool {
        let mut health = self.health();
        match health.failing_since {
            Some(since) if began < since + QUARANTINE => return false,
            Some(_) => *health = Health::default(),
            None => {}
        }
        true
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A job's place at a member.
pub struct Slot(Arc<BackendHandle>);

impl Slot {
    /// Whose it is.
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

    fn member(slots_max: u32) -> Arc<BackendHandle> {
        BackendHandle::new(Arc::new(HttpBackend::new(Kind::Vllm, None, None)), slots_max)
    }

    fn status(status: u16) -> BackendResult<JobResult> {
        Err(BackendError::from_status(status, b""))
    }

    #[test]
    fn slots_are_given_out_and_back() {
        let member = member(2);
        let first = member.try_acquire_slot();
        let second = member.try_acquire_slot();
        assert!(first.is_some() && second.is_some() && member.try_acquire_slot().is_none());
        assert_eq!(member.slots_free(), 0);
        drop(first);
        assert_eq!(member.slots_free(), 1);
        assert!(member.try_acquire_slot().is_some());
    }

    #[test]
    fn three_failures_in_a_row_and_nothing_less_make_it_failing() {
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
        let member = member(1);
        assert!(!member.record_outcome(&status(500)) && !member.record_outcome(&refused()));
        assert!(!member.record_outcome(&Ok(JobResult::default())));
        assert!(!member.record_outcome(&status(502)) && !member.record_outcome(&refused()));
        for outcome in &neither {
            assert!(!member.record_outcome(outcome), "{outcome:?}");
        }
        assert!(!member.is_failing());
        assert!(member.record_outcome(&status(503)));
        assert!(member.is_failing());
        assert!(!member.record_outcome(&status(500)), "told once");
    }

    #[test]
    fn only_a_probe_after_the_quarantine_brings_it_back() {
        let member = member(1);
        for _ in 0..FAILURES_MAX {
            member.record_outcome(&Err(BackendError::Status(HttpStatus { status: 500, body: String::new() })));
        }
        let now = Instant::now();
        assert!(!member.probe_succeeded(now));
        assert!(!member.record_outcome(&Ok(JobResult::default())) && member.is_failing());
        assert!(member.probe_succeeded(now + QUARANTINE));
        assert!(!member.is_failing() && !member.record_outcome(&status(500)), "counted anew");
    }
}
