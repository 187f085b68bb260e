//! An admitted job: its request and its resources, shared by the threads that may end it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use uuid::Uuid;

use super::memory_permit::MemoryPermit;
use crate::backend::{Interrupt, RawJob};
use crate::discovery::{BackendHandle, Slot};

/// Invariant: once [`InFlightJob::is_cancelled`] returns true, no frame of the job is written, and its worker has been woken
/// from any blocking call. The flag decides; closing sockets and channels only wakes the worker.
pub struct InFlightJob {
    pub job_id: Uuid,
    pub model_id: String,
    pub accepted: Instant,
    /// The deadline; `None` if the clock cannot represent it.
    pub deadline: Option<Instant>,
    tokens_emitted: AtomicU32,
    cached_tokens: AtomicU32,
    cancelled: AtomicBool,
    expired: AtomicBool,
    state: Mutex<State>,
    /// Disconnects when the job is cancelled, which ends a wait for room in a lane.
    pub cancel_signal: Receiver<()>,
}

struct State {
    /// The work; `None` after a worker has taken it.
    work: Option<Work>,
    is_started: bool,
    interrupt: Option<Interrupt>,
    cancel_signal: Option<Sender<()>>,
    /// The slot of the backend that runs the job.
    slot: Option<Slot>,
}

/// The resources that a worker takes over when it starts the job.
pub struct Work {
    pub job: RawJob,
    /// The memory permit, held until the request is dropped.
    pub permit: MemoryPermit,
    /// The backend that the job has a slot of.
    pub backend: Arc<BackendHandle>,
    /// The backends to try if `backend` cannot take the job, in order of preference.
    pub fallback_route: Vec<Arc<BackendHandle>>,
}

impl InFlightJob {
    pub fn new(job: &RawJob) -> InFlightJob {
        let accepted = Instant::now();
        let (sender, cancel_signal) = bounded(0);
        let state = State { work: None, is_started: false, interrupt: None, cancel_signal: Some(sender), slot: None };
        InFlightJob {
            job_id: job.job_id,
            model_id: job.model_id.clone(),
            accepted,
            deadline: accepted.checked_add(Duration::from_millis(u64::from(job.deadline_ms))),
            tokens_emitted: AtomicU32::new(0),
            cached_tokens: AtomicU32::new(0),
            cancelled: AtomicBool::new(false),
            expired: AtomicBool::new(false),
            state: Mutex::new(state),
            cancel_signal,
        }
    }

    /// Sets the flag. Only the table calls this, under its lock.
    pub fn mark_cancelled(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Stores the work for the worker that will run it. If the job has been cancelled, drops the work at once.
    pub fn park_work(&self, work: Work) {
        let mut state = self.lock();
        if !self.is_cancelled() {
            state.work = Some(work);
        }
    }

    /// Starts the job; `None` if it was cancelled.
    pub fn take_work(&self) -> Option<Work> {
        let mut state = self.lock();
        state.is_started = true;
        state.work.take()
    }

    /// Whether a worker has started the job. False while the job waits for a worker.
    pub fn is_started(&self) -> bool {
        self.lock().is_started
    }

    /// Marks the deadline as passed. Returns true the first time.
    pub fn expire(&self) -> bool {
        !self.expired.swap(true, Ordering::SeqCst)
    }

    /// Holds the slot until the job leaves the table. If the job has already left, the slot is released at once.
    pub fn attach_slot(&self, slot: Slot) {
        let mut state = self.lock();
        if !self.is_cancelled() {
            state.slot = Some(slot);
        }
    }

    /// Releases the slot. Only the table calls this, when the job leaves it.
    pub fn release_slot(&self) {
        self.lock().slot = None;
    }

    /// Sets the handle that wakes the worker from a blocking call to its backend. If the job has been cancelled, interrupts at once.
    pub fn interrupt_with(&self, interrupt: Interrupt) {
        self.lock().interrupt = Some(interrupt.clone());
        if self.is_cancelled() {
            interrupt.interrupt();
        }
    }

    /// Wakes the worker from a blocking call to its backend. The worker then checks the cancel flag and the deadline.
    pub fn interrupt(&self) {
        let interrupt = self.lock().interrupt.take();
        if let Some(interrupt) = interrupt {
            interrupt.interrupt();
        }
    }

    /// Wakes the worker of a cancelled job from any blocking call, and drops work that no worker has taken.
    pub fn interrupt_worker(&self) {
        let mut state = self.lock();
        let (signal, interrupt, work) = (state.cancel_signal.take(), state.interrupt.take(), state.work.take());
        drop(state);
        drop((signal, work));
        if let Some(interrupt) = interrupt {
            interrupt.interrupt();
        }
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// Output tokens so far, as far as the stream shows them.
    pub fn tokens_emitted(&self) -> u32 {
        self.tokens_emitted.load(Ordering::Relaxed)
    }

    /// Updates the output tokens so far, and returns how many of them are new. A lower figure than before is ignored: tokens
    /// that a backend retracts were emitted nevertheless.
    pub fn update_tokens_emitted(&self, tokens: u32) -> u32 {
        tokens.saturating_sub(self.tokens_emitted.fetch_max(tokens, Ordering::Relaxed))
    }

    /// Input tokens that the backend read from its cache or wrote to it, and does not count as input.
    pub fn cached_tokens(&self) -> u32 {
        self.cached_tokens.load(Ordering::Relaxed)
    }

    /// Sets [`InFlightJob::cached_tokens`].
    pub fn set_cached_tokens(&self, tokens: u32) {
        self.cached_tokens.store(tokens, Ordering::Relaxed);
    }

    /// Time until the deadline.
    pub fn remaining(&self) -> Duration {
        self.deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::backend::{Job, WireFormat};

    pub fn job(job_id: Uuid, deadline_ms: u32) -> RawJob {
        let (model_id, request) = ("m".to_owned(), serde_json::Value::Null);
        RawJob::from(&Job { job_id, model_id, request, format: WireFormat::Openai, deadline_ms })
    }

    #[test]
    fn is_started_turns_true_when_a_worker_takes_the_work() {
        let job = InFlightJob::new(&job(Uuid::nil(), 0));
        assert!(!job.is_started(), "it may have to wait for a worker");
        assert!(job.take_work().is_none() && job.is_started());
    }

    #[test]
    fn update_tokens_emitted_counts_no_token_twice() {
        let job = InFlightJob::new(&job(Uuid::nil(), 0));
        let new = [5, 9, 2, 9, 10].map(|tokens| job.update_tokens_emitted(tokens));
        assert_eq!((new, job.tokens_emitted()), ([5, 4, 0, 0, 1], 10));
    }
}
