//! Wraps a backend to record the bytes that it sends for selected jobs, and when, so that the demo can compare them with the bytes
//! that reached the coordinator.
//!
//! Threads: the agent's workers record; the demo's thread selects the jobs and takes the recordings.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use uuid::Uuid;

use super::DemoError;
use super::timed_response::Timed;
use crate::backend::{
    Backend, BackendHealth, BackendModel, BackendResult, Interrupt, Job, JobResult, JobSink, ProbedModels, RawJob,
};

/// A backend whose responses are recorded.
pub(super) struct RecordingBackend {
    backend: Arc<dyn Backend>,
    record: Arc<Recording>,
}

/// The selected jobs, and the recordings of ended jobs. Shared by all backends of a demo, because any of them may get a job.
#[derive(Default)]
pub(super) struct Recording(Mutex<HashMap<Uuid, Option<Recorded>>>);

/// The response of a backend to a job, from the request on.
pub(super) struct Recorded {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) given: Timed,
}

impl Recording {
    /// Records this job.
    pub(super) fn start(&self, job_id: Uuid) {
        self.lock().insert(job_id, None);
    }

    /// Removes and returns the recording of a job that has ended. Fails if no backend got the job.
    pub(super) fn take(&self, job_id: Uuid) -> Result<Recorded, DemoError> {
        let recorded = self.lock().remove(&job_id).flatten();
        recorded.ok_or_else(|| DemoError::WrongBytes("no backend got the request".to_owned()))
    }

    fn is_recording(&self, job_id: Uuid) -> bool {
        self.lock().contains_key(&job_id)
    }

    /// Stores a recording, before the agent can report the end of the job. The last backend that got the job counts.
    fn store(&self, job_id: Uuid, recorded: Recorded) {
        if let Some(stored) = self.lock().get_mut(&job_id) {
            *stored = Some(recorded);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Option<Recorded>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RecordingBackend {
    pub(super) fn new(backend: Arc<dyn Backend>, record: Arc<Recording>) -> Self {
        Self { backend, record }
    }

    fn record(
        &self,
        job_id: Uuid,
        sink: &mut dyn JobSink,
        execute: impl FnOnce(&mut dyn JobSink) -> BackendResult<JobResult>,
    ) -> BackendResult<JobResult> {
        if !self.record.is_recording(job_id) {
            return execute(sink);
        }
        let mut recording = RecordingSink { sink, given: Timed::starting_now() };
        let result = execute(&mut recording);
        self.record.store(job_id, Recorded { backend: self.backend.clone(), given: recording.given });
        result
    }
}

impl Backend for RecordingBackend {
    fn kind(&self) -> &'static str {
        self.backend.kind()
    }

    fn id(&self) -> &str {
        self.backend.id()
    }

    fn list_models(&self) -> BackendResult<Vec<BackendModel>> {
        self.backend.list_models()
    }

    fn health(&self) -> BackendResult<BackendHealth> {
        self.backend.health()
    }

    fn execute(&self, job: &Job, sink: &mut dyn JobSink) -> BackendResult<JobResult> {
        self.record(job.job_id, sink, |sink| self.backend.execute(job, sink))
    }

    fn execute_raw(&self, job: RawJob, sink: &mut dyn JobSink) -> BackendResult<JobResult> {
        self.record(job.job_id, sink, |sink| self.backend.execute_raw(job, sink))
    }

    fn probe(&self) -> BackendResult<ProbedModels> {
        self.backend.probe()
    }

    fn ready(&self) -> BackendResult<()> {
        self.backend.ready()
    }
}

struct RecordingSink<'a> {
    sink: &'a mut dyn JobSink,
    given: Timed,
}

impl JobSink for RecordingSink<'_> {
    fn send_chunk(&mut self, bytes: &[u8]) -> BackendResult<()> {
        self.given.push(Instant::now(), bytes);
        self.sink.send_chunk(bytes)
    }

    fn still_wanted(&self) -> BackendResult<()> {
        self.sink.still_wanted()
    }

    fn interrupt_with(&mut self, interrupt: Interrupt) {
        self.sink.interrupt_with(interrupt);
    }

    fn tokens_emitted(&mut self, tokens: u32) {
        self.sink.tokens_emitted(tokens);
    }

    fn cached_tokens(&mut self, tokens: u32) {
        self.sink.cached_tokens(tokens);
    }
}
