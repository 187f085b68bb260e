//! The thread that ends jobs at their deadlines, whatever their workers block in: a write to a backend that does not read, or
//! the queue. The sockets' own timeouts are no clock for that: the kernel rings late by up to an eighth of the time, and a
//! write that got anywhere has all of it again.
//!
//! It is there while jobs are, and for a while after the last.

use std::sync::Arc;

use super::Shared;
use super::in_flight::InFlightJob;
use crate::backend::BackendError;

/// Runs until no job has been in flight for a while.
pub fn watch(shared: &Shared) {
    while let Some(expired) = shared.table.wait_for_deadlines() {
        expired.iter().for_each(|ticket| end(shared, ticket));
    }
}

fn end(shared: &Shared, ticket: &Arc<InFlightJob>) {
    if ticket.is_started() {
        // Its worker finds that the time is over.
        ticket.interrupt();
    } else if shared.table.abandon(ticket) {
        let error = BackendError::DeadlinePassed;
        log::warn!("job {} failed in the queue: {error}", ticket.job_id);
        if let Some(code) = error.code() {
            shared.answer_with_error(ticket, code, &error.to_string());
        }
    }
}
