//! The owner of the lock file: the process that holds the lock, and its last sign of life.
//!
//! Invariant: an agent that cannot write its lock file, for example because its disk has become read-only, is not unresponsive: if
//! the file is out of date, the agent is asked over its wake socket, and answers from its own clock.
//!
//! The lock file contains the pid, the start time and the last sign of life of its owner. It is overwritten in place, always with
//! the same number of bytes, so that a full disk does not make a working agent look dead. Times are from the system's monotonic
//! clock, which is unaffected by clock corrections and stops while the machine is suspended.

use std::fs::{self, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Uid;

use super::{AgentPaths, wake_socket};
use crate::sys::{files, process};

/// Time without a sign of life after which an agent is unresponsive. A working agent shows a sign of life at least every 45 s
/// while connected, and at least every 75 s otherwise, with the longest delay between two connection attempts.
pub const LIVENESS_TIMEOUT: Duration = Duration::from_secs(180);

/// Size of a lock file, in bytes.
pub(super) const TEXT_BYTES: u64 = 53;
/// Maximum size of a lock file that is read, in bytes.
const LOCK_BYTES_MAX: u64 = 256;

/// The process that the lock file identifies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockOwner {
    /// The pid of the process.
    pub pid: u32,
    /// The start time in clock ticks, as in `/proc`. Together with the pid, it identifies the process uniquely.
    started: u64,
    /// The last sign of life, on the monotonic clock.
    last_liveness: Duration,
    /// Whether the lock file contains this sign of life; false if the agent cannot write its lock file.
    pub is_recorded: bool,
}

impl LockOwner {
    /// The running process that the lock file identifies.
    pub(super) fn running(paths: &AgentPaths) -> Option<LockOwner> {
        let (owner, lock) = LockOwner::read(&paths.lock()).filter(|(owner, _)| owner.is_running())?;
        may_name(&lock, owner.pid).then_some(owner)
    }

    /// The pid of a running process that the lock file names, although the process does not belong to the owner of the file: that
    /// owner could make a command signal any process.
    pub fn foreign(paths: &AgentPaths) -> Option<u32> {
        let (owner, lock) = LockOwner::read(&paths.lock()).filter(|(owner, _)| owner.is_running())?;
        (!may_name(&lock, owner.pid)).then_some(owner.pid)
    }

    /// The running agent, as it describes itself over its wake socket. Whoever can write to the folder can replace the socket, so
    /// only the process that sends the answer can be its subject.
    pub(super) fn ask(paths: &AgentPaths) -> Option<LockOwner> {
        let answer = wake_socket::ask_process(&paths.wake())?;
        let socket = fs::symlink_metadata(paths.wake()).ok()?;
        let mut owner = LockOwner::parse(&answer.text).filter(|owner| owner.pid == answer.from)?;
        // An answer contains the age of the last sign of life.
        owner.last_liveness = monotonic().saturating_sub(owner.last_liveness);
        owner.is_recorded = false;
        Some(owner).filter(|owner| owner.is_running() && may_name(&socket, owner.pid))
    }

    /// The same process with its last sign of life: if the one in the lock file is too old, the agent is asked.
    pub(super) fn up_to_date(self, paths: &AgentPaths) -> LockOwner {
        if !self.is_unresponsive() {
            return self;
        }
        match LockOwner::ask(paths).filter(|answer| answer.is_same_process(&self)) {
            Some(answer) => answer,
            None => self,
        }
    }

    /// Describes a process that shows a sign of life now.
    pub(super) fn alive_now(pid: u32, started: u64) -> LockOwner {
        LockOwner { pid, started, last_liveness: monotonic(), is_recorded: true }
    }

    /// Moves the last sign of life to now.
    pub(super) fn show_life(&mut self) {
        self.last_liveness = monotonic();
    }

    /// Time since the last sign of life.
    pub fn since_last_liveness(&self) -> Duration {
        monotonic().saturating_sub(self.last_liveness)
    }

    /// Whether the last sign of life is older than [`LIVENESS_TIMEOUT`].
    pub fn is_unresponsive(&self) -> bool {
        self.since_last_liveness() >= LIVENESS_TIMEOUT
    }

