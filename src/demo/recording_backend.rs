//! Looks over a backend's shoulder: keeps the bytes that it gave for the watched jobs, and when, so that the demo can
//! compare them with those that reached the coordinator. Everything else passes through untouched.
//!
//! Who runs here: the agent's worker threads, in `execute`; the demo's thread watches and takes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use uuid::Uuid;

use super::DemoError;
use super::timed_response::Timed;
use crate::backend::{Backend, BackendHealth, BackendModel, BackendResult, Interrupt, Job, JobResult, JobSink};

/// A backend, and a record of what it gave for the watched jobs.
pub(super) struct RecordingBackend {
    backend: Arc<dyn Backend>,
    record: Arc<Recording>,
}

/// The watched jobs, and what was seen of those that a backend is done with; shared by all witnesses of a demo, since any
/// of them may see a job.
#[derive(Default)]
pub(super) struct Recording(Mutex<Vec<(Uuid, Option<Seen>)>>);

/// What a backend gave for a job, from the moment that it was asked on.
pub(super) struct Seen {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) given: Timed,
}

impl Recording {
    /// Watches this job.
    pub(super) fn watch(&self, job_id: Uuid) {
        self.lock().push((job_id, None));
    }

    /// Ends the watch of a job that is over, and gives what was seen; an error when no backend was asked.
    pub(super) fn take(&self, job_id: Uuid) -> Result<Seen, DemoError> {
        let mut watched = self.lock();
        let index = watched.iter().position(|(id, _)| *id == job_id);
        let seen = index.and_then(|index| watched.swap_remove(index).1);
        seen.ok_or_else(|| DemoError::WrongBytes("no backend was asked".to_owned()))
    }

    fn is_recording(&self, job_id: Uuid) -> bool {
        self.lock().iter().any(|(id, _)| *id == job_id)
    }

    /// Takes note before the agent can say that the job has ended. The last backend that was asked counts.
    fn note(&self, job_id: Uuid, seen: Seen) {
        if let Some((_, noted)) = self.lock().iter_mut().find(|(id, _)| *id == job_id) {
            *noted = Some(seen);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Uuid, Option<Seen>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RecordingBackend {
    pub(super) fn new(backend: Arc<dyn Backend>, record: Arc<Recording>) -> Self {
        Self { backend, record }
    }

    fn watch(
        &self,
        job_id: Uuid,
        sink: &mut dyn JobSink,
        execute: impl FnOnce(&mut dyn JobSink) -> BackendResult<JobResult>,
    ) -> BackendResult<JobResult> {
        if !self.record.is_recording(job_id) {
            return execute(sink);
        }
        let mut recording = RecordingSink { sink, given: Timed::asked_now() };
        let result = execute(&mut recording);
        self.record.note(job_id, Seen { backend: self.backend.clone(), given: recording.given });
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
        self.watch(job.job_id, sink, |sink| self.backend.execute(job, sink))
    }

    fn execute_last(&self, job: Job, sink: &mut dyn JobSink) -> BackendResult<JobResult> {
        self.watch(job.job_id, sink, |sink| self.backend.execute_last(job, sink))
    }

    fn probe(&self) -> BackendResult<Vec<BackendModel>> {
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
}
