//! The same request over and over, directly and through the agent, each with the times of its bytes.
//!
//! Both ways run the same client code against the same backend object, so that what differs is the agent and its WebSocket
//! alone. What the agent adds within one request needs no second one: the witness at the agent's own backend has the times
//! at which the request got there and each byte came from there, the coordinator those at which the job was sent and the
//! bytes arrived. How fast the backend is, and how evenly, falls out of the difference. What the coordinator itself needs to
//! read a frame is in it.
//!
//! Who runs here: the demo's thread.

use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;

use super::agent_protocol::JobEnd;
use super::coordinator::{Coordinator, Format, Job, JobOrder, Waited};
use super::job_events::JobEvent;
use super::recording_backend::Recording;
use super::timed_response::Timed;
use super::{DemoError, STOP_POLL, compare, echo};
use crate::agent::shutdown::Stop;
use crate::backend::{self, Backend, Kind, WireFormat};
use crate::discovery::BackendOffer;

/// How long one of the demo's requests may take; a cold model on a slow machine takes minutes.
const REQUEST_DEADLINE: Duration = Duration::from_secs(300);

/// Who is asked.
pub(super) struct OverheadMeter<'a> {
    pub(super) coordinator: &'a Coordinator,
    pub(super) record: &'a Recording,
    /// All that the agent has.
    pub(super) backends: &'a [BackendOffer],
    pub(super) model_id: String,
    /// Whether the backend is the built-in echo, whose every byte is known.
    pub(super) is_echo: bool,
    pub(super) stop: &'a Stop,
}

/// A request through the agent, and its answer.
pub(super) struct Through {
    pub(super) job_id: Uuid,
    job: Job,
    /// The answer as it reached the coordinator.
    pub(super) arrived: Timed,
    /// The answer as it left the backend; empty until it is whole.
    pub(super) given: Timed,
}

impl OverheadMeter<'_> {
    /// Whether a request may cost the operator money: a job goes to any backend of its model that has a free slot. A hosted
    /// one that does not say what it lists may have it.
    pub(super) fn may_cost(&self) -> bool {
        let is_hosted = |backend: &dyn Backend| Kind::ALL.iter().any(|k| k.is_hosted() && k.name() == backend.kind());
        let may_list = |backend: &dyn Backend| {
            backend.list_models().map_or(true, |models| models.iter().any(|model| model.model_id == self.model_id))
        };
        self.backends.iter().any(|BackendOffer { backend, allowed_models, .. }| {
            let is_allowed = allowed_models.as_ref().is_none_or(|allowed| allowed.contains(&self.model_id));
            is_allowed && is_hosted(backend.as_ref()) && may_list(backend.as_ref())
        })
    }

    /// Asks the backend itself, without its witness.
    pub(super) fn directly(&self, backend: &dyn Backend, request: &Value) -> Result<Timed, DemoError> {
        let job = backend::Job {
            job_id: Uuid::new_v4(),
            model_id: self.model_id.clone(),
            request: request.clone(),
            format: WireFormat::Openai,
            deadline_ms: u32::try_from(REQUEST_DEADLINE.as_millis()).unwrap_or(u32::MAX),
        };
        let mut answer = Timed::asked_now();
        backend.execute(&job, &mut answer).map_err(|error| DemoError::Direct(error.to_string()))?;
        Ok(answer)
    }

    /// Asks through the agent, so many times at once.
    pub(super) fn through(&self, request: &Value, streams: usize) -> Result<Vec<Through>, DemoError> {
        let expected = self.is_echo.then(|| echo::exact_answer(request, Format::Openai));
        let mut asked = Vec::new();
        for _ in 0..streams {
            asked.push(self.send(request.clone())?);
        }
        for through in &mut asked {
            self.receive(through, &mut |_| {})?;
            through.given = self.record.take(through.job_id)?.given;
            compare(&through.arrived.bytes, &through.given.bytes, expected.as_deref())?;
        }
        Ok(asked)
    }

    /// Sends a watched job.
    pub(super) fn send(&self, request: Value) -> Result<Through, DemoError> {
        if self.stop.is_requested() {
            return Err(DemoError::Stopped); // the agent may be gone by now, which is no failure
        }
        let (job_id, arrived, given) = (Uuid::new_v4(), Timed::asked_now(), Timed::asked_now());
        self.record.watch(job_id);
        let (model_id, format) = (self.model_id.clone(), Format::Openai);
        let order = JobOrder { job_id, model_id, request, format, deadline: REQUEST_DEADLINE };
        Ok(Through { job_id, job: self.coordinator.submit(order)?, arrived, given })
    }

    /// Waits for the whole answer, unless the demo is to stop. Calls `meanwhile` for each chunk, and without one now and
    /// then. The times are those of the coordinator's own thread, so that the answer may wait here.
    pub(super) fn receive(&self, through: &mut Through, meanwhile: &mut dyn FnMut(&[u8])) -> Result<JobEnd, DemoError> {
        let Through { job, arrived, .. } = through;
        loop {
            match job.wait(STOP_POLL) {
                Waited::Event(JobEvent::Chunk(chunk)) => {
                    arrived.push(job.arrived_at(), &chunk);
                    meanwhile(&chunk);
                }
                Waited::Event(JobEvent::Done(end)) => return Ok(end),
                // Nor is that an agent which is to stop refuses new jobs.
                _ if self.stop.is_requested() => return Err(DemoError::Stopped),
                Waited::Event(JobEvent::Failed { code, message }) => {
                    return Err(DemoError::JobFailed { code, message });
                }
                Waited::NotYet => meanwhile(&[]),
                Waited::Over => return Err(DemoError::Stopped), // not reached: the end is given as an event before
            }
        }
    }
}
