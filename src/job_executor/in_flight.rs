//! One job in flight, as the threads that may end it share it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use uuid::Uuid;

use super::table::MemoryPermit;
use crate::backend::{Interrupt, Job};
use crate::discovery::Slot;

/// Invariant: once [`InFlightJob::is_cancelled`] is true no frame of this job is written, and whatever its worker blocks on
/// has been woken. The flag decides; closing sockets and channels only wakes.
pub struct InFlightJob {
    pub job_id: Uuid,
    pub model_id: String,
    pub accepted: Instant,
    /// `None` when it is too far off for the clock to hold.
    pub deadline: Option<Instant>,
    tokens_emitted: AtomicU32,
    cancelled: AtomicBool,
    expired: AtomicBool,
    state: Mutex<State>,
    /// Disconnects at the cancel: ends a wait for room in a lane.
    pub cancel_signal: Receiver<()>,
}

struct State {
    /// Until a worker takes it.
    job: Option<(Job, MemoryPermit)>,
    is_started: bool,
    interrupt: Option<Interrupt>,
    cancel_signal: Option<Sender<()>>,
    /// At the backend that runs it.
    slot: Option<Slot>,
}

impl InFlightJob {
    pub fn new(job: &Job) -> InFlightJob {
        let accepted = Instant::now();
        let (sender, cancel_signal) = bounded(0);
        let state = Mutex::new(State {
            job: None,
            is_started: false,
            interrupt: None,
            cancel_signal: Some(sender),
            slot: None,
        });
        InFlightJob {
            job_id: job.job_id,
            model_id: job.model_id.clone(),
            accepted,
            deadline: accepted.checked_add(Duration::from_millis(u64::from(job.deadline_ms))),
            tokens_emitted: AtomicU32::new(0),
            cancelled: AtomicBool::new(false),
            expired: AtomicBool::new(false),
            state,
            cancel_signal,
        }
    }

    /// Nothing of the job is written any more. Called by the table alone, under its lock.
    pub fn mark_cancelled(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Leaves the job to the worker that comes to take it; a cancelled one is dropped at once, however long the worker takes.
    pub fn park_job(&self, job: Job, share: MemoryPermit) {
        let mut wake = self.lock();
        if !self.is_cancelled() {
            wake.job = Some((job, share));
        }
    }

    /// The job, unless it was cancelled.
    pub fn take_job(&self) -> Option<(Job, MemoryPermit)> {
        let mut wake = self.lock();
        wake.is_started = true;
        wake.job.take()
    }

    /// Whether a worker has come for it. Not so of a job that is only about to be left to one.
    pub fn is_started(&self) -> bool {
        self.lock().is_started
    }

    /// True the first time: the deadline has passed.
    pub fn expire(&self) -> bool {
        !self.expired.swap(true, Ordering::SeqCst)
    }

    /// Ends whatever the worker blocks on at its backend; it finds out why by itself.
    pub fn interrupt(&self) {
        let interrupt = self.lock().interrupt.take();
        if let Some(interrupt) = interrupt {
            interrupt.interrupt();
        }
    }

    /// Keeps the job's slot until it leaves the table; of a job that has left, the slot is free at once.
    pub fn attach_slot(&self, slot: Slot) {
        let mut wake = self.lock();
        if !self.is_cancelled() {
            wake.slot = Some(slot);
        }
    }

    /// Frees the job's slot. Called by the table alone, as the job leaves it.
    pub fn release_slot(&self) {
        self.lock().slot = None;
    }

    /// Ends whatever the worker of a cancelled job blocks on.
    pub fn interrupt_worker(&self) {
        let mut wake = self.lock();
        drop(wake.cancel_signal.take());
        let (interrupt, job) = (wake.interrupt.take(), wake.job.take());
        drop(wake);
        drop(job);
        if let Some(interrupt) = interrupt {
            interrupt.interrupt();
        }
    }

    /// The way to wake the worker from here on; used at once when the cancel came first.
    pub fn interrupt_with(&self, interrupt: Interrupt) {
        self.lock().interrupt = Some(interrupt.clone());
        if self.is_cancelled() {
            interrupt.interrupt();
        }
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// Output tokens so far, as far as the stream shows.
    pub fn tokens_emitted(&self) -> u32 {
        self.tokens_emitted.load(Ordering::Relaxed)
    }

    /// Notes what the stream has shown; returns how many are new. What a backend takes back was emitted all the same.
    pub fn note_tokens_emitted(&self, tokens: u32) -> u32 {
        tokens.saturating_sub(self.tokens_emitted.fetch_max(tokens, Ordering::Relaxed))
    }

    /// Until the deadline.
    pub fn time_left(&self) -> Duration {
        self.deadline.map_or(Duration::MAX, |d| d.saturating_duration_since(Instant::now()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::backend::WireFormat;

    pub fn job(job_id: Uuid, deadline_ms: u32) -> Job {
        let (model_id, request) = ("m".to_owned(), serde_json::Value::Null);
        Job { job_id, model_id, request, format: WireFormat::Openai, deadline_ms }
    }

    #[test]
    fn a_job_has_begun_when_a_worker_comes_and_no_sooner() {
        let ticket = InFlightJob::new(&job(Uuid::nil(), 0));
        assert!(!ticket.is_started(), "it may yet have to wait for a worker");
        assert!(ticket.take_job().is_none() && ticket.is_started());
    }

    #[test]
    fn no_token_is_new_twice() {
        let ticket = InFlightJob::new(&job(Uuid::nil(), 0));
        let new = [5, 9, 2, 9, 10].map(|tokens| ticket.note_tokens_emitted(tokens));
        assert_eq!((new, ticket.tokens_emitted()), ([5, 4, 0, 0, 1], 10));
    }
}
