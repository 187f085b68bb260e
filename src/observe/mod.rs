//! The state that other processes can observe: whether the agent serves, and if not, why.
//!
//! The agent's threads update the [`LiveState`]. The [`StateFileWriter`], called by the housekeeping thread, combines the live state
//! with the offer, the backends and the job statistics, and replaces the state file: at each heartbeat, at each change, and when
//! another process requests it. The state file is informative only: the agent never reads it.

mod condition;
mod live;
mod state_file;

pub use live::{Connection, LiveState};
pub use state_file::{
    Backend, BackendError, Jobs, LastError, LastJob, Model, NotOffered, Sources, State, StateFileWriter, Tokens,
};
