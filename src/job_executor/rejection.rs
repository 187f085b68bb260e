//! Why a job is not taken.

use crate::link::protocol::ErrorCode;

/// The causes, told apart for the operator; the coordinator knows the code alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// No backend serves the model.
    NoSuchModel,
    /// As many jobs are in flight as `[limits] max_concurrent` allows.
    AllPlacesTaken,
    /// Every backend of the model has as many jobs as its own `max_concurrent` allows.
    BackendsFull,
    /// `max_tokens_per_minute` is used up.
    TokenLimit,
    /// The requests in flight leave no memory for this one.
    Memory,
    /// The box has no thread for it.
    Threads,
    /// The operator has paused the agent.
    Paused,
    /// The agent is stopping.
    Stopping,
    /// The request cannot be read.
    Unreadable,
}

impl Cause {
    /// What the coordinator is told.
    pub fn code(self) -> ErrorCode {
        match self {
            Cause::NoSuchModel => ErrorCode::ModelNotLoaded,
            Cause::Unreadable => ErrorCode::Internal,
            Cause::AllPlacesTaken
            | Cause::BackendsFull
            | Cause::TokenLimit
            | Cause::Memory
            | Cause::Threads
            | Cause::Paused
            | Cause::Stopping => ErrorCode::OutOfCapacity,
        }
    }

    /// As the state file names it.
    pub fn name(self) -> &'static str {
        match self {
            Cause::NoSuchModel => "no_such_model",
            Cause::AllPlacesTaken => "all_places_taken",
            Cause::BackendsFull => "backends_full",
            Cause::TokenLimit => "token_limit",
            Cause::Memory => "memory",
            Cause::Threads => "threads",
            Cause::Paused => "paused",
            Cause::Stopping => "stopping",
            Cause::Unreadable => "unreadable",
        }
    }
}
