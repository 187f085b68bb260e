//! Why a backend call failed: one variant per cause, and the consequences of each cause for the backend and its offer.

use std::fmt;

use super::WireFormat;
use crate::logging::sanitize_for_log;

/// Maximum part of a backend's error body that is passed on, in bytes.
pub const ERROR_BODY_MAX: usize = 512;

/// The result of the methods of [`Backend`](super::Backend).
pub type BackendResult<T> = Result<T, BackendError>;

/// An unsuccessful HTTP response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpStatus {
    /// The status code.
    pub status: u16,
    /// The first [`ERROR_BODY_MAX`] bytes of the body. May contain the prompt, so it is never logged.
    pub body: String,
}

impl fmt::Display for HttpStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HTTP {}", self.status)?;
        if self.body.is_empty() { Ok(()) } else { write!(f, ": {}", self.body) }
    }
}

/// Why a call to a backend failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// The coordinator cancelled the job. Nothing is reported.
    #[error("the job was cancelled")]
    Cancelled,
    /// The connection to the coordinator is lost. Nothing can be reported.
    #[error("the session has ended")]
    SessionGone,
    /// The job's deadline has passed.
    #[error("the deadline passed")]
    DeadlinePassed,
    /// The connection failed, or broke before the first byte of the response.
    #[error("the backend cannot be reached: {0}")]
    Unreachable(String),
    /// The machine has no file descriptor or thread left for a connection.
    #[error("the agent's machine is out of resources: {0}")]
    Exhausted(String),
    /// This many consecutive jobs have failed, regardless of the health check.
    #[error("its last {0} jobs failed")]
    FailingJobs(u32),
    /// A probe timed out: the backend may be busy or hung.
    #[error("no response within {0} s")]
    ProbeTimeout(u64),
    /// The response is not HTTP.
    #[error("the backend does not speak HTTP: {0}")]
    NotHttp(String),
    /// A gateway in front of the backend cannot reach it.
    #[error("the gateway cannot reach the backend: {0}")]
    BadGateway(HttpStatus),
    /// The model is still loading.
    #[error("the backend is still loading its model: {0}")]
    Loading(HttpStatus),
    /// A gateway says that it cannot serve, although it lists models.
    #[error("the backend says that it is not ready: HTTP {0}")]
    NotReady(u16),
    /// The backend does not have the model.
    #[error("the backend does not have the model: {0}")]
    ModelNotFound(HttpStatus),
    /// The backend has the model, but it serves another purpose than chat.
    #[error("the model cannot chat: {0}")]
    CannotChat(HttpStatus),
    /// The backend lists the model, but cannot load it.
    #[error("the backend cannot load the model: {0}")]
    LoadFailed(HttpStatus),
    /// The backend does not know the path of the request.
    #[error("the backend does not have this route: {0}")]
    RouteNotFound(HttpStatus),
    /// The backend does not have the route of this format.
    #[error("the backend does not serve {0} requests: {1}")]
    FormatNotServed(WireFormat, HttpStatus),
    /// The backend has no capacity for another request, or its account no credit.
    #[error("the backend is at capacity: {0}")]
    Overloaded(HttpStatus),
    /// The environment variable for the API key contains no usable key.
    #[error("the environment variable `{0}` holds no usable API key")]
    MissingKey(String),
    /// 401 or 403.
    #[error("the backend rejected the API key: {0}")]
    AuthRejected(HttpStatus),
    /// The request is JSON that cannot be parsed into a value.
    #[error("the request cannot be parsed: {0}")]
    UnreadableRequest(String),
    /// 400, 413 or 422: the request itself is invalid.
    #[error("the backend rejected the request: {0}")]
    BadRequest(HttpStatus),
    /// Any other unsuccessful response, including redirects.
    #[error("the backend failed: {0}")]
    Status(HttpStatus),
    /// The connection broke after the first byte of the response.
    #[error("the connection to the backend broke: {0}")]
    Broken(String),
    /// The stream ended after its first byte and before its end marker.
    #[error("the stream was truncated: {0}")]
    CutStream(String),
    /// The response contained an `error` object, despite its successful status.
    #[error("the backend reported an error in its response: {0}")]
    ReportedError(String),
    /// The server gave up the generation (`finish_reason` `abort` or `error`) without naming a reason.
    #[error("the backend aborted the generation")]
    Aborted,
    /// The response cannot be interpreted: to a probe, or to a job that it does not answer.
    #[error("the backend's response cannot be read: {0}")]
    BadAnswer(String),
    /// A bug: the backend's code panicked.
    #[error("the agent failed while running the job")]
    Panicked,
}

/// Whose health a failed job counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The backend's: it cannot be reached, or says that it cannot serve.
    Backend,
    /// The model's, if its jobs keep failing like this.
    Model,
    /// Nobody's: the request, the deadline or this machine caused the failure.
    Neither,
}

impl BackendError {
    /// Whether the request caused the failure, so that it counts neither against the agent nor against the backend.
    pub fn is_requesters_fault(&self) -> bool {
        matches!(self, BackendError::BadRequest(_) | BackendError::UnreadableRequest(_))
    }

