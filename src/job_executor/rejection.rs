//! Why a job is not taken.

use crate::link::protocol::ErrorCode;

/// The causes, told apart for the operator; the coordinator knows the code alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectReason {
    /// No backend serves the model.
    UnknownModel,
    /// As many jobs are in flight as `[limits] max_concurrent` allows.
    AtCapacity,
    /// Every backend of the model has as many jobs as its own `max_concurrent` allows.
    BackendsFull,
    /// `max_tokens_per_minute` is used up.
    TokenLimit,
    /// The requests in flight leave no memory for this one.
    NoMemory,
    /// The box has no thread for it.
    NoThread,
    /// The operator has paused the agent.
    Paused,
    /// The agent is stopping.
    Stopping,
    /// The request cannot be read.
    Unreadable,
}

impl RejectReason {
    /// What the coordinator is told.
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

    /// As the state file names it.
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
