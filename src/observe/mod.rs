//! How the agent is, for other processes: whether it serves, and why not.
//!
//! The agent's threads note what they know on a [`LiveState`]; the housekeeping thread's [`StateFileWriter`] puts it together with the
//! offer and the backends, and replaces the state file as a whole, at each heartbeat, at each change, and when another
//! process asks for it. The state file is for reading alone: nothing in it decides what the agent does.
//!
//! Invariant: there is nothing in the state file that a log may not show.

mod live;
mod state_file;

use std::io;
use std::time::SystemTime;

use serde_json::{Map, Value};

pub use live::{Connection, LiveState};
pub use state_file::{LastWritten, StateFileWriter};

use crate::instance::identity::Identity;
use crate::instance::{AgentPaths, LockOwner};
use crate::sys::datetime::rfc3339;
use crate::sys::files;

/// The most of a state file that is read, in bytes: some 200 for each model.
const STATE_BYTES_MAX: u64 = 16 << 20;

/// What never changes while the agent runs; it starts now.
pub fn static_fields(identity: &Identity, coordinator: String) -> Map<String, Value> {
    collect(
        &mut [
            ("started_at", rfc3339(SystemTime::now()).into()),
            ("public_key", identity.public_key_base64().into()),
            ("coordinator", coordinator.into()),
        ]
        .into_iter(),
    )
}

/// Reads the state file.
///
/// # Errors
/// There is none, or it makes no sense.
pub fn read(paths: &AgentPaths) -> io::Result<Value> {
    let content = files::read_bounded(&paths.state(), STATE_BYTES_MAX)?;
    Ok(Value::Object(serde_json::from_slice(&content)?))
}

/// What this very agent has written; `None` while it has written nothing yet.
pub fn read_own(paths: &AgentPaths, owner: &LockOwner) -> Option<Value> {
    read(paths).ok().filter(|state| state["pid"] == owner.pid)
}

/// An object of these keys, in their order.
pub(crate) fn object<const N: usize>(fields: [(&str, Value); N]) -> Value {
    Value::Object(collect(&mut fields.into_iter()))
}

/// Once for all lengths.
fn collect(fields: &mut dyn Iterator<Item = (&str, Value)>) -> Map<String, Value> {
    fields.map(|(key, value)| (key.to_owned(), value)).collect()
}
