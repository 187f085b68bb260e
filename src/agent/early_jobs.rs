//! Jobs that arrive before the first offer. Which backend serves them is known only once the backends have been probed.
//!
//! Invariants: the jobs held are bounded in number and size. A job is dispatched, rejected or cancelled exactly once, in the order
//! of arrival.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use uuid::Uuid;

use crate::backend::Job;
use crate::job_executor::{JobExecutor, REQUEST_BYTES_MAX, RejectReason};
use crate::link::write_queues::LaneError;

/// Passes jobs to the executor; until the first offer, holds them.
pub struct EarlyJobs {
    executor: Arc<JobExecutor>,
    jobs_max: usize,
    /// `None` from the first offer on.
    held: Mutex<Option<Vec<Held>>>,
}

struct Held {
    job: Job,
    request_bytes: usize,
    arrived: Instant,
}

impl EarlyJobs {
    /// Holds at most `max_concurrent` jobs.
    pub fn new(executor: Arc<JobExecutor>, max_concurrent: u32) -> EarlyJobs {
        EarlyJobs { executor, jobs_max: max_concurrent as usize, held: Mutex::new(Some(Vec::new())) }
    }

    /// Dispatches the job, whose request has `request_bytes`, or holds it until the first offer.
    ///
    /// # Errors
    /// A rejection could not be queued.
    pub fn dispatch(&self, job: Job, request_bytes: usize) -> Result<(), LaneError> {
        let mut held = self.held();
        let Some(jobs) = held.as_mut() else {
            drop(held);
            return self.executor.try_dispatch(job, request_bytes);
        };
        if jobs.iter().any(|held| held.job.job_id == job.job_id) {
            log::warn!("job {} ignored: a job with this id is waiting", job.job_id);
            return Ok(());
        }
        if jobs.len() >= self.jobs_max {
            let message = "the agent has no offer yet, and as many jobs are waiting for it as it may run";
            return self.executor.reject(job.job_id, RejectReason::AtCapacity, message);
        }
        let held_bytes: usize = jobs.iter().map(|held| held.request_bytes).sum();
        if held_bytes + request_bytes > REQUEST_BYTES_MAX {
            let message = "the requests that wait for the first offer leave too little memory for one of this size";
            return self.executor.reject(job.job_id, RejectReason::NoMemory, message);
        }
        jobs.push(Held { job, request_bytes, arrived: Instant::now() });
        Ok(())
    }

    /// Ends the job without a frame.
    pub fn cancel(&self, job_id: Uuid) {
        if let Some(jobs) = self.held().as_mut() {
            jobs.retain(|held| held.job.job_id != job_id);
        }
        self.executor.cancel(job_id);
    }

    /// Dispatches the held jobs, with what is left of their deadlines. Holds no further ones.
    pub fn release(&self) {
        // Locked throughout, so that a cancel finds each job either here or in the executor. A dispatch does not block.
        let mut held = self.held();
        for Held { mut job, request_bytes, arrived } in held.take().unwrap_or_default() {
            let waited = u32::try_from(arrived.elapsed().as_millis()).unwrap_or(u32::MAX);
            job.deadline_ms = job.deadline_ms.saturating_sub(waited);
            // Fails only if the rejection cannot be queued, which also ends the session.
            let _ = self.executor.try_dispatch(job, request_bytes);
        }
    }

    fn held(&self) -> MutexGuard<'_, Option<Vec<Held>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
