//! A backend that jobs are routed to: its slots, its health, and when it last sent a part of an answer. A [`BackendHandle`] outlives
//! the catalogs that contain it.
//!
//! Invariant: each [`Slot`] is counted once and released once, when it is dropped.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::health::{Health, Verdict};
use crate::backend::{Backend, BackendResult, JobResult, Kind};

/// Time without a byte after which jobs in flight no longer show that their backend works. Prompts are processed, and slow models
/// generate, in silence.
const SILENCE_MAX: Duration = Duration::from_secs(15);

/// A backend that jobs can be routed to.
pub struct BackendHandle {
    /// Runs the jobs.
    pub backend: Arc<dyn Backend>,
    /// Limit of concurrent jobs.
    pub slots_max: u32,
    taken: AtomicU32,
    created: Instant,
    /// When the last part of an answer arrived, in milliseconds since `created`; 0 before the first.
    answered_ms: AtomicU64,
    health: Mutex<Health>,
}

impl BackendHandle {
    /// A handle without jobs.
    pub fn new(backend: Arc<dyn Backend>, slots_max: u32) -> Arc<BackendHandle> {
        let is_hosted = Kind::from_name(backend.kind()).is_some_and(Kind::is_hosted);
        Arc::new(BackendHandle {
            backend,
            slots_max,
            taken: AtomicU32::new(0),
            created: Instant::now(),
            answered_ms: AtomicU64::new(0),
            health: Mutex::new(Health::new(!is_hosted)),
        })
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

    /// Records the outcome of a job for `model_id` that began at `began`.
    pub fn record_outcome(&self, model_id: &str, began: Instant, outcome: &BackendResult<JobResult>) -> Verdict {
        self.health().record(model_id, began, outcome, Instant::now())
    }

    /// Records that a part of an answer has arrived.
    pub fn mark_answering(&self) {
        let elapsed = u64::try_from(self.created.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.answered_ms.store(elapsed.max(1), Ordering::Relaxed);
    }

    /// Whether a part of an answer has arrived since `since`, or shortly before while its jobs are in flight.
    pub fn is_answering(&self, since: Instant) -> bool {
        let Some(last) = self.last_answer() else { return false };
        last >= since || (self.taken.load(Ordering::SeqCst) > 0 && last.elapsed() <= SILENCE_MAX)
    }

    /// Whether a part of an answer has arrived within this time, and since the last failure.
    pub fn serves_jobs(&self, within: Duration) -> bool {
        let last_failure = self.health().last_failure();
        self.last_answer().is_some_and(|last| last.elapsed() <= within && last_failure.is_none_or(|at| last > at))
    }

    /// When the last part of an answer arrived.
    fn last_answer(&self) -> Option<Instant> {
        let ms = self.answered_ms.load(Ordering::Relaxed);
        (ms > 0).then(|| self.created + Duration::from_millis(ms))
    }

    /// The health, locked.
    pub(super) fn health(&self) -> MutexGuard<'_, Health> {
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
    use crate::backend::HttpBackend;

    fn handle(slots_max: u32) -> Arc<BackendHandle> {
        BackendHandle::new(Arc::new(HttpBackend::new(Kind::Vllm, None, None)), slots_max)
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
    fn parts_of_answers_are_a_sign_of_life_since_then_or_while_jobs_are_in_flight() {
        let handle = handle(1);
        let before = Instant::now();
        assert!(!handle.is_answering(before) && !handle.serves_jobs(SILENCE_MAX));
        handle.mark_answering();
        let since = handle.last_answer().expect("an answer");
        assert!(handle.is_answering(since) && handle.serves_jobs(SILENCE_MAX));
        let later = since + Duration::from_millis(1);
        assert!(!handle.is_answering(later));
        let _slot = handle.try_acquire_slot().expect("a slot");
        assert!(handle.is_answering(later));
    }
}
