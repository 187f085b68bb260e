//! Jobs that arrive before the first offer. Which backend serves them is known only once the backends have been probed.
//!
//! Invariants: the held jobs are bounded in number and size. Each is dispatched, rejected or cancelled exactly once; dispatching
//! follows the order of arrival.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use uuid::Uuid;

use crate::backend::RawJob;
use crate::job_executor::{JobExecutor, REQUEST_BYTES_MAX, RejectReason};
use crate::link::write_queues::LaneError;

/// Passes jobs to the executor; until the first offer, holds them.
pub struct EarlyJobs {
    executor: Arc<JobExecutor>,
    jobs_max: usize,
    /// The held jobs; `None` after the first offer.
    held: Mutex<Option<Vec<Held>>>,
}

struct Held {
    job: RawJob,
    arrived: Instant,
}

impl EarlyJobs {
    /// Holds at most `max_concurrent` jobs.
    pub fn new(executor: Arc<JobExecutor>, max_concurrent: u32) -> EarlyJobs {
        EarlyJobs { executor, jobs_max: max_concurrent as usize, held: Mutex::new(Some(Vec::new())) }
    }

    /// Dispatches the job, or holds it until the first offer.
    ///
    /// # Errors
    /// A rejection could not be queued.
    pub fn dispatch(&self, job: RawJob) -> Result<(), LaneError> {
        let mut held = self.held();
        let Some(jobs) = held.as_mut() else {
            drop(held);
            return self.executor.try_dispatch(job);
        };
        if is_held(jobs, job.job_id) {
            return Ok(());
        }
        if jobs.len() >= self.jobs_max {
            let message = "the agent has no offer yet, and max_concurrent jobs are already waiting for it";
            return self.executor.reject(job.job_id, RejectReason::AtCapacity, message);
        }
        let held_bytes: usize = jobs.iter().map(|held| held.job.request.len()).sum();
        if held_bytes + job.request.len() > REQUEST_BYTES_MAX {
            let message = "the requests that wait for the first offer leave too little memory for this one";
            return self.executor.reject(job.job_id, RejectReason::NoMemory, message);
        }
        jobs.push(Held { job, arrived: Instant::now() });
        Ok(())
    }

    /// Answers a job with an error, unless a job with its id is held or in flight.
    ///
    /// # Errors
    /// The answer could not be queued.
    pub fn reject(&self, job_id: Uuid, reason: RejectReason, message: &str) -> Result<(), LaneError> {
        if self.held().as_ref().is_some_and(|jobs| is_held(jobs, job_id)) {
            return Ok(());
        }
        self.executor.reject(job_id, reason, message)
    }

    /// Ends the job, held or in flight, without a frame.
    pub fn cancel(&self, job_id: Uuid) {
        if let Some(jobs) = self.held().as_mut() {
            jobs.retain(|held| held.job.job_id != job_id);
        }
        self.executor.cancel(job_id);
    }

    /// Dispatches the held jobs with the rest of their deadlines. Later jobs are dispatched at once.
    pub fn release(&self) {
        // Locked throughout, so that a cancel finds each job either here or in the executor. A dispatch does not block.
        let mut held = self.held();
        for Held { mut job, arrived } in held.take().unwrap_or_default() {
            let waited = u32::try_from(arrived.elapsed().as_millis()).unwrap_or(u32::MAX);
            job.deadline_ms = job.deadline_ms.saturating_sub(waited);
            // Fails only if the rejection cannot be queued, which also ends the session.
            let _ = self.executor.try_dispatch(job);
        }
    }

    fn held(&self) -> MutexGuard<'_, Option<Vec<Held>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a job with this id is held. If so, logs that the new job is ignored: an answer would end the held one.
fn is_held(jobs: &[Held], job_id: Uuid) -> bool {
    let is_held = jobs.iter().any(|held| held.job.job_id == job_id);
    if is_held {
        crate::log_repeatable!(log::Level::Warn, "job {job_id} ignored: a job with this id is waiting");
    }
    is_held
}
