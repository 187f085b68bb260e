//! What a worker does with one job: run the backend, pass its bytes on, and end it exactly once.

use std::sync::Arc;
use std::time::Instant;

use super::in_flight::InFlightJob;
use super::stats::Outcome;
use super::{FallbackRoute, Shared};
use crate::backend::{BackendError, BackendResult, Interrupt, JobResult, JobSink};
use crate::discovery::BackendHandle;
use crate::link::protocol::{self, JobChunks};

/// With so many milliseconds left or fewer, nothing can be done.
const MIN_REMAINING_MS: u32 = 1;

/// Runs in a worker thread, from the first byte of the job to its terminal frame. The job has a slot of `member`; an
/// alternative is tried when that one cannot take it, as long as no byte of an answer has been sent.
pub fn run(
    shared: &Arc<Shared>,
    ticket: &Arc<InFlightJob>,
    mut member: Arc<BackendHandle>,
    alternatives: FallbackRoute,
) {
    // From here on the job is answered, whatever happens: also when the backend panics.
    let mut ending = TerminalGuard { shared, ticket, outcome: Err(BackendError::Panicked) };
    let Some((mut job, _share)) = ticket.take_job() else { return };
    let mut relay = JobRelay { shared, ticket, chunks: JobChunks::of(ticket.job_id), has_sent: false };
    let mut alternatives = alternatives.into_iter();
    loop {
        // The deadline covers the time in the queue and with other backends too. Rounded up: a job just admitted has
        // its time.
        let left_ms = ticket.time_left().as_micros().div_ceil(1000);
        job.deadline_ms = u32::try_from(left_ms).unwrap_or(u32::MAX).min(job.deadline_ms);
        if job.deadline_ms <= MIN_REMAINING_MS {
            ending.outcome = Err(BackendError::DeadlinePassed);
            return;
        }
        ending.outcome = Err(BackendError::Panicked);
        let (outcome, kept) = match alternatives.len() {
            0 => (member.backend.execute_last(job, &mut relay), None),
            _ => (member.backend.execute(&job, &mut relay), Some(job)),
        };
        ending.outcome = outcome;
        // What an interrupted backend says means nothing.
        if ticket.is_cancelled() {
            return;
        }
        shared.update_backend_health(&member, &ending.outcome);
        let Some(kept) = kept else { return };
        job = kept;
        match &ending.outcome {
            Err(e) if e.may_fail_over() && !relay.has_sent => {
                let Some(slot) = alternatives.find_map(|next| next.try_acquire_slot()) else { return };
                let (from, why) = (member.backend.id(), e.for_log());
                log::info!("job {}: {from} cannot take it ({why}); trying the next", job.job_id);
                member = slot.backend().clone();
                ticket.attach_slot(slot);
            }
            _ => return,
        }
    }
}

/// Between a backend and the outbox.
struct JobRelay<'a> {
    shared: &'a Shared,
    ticket: &'a Arc<InFlightJob>,
    chunks: JobChunks,
    /// A piece of an answer is on its way, so no other backend's may follow it.
    has_sent: bool,
}

impl JobSink for JobRelay<'_> {
    fn send_chunk(&mut self, bytes: &[u8]) -> BackendResult<()> {
        if bytes.is_empty() {
            return self.still_wanted();
        }
        self.still_wanted()?;
        self.has_sent = true;
        let frame = self.chunks.frame(bytes);
        self.shared.outbox.chunk(self.ticket, frame)
    }

    fn still_wanted(&self) -> BackendResult<()> {
        if self.ticket.is_cancelled() {
            return Err(BackendError::Cancelled);
        }
        match self.ticket.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(BackendError::DeadlinePassed),
            _ => Ok(()),
        }
    }

    fn interrupt_with(&mut self, interrupt: Interrupt) {
        self.ticket.interrupt_with(interrupt);
    }

    fn tokens_emitted(&mut self, tokens: u32) {
        let new = self.ticket.note_tokens_emitted(tokens);
        self.shared.deps.token_limit.count(u64::from(new));
    }
}

/// The guard that ends the job: one terminal frame, or none after a cancel.
struct TerminalGuard<'a> {
    shared: &'a Arc<Shared>,
    ticket: &'a Arc<InFlightJob>,
    outcome: BackendResult<JobResult>,
}

impl Drop for TerminalGuard<'_> {
    fn drop(&mut self) {
        if let Ok(result) = &self.outcome {
            let unseen = result.output_tokens.unwrap_or(0).saturating_sub(self.ticket.tokens_emitted());
            let tokens = u64::from(unseen) + u64::from(result.input_tokens.unwrap_or(0));
            self.shared.deps.token_limit.count(tokens);
        }
        let sent = match self.terminal_frame() {
            Some(frame) => self.shared.outbox.terminal(&self.shared.table, self.ticket, frame).is_ok(),
            None => false,
        };
        self.shared.table.finish(self.ticket);
        match sent {
            // Whoever took it out counts it.
            _ if self.ticket.is_cancelled() => {}
            true => self.record(),
            false => self.shared.deps.stats.record(Outcome::Lost),
        }
    }
}

impl TerminalGuard<'_> {
    fn terminal_frame(&mut self) -> Option<String> {
        let job_id = self.ticket.job_id;
        match &mut self.outcome {
            Ok(result) => {
                if result.duration_ms == 0 {
                    result.duration_ms = u32::try_from(self.ticket.accepted.elapsed().as_millis()).unwrap_or(u32::MAX);
                }
                Some(protocol::job_done(job_id, result))
            }
            Err(e) => {
                let frame = protocol::job_error(job_id, e.code()?, &e.to_string(), self.ticket.tokens_emitted());
                if !self.ticket.is_cancelled() {
                    log::warn!("job {job_id} failed: {}", e.for_log());
                }
                Some(frame)
            }
        }
    }

    fn record(&self) {
        let (model_id, latency) = (self.ticket.model_id.as_str(), self.ticket.accepted.elapsed());
        self.shared.deps.stats.record(match &self.outcome {
            Ok(result) => Outcome::Done {
                model_id,
                latency,
                input_tokens: result.input_tokens.unwrap_or(0),
                output_tokens: result.output_tokens.unwrap_or(0),
            },
            Err(e) => {
                let Some(code) = e.code() else { return };
                Outcome::Failed {
                    model_id,
                    latency,
                    output_tokens: self.ticket.tokens_emitted(),
                    code,
                    reason: e.for_log(),
                    is_requesters_fault: e.is_requesters_fault(),
                }
            }
        });
    }
}
