//! One agent an identity: the lock that it holds, and what others can tell of it from outside.
//!
//! The lock file, beside the identity, says who holds it and when that process last showed that it works. It is overwritten in
//! place, always with the same number of bytes, so that a full disk does not make a working agent look dead. Time in it is the
//! system's monotonic clock, which no correction of the wall clock moves and which stands still while the box sleeps.
//!
//! Invariant: the file is never deleted, because that would let two processes lock two files of one name.

pub mod identity;
mod paths;
pub mod takeover;
pub mod terminate;
pub mod wake_socket;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

pub use paths::AgentPaths;

use crate::sys::files;

/// An agent that has not shown for so long that it works does not: it does so at least every 75 s, with the longest delay between
/// two attempts to connect, and every 45 s while it is connected.
pub const LIVENESS_TIMEOUT: Duration = Duration::from_secs(180);

/// What stands in a lock file, in bytes.
const TEXT_BYTES: u64 = 53;
/// The most of a lock file that is read, in bytes.
const LOCK_BYTES_MAX: u64 = 256;

/// Held for as long as this process is the one agent of an identity. The kernel releases it at the process's end, whatever
/// that is.
#[derive(Debug)]
pub struct InstanceLock {
    file: Option<File>,
    is_exclusive: bool,
    started: u64,
}

/// Why there is no lock.
#[derive(Debug)]
pub enum LockError {
    /// Another agent holds it; its pid, if that could be read.
    Held(Option<u32>),
    /// The lock file cannot be used.
    Io(PathBuf, io::Error),
}

impl InstanceLock {
    /// Locks the file, and says in it who we are.
    ///
    /// # Errors
    /// Another agent holds it, or there can be none.
    pub fn acquire(paths: &AgentPaths) -> Result<InstanceLock, LockError> {
        let path = paths.lock();
        let io_error = |e| LockError::Io(path.clone(), e);
        let writable =
            files::owner_only(OpenOptions::new().read(true).write(true).create(true).truncate(false)).open(&path);
        // A lock needs no right to write; only what stands in it does.
        let file = writable.or_else(|e| File::open(&path).map_err(|_| e)).map_err(io_error)?;
        let mut is_exclusive = true;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LockError::Held(LockOwner::read(&path).map(|owner| owner.pid)));
            }
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {
                is_exclusive = false;
                log::warn!("`{}`: this file system has no locks; see to it that only one agent runs", path.display());
            }
            Err(TryLockError::Error(e)) => return Err(io_error(e)),
        }
        let started = start_of("self").unwrap_or(0);
        // What an older program left behind may be longer.
        let _ = file.set_len(TEXT_BYTES);
        let lock = InstanceLock { file: Some(file), is_exclusive, started };
        lock.record_liveness();
        Ok(lock)
    }

    /// A lock of nobody, for an agent that has no file to lock.
    pub fn none() -> InstanceLock {
        InstanceLock { file: None, is_exclusive: false, started: 0 }
    }

    /// Whether it keeps others out; not where the file system has no locks.
    pub fn is_exclusive(&self) -> bool {
        self.is_exclusive
    }

    /// Notes that this process works, as of now. Where that cannot be written (a full disk whose file system overwrites nothing in
    /// place) nothing is left: an older time would have an agent at work ended.
    pub fn record_liveness(&self) {
        let Some(file) = &self.file else { return };
        let owner = LockOwner { pid: std::process::id(), started: self.started, beat: monotonic() };
        if file.write_all_at(owner.to_text().as_bytes(), 0).is_err() {
            let _ = file.set_len(0);
        }
    }
}

/// The process that holds the lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockOwner {
    /// Its pid.
    pub pid: u32,
    /// When it started, in the clock ticks of `/proc`; with the pid it names one process for ever.
    started: u64,
    /// When it last showed that it works, on the monotonic clock.
    beat: Duration,
}

impl LockOwner {
    /// The agent that runs on this identity.
    pub fn running(paths: &AgentPaths) -> Option<LockOwner> {
        LockOwner::read(&paths.lock()).filter(LockOwner::is_running)
    }

    /// How long ago it last showed that it works.
    pub fn since_last_liveness(&self) -> Duration {
        monotonic().saturating_sub(self.beat)
    }

    /// Whether it has been silent for too long to be at work.
    pub fn is_unresponsive(&self) -> bool {
        self.since_last_liveness() >= LIVENESS_TIMEOUT
    }

    /// Whether it is still this very process that has the pid.
    pub fn is_running(&self) -> bool {
        start_of(&self.pid.to_string()) == Some(self.started)
    }

    /// Sends it a signal, unless it has ended.
    ///
    /// # Errors
    /// It is not ours to send one to.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        // No pid is larger.
        let Some(pid) = i32::try_from(self.pid).ok().filter(|_| self.is_running()) else { return Ok(()) };
        match kill(Pid::from_raw(pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether both are the same process, whenever it last showed that it works.
    pub fn is_same_process(&self, other: &LockOwner) -> bool {
        (self.pid, self.started) == (other.pid, other.started)
    }

    fn read(lock: &Path) -> Option<LockOwner> {
        let content = files::read_bounded(lock, LOCK_BYTES_MAX).ok()?;
        let mut words = std::str::from_utf8(&content).ok()?.split_whitespace();
        let pid = words.next()?.parse().ok()?;
        let (started, beat) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(LockOwner { pid, started, beat: Duration::from_millis(beat) })
    }

    /// The pid, the start and the beat in milliseconds, a line each, as long for one process as for any.
    fn to_text(&self) -> String {
        format!("{:<10}\n{:<20}\n{:<20}\n", self.pid, self.started, self.beat.as_millis())
    }
}

/// When a process started, in clock ticks since the boot; `None` for one that has ended, also when nobody has asked how yet.
fn start_of(pid: &str) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may hold anything; the third is the state, the 22nd the start.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let has_ended = matches!(fields.next()?, "Z" | "X");
    fields.nth(18).filter(|_| !has_ended)?.parse().ok()
}

/// Since some moment before the start of this process, the same for all processes until the next boot.
fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_read_as_it_was_written_and_always_in_the_same_space() {
        let short = LockOwner { pid: 7, started: 0, beat: Duration::ZERO };
        let long = LockOwner { pid: u32::MAX, started: u64::MAX, beat: Duration::from_millis(u64::MAX) };
        assert_eq!([&short, &long].map(|owner| owner.to_text().len() as u64), [TEXT_BYTES; 2]);
        let path = std::env::temp_dir().join(format!("usepod-holder-{}", std::process::id()));
        for owner in [short, long] {
            fs::write(&path, owner.to_text()).expect("written");
            assert_eq!(LockOwner::read(&path), Some(owner));
        }
        fs::write(&path, "123\n").expect("written");
        assert_eq!(LockOwner::read(&path), None);
        fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn a_pid_that_somebody_else_has_by_now_is_not_the_holder() {
        let started = start_of("self").expect("a start");
        let owner = LockOwner { pid: std::process::id(), started, beat: monotonic() };
        assert!(owner.is_running() && owner.since_last_liveness() < Duration::from_secs(60));
        assert!(!LockOwner { started: started + 1, ..owner }.is_running());
    }
}
