//! One agent per identity: the lock, the liveness of its owner, and the files beside the identity.

pub mod identity;
mod liveness;
mod lock;
mod paths;
pub mod takeover;
pub mod terminate;
pub mod wake_socket;

pub use liveness::{LIVENESS_TIMEOUT, LockOwner};
pub use lock::{InstanceLock, LockError, running_agent};
pub use paths::AgentPaths;