    /// Whose health the failure counts against.
    pub fn fault(&self) -> Fault {
        match self {
            BackendError::Unreachable(_) | BackendError::NotHttp(_) | BackendError::Broken(_) => Fault::Backend,
            BackendError::BadGateway(s) if s.status >= 500 => Fault::Backend,
            BackendError::Loading(s) | BackendError::Overloaded(s) if s.status == 503 => Fault::Backend,
            // The request may have caused it.
            BackendError::Status(s) | BackendError::LoadFailed(s) if s.status >= 500 => Fault::Model,
            _ => Fault::Neither,
        }
    }

    /// Whether the server reported a failure of its own or of the servers behind it, other than that it is loading.
    pub fn is_server_error(&self) -> bool {
        match self {
            BackendError::BadGateway(s) | BackendError::Overloaded(s) | BackendError::Status(s) => s.status >= 500,
            _ => false,
        }
    }

    /// Whether the job can fail over to another backend: this one is missing, not ready or at capacity, or lacks the model or the
    /// format, and has sent nothing.
    pub fn may_fail_over(&self) -> bool {
        use BackendError::{CannotChat, FormatNotServed, LoadFailed, ModelNotFound, Overloaded, RouteNotFound};
        let lacks =
            matches!(self, ModelNotFound(_) | CannotChat(_) | LoadFailed(_) | RouteNotFound(_) | FormatNotServed(..));
        lacks || self.is_absent() || matches!(self, Overloaded(_))
    }

    /// Whether the backend rejected the request in words that name `stream_options` or what the agent sets in it.
    pub fn names_stream_options(&self) -> bool {
        match self {
            BackendError::BadRequest(s) | BackendError::Status(s) => {
                s.body.contains("stream_options") || s.body.contains("include_usage")
            }
            _ => false,
        }
    }

    /// Whether the offer may be out of date: the backend or the model is missing, or cannot chat.
    pub fn invalidates_offer(&self) -> bool {
        use BackendError::{CannotChat, FormatNotServed, ModelNotFound};
        let lacks = matches!(self, ModelNotFound(_) | CannotChat(_) | FormatNotServed(WireFormat::Openai, _));
        lacks || self.is_absent()
    }

    /// Whether the backend is missing or not yet ready.
    fn is_absent(&self) -> bool {
        use BackendError::{BadGateway, Loading, NotHttp, Unreachable};
        matches!(self, Unreachable(_) | NotHttp(_) | BadGateway(_) | Loading(_))
    }

    /// The cause without any text from the backend, which may contain a prompt. Safe to log.
    pub fn for_log(&self) -> String {
        match self {
            BackendError::BadGateway(s)
            | BackendError::Loading(s)
            | BackendError::ModelNotFound(s)
            | BackendError::CannotChat(s)
            | BackendError::LoadFailed(s)
            | BackendError::RouteNotFound(s)
            | BackendError::Overloaded(s)
            | BackendError::AuthRejected(s)
            | BackendError::BadRequest(s)
            | BackendError::Status(s) => format!("HTTP {}", s.status),
            BackendError::FormatNotServed(format, s) => {
                format!("the backend does not serve {format} requests: HTTP {}", s.status)
            }
            BackendError::ReportedError(_) => "the backend reported an error in its response".into(),
            BackendError::Cancelled
            | BackendError::SessionGone
            | BackendError::DeadlinePassed
            | BackendError::Unreachable(_)
            | BackendError::Exhausted(_)
            | BackendError::FailingJobs(_)
            | BackendError::ProbeTimeout(_)
            | BackendError::NotHttp(_)
            | BackendError::NotReady(_)
            | BackendError::MissingKey(_)
            | BackendError::UnreadableRequest(_)
            | BackendError::Broken(_)
            | BackendError::CutStream(_)
            | BackendError::Aborted
            | BackendError::BadAnswer(_)
            | BackendError::Panicked => self.to_string(),
        }
    }

    /// The cause as one line without control characters, with the text from the backend. For the operator; not to be logged.
    pub fn for_operator(&self) -> String {
        sanitize_for_log(&self.to_string())
    }
}

/// The first [`ERROR_BODY_MAX`] bytes of a body, as text.
pub fn truncated_body(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(ERROR_BODY_MAX)]);
    let mut text = text.trim().to_owned();
    // A replacement character is longer than the byte that it replaces.
    while text.len() > ERROR_BODY_MAX {
        text.pop();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_body_is_bounded_for_any_bytes() {
        assert_eq!(truncated_body(&[b'x'; 2000]).len(), ERROR_BODY_MAX);
        assert!(truncated_body(&[0xff; 2000]).len() <= ERROR_BODY_MAX);
        assert!(truncated_body("é".repeat(300).as_bytes()).len() <= ERROR_BODY_MAX);
    }

    #[test]
    fn for_operator_is_one_printable_line() {
        let body = "\u{1b}[2J\r\n\u{9b}31m\u{202e}no memory".as_bytes();
        for status in [400, 401, 404, 429, 500, 502, 503] {
            let text = BackendError::from_status(status, body).for_operator();
            assert!(text.ends_with("\\u{1b}[2J\\r\\n\\u{9b}31m\\u{202e}no memory"), "{text}");
        }
    }

    #[test]
    fn for_log_never_contains_text_from_the_backend() {
        for status in [400, 401, 404, 429, 500, 502, 503] {
            assert!(!BackendError::from_status(status, b"my prompt").for_log().contains("prompt"), "{status}");
        }
        assert!(!BackendError::ReportedError("my prompt".into()).for_log().contains("prompt"));
    }
}
