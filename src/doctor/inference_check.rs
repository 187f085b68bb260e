//! One tiny job and one cancel, through the code of real jobs.

use std::time::{Duration, Instant};

use serde_json::json;
use uuid::Uuid;

use super::backend_fixes::fix_of;
use super::report::Report;
use crate::backend::{Backend, BackendError, BackendResult, Job, JobResult, JobSink, Kind, WireFormat};
use crate::discovery::ResolvedModel;
use crate::link::protocol::DEADLINE_DEFAULT_MS;

/// What the cancelled job asks for: enough for the server to be still at it.
const CANCELLED_TOKENS: u32 = 64;

/// The model to try: a loaded one, and one that chats, where there are such.
pub fn pick<'a>(offered: &'a [ResolvedModel], unloaded: &[String]) -> &'a str {
    let doubts = |model: &&ResolvedModel| {
        let id = &model.model_id;
        2 * u8::from(id.to_ascii_lowercase().contains("embed")) + u8::from(unloaded.contains(id))
    };
    offered.iter().min_by_key(doubts).map_or("", |model| &model.model_id)
}

/// Has the backend complete one token, then hangs up on a second answer at its first byte.
pub fn run(report: &mut Report<'_>, backend: &dyn Backend, model: &str, kind: Kind) {
    report.pending("completion");
    let (outcome, first_byte) = execute(backend, model, 1, false);
    let first_ms = first_byte.unwrap_or_default().as_millis();
    match outcome {
        Ok(JobResult { duration_ms, .. }) => {
            let what = format_args!("{}: first byte after {first_ms} ms, the whole after {duration_ms} ms", model);
            report.pass("completion", what);
        }
        Err(e) => {
            let fix = fix_of(&e, kind);
            if first_byte.is_none() && e == BackendError::DeadlinePassed {
                let seconds = DEADLINE_DEFAULT_MS / 1000;
                let what = format_args!("{model}: no byte within {seconds} s, the time that a job has");
                report.fail("completion", what, format_args!("{fix}"));
            } else {
                report.fail("completion", format_args!("{model}: {e}"), format_args!("{fix}"));
            }
            report.skip("cancel", format_args!("rests on completion"));
            return;
        }
    }
    report.pending("cancel");
    match execute(backend, model, CANCELLED_TOKENS, true) {
        (Err(BackendError::Cancelled), _) => cancelled(report, backend, kind),
        (Ok(_), _) => report.warn(
            "cancel",
            format_args!("the answer was over before it could be cancelled"),
            format_args!("try again"),
        ),
        (Err(e), _) => report.fail("cancel", format_args!("{e}"), format_args!("{}", fix_of(&e, kind))),
    }
}

/// Whether the server is alive after a customer hung up on it.
fn cancelled(report: &mut Report<'_>, backend: &dyn Backend, kind: Kind) {
    let began = Instant::now();
    match backend.probe() {
        Ok(_) => {
            let took = began.elapsed().as_millis();
            report.pass(
                "cancel",
                format_args!("hung up at the first byte; the server answered its probe {took} ms later"),
            );
        }
        Err(e) => {
            let what = format_args!("after a customer hung up the server is not well: {}", e);
            report.fail("cancel", what, format_args!("{}", fix_of(&e, kind)));
        }
    }
}

fn execute(
    backend: &dyn Backend,
    model: &str,
    max_tokens: u32,
    hang_up: bool,
) -> (BackendResult<JobResult>, Option<Duration>) {
    let job = Job {
        job_id: Uuid::new_v4(),
        model_id: model.to_owned(),
        request: json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens}),
        format: WireFormat::Openai,
        deadline_ms: DEADLINE_DEFAULT_MS,
    };
    let mut sink = Stopwatch { began: Instant::now(), first_byte: None, hang_up };
    let outcome = backend.execute(&job, &mut sink);
    (outcome, sink.first_byte)
}

/// Takes an answer for its time alone.
struct Stopwatch {
    began: Instant,
    first_byte: Option<Duration>,
    hang_up: bool,
}

impl JobSink for Stopwatch {
    fn send_chunk(&mut self, _: &[u8]) -> BackendResult<()> {
        self.first_byte.get_or_insert(self.began.elapsed());
        if self.hang_up { Err(BackendError::Cancelled) } else { Ok(()) }
    }
}
