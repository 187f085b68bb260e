//! Why a backend call failed: one variant per cause, and what each cause means for the backend and its offer.

use std::fmt;

/// How much of a backend's error body travels on, in bytes.
pub const ERROR_BODY_MAX: usize = 512;

/// What [`Backend`](super::Backend) methods return.
pub type BackendResult<T> = Result<T, BackendError>;

/// An HTTP answer that was not a success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpStatus {
    /// The status code.
    pub status: u16,
    /// The first [`ERROR_BODY_MAX`] bytes of the body. May quote the prompt: for the coordinator, never for a log.
    pub body: String,
}

impl fmt::Display for HttpStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HTTP {}", self.status)?;
        if self.body.is_empty() { Ok(()) } else { write!(f, ": {}", self.body) }
    }
}

/// Why a backend could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// The coordinator cancelled the job: nobody is to be told anything.
    #[error("the job was cancelled")]
    Cancelled,
    /// The connection that the answer would travel on is gone.
    #[error("the session is gone")]
    SessionGone,
    /// The job's deadline passed.
    #[error("the deadline passed")]
    DeadlinePassed,
    /// Refused, not resolved, not connected in time, or broken off before the first byte of the answer.
    #[error("the backend cannot be reached: {0}")]
    Unreachable(String),
    /// The box has no descriptor or no thread left for a connection.
    #[error("the agent's box is short of resources: {0}")]
    Exhausted(String),
    /// So many jobs running failed at it, whatever its health check says.
    #[error("its last {0} jobs failed")]
    FailingJobs(u32),
    /// A probe got no answer in its time: the backend may be busy, or hang.
    #[error("no answer within {0} s")]
    ProbeTimeout(u64),
    /// What came back is not HTTP.
    #[error("the backend does not speak HTTP: {0}")]
    NotHttp(String),
    /// 502 or 504: a gateway in front of the backend cannot reach it.
    #[error("the gateway cannot reach the backend: {0}")]
    BadGateway(HttpStatus),
    /// 503 while the model loads.
    #[error("the backend is still loading its model: {0}")]
    Loading(HttpStatus),
    /// The backend does not have the model.
    #[error("the backend does not have the model: {0}")]
    ModelNotFound(HttpStatus),
    /// 429, 402, or a 503 that is not a loading model: the backend is full.
    #[error("the backend is full: {0}")]
    Overloaded(HttpStatus),
    /// The variable that should hold the key does not.
    #[error("the environment variable `{0}` holds no usable API key")]
    MissingKey(String),
    /// 401 or 403.
    #[error("the backend refused the API key: {0}")]
    AuthRejected(HttpStatus),
    /// 400, 413, 422: the request itself is at fault.
    #[error("the backend refused the request: {0}")]
    BadRequest(HttpStatus),
    /// Any other status, redirects included.
    #[error("the backend failed: {0}")]
    Status(HttpStatus),
    /// The connection broke after the first byte of the answer.
    #[error("the connection to the backend broke: {0}")]
    Broken(String),
    /// The stream ended before its end mark, after its first byte.
    #[error("the stream was cut: {0}")]
    CutStream(String),
    /// The stream carried an `error` object.
    #[error("the backend reported an error in the stream: {0}")]
    StreamError(String),
    /// The engine gave the generation up (`finish_reason` `abort`).
    #[error("the backend aborted the generation")]
    Aborted,
    /// An answer to one of our own questions that makes no sense.
    #[error("the backend's answer cannot be read: {0}")]
    BadAnswer(String),
    /// A bug: the backend's code panicked.
    #[error("the agent failed while it ran the job")]
    Panicked,
}

impl BackendError {
    /// Whether the requester is to blame, so that it counts neither against us nor against the backend.
    pub fn is_requesters_fault(&self) -> bool {
        matches!(self, BackendError::BadRequest(_))
    }

