//! What became of the jobs since the agent started, for `status`.
//!
//! Unlike the heartbeat's figures these count everything: cancelled jobs, and those that were the requester's own fault.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::observe::object;

use crate::link::protocol::ErrorCode;
use crate::sys::datetime::rfc3339;

/// The sums.
#[derive(Debug, Default)]
pub struct Tally {
    sums: Mutex<Sums>,
}

#[derive(Debug, Default)]
struct Sums {
    done: u64,
    failed: u64,
    cancelled: u64,
    lost: u64,
    /// By cause.
    refused: Vec<(&'static str, u64)>,
    input_tokens: u64,
    output_tokens: u64,
    last_job: Option<LastJob>,
    last_error: Option<LastError>,
}

#[derive(Debug)]
struct LastJob {
    at: SystemTime,
    /// Of a job that a worker had begun.
    model_id: Option<String>,
    outcome: &'static str,
    duration: Duration,
}

#[derive(Debug)]
struct LastError {
    at: SystemTime,
    code: &'static str,
    /// Fit for a log: nothing that a backend said.
    why: String,
}

impl Tally {
    /// A job that went well.
    pub fn done(&self, model_id: &str, duration: Duration, input_tokens: u32, output_tokens: u32) {
        let mut sums = self.lock();
        sums.done += 1;
        sums.input_tokens += u64::from(input_tokens);
        sums.output_tokens += u64::from(output_tokens);
        sums.last_job = Some(LastJob::now(Some(model_id), "done", duration));
    }

    /// A job that was answered with an error, having emitted so many tokens. `why` is fit for a log.
    pub fn failed(&self, model_id: Option<&str>, duration: Duration, output_tokens: u32, code: ErrorCode, why: String) {
        let code = code.as_str();
        let mut sums = self.lock();
        sums.failed += 1;
        sums.output_tokens += u64::from(output_tokens);
        sums.last_job = Some(LastJob::now(model_id, code, duration));
        sums.last_error = Some(LastError { at: SystemTime::now(), code, why });
    }

    /// A job that the coordinator cancelled.
    pub fn cancelled(&self, output_tokens: u32) {
        let mut sums = self.lock();
        sums.cancelled += 1;
        sums.output_tokens += u64::from(output_tokens);
    }

    /// Jobs whose session ended before they did.
    pub fn lost(&self, jobs: usize) {
        self.lock().lost += jobs as u64;
    }

    /// A job that was not taken, for this cause.
    pub fn refused(&self, cause: &'static str) {
        let refused = &mut self.lock().refused;
        match refused.iter_mut().find(|(known, _)| *known == cause) {
            Some((_, count)) => *count += 1,
            None => refused.push((cause, 1)),
        }
    }

    /// `jobs`, `tokens`, `last_job` and `last_error` of the state file, with the jobs in flight now.
    pub fn describe(&self, in_flight: u32, set: &mut dyn FnMut(&str, Value)) {
        let sums = self.lock();
        let by_cause = sums.refused.iter().map(|(cause, count)| ((*cause).to_owned(), Value::from(*count)));
        let jobs = object([
            ("in_flight", in_flight.into()),
            ("done", sums.done.into()),
            ("failed", sums.failed.into()),
            ("cancelled", sums.cancelled.into()),
            ("lost", sums.lost.into()),
            ("refused", sums.refused.iter().map(|(_, count)| count).sum::<u64>().into()),
            ("refused_by_cause", Value::Object(by_cause.collect())),
        ]);
        set("jobs", jobs);
        set("tokens", object([("input", sums.input_tokens.into()), ("output", sums.output_tokens.into())]));
        let last_job = sums.last_job.as_ref().map(|job| {
            object([
                ("at", rfc3339(job.at).into()),
                ("model_id", job.model_id.as_deref().into()),
                ("outcome", job.outcome.into()),
                ("duration_ms", u64::try_from(job.duration.as_millis()).unwrap_or(u64::MAX).into()),
            ])
        });
        set("last_job", last_job.into());
        let last_error = sums.last_error.as_ref().map(|error| {
            object([
                ("at", rfc3339(error.at).into()),
                ("code", error.code.into()),
                ("message", error.why.as_str().into()),
            ])
        });
        set("last_error", last_error.into());
    }

    fn lock(&self) -> MutexGuard<'_, Sums> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LastJob {
    fn now(model_id: Option<&str>, outcome: &'static str, duration: Duration) -> LastJob {
        LastJob { at: SystemTime::now(), model_id: model_id.map(str::to_owned), outcome, duration }
    }
}
