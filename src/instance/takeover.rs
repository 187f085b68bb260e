//! What a call by cron does about the agent that may be running: it leaves one at work alone, and takes the place of one that
//! hangs.
//!
//! Invariants: whoever has the lock is the agent, so that of several calls at a time one takes over at the most. A signal goes to
//! none but the process that the lock file names, by its pid and its start, and only while that one is silent. A holder that
//! cannot be told is left alone: the lock says that somebody works, and no other proof of who it is would do to end it.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::instance::{AgentPaths, InstanceLock, LockError, LockOwner};

/// How much later it is looked at again, before anything is done: on a box or in a container that was frozen the clock may have
/// gone on, and who is thawed with us needs a moment to show that it works.
const RECHECK_DELAY: Duration = Duration::from_secs(5);
/// How one is ended, and how long each way is given. The last is no matter of the process any more, but of the system.
const TERMINATION_STEPS: [(Signal, Duration); 2] =
    [(Signal::SIGTERM, Duration::from_secs(10)), (Signal::SIGKILL, Duration::from_secs(5))];
/// How often the lock is tried meanwhile.
const POLL: Duration = Duration::from_millis(50);

/// Why cron gets neither an agent nor the certainty that there is one.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// There can be no lock, so that each minute would start one more agent.
    #[error("`{}` cannot be locked ({why}), so cron cannot tell whether an agent runs; mend the rights there, or name a key_path on a disk that has locks", path.display())]
    NoLock {
        /// The lock file.
        path: PathBuf,
        /// Why not.
        why: io::Error,
    },
    /// An agent hangs, and we may not end it.
    #[error("the agent with pid {pid} hangs and cannot be ended ({why}); end it as its owner: kill -9 {pid}")]
    NoRight {
        /// Its pid.
        pid: u32,
        /// Why not.
        why: io::Error,
    },
    /// An agent hangs, and the system does not end it.
    #[error(
        "the agent with pid {pid} hangs and is still there after SIGKILL; when its state in `ps` is D, a disk or driver holds it and a reboot may be needed"
    )]
    Stuck {
        /// Its pid.
        pid: u32,
    },
}

/// The lock, taken from an agent that hangs if need be: in 20 s at the most. `None` where an agent is at work.
///
/// # Errors
/// There can be no lock, or the one that hangs cannot be ended.
pub fn acquire_or_take_over(paths: &AgentPaths) -> Result<Option<InstanceLock>, TakeoverError> {
    if let Some(lock) = try_lock(paths)? {
        return Ok(Some(lock));
    }
    let hanging = || LockOwner::running(paths).filter(LockOwner::is_unresponsive);
    let Some(first) = hanging() else { return Ok(None) };
    std::thread::sleep(RECHECK_DELAY);
    match hanging() {
        Some(second) if second.is_same_process(&first) => replace(&second, paths),
        // Another has come, it works again, or it is gone.
        _ => try_lock(paths),
    }
}

fn replace(hung: &LockOwner, paths: &AgentPaths) -> Result<Option<InstanceLock>, TakeoverError> {
    let pid = hung.pid;
    let silence = hung.since_last_liveness().as_secs();
    log::warn!(
        "the agent with pid {pid} hangs: it has not shown for {silence} s that it works, so it is ended and replaced"
    );
    for (signal, grace) in TERMINATION_STEPS {
        match LockOwner::running(paths) {
            Some(now) if !now.is_same_process(hung) => return Ok(None),
            Some(now) if !now.is_unresponsive() => {
                log::warn!(
                    "the agent with pid {pid} works again; it was told to stop, and a later call takes its place"
                );
                return Ok(None);
            }
            Some(now) => now.signal(signal).map_err(|why| TakeoverError::NoRight { pid, why })?,
            // It has ended; its lock goes with it.
            None => {}
        }
        let until = Instant::now() + grace;
        while Instant::now() < until {
            if let Some(lock) = try_lock(paths)? {
                log::warn!(
                    "the agent with pid {pid} has ended, after {signal}; pid {} takes its place",
                    std::process::id()
                );
                return Ok(Some(lock));
            }
            if LockOwner::running(paths).is_some_and(|now| !now.is_same_process(hung)) {
                return Ok(None);
            }
            std::thread::sleep(POLL);
        }
    }
    Err(TakeoverError::Stuck { pid })
}

fn try_lock(paths: &AgentPaths) -> Result<Option<InstanceLock>, TakeoverError> {
    match InstanceLock::acquire(paths) {
        Ok(lock) if lock.is_exclusive() => Ok(Some(lock)),
        Ok(_) => Err(TakeoverError::NoLock { path: paths.lock(), why: io::ErrorKind::Unsupported.into() }),
        Err(LockError::Held(_)) => Ok(None),
        Err(LockError::Io(path, why)) => Err(TakeoverError::NoLock { path, why }),
    }
}