    /// Whether it speaks against the backend's health: a connection that failed, or a 5xx.
    pub fn is_backends_fault(&self) -> bool {
        match self {
            BackendError::Unreachable(_) | BackendError::NotHttp(_) | BackendError::Broken(_) => true,
            BackendError::BadGateway(s)
            | BackendError::Loading(s)
            | BackendError::Overloaded(s)
            | BackendError::Status(s) => s.status >= 500,
            _ => false,
        }
    }

    /// Whether another backend may do better: this one is not there, not ready or full, and has not begun.
    pub fn may_fail_over(&self) -> bool {
        self.is_absent() || matches!(self, BackendError::Overloaded(_))
    }

    /// Whether the offer may be out of date: the backend was not there, or not with this model.
    pub fn invalidates_offer(&self) -> bool {
        self.is_absent() || matches!(self, BackendError::ModelNotFound(_))
    }

    /// Nothing that could serve is there, or not yet.
    fn is_absent(&self) -> bool {
        use BackendError::{BadGateway, Loading, NotHttp, Unreachable};
        matches!(self, Unreachable(_) | NotHttp(_) | BadGateway(_) | Loading(_))
    }

    /// The cause without anything that a backend said, which may quote a prompt: fit for a log.
    pub fn for_log(&self) -> String {
        match self {
            BackendError::BadGateway(s)
            | BackendError::Loading(s)
            | BackendError::ModelNotFound(s)
            | BackendError::Overloaded(s)
            | BackendError::AuthRejected(s)
            | BackendError::BadRequest(s)
            | BackendError::Status(s) => format!("HTTP {}", s.status),
            BackendError::StreamError(_) => "the backend reported an error in the stream".into(),
            BackendError::Cancelled
            | BackendError::SessionGone
            | BackendError::DeadlinePassed
            | BackendError::Unreachable(_)
            | BackendError::Exhausted(_)
            | BackendError::FailingJobs(_)
            | BackendError::ProbeTimeout(_)
            | BackendError::NotHttp(_)
            | BackendError::MissingKey(_)
            | BackendError::Broken(_)
            | BackendError::CutStream(_)
            | BackendError::Aborted
            | BackendError::BadAnswer(_)
            | BackendError::Panicked => self.to_string(),
        }
    }

    /// What a status that is not a success means, after the table of what the servers really send.
    pub fn from_status(status: u16, body: &[u8]) -> BackendError {
        let answer = HttpStatus { status, body: truncated_body(body) };
        let text = answer.body.to_ascii_lowercase();
        let no_such_model = text.contains("no models loaded") || (text.contains("model") && text.contains("not found"));
        match status {
            400 if no_such_model => BackendError::ModelNotFound(answer),
            400 | 413 | 422 => BackendError::BadRequest(answer),
            401 | 403 => BackendError::AuthRejected(answer),
            402 | 429 => BackendError::Overloaded(answer),
            404 => BackendError::ModelNotFound(answer),
            502 | 504 => BackendError::BadGateway(answer),
            503 if text.contains("loading") => BackendError::Loading(answer),
            503 => BackendError::Overloaded(answer),
            _ => BackendError::Status(answer),
        }
    }
}

/// At most [`ERROR_BODY_MAX`] bytes of what a backend said, as text.
pub fn truncated_body(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(ERROR_BODY_MAX)]);
    let mut text = text.trim().to_owned();
    // A replacement character is longer than the bytes it stands for.
    while text.len() > ERROR_BODY_MAX {
        text.pop();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quote_is_bounded_whatever_the_bytes() {
        assert_eq!(truncated_body(&[b'x'; 2000]).len(), ERROR_BODY_MAX);
        assert!(truncated_body(&[0xff; 2000]).len() <= ERROR_BODY_MAX);
        assert!(truncated_body("é".repeat(300).as_bytes()).len() <= ERROR_BODY_MAX);
    }

    #[test]
    fn a_log_line_never_holds_what_the_backend_said() {
        for status in [400, 401, 404, 429, 500, 502, 503] {
            assert!(!BackendError::from_status(status, b"my prompt").for_log().contains("prompt"), "{status}");
        }
        assert!(!BackendError::StreamError("my prompt".into()).for_log().contains("prompt"));
    }
}
