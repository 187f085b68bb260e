//! A test completion and a test cancel, run by the same code as real jobs.

use std::time::{Duration, Instant};

use serde_json::json;
use uuid::Uuid;

use super::backend_fixes::fix_of;
use super::report::Report;
use crate::backend::{Backend, BackendError, BackendResult, Job, JobResult, JobSink, Kind, WireFormat};
use crate::discovery::ResolvedModel;
use crate::link::protocol::DEADLINE_DEFAULT_MS;

/// The length of the cancelled job, in tokens: long enough that the server is still generating.
const CANCELLED_TOKENS: u32 = 64;

/// Picks the model to test: preferably one that is loaded and is not for embeddings.
pub fn pick<'a>(offered: &'a [ResolvedModel], unloaded: &[String]) -> &'a str {
    let penalty = |model: &&ResolvedModel| {
        let id = &model.model_id;
        2 * u8::from(id.to_ascii_lowercase().contains("embed")) + u8::from(unloaded.contains(id))
    };
    offered.iter().min_by_key(penalty).map_or("", |model| &model.model_id)
}

/// Requests a completion of one token, then cancels a second completion at its first byte.
pub fn run(report: &mut Report<'_>, backend: &dyn Backend, model: &str, kind: Kind) {
    report.pending("completion");
    let (outcome, first_byte) = execute(backend, model, 1, false);
    let first_ms = first_byte.unwrap_or_default().as_millis();
    match outcome {
        Ok(JobResult { duration_ms, .. }) => {
            let what = format_args!("{model}: first byte after {first_ms} ms, complete after {duration_ms} ms");
            report.pass("completion", what);
        }
        Err(e) => {
            let fix = fix_of(&e, kind);
            if first_byte.is_none() && e == BackendError::DeadlinePassed {
                let seconds = DEADLINE_DEFAULT_MS / 1000;
                let what = format_args!("{model}: no byte within {seconds} s, the usual deadline of a job");
                report.fail("completion", what, fix);
            } else {
                report.fail("completion", format_args!("{model}: {e}"), fix);
            }
            report.skip("cancel", "skipped: needs completion");
            return;
        }
    }
    report.pending("cancel");
    match execute(backend, model, CANCELLED_TOKENS, true) {
        (Err(BackendError::Cancelled), _) => cancelled(report, backend, kind),
        (Ok(_), _) => report.warn("cancel", "the answer was complete before it could be cancelled", "try again"),
        (Err(e), _) => report.fail("cancel", &e, fix_of(&e, kind)),
    }
}

/// Checks whether the server survives a cancel.
fn cancelled(report: &mut Report<'_>, backend: &dyn Backend, kind: Kind) {
    let began = Instant::now();
    match backend.probe() {
        Ok(_) => {
            let took = began.elapsed().as_millis();
            report.pass(
                "cancel",
                format_args!("closed the connection at the first byte; the server answered a probe {took} ms later"),
            );
        }
        Err(e) => {
            let what = format_args!("the server fails after a cancelled job: {e}");
            report.fail("cancel", what, fix_of(&e, kind));
        }
    }
}

fn execute(
    backend: &dyn Backend,
    model: &str,
    max_tokens: u32,
    cancels: bool,
) -> (BackendResult<JobResult>, Option<Duration>) {
    let job = Job {
        job_id: Uuid::new_v4(),
        model_id: model.to_owned(),
        request: json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens}),
        format: WireFormat::Openai,
        deadline_ms: DEADLINE_DEFAULT_MS,
    };
    let mut sink = Stopwatch { began: Instant::now(), first_byte: None, cancels };
    let outcome = backend.execute(&job, &mut sink);
    (outcome, sink.first_byte)
}

/// A sink that measures an answer and discards it.
struct Stopwatch {
    began: Instant,
    first_byte: Option<Duration>,
    cancels: bool,
}

impl JobSink for Stopwatch {
    fn send_chunk(&mut self, _: &[u8]) -> BackendResult<()> {
        self.first_byte.get_or_insert(self.began.elapsed());
        if self.cancels { Err(BackendError::Cancelled) } else { Ok(()) }
    }
}
