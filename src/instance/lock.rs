//! The lock that ensures that only one agent runs per identity.
//!
//! Invariant: the lock file is never deleted; otherwise, two processes could each lock a file of that name.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::AgentPaths;
use super::liveness::{LockOwner, TEXT_BYTES, start_of};
use crate::sys::files;

/// The lock of an identity, held while this process is its agent. The kernel releases it when the process ends, however it ends.
#[derive(Debug)]
pub struct InstanceLock {
    file: Option<File>,
    is_exclusive: bool,
    started: u64,
}

/// Why the lock could not be acquired.
#[derive(Debug)]
pub enum LockError {
    /// Another agent holds the lock; its pid, if the lock file contains it.
    Held(Option<u32>),
    /// The lock file cannot be used.
    Io(PathBuf, io::Error),
}

impl InstanceLock {
    /// Locks the file and writes its owner into it.
    ///
    /// # Errors
    /// Another agent holds the lock, or the file cannot be locked.
    pub fn acquire(paths: &AgentPaths) -> Result<InstanceLock, LockError> {
        let path = paths.lock();
        let io_error = |e| LockError::Io(path.clone(), e);
        let writable =
            files::owner_only(OpenOptions::new().read(true).write(true).create(true).truncate(false)).open(&path);
        // Locking needs no write permission; only writing the content does.
        let file = writable.or_else(|e| File::open(&path).map_err(|_| e)).map_err(io_error)?;
        let mut is_exclusive = true;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LockError::Held(LockOwner::read(&path).map(|owner| owner.pid)));
            }
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {
                is_exclusive = false;
                log::warn!(
                    "`{}`: this file system does not support locking; make sure that only one agent is running",
                    path.display()
                );
            }
            Err(TryLockError::Error(e)) => return Err(io_error(e)),
        }
        let started = start_of("self").unwrap_or(0);
        // The lock file of an older version may be longer.
        let _ = file.set_len(TEXT_BYTES);
        let lock = InstanceLock { file: Some(file), is_exclusive, started };
        lock.record_liveness();
        Ok(lock)
    }

    /// Returns an empty lock, for an agent whose lock file cannot be used.
    pub fn none() -> InstanceLock {
        InstanceLock { file: None, is_exclusive: false, started: 0 }
    }

    /// Whether the lock excludes other agents; false if the file system does not support locking.
    pub fn is_exclusive(&self) -> bool {
        self.is_exclusive
    }

    /// Records a sign of life. If writing fails (on a full disk with a copy-on-write file system), the file is truncated: with an
    /// outdated time, a working agent would be killed.
    pub fn record_liveness(&self) {
        let Some(file) = &self.file else { return };
        let owner = LockOwner::alive_now(std::process::id(), self.started);
        if file.write_all_at(owner.to_text().as_bytes(), 0).is_err() {
            let _ = file.set_len(0);
        }
    }
}
