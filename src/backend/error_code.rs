//! The error codes of the protocol, and the mapping from a cause of failure to a code.

use super::BackendError;

/// The six error codes that the coordinator knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The agent or the backend is at capacity.
    OutOfCapacity,
    /// The model is not offered, missing, or still loading.
    ModelNotLoaded,
    /// The backend cannot be reached, or failed before its first byte.
    BackendUnreachable,
    /// The deadline passed.
    BackendTimeout,
    /// The backend rejected the API key, or the key is missing.
    AuthRejectedByBackend,
    /// Any other failure, including truncated streams.
    Internal,
}

impl ErrorCode {
    /// The code as it is sent.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorCode::OutOfCapacity => "out_of_capacity",
            ErrorCode::ModelNotLoaded => "model_not_loaded",
            ErrorCode::BackendUnreachable => "backend_unreachable",
            ErrorCode::BackendTimeout => "backend_timeout",
            ErrorCode::AuthRejectedByBackend => "auth_rejected_by_backend",
            ErrorCode::Internal => "internal",
        }
    }
}

impl BackendError {
    /// The code to report to the coordinator; `None` if the failure is not reported.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            BackendError::Cancelled | BackendError::SessionGone => None,
            BackendError::DeadlinePassed => Some(ErrorCode::BackendTimeout),
            BackendError::Unreachable(_)
            | BackendError::FailingJobs(_)
            | BackendError::ProbeTimeout(_)
            | BackendError::NotHttp(_)
            | BackendError::NotReady(_)
            | BackendError::BadGateway(_) => Some(ErrorCode::BackendUnreachable),
            // 405 and 501, and the 200 of LM Studio.
            BackendError::RouteNotFound(s) | BackendError::FormatNotServed(_, s) if s.status != 404 => {
                Some(ErrorCode::Internal)
            }
            BackendError::Loading(_)
            | BackendError::ModelNotFound(_)
            | BackendError::CannotChat(_)
            | BackendError::LoadFailed(_)
            | BackendError::RouteNotFound(_)
            | BackendError::FormatNotServed(..) => Some(ErrorCode::ModelNotLoaded),
            BackendError::Overloaded(_) | BackendError::Exhausted(_) => Some(ErrorCode::OutOfCapacity),
            BackendError::MissingKey(_) | BackendError::AuthRejected(_) => Some(ErrorCode::AuthRejectedByBackend),
            BackendError::UnreadableRequest(_)
            | BackendError::BadRequest(_)
            | BackendError::Status(_)
            | BackendError::Broken(_)
            | BackendError::CutStream(_)
            | BackendError::ReportedError(_)
            | BackendError::Aborted
            | BackendError::BadAnswer(_)
            | BackendError::Panicked => Some(ErrorCode::Internal),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_statuses_map_to_error_codes() {
        let table: &[(u16, &str, ErrorCode)] = &[
            (400, r#"{"error":{"message":"too long"}}"#, ErrorCode::Internal),
            (400, r#"{"error":{"message":"model 'x' not found"}}"#, ErrorCode::ModelNotLoaded),
            (401, "", ErrorCode::AuthRejectedByBackend),
            (402, "", ErrorCode::OutOfCapacity),
            (403, "", ErrorCode::AuthRejectedByBackend),
            (404, r#"{"error":"model \"x\" not found, try pulling it first"}"#, ErrorCode::ModelNotLoaded),
            (404, "No models loaded. Please load a model.", ErrorCode::ModelNotLoaded),
            (413, "", ErrorCode::Internal),
            (422, "", ErrorCode::Internal),
            (429, "", ErrorCode::OutOfCapacity),
            (500, "", ErrorCode::Internal),
            (502, "", ErrorCode::BackendUnreachable),
            (503, r#"{"error":{"message":"Loading model","code":503}}"#, ErrorCode::ModelNotLoaded),
            (503, "server busy, please try again.", ErrorCode::OutOfCapacity),
            (504, "", ErrorCode::BackendUnreachable),
            (307, "", ErrorCode::Internal),
        ];
        for (status, body, code) in table {
            assert_eq!(BackendError::from_status(*status, body.as_bytes()).code(), Some(*code), "{status} {body}");
        }
    }
}
