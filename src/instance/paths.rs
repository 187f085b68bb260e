//! Where the files of one agent are: beside its identity, and named after it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::sys::files;

/// The files beside an identity, named after it.
#[derive(Debug, Clone)]
pub struct AgentPaths {
    identity: PathBuf,
}

impl AgentPaths {
    /// Beside this identity file, which need not exist.
    pub fn beside(identity: &Path) -> AgentPaths {
        // Two ways to the same identity are one identity.
        AgentPaths { identity: fs::canonicalize(identity).unwrap_or_else(|_| identity.to_owned()) }
    }

    /// Locked while an agent runs.
    pub fn lock(&self) -> PathBuf {
        files::with_suffix(&self.identity, ".lock")
    }

    /// What the agent does, for `status`.
    pub fn state(&self) -> PathBuf {
        files::with_suffix(&self.identity, ".state")
    }

    /// There while the operator has paused the agent.
    pub fn paused(&self) -> PathBuf {
        files::with_suffix(&self.identity, ".paused")
    }

    /// There while the operator wants no agent to run.
    pub fn stopped(&self) -> PathBuf {
        files::with_suffix(&self.identity, ".stopped")
    }

    /// The socket that wakes the agent's housekeeping.
    pub fn wake(&self) -> PathBuf {
        files::with_suffix(&self.identity, ".wake")
    }

    /// Where an agent that cron started logs, unless the configuration says otherwise.
    pub fn log(&self) -> PathBuf {
        self.identity.with_file_name("agent.log")
    }
}
