//! What other processes can observe: whether the agent serves, and if not, why.
//!
//! The agent's threads update the [`LiveState`]. The housekeeping thread has the [`StateFileWriter`] combine it with the offer, the
//! backends and the job statistics, and replace the state file: at each heartbeat, at each change, and when another process asks
//! for it. The state file is informative only: the agent never reads it.

mod condition;
mod live;
mod state_file;

pub use live::{Connection, LiveState};
pub use state_file::{Backend, BackendError, Jobs, LastError, LastJob, Model, Sources, State, StateFileWriter, Tokens};
