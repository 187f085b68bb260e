//! Looks over a backend's shoulder: keeps the bytes that it gave for one watched job, so that the demo can compare them
//! with those that reached the coordinator. Everything else passes through untouched.
//!
//! Who runs here: the agent's worker threads, in `execute`; the demo's thread watches and takes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::backend::{Backend, BackendHealth, BackendModel, BackendResult, Interrupt, Job, JobResult, JobSink};

/// A backend, and a record of what it gave for the watched job.
pub(super) struct Witness {
    backend: Arc<dyn Backend>,
    record: Arc<Record>,
}

/// What the watched job's backend gave; shared by all witnesses of a demo, since one of them will see the job.
#[derive(Default)]
pub(super) struct Record(Mutex<Watched>);

#[derive(Default)]
struct Watched {
    job_id: Option<Uuid>,
    seen: Option<Seen>,
}

/// The bytes of the watched job, and who gave them.
#[derive(Clone)]
pub(super) struct Seen {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) bytes: Vec<u8>,
}

impl Record {
    /// Watches this job from now on, and no other.
    pub(super) fn watch(&self, job_id: Uuid) {
        *self.lock() = Watched { job_id: Some(job_id), seen: None };
    }

    /// Ends the watch and gives what was seen; `None` when no backend was asked.
    pub(super) fn take(&self) -> Option<Seen> {
        std::mem::take(&mut *self.lock()).seen
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Witness {
    pub(super) fn new(backend: Arc<dyn Backend>, record: Arc<Record>) -> Self {
        Self { backend, record }
    }
}

impl Backend for Witness {
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
        let watched = {
            let mut record = self.record.lock();
            let watched = record.job_id == Some(job.job_id);
            if watched {
                record.seen = Some(Seen { backend: self.backend.clone(), bytes: Vec::new() });
            }
            watched
        };
        if !watched {
            return self.backend.execute(job, sink);
        }
        self.backend.execute(job, &mut RecordingSink { sink, record: &self.record })
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
    record: &'a Record,
}

impl JobSink for RecordingSink<'_> {
    fn send_chunk(&mut self, bytes: &[u8]) -> BackendResult<()> {
        if let Some(seen) = &mut self.record.lock().seen {
            seen.bytes.extend_from_slice(bytes);
        }
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
