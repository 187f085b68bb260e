//! Inference servers: the [`Backend`] trait, and its implementation for the HTTP servers that the agent supports.
//!
//! Admission, cancellation and the connection to the coordinator work with any implementation of the trait. Data flows one
//! way, from [`Backend::execute`] into a [`JobSink`]; an error from the sink ends the job at once.

mod http_backend;
mod kind;
mod probe;
mod listing;
mod purpose;
mod model_details;
mod probe_json;
mod exclusion;
mod diagnosis;
mod raw_job;
mod request;
mod server_support;
mod stream;
mod http;
mod error;
mod error_code;
mod error_response;

use std::fmt;

use uuid::Uuid;

pub use diagnosis::Diagnosis;
pub use error::{BackendError, BackendResult, ERROR_BODY_MAX, Fault, HttpStatus};
pub use error_code::ErrorCode;
pub use exclusion::{ExcludedModel, Exclusion, ListingLimit, MODELS_MAX, ProbedModels, summary};
pub use http::{ApiKey, Client, Interrupt, RequestBody, read_bounded};
pub use http_backend::HttpBackend;
pub use kind::{BaseUrl, Kind};
pub use probe::PROBE_TIME;
pub use raw_job::{RawJob, RequestText};

use error::truncated_body;

/// A chat request from the coordinator.
#[derive(Debug, Clone)]
pub struct Job {
    /// The coordinator's id of the job.
    pub job_id: Uuid,
    /// The requested model.
    pub model_id: String,
    /// The request body, unchanged.
    pub request: serde_json::Value,
    /// The API of the body.
    pub format: WireFormat,
    /// Time limit for the whole job, in milliseconds.
    pub deadline_ms: u32,
}

/// The API that a job uses. Nothing is converted between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireFormat {
    /// `/v1/chat/completions`.
    Openai,
    /// `/v1/messages`.
    Anthropic,
}

impl fmt::Display for WireFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WireFormat::Openai => "OpenAI",
            WireFormat::Anthropic => "Anthropic",
        })
    }
}

/// The result of a successful job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobResult {
    /// Input tokens; `None` if the backend reported none.
    pub input_tokens: Option<u32>,
    /// Output tokens; `None` if the backend reported none.
    pub output_tokens: Option<u32>,
    /// Time from the request to the last byte, in milliseconds.
    pub duration_ms: u32,
}

/// An entry of a backend's model listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendModel {
    /// The backend's id of the model.
    pub model_id: String,
    /// The context window that the server actually runs with, in tokens; `None` if unknown.
    pub context_window: Option<u32>,
    /// Whether the model runs on the operator's own hardware; false for hosted backends.
    pub native: bool,
}

/// The result of a health check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackendHealth {
    /// Whether the backend can serve.
    pub reachable: bool,
    /// Duration of the check, in milliseconds.
    pub latency_ms: Option<u32>,
    /// Why the backend cannot serve.
    pub last_error: Option<String>,
}

/// Receives the response of a job.
pub trait JobSink: Send {
    /// Sends the next bytes, in order. Blocks while the coordinator is slow.
    ///
    /// # Errors
    /// The job is over (cancelled, past its deadline, or its session has ended). The backend must stop at once.
    fn send_chunk(&mut self, bytes: &[u8]) -> BackendResult<()>;

    /// Checks that the job is still wanted. Backends also call it at the end of input, because an interrupted read can look
    /// like one.
    ///
    /// # Errors
    /// As [`JobSink::send_chunk`].
    fn still_wanted(&self) -> BackendResult<()> {
        Ok(())
    }

    /// Sets the handle that interrupts the backend's blocking calls; replaces the previous one.
    fn interrupt_with(&mut self, _interrupt: Interrupt) {}

    /// Reports the number of output tokens sent so far, as far as the stream shows it.
    fn tokens_emitted(&mut self, _tokens: u32) {}

    /// Reports the number of input tokens that [`JobResult::input_tokens`] does not include, because the backend read them from its
    /// cache or wrote them to it.
    fn cached_tokens(&mut self, _tokens: u32) {}
}

/// An inference server.
pub trait Backend: Send + Sync {
    /// The name of the backend's kind in `agent.toml` and in the protocol.
    fn kind(&self) -> &'static str;

    /// A name for the operator, unique among the configured backends.
    fn id(&self) -> &str;

    /// Lists the models that the backend currently serves and that can chat.
    ///
    /// # Errors
    /// The backend does not respond, or its response cannot be read.
    fn list_models(&self) -> BackendResult<Vec<BackendModel>>;

    /// Checks whether the backend can currently serve.
    ///
    /// # Errors
    /// The check could not be performed.
    fn health(&self) -> BackendResult<BackendHealth>;

    /// Runs one job to its end, on the calling thread.
    ///
    /// # Errors
    /// The cause of failure. Bytes already sent to the sink stay sent.
    fn execute(&self, job: &Job, sink: &mut dyn JobSink) -> BackendResult<JobResult>;

    /// Like [`Backend::execute`], for a job whose request is still text. The default implementation parses the request.
    ///
    /// # Errors
    /// As [`Backend::execute`].
    fn execute_raw(&self, job: RawJob, sink: &mut dyn JobSink) -> BackendResult<JobResult> {
        self.execute(&job.parse()?, sink)
    }

    /// Checks the health and lists the models.
    ///
    /// # Errors
    /// Why no model can be offered.
    fn probe(&self) -> BackendResult<ProbedModels> {
        let health = self.health()?;
        if !health.reachable {
            return Err(BackendError::Unreachable(health.last_error.unwrap_or_else(|| "not reachable".into())));
        }
        self.list_models().map(ProbedModels::from)
    }

    /// Checks for problems that would make every job fail even if the models can be listed, such as a missing API key.
    ///
    /// # Errors
    /// The reason.
    fn ready(&self) -> BackendResult<()> {
        Ok(())
    }

    /// Whether the backend serves jobs in this format, as far as its responses have shown.
    fn serves(&self, _format: WireFormat) -> bool {
        true
    }
}
