//! A trial: a completion of one token that shows whether a model whose jobs fail still serves. Runs like a job, so that it fails
//! like one.
//!
//! Invariants: a trial is limited in tokens, bytes and time, and is never run where the operator may be charged for it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use serde_json::json;
use uuid::Uuid;

use crate::backend::{Backend, BackendError, BackendResult, Fault, Job, JobSink, WireFormat};

/// Time limit for the trial of a model. Some servers take almost as long to report that a model cannot be loaded.
const MODEL_TRIAL_TIME: Duration = Duration::from_secs(30);

/// Time limit for the trial of a withdrawn model: large models take minutes to load, and servers stop loading if the client disconnects.
/// Ollama's own limit.
const WITHDRAWN_TRIAL_TIME: Duration = Duration::from_secs(300);

/// Time limit for the trial of a backend whose probe failed.
const BACKEND_TRIAL_TIME: Duration = Duration::from_secs(5);

/// Bytes of an answer after which a trial has passed: the server ignores the token limit, but it serves.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// What a trial has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrialOutcome {
    /// The model serves.
    Passed,
    /// The model does not serve, for this reason.
    Failed(String),
    /// Neither: the server is at capacity, or the trial was not a request that it accepts.
    Inconclusive(String),
}

impl fmt::Display for TrialOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrialOutcome::Passed => f.write_str("succeeded"),
            TrialOutcome::Failed(why) => write!(f, "failed: {why}"),
            TrialOutcome::Inconclusive(why) => write!(f, "was inconclusive: {why}"),
        }
    }
}

/// A trial to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    /// The model to try.
    pub model_id: String,
    /// Why it is tried.
    pub purpose: Purpose,
}

/// Why a trial is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The jobs of the model keep failing.
    Model,
    /// The model is withdrawn: does it serve again?
    Withdrawn,
    /// The probe of the backend failed: does it serve nevertheless?
    Backend,
}

/// Tries a model. Blocks for at most [`WITHDRAWN_TRIAL_TIME`].
pub fn run(backend: &dyn Backend, trial: &Trial) -> TrialOutcome {
    let time = match trial.purpose {
        Purpose::Model => MODEL_TRIAL_TIME,
        Purpose::Withdrawn => WITHDRAWN_TRIAL_TIME,
        Purpose::Backend => BACKEND_TRIAL_TIME,
    };
    let job = Job {
        job_id: Uuid::new_v4(),
        model_id: trial.model_id.clone(),
        request: json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}),
        format: WireFormat::Openai,
        deadline_ms: u32::try_from(time.as_millis()).unwrap_or(u32::MAX),
    };
    let mut sink = DiscardingSink(0);
    // A panic in one backend must not affect the others.
    let outcome = catch_unwind(AssertUnwindSafe(|| backend.execute(&job, &mut sink)));
    match outcome.unwrap_or(Err(BackendError::Panicked)) {
        Ok(_) | Err(BackendError::Cancelled) => TrialOutcome::Passed,
        // It rejects the trial instead of failing. Jobs must show whether it serves.
        Err(BackendError::BadRequest(response)) if trial.purpose == Purpose::Withdrawn && response.status < 500 => {
            TrialOutcome::Passed
        }
        Err(e) if is_failure(&e) => TrialOutcome::Failed(e.for_log()),
        Err(e) => TrialOutcome::Inconclusive(e.for_log()),
    }
}

/// Whether jobs would fail like this trial.
fn is_failure(e: &BackendError) -> bool {
    match e {
        BackendError::Loading(_) | BackendError::Overloaded(_) => false,
        // The trial's request is valid, whatever the response says.
        BackendError::BadRequest(response) => response.status >= 500,
        BackendError::ModelNotFound(_)
        | BackendError::LoadFailed(_)
        | BackendError::CutStream(_)
        | BackendError::ReportedError(_)
        | BackendError::Aborted
        | BackendError::Panicked => true,
        e => e.fault() != Fault::Neither,
    }
}

/// Counts an answer and discards it.
struct DiscardingSink(usize);

impl JobSink for DiscardingSink {
    fn send_chunk(&mut self, bytes: &[u8]) -> BackendResult<()> {
        self.0 += bytes.len();
        if self.0 > ANSWER_BYTES_MAX { Err(BackendError::Cancelled) } else { Ok(()) }
    }
}
