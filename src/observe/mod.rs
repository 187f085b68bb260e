//! What other processes can observe: whether the agent serves, and if not, why.
//!
//! The agent's threads update the [`LiveState`]. The housekeeping thread has the [`StateFileWriter`] combine it with the offer, the
//! backends and the job statistics, and replace the state file: at each heartbeat, at each change, and when another process asks
//! for it. The state file is informative only: the agent never reads it.

mod condition;
mod live;
mod state_file;

use std::io;

use serde_json::Value;

use crate::instance::{AgentPaths, LockOwner};

pub use live::{Connection, LiveState};
pub use state_file::{Sources, State, StateFileWriter};

/// Reads the state file.
///
/// # Errors
/// There is none, or it makes no sense.
pub fn read(paths: &AgentPaths) -> io::Result<Value> {
    serde_json::to_value(State::read(paths)?).map_err(io::Error::from)
}

/// What this very agent has written; `None` while it has written nothing yet.
pub fn read_own(paths: &AgentPaths, owner: &LockOwner) -> Option<Value> {
    serde_json::to_value(State::read_own(paths, owner)?).ok()
}
