//! Runs one job in a worker thread: relays the backend's bytes to the coordinator, and sends exactly one terminal frame.

use std::sync::Arc;
use std::time::Instant;

use super::in_flight::{InFlightJob, Work};
use super::shared::Shared;
use super::stats::Outcome;
use crate::backend::{BackendError, BackendResult, Interrupt, JobResult, JobSink};
use crate::discovery::BackendHandle;
use crate::link::protocol::{self, JobChunks};

/// The remaining time at or below which a job is not sent to a backend, in milliseconds.
const MIN_REMAINING_MS: u32 = 1;

/// Runs the job to its terminal frame. If a backend cannot take the job, tries the next backend of the fallback route,
/// unless part of an answer has been sent.
pub fn run(shared: &Shared, in_flight: &Arc<InFlightJob>) {
    // Answers the job however this function ends, including a panic of the backend.
    let mut guard = TerminalGuard { shared, in_flight, outcome: Err(BackendError::Panicked) };
    let Some(work) = in_flight.take_work() else { return };
    let Work { mut job, permit: _permit, mut backend, fallback_route } = work;
    let chunks = JobChunks::of(in_flight.job_id);
    let mut relay = JobRelay { shared, in_flight, backend: backend.clone(), chunks, has_sent: false };
    let mut fallback_route = fallback_route.into_iter();
    loop {
        // The deadline includes the time in the queue and at other backends. Rounded up, so that a job that was just admitted
        // keeps its full deadline.
        let remaining_ms = in_flight.remaining().as_micros().div_ceil(1000);
        job.deadline_ms = u32::try_from(remaining_ms).unwrap_or(u32::MAX).min(job.deadline_ms);
        if job.deadline_ms <= MIN_REMAINING_MS {
            guard.outcome = Err(BackendError::DeadlinePassed);
            return;
        }
        guard.outcome = Err(BackendError::Panicked);
        let began = Instant::now();
        // The last backend holds the only reference to the request, and drops it once it is sent.
        let kept = (fallback_route.len() > 0).then(|| job.clone());
        guard.outcome = backend.backend.execute_raw(job, &mut relay);
        // The outcome of an interrupted call says nothing about the backend.
        if in_flight.is_cancelled() {
            return;
        }
        shared.update_backend_health(&backend, &in_flight.model_id, began, &guard.outcome);
        let Some(kept) = kept else { return };
        job = kept;
        match &guard.outcome {
            Err(e) if e.may_fail_over() && !relay.has_sent => {
                let Some(slot) = fallback_route.find_map(|next| next.try_acquire_slot()) else { return };
                let (from, why) = (backend.backend.id(), e.for_log());
                crate::log_repeatable!(
                    log::Level::Info,
                    "job {}: {from} cannot take it ({why}); trying the next backend",
                    job.job_id
                );
                backend = slot.backend().clone();
                relay.backend = backend.clone();
                in_flight.attach_slot(slot);
            }
            _ => return,
        }
    }
}

/// The sink that a backend writes its answer to.
struct JobRelay<'a> {
    shared: &'a Shared,
    in_flight: &'a Arc<InFlightJob>,
    /// The backend that the answer comes from.
    backend: Arc<BackendHandle>,
    chunks: JobChunks,
    /// Whether part of an answer has been sent, so that the job cannot fail over.
    has_sent: bool,
}

impl JobSink for JobRelay<'_> {
    fn send_chunk(&mut self, bytes: &[u8]) -> BackendResult<()> {
        if bytes.is_empty() {
            return self.still_wanted();
        }
        self.still_wanted()?;
        self.has_sent = true;
        self.backend.mark_answering();
        let frame = self.chunks.frame(bytes);
        self.shared.outbox.send_chunk(self.in_flight, frame)
    }

    fn still_wanted(&self) -> BackendResult<()> {
        if self.in_flight.is_cancelled() {
            return Err(BackendError::Cancelled);
        }
        match self.in_flight.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(BackendError::DeadlinePassed),
            _ => Ok(()),
        }
    }

    fn interrupt_with(&mut self, interrupt: Interrupt) {
        self.in_flight.interrupt_with(interrupt);
    }

    fn tokens_emitted(&mut self, tokens: u32) {
        let new = self.in_flight.update_tokens_emitted(tokens);
        self.shared.deps.token_limit.count(u64::from(new));
    }

    fn cached_tokens(&mut self, tokens: u32) {
        self.in_flight.set_cached_tokens(tokens);
    }
}

/// Ends the job when it is dropped: with one terminal frame, or with none after a cancel.
struct TerminalGuard<'a> {
    shared: &'a Shared,
    in_flight: &'a Arc<InFlightJob>,
    outcome: BackendResult<JobResult>,
}

impl Drop for TerminalGuard<'_> {
    fn drop(&mut self) {
        let Shared { outbox, table, deps, .. } = self.shared;
        if let Ok(result) = &self.outcome {
            let uncounted = result.output_tokens.unwrap_or(0).saturating_sub(self.in_flight.tokens_emitted());
            deps.token_limit.count(u64::from(uncounted) + u64::from(self.input_tokens(result)));
        }
        let sent = match self.terminal_frame() {
            Some(frame) => outbox.send_terminal(table, self.in_flight, frame).is_ok(),
            None => false,
        };
        table.finish(self.in_flight);
        // The thread that cancels a job records it.
        if !self.in_flight.is_cancelled() {
            deps.stats.record(self.recorded_outcome(sent));
        }
    }
}

impl TerminalGuard<'_> {
    /// All tokens of the prompt. The terminal frame contains only those that the backend states, without the cached ones.
    fn input_tokens(&self, result: &JobResult) -> u32 {
        result.input_tokens.unwrap_or(0).saturating_add(self.in_flight.cached_tokens())
    }

    fn terminal_frame(&mut self) -> Option<String> {
        let job_id = self.in_flight.job_id;
        match &mut self.outcome {
            Ok(result) => {
                if result.duration_ms == 0 {
                    let elapsed = self.in_flight.accepted.elapsed();
                    result.duration_ms = u32::try_from(elapsed.as_millis()).unwrap_or(u32::MAX);
                }
                Some(protocol::job_done(job_id, result))
            }
            Err(e) => {
                let frame = protocol::job_error(job_id, e.code()?, &e.to_string(), self.in_flight.tokens_emitted());
                if !self.in_flight.is_cancelled() {
                    crate::log_repeatable!(log::Level::Warn, "job {job_id} failed: {}", e.for_log());
                }
                Some(frame)
            }
        }
    }

    fn recorded_outcome(&self, sent: bool) -> Outcome<'_> {
        let (model_id, latency) = (self.in_flight.model_id.as_str(), self.in_flight.accepted.elapsed());
        match &self.outcome {
            Ok(result) if sent => Outcome::Done {
                model_id,
                latency,
                input_tokens: self.input_tokens(result),
                output_tokens: result.output_tokens.unwrap_or(0),
            },
            Err(e) if sent => e.code().map_or(Outcome::Lost, |code| Outcome::Failed {
                model_id,
                latency,
                output_tokens: self.in_flight.tokens_emitted(),
                code,
                reason: e.for_log(),
                is_requesters_fault: e.is_requesters_fault(),
            }),
            _ => Outcome::Lost,
        }
    }
}
