//! Sends the same request directly and through the agent, and records when the bytes of each response arrive.
//!
//! Both ways use the same HTTP client and backend object, so they differ by the agent and its WebSocket only. The latency added
//! within one request is measured without a second one: the recording backend has the times at which the request arrived and the
//! bytes left, the coordinator those at which the job left and the bytes arrived. The difference does not depend on the speed of the
//! backend. It includes the time that the coordinator takes to read a frame.

use std::time::Duration;

use serde_json::Value;
use serde_json::value::to_raw_value;
use uuid::Uuid;

use super::coordinator::{Coordinator, Format, Job, JobOrder};
use super::job_events::{JobEnd, JobEvent};
use super::recording_backend::Recording;
use super::timed_response::Timed;
use super::{DemoError, STOP_POLL, compare, echo};
use crate::agent::shutdown::Stop;
use crate::backend::{self, Backend, Kind, WireFormat};
use crate::discovery::BackendOffer;
use crate::logging::sanitize_for_log;

/// Time limit of a request; a model that has to be loaded may take minutes.
const REQUEST_DEADLINE: Duration = Duration::from_secs(300);

/// Sends the requests, and records their responses.
pub(super) struct OverheadMeter<'a> {
    pub(super) coordinator: &'a Coordinator,
    pub(super) record: &'a Recording,
    /// All backends of the agent.
    pub(super) backends: &'a [BackendOffer],
    pub(super) model_id: String,
    /// Whether the backend is the built-in echo, whose response is known.
    pub(super) is_echo: bool,
    pub(super) stop: &'a Stop,
}

/// A request through the agent, and its response.
pub(super) struct Through {
    pub(super) job_id: Uuid,
    job: Job,
    /// The response as it reached the coordinator.
    pub(super) arrived: Timed,
    /// The response as it left the backend; empty until it is complete.
    pub(super) given: Timed,
}

impl OverheadMeter<'_> {
    /// Whether a request may cost the operator money: a job may be routed to any backend that lists its model, and a hosted backend
    /// whose listing failed may also have the model.
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

    /// Sends a request to the backend itself, without recording.
    pub(super) fn directly(&self, backend: &dyn Backend, request: &Value) -> Result<Timed, DemoError> {
        let job = backend::Job {
            job_id: Uuid::new_v4(),
            model_id: self.model_id.clone(),
            request: request.clone(),
            format: WireFormat::Openai,
            deadline_ms: u32::try_from(REQUEST_DEADLINE.as_millis()).unwrap_or(u32::MAX),
        };
        let mut response = Timed::starting_now();
        backend.execute(&job, &mut response).map_err(|error| DemoError::Direct(error.for_operator()))?;
        Ok(response)
    }

    /// Sends `streams` concurrent requests through the agent.
    pub(super) fn through(&self, request: &Value, streams: usize) -> Result<Vec<Through>, DemoError> {
        let expected = self.is_echo.then(|| echo::exact_response(request, Format::Openai));
        let mut requests = Vec::new();
        for _ in 0..streams {
            requests.push(self.send(request.clone())?);
        }
        for through in &mut requests {
            self.receive(through, &mut |_| {})?;
            through.given = self.record.take(through.job_id)?.given;
            compare(&through.arrived.bytes, &through.given.bytes, expected.as_deref())?;
        }
        Ok(requests)
    }

    /// Sends a recorded job.
    pub(super) fn send(&self, request: Value) -> Result<Through, DemoError> {
        if self.stop.is_requested() {
            return Err(DemoError::Stopped); // the agent may have stopped, which is not a failure
        }
        let (job_id, arrived, given) = (Uuid::new_v4(), Timed::starting_now(), Timed::starting_now());
        self.record.start(job_id);
        let (model_id, format) = (self.model_id.clone(), Format::Openai);
        let request = to_raw_value(&request).unwrap_or_default();
        let order = JobOrder { job_id, model_id, request, format, deadline: REQUEST_DEADLINE };
        Ok(Through { job_id, job: self.coordinator.submit(order)?, arrived, given })
    }

    /// Waits for the complete response, or for the demo to stop. Calls `meanwhile` with each chunk, and regularly with an empty one.
    /// The times are taken on the coordinator's thread, so delays here do not count.
    pub(super) fn receive(&self, through: &mut Through, meanwhile: &mut dyn FnMut(&[u8])) -> Result<JobEnd, DemoError> {
        let Through { job, arrived, .. } = through;
        loop {
            match job.wait(STOP_POLL) {
                Some(JobEvent::Chunk(chunk)) => {
                    arrived.push(job.arrived_at(), &chunk);
                    meanwhile(&chunk);
                }
                Some(JobEvent::Done(end)) => return Ok(end),
                // An agent that is stopping rejects new jobs, which is not a failure.
                _ if self.stop.is_requested() => return Err(DemoError::Stopped),
                Some(JobEvent::Failed { code, message }) => {
                    return Err(DemoError::JobFailed { code, message: sanitize_for_log(&message) });
                }
                None => meanwhile(&[]),
            }
        }
    }
}
