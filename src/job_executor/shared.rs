//! The state that an executor shares with its workers and its deadline thread.

use std::sync::Arc;
use std::time::Instant;

use super::in_flight::InFlightJob;
use super::outbox::Outbox;
use super::stats::{JobStats, Outcome};
use super::table::JobTable;
use super::token_limit::TokenLimit;
use crate::backend::{BackendError, BackendResult, JobResult};
use crate::discovery::{BackendHandle, OfferFeed, Prober, Verdict};
use crate::link::protocol::{self, ErrorCode};

/// The dependencies of an executor, which outlive it.
#[derive(Default)]
pub struct ExecutorDeps {
    /// The backends of each model.
    pub offers: Arc<OfferFeed>,
    /// The statistics, which record how each job ends.
    pub stats: Arc<JobStats>,
    /// The token limit; jobs are rejected while it is used up.
    pub token_limit: Arc<TokenLimit>,
    /// The prober, notified of backends that are missing or fail their jobs.
    pub prober: Option<Prober>,
    /// Called when the token limit rejects a job.
    pub on_throttled: Option<Box<dyn Fn() + Send + Sync>>,
}

/// The shared state. Lives until the last worker and the deadline thread have ended.
pub struct Shared {
    pub max_concurrent: u32,
    pub outbox: Box<dyn Outbox>,
    pub deps: ExecutorDeps,
    pub table: Arc<JobTable>,
}

impl Shared {
    /// Updates the health of a backend from the outcome of a job for `model_id` that it ran since `began`.
    pub fn update_backend_health(
        &self,
        backend: &BackendHandle,
        model_id: &str,
        began: Instant,
        outcome: &BackendResult<JobResult>,
    ) {
        let verdict = backend.record_outcome(model_id, began, outcome);
        let Some(prober) = &self.deps.prober else { return };
        match verdict {
            Verdict::Unchanged => {}
            Verdict::BackendFails => prober.withdraw_failing(),
            Verdict::ModelFails => prober.try_suspects(),
        }
        if outcome.as_ref().is_err_and(BackendError::invalidates_offer) {
            prober.request_refresh();
        }
    }

    /// Answers a job that [`JobTable::abandon`] or [`JobTable::cancel_all`] removed from the table. The error may overtake
    /// queued data, because the queued frames of a cancelled job are not written.
    pub fn answer_abandoned(&self, job: &InFlightJob, code: ErrorCode, message: &str) {
        let output_tokens = job.tokens_emitted();
        let sent = self.outbox.send_control(protocol::job_error(job.job_id, code, message, output_tokens));
        self.deps.stats.record(match sent {
            Ok(()) => Outcome::Failed {
                model_id: &job.model_id,
                latency: job.accepted.elapsed(),
                output_tokens,
                code,
                reason: message.to_owned(),
                is_requesters_fault: false,
            },
            Err(_) => Outcome::Lost,
        });
    }
}