    /// Whether the pid still belongs to this process.
    pub fn is_running(&self) -> bool {
        start_of(&self.pid.to_string()) == Some(self.started)
    }

    /// Sends the process a signal, unless it has ended.
    ///
    /// # Errors
    /// The process belongs to another user.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        process::signal(self.pid, signal, || self.is_running())
    }

    /// Whether both are the same process, regardless of liveness.
    pub fn is_same_process(&self, other: &LockOwner) -> bool {
        (self.pid, self.started) == (other.pid, other.started)
    }

    /// Reads the lock file. Its metadata are of the file that was read, whatever file has the name by then.
    pub(super) fn read(lock: &Path) -> Option<(LockOwner, Metadata)> {
        let file = files::open_no_follow(lock, false).ok()?;
        let (mut text, metadata) = (String::new(), file.metadata().ok()?);
        file.take(LOCK_BYTES_MAX).read_to_string(&mut text).ok()?;
        Some((LockOwner::parse(&text)?, metadata))
    }

    fn parse(text: &str) -> Option<LockOwner> {
        let mut words = text.split_whitespace();
        let pid = words.next()?.parse().ok()?;
        let (started, last_liveness) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(LockOwner { pid, started, last_liveness: Duration::from_millis(last_liveness), is_recorded: true })
    }

    /// The answer to [`LockOwner::ask`]: the pid, the start time and the age of the last sign of life in milliseconds.
    pub(super) fn to_answer(&self) -> String {
        format!("{} {} {}", self.pid, self.started, self.since_last_liveness().as_millis())
    }

    /// The pid, the start time and the last sign of life in milliseconds, one per line and padded to a fixed width.
    pub(super) fn to_text(&self) -> String {
        format!("{:<10}\n{:<20}\n{:<20}\n", self.pid, self.started, self.last_liveness.as_millis())
    }
}

/// The start time of a process, in clock ticks since boot; `None` if the process has ended, even if it has not been reaped.
pub(super) fn start_of(pid: &str) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may contain anything; the third is the state, the 22nd the start time.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let has_ended = matches!(fields.next()?, "Z" | "X");
    fields.nth(18).filter(|_| !has_ended)?.parse().ok()
}

/// Whether a file, which is this user's own or of root, may say that this process is the agent: the process belongs to the owner of
/// the file. Everybody else who can write to the folder could have root or this user signal one of their own processes. A file that
/// only root can write to is trusted; root also trusts other users about their own processes.
fn may_name(file: &Metadata, pid: u32) -> bool {
    let (owner, this_user) = (file.uid(), Uid::effective().as_raw());
    let is_roots = owner == 0 && file.mode() & 0o022 == 0;
    let is_ours = owner == this_user || owner == 0 || this_user == 0;
    !file.is_symlink() && (is_roots || (is_ours && process::user_of(pid) == Some(owner)))
}

/// The time of the monotonic clock, which is the same for all processes until the next boot.
fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_owner_is_read_as_it_was_written_and_has_a_fixed_size() {
        let short = LockOwner { pid: 7, started: 0, last_liveness: Duration::ZERO, is_recorded: true };
        let last_liveness = Duration::from_millis(u64::MAX);
        let long = LockOwner { pid: u32::MAX, started: u64::MAX, last_liveness, ..short };
        assert_eq!([&short, &long].map(|owner| owner.to_text().len() as u64), [TEXT_BYTES; 2]);
        let path = std::env::temp_dir().join(format!("usepod-lock-owner-{}", std::process::id()));
        for owner in [short, long] {
            fs::write(&path, owner.to_text()).expect("written");
            assert_eq!(LockOwner::read(&path).map(|(read, _)| read), Some(owner));
        }
        fs::write(&path, "123\n").expect("written");
        assert!(LockOwner::read(&path).is_none());
        fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn is_running_is_false_when_the_pid_belongs_to_another_process() {
        let started = start_of("self").expect("a start");
        let owner = LockOwner::alive_now(std::process::id(), started);
        assert!(owner.is_running() && owner.since_last_liveness() < Duration::from_secs(60));
        assert!(!LockOwner { started: started + 1, ..owner }.is_running());
    }
}
