//! The demo's own requests: the one that is shown and checked byte by byte, and the pairs that measure the overhead.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use super::assemble;
use super::coordinator::{Coordinator, Format, Job, JobEvent, JobOrder, Waited};
use super::link::JobEnd;
use super::sse::EventSplitter;
use super::{DemoError, Page};
use crate::backend::{self, Backend, BackendResult, JobSink, WireFormat};
use crate::shutdown::Stop;

/// The longest answer that the demo asks for.
const ANSWER_TOKENS_MAX: u32 = 128;

/// How long one of the demo's requests may take; a cold model on a slow machine takes minutes.
const REQUEST_DEADLINE: Duration = Duration::from_secs(300);

/// Requests of each sort in the measurement of the overhead; odd, so that there is a middle one.
const OVERHEAD_PAIRS: usize = 5;

/// How often a wait looks whether the demo is to stop.
const STOP_POLL: Duration = Duration::from_millis(50);

/// After so long without a byte the operator is told why that may be.
const PATIENCE: Duration = Duration::from_secs(3);

/// The answer to the demo's request, and how long it took.
pub(super) struct Answer {
    pub(super) bytes: Vec<u8>,
    pub(super) end: JobEnd,
    pub(super) first_byte: Duration,
    pub(super) total: Duration,
}

/// The request that the demo shows.
pub(super) fn request(model_id: &str, prompt: &str) -> Value {
    json!({
        "model": model_id, "messages": [{"role": "user", "content": prompt}], "max_tokens": ANSWER_TOKENS_MAX,
        "stream": true, "stream_options": {"include_usage": true},
    })
}

/// Sends the request through the agent and prints the answer's text as it comes.
pub(super) fn ask(
    coordinator: &Coordinator,
    job_id: Uuid,
    model_id: &str,
    request: Value,
    stop: &Stop,
    page: &mut Page<'_>,
) -> Result<Answer, DemoError> {
    let asked_at = Instant::now();
    let mut job = submit(coordinator, job_id, model_id, request)?;
    let mut splitter = EventSplitter::default();
    let (mut bytes, mut first_byte, mut visible) = (Vec::new(), None, false);
    let mut patient = true;
    loop {
        let event = next_event(&mut job, stop, || {
            if first_byte.is_none() && asked_at.elapsed() > PATIENCE && std::mem::take(&mut patient) {
                page.line(format_args!("(nothing yet: a model that is not loaded may take minutes; Ctrl-C gives up)"));
            }
        })?;
        match event {
            JobEvent::Chunk(chunk) => {
                first_byte.get_or_insert_with(|| asked_at.elapsed());
                splitter.push(&chunk, |data| visible |= show(data, page));
                bytes.extend_from_slice(&chunk);
            }
            JobEvent::Done(end) => {
                if !visible {
                    page.answer("(an answer without text)");
                }
                page.line(format_args!(""));
                let total = asked_at.elapsed();
                return Ok(Answer { bytes, end, first_byte: first_byte.unwrap_or(total), total });
            }
            JobEvent::Failed { code, message } => {
                page.line(format_args!(""));
                return Err(DemoError::JobFailed { code, message });
            }
        }
    }
}

/// Prints what an event adds to the answer; whether it was anything.
fn show(data: &str, page: &mut Page<'_>) -> bool {
    let Ok(event) = serde_json::from_str::<Value>(data) else { return false };
    let text = assemble::delta_text(&event);
    page.answer(&text);
    !text.is_empty()
}

/// The median times to the first byte, without and with the agent in between.
pub(super) struct Overhead {
    pub(super) direct: Duration,
    pub(super) through: Duration,
}

