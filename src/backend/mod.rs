//! Inference servers: what the agent asks of one, and the HTTP kinds that it knows.
//!
//! [`Backend`] is the seam: everything above it (admission, cancellation, the wire) works with any implementation.
//! Data flows one way, from [`Backend::execute`] into a [`JobSink`]; an error from the sink ends the job at once.

mod http_backend;
mod kind;
mod probe;
mod listing;
mod context_window;
mod diagnosis;
mod request;
mod stream;
mod http;
mod error;
mod error_code;

use uuid::Uuid;

pub use diagnosis::Diagnosis;
pub use error::{BackendError, BackendResult, ERROR_BODY_MAX, HttpStatus};
pub use error_code::ErrorCode;
pub use http::{ApiKey, Client, Interrupt, read_bounded};
pub use http_backend::HttpBackend;
pub use kind::{BaseUrl, Kind};

use error::truncated_body;

/// One chat request that the coordinator handed us.
#[derive(Debug, Clone)]
pub struct Job {
    /// The coordinator's name for it.
    pub job_id: Uuid,
    /// The model that was offered.
    pub model_id: String,
    /// The request body, as it came.
    pub request: serde_json::Value,
    /// The dialect of the body.
    pub format: WireFormat,
    /// Time for the whole job, in milliseconds.
    pub deadline_ms: u32,
}

/// The dialect that a job speaks; nothing is ever transcoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireFormat {
    /// `/v1/chat/completions`.
    Openai,
    /// `/v1/messages`.
    Anthropic,
}

/// What a job that went well has to say for itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobResult {
    /// As the backend's usage says; `None` when it said nothing.
    pub input_tokens: Option<u32>,
    /// Likewise.
    pub output_tokens: Option<u32>,
    /// From the request to the last byte, in milliseconds.
    pub duration_ms: u32,
}

/// One entry of a backend's listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendModel {
    /// The name that the backend knows it by.
    pub model_id: String,
    /// The window that the server really runs, in tokens; `None` when it does not say.
    pub context_window: Option<u32>,
    /// Whether it runs on this operator's own hardware; false for hosted backends.
    pub native: bool,
}

/// The outcome of a health check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackendHealth {
    /// Whether it can serve.
    pub reachable: bool,
    /// How long the check took, in milliseconds.
    pub latency_ms: Option<u32>,
    /// Why it cannot.
    pub last_error: Option<String>,
}

/// Where a backend puts the bytes of an answer.
pub trait JobSink: Send {
    /// Takes the next bytes, in order; blocks while the coordinator is slow.
    ///
    /// # Errors
    /// The job is over (cancelled, its session gone, its deadline past): the backend stops at once.
    fn send_chunk(&mut self, bytes: &[u8]) -> BackendResult<()>;

    /// Whether the job is still wanted. Asked at every end of input too, because an interrupted read can look like one.
    ///
    /// # Errors
    /// As [`JobSink::send_chunk`].
    fn still_wanted(&self) -> BackendResult<()> {
        Ok(())
    }

    /// Hands over the means to wake the backend out of a blocking call; replaces the one before.
    fn interrupt_with(&mut self, _interrupt: Interrupt) {}

    /// How many output tokens have gone out so far, as far as the stream shows.
    fn tokens_emitted(&mut self, _tokens: u32) {}
}

/// An inference server.
pub trait Backend: Send + Sync {
    /// The kind's name on the wire and in `agent.toml`.
    fn kind(&self) -> &'static str;

    /// A name for the operator, unique among the configured ones.
    fn id(&self) -> &str;

    /// What it serves right now.
    ///
    /// # Errors
    /// It cannot be asked, or its answer cannot be read.
    fn list_models(&self) -> BackendResult<Vec<BackendModel>>;

    /// Whether it can serve right now.
    ///
    /// # Errors
    /// The question itself could not be put.
    fn health(&self) -> BackendResult<BackendHealth>;

    /// Runs one job to its end, in the calling thread.
    ///
    /// # Errors
    /// By cause; what was sent to the sink before stays sent.
    fn execute(&self, job: &Job, sink: &mut dyn JobSink) -> BackendResult<JobResult>;

    /// As [`Backend::execute`], for a job that no other backend is going to get: its request need not be kept while the answer
    /// comes.
    ///
    /// # Errors
    /// As [`Backend::execute`].
    fn execute_last(&self, job: Job, sink: &mut dyn JobSink) -> BackendResult<JobResult> {
        self.execute(&job, sink)
    }

    /// Health and listing in one: what can be offered now.
    ///
    /// # Errors
    /// Why nothing can be offered.
    fn probe(&self) -> BackendResult<Vec<BackendModel>> {
        let health = self.health()?;
        if !health.reachable {
            return Err(BackendError::Unreachable(health.last_error.unwrap_or_else(|| "not reachable".into())));
        }
        self.list_models()
    }

    /// Why every job would fail although the listing may be readable (a key that is not set, for instance).
    ///
    /// # Errors
    /// The reason.
    fn ready(&self) -> BackendResult<()> {
        Ok(())
    }
}
