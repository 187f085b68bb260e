//! Terminates a process: SIGTERM, a grace period, SIGKILL.

use std::io;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::LockOwner;

/// How long a process may take to disappear after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the caller's `has_ended` is called.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Why a process could not be terminated.
#[derive(Debug, thiserror::Error)]
pub enum TerminateError {
    /// The signal was refused.
    #[error("failed to send {signal} to pid {pid} ({error}); as its owner or as root, run `kill -9 {pid}`")]
    Signal {
        /// The process.
        pid: u32,
        /// The signal that was refused.
        signal: Signal,
        /// The system's reason.
        error: io::Error,
    },
    /// The process survived SIGKILL.
    #[error(
        "pid {pid} is still there after SIGKILL; if `ps` shows it in state D, it waits for a disk or a driver, and a reboot may be needed"
    )]
    StillRunning {
        /// The process.
        pid: u32,
    },
}

/// Sends SIGTERM to `owner`, and SIGKILL once `grace` has passed, until `has_ended` returns a value for the last signal sent.
/// `before_signal` is called before each signal and may end the termination instead.
///
/// # Errors
/// A signal was refused, the process survived SIGKILL, or `has_ended` failed.
pub fn terminate<T, E: From<TerminateError>>(
    owner: &LockOwner,
    grace: Duration,
    mut before_signal: impl FnMut() -> ControlFlow<T>,
    mut has_ended: impl FnMut(Signal) -> Result<Option<T>, E>,
) -> Result<T, E> {
    let pid = owner.pid;
    for (signal, timeout) in [(Signal::SIGTERM, grace), (Signal::SIGKILL, KILL_TIMEOUT)] {
        if let ControlFlow::Break(value) = before_signal() {
            return Ok(value);
        }
        owner.signal(signal).map_err(|error| TerminateError::Signal { pid, signal, error })?;
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(value) = has_ended(signal)? {
                return Ok(value);
            }
            if Instant::now() >= deadline {
                break;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
    Err(TerminateError::StillRunning { pid }.into())
}
