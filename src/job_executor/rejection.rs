//! Why a job is not admitted.

use crate::link::protocol::ErrorCode;

/// The reasons, as shown to the operator. The coordinator receives the error code and a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectReason {
    /// No backend serves the model.
    UnknownModel,
    /// `[limits] max_concurrent` jobs are in flight.
    AtCapacity,
    /// Every backend of the model is at its own `max_concurrent`.
    BackendsFull,
    /// `max_tokens_per_minute` is used up.
    TokenLimit,
    /// The requests in flight leave too little memory.
    NoMemory,
    /// No worker thread can be started.
    NoThread,
    /// The operator has paused the agent.
    Paused,
    /// The agent is stopping.
    Stopping,
    /// The request cannot be read.
    Unreadable,
}

impl RejectReason {
    /// The error code for the coordinator.
    pub fn code(self) -> ErrorCode {
        match self {
            RejectReason::UnknownModel => ErrorCode::ModelNotLoaded,
            RejectReason::Unreadable => ErrorCode::Internal,
            RejectReason::AtCapacity
            | RejectReason::BackendsFull
            | RejectReason::TokenLimit
            | RejectReason::NoMemory
            | RejectReason::NoThread
            | RejectReason::Paused
            | RejectReason::Stopping => ErrorCode::OutOfCapacity,
        }
    }

    /// The name in the state file.
    pub fn name(self) -> &'static str {
        match self {
            RejectReason::UnknownModel => "no_such_model",
            RejectReason::AtCapacity => "all_places_taken",
            RejectReason::BackendsFull => "backends_full",
            RejectReason::TokenLimit => "token_limit",
            RejectReason::NoMemory => "memory",
            RejectReason::NoThread => "threads",
            RejectReason::Paused => "paused",
            RejectReason::Stopping => "stopping",
            RejectReason::Unreadable => "unreadable",
        }
    }
}
