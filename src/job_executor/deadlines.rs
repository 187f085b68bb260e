//! The thread that ends jobs at their deadlines, whatever they are blocked on: a write to a backend that does not read, or
//! the queue for a worker. Socket timeouts are not sufficient: the kernel fires them up to an eighth late, and restarts them
//! whenever a write makes progress.
//!
//! The thread runs while jobs are in flight, and for a while after the last one.

use std::sync::Arc;

use super::in_flight::InFlightJob;
use super::shared::Shared;
use crate::backend::BackendError;

/// Runs until no job has been in flight for a while.
pub fn watch(shared: &Shared) {
    while let Some(expired) = shared.table.wait_for_deadlines() {
        expired.iter().for_each(|job| end(shared, job));
    }
}

fn end(shared: &Shared, job: &Arc<InFlightJob>) {
    if job.is_started() {
        // The worker sees that the deadline has passed.
        job.interrupt();
    } else if shared.table.abandon(job) {
        let error = BackendError::DeadlinePassed;
        crate::log_repeatable!(log::Level::Warn, "job {} failed in the queue: {error}", job.job_id);
        if let Some(code) = error.code() {
            shared.answer_abandoned(job, code, &error.to_string());
        }
    }
}