/// Asks the backend alternately by itself and through the agent.
///
/// Both ways run the same client code against the backend, so the difference is what the agent and its WebSocket cost.
pub(super) fn measure_overhead(
    coordinator: &Coordinator,
    backend: &dyn Backend,
    model_id: &str,
    stop: &Stop,
) -> Result<Overhead, DemoError> {
    let mut request = request(model_id, "Hi");
    request["max_tokens"] = json!(1);
    first_byte_directly(backend, model_id, &request)?; // fills the backend's prompt cache
    let (mut direct, mut through) = (Vec::new(), Vec::new());
    for _ in 0..OVERHEAD_PAIRS {
        direct.push(first_byte_directly(backend, model_id, &request)?);
        through.push(first_byte_through(coordinator, model_id, &request, stop)?);
    }
    Ok(Overhead { direct: median(&direct), through: median(&through) })
}

fn first_byte_directly(backend: &dyn Backend, model_id: &str, request: &Value) -> Result<Duration, DemoError> {
    let job = backend::Job {
        job_id: Uuid::new_v4(),
        model_id: model_id.to_owned(),
        request: request.clone(),
        format: WireFormat::Openai,
        deadline_ms: u32::try_from(REQUEST_DEADLINE.as_millis()).unwrap_or(u32::MAX),
    };
    let mut sink = FirstByte { asked_at: Instant::now(), after: None };
    backend.execute(&job, &mut sink).map_err(|error| DemoError::Direct(error.to_string()))?;
    Ok(sink.after.unwrap_or_else(|| sink.asked_at.elapsed()))
}

struct FirstByte {
    asked_at: Instant,
    after: Option<Duration>,
}

impl JobSink for FirstByte {
    fn send_chunk(&mut self, _bytes: &[u8]) -> BackendResult<()> {
        self.after.get_or_insert_with(|| self.asked_at.elapsed());
        Ok(())
    }
}

fn first_byte_through(
    coordinator: &Coordinator,
    model_id: &str,
    request: &Value,
    stop: &Stop,
) -> Result<Duration, DemoError> {
    let asked_at = Instant::now();
    let mut job = submit(coordinator, Uuid::new_v4(), model_id, request.clone())?;
    let mut after = None;
    loop {
        match next_event(&mut job, stop, || {})? {
            JobEvent::Chunk(_) => {
                after.get_or_insert_with(|| asked_at.elapsed());
            }
            JobEvent::Done(_) => return Ok(after.unwrap_or_else(|| asked_at.elapsed())),
            JobEvent::Failed { code, message } => return Err(DemoError::JobFailed { code, message }),
        }
    }
}

fn submit(coordinator: &Coordinator, job_id: Uuid, model_id: &str, request: Value) -> Result<Job, DemoError> {
    let order =
        JobOrder { job_id, model_id: model_id.to_owned(), request, format: Format::Openai, deadline: REQUEST_DEADLINE };
    Ok(coordinator.submit(order)?)
}

/// The next event, unless the demo is to stop. Calls `meanwhile` now and then.
fn next_event(job: &mut Job, stop: &Stop, mut meanwhile: impl FnMut()) -> Result<JobEvent, DemoError> {
    loop {
        match job.wait(STOP_POLL) {
            Waited::Event(event) => return Ok(event),
            Waited::NotYet if stop.is_requested() => return Err(DemoError::Stopped),
            Waited::NotYet => meanwhile(),
            Waited::Over => return Err(DemoError::Stopped), // not reached: the end is returned as an event before
        }
    }
}

/// The middle one: as many are below it as above.
fn median(times: &[Duration]) -> Duration {
    let rank = |time: &&Duration| times.iter().filter(|other| other < time).count() <= times.len() / 2;
    times.iter().filter(rank).max().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        let median_of = |times: &[u64]| median(&times.iter().map(|ms| Duration::from_millis(*ms)).collect::<Vec<_>>());
        for times in [&[3, 1, 2][..], &[2, 2, 9], &[2, 2, 1], &[5, 2, 2, 1, 9], &[2]] {
            assert_eq!(median_of(times), Duration::from_millis(2), "{times:?}");
        }
        assert_eq!(median_of(&[]), Duration::ZERO);
    }
}
