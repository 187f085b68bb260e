//! The paths of an agent's files, which are beside its identity file and named after it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::sys::files;

/// The paths of the files beside an identity file.
#[derive(Debug, Clone)]
pub struct AgentPaths {
    identity: PathBuf,
}

impl AgentPaths {
    /// The paths beside this identity file, which need not exist.
    pub fn beside(identity: &Path) -> AgentPaths {
        // Two paths to the same identity file belong to the same agent.
        AgentPaths { identity: fs::canonicalize(identity).unwrap_or_else(|_| identity.to_owned()) }
    }

    /// The lock file, locked while an agent runs.
    pub fn lock(&self) -> PathBuf {
        files::with_suffix(&self.identity, ".lock")
    }

    /// The state file, for `status`.
    pub fn state(&self) -> PathBuf {
        files::with_suffix(&self.identity, ".state")
    }

    /// The marker that exists while the operator has paused the agent.
    pub fn paused(&self) -> PathBuf {
        files::with_suffix(&self.identity, ".paused")
    }

    /// The marker that exists while the operator wants no agent to run.
    pub fn stopped(&self) -> PathBuf {
        files::with_suffix(&self.identity, ".stopped")
    }

    /// The socket that wakes the agent's housekeeping.
    pub fn wake(&self) -> PathBuf {
        files::with_suffix(&self.identity, ".wake")
    }

    /// The log file of an agent that cron started, unless the configuration names another file.
    pub fn log(&self) -> PathBuf {
        self.identity.with_file_name("agent.log")
    }
}
