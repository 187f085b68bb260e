//! `run --cron` while an agent is running: leaves a responsive agent alone and replaces an unresponsive agent.
//!
//! Invariants: the agent is the process that holds the lock, so of several concurrent calls at most one takes over. Only the
//! process that the lock file identifies by pid and start time is ever signaled, and only while it is unresponsive. If the lock
//! file does not identify its owner, no process is signaled: the held lock alone does not show which process to terminate. An
//! agent that reports a recent sign of life over its wake socket is not signaled either, however old its lock file is.

use std::ops::ControlFlow;
use std::time::Duration;

use super::terminate::{TerminateError, terminate};
use super::{AgentPaths, InstanceLock, LockError, LockOwner};

/// Delay before an unresponsive agent is checked a second time. After a suspended machine or container resumes, the clock may
/// have advanced, and the agent needs a moment to record its liveness.
const RECHECK_DELAY: Duration = Duration::from_secs(5);
/// How long an unresponsive agent may take to end after SIGTERM.
pub const TERM_TIMEOUT: Duration = Duration::from_secs(10);

/// Why cron could neither start an agent nor establish that one is running.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// The lock cannot be used, so every call would start another agent.
    #[error("{0}; cron starts no agent without the lock")]
    NoLock(LockError),
    /// The agent is unresponsive and could not be terminated.
    #[error("the running agent is unresponsive and was not replaced: {0}")]
    Terminate(#[from] TerminateError),
}

/// Acquires the lock, from an unresponsive agent if necessary, within 20 s. `None` if another agent is running.
///
/// # Errors
/// The lock file cannot be used, or the unresponsive agent cannot be terminated.
pub fn acquire_or_take_over(paths: &AgentPaths) -> Result<Option<InstanceLock>, TakeoverError> {
    if let Some(lock) = try_lock(paths)? {
        return Ok(Some(lock));
    }
    let recorded = || LockOwner::running(paths).filter(LockOwner::is_unresponsive);
    let Some(first) = recorded() else { return Ok(None) };
    std::thread::sleep(RECHECK_DELAY);
    match recorded().map(|owner| owner.up_to_date(paths)).filter(LockOwner::is_unresponsive) {
        Some(second) if second.is_same_process(&first) => replace(&second, paths),
        // The agent has recovered or ended, or another agent has started.
        _ => try_lock(paths),
    }
}

fn replace(owner: &LockOwner, paths: &AgentPaths) -> Result<Option<InstanceLock>, TakeoverError> {
    let pid = owner.pid;
    let silence = owner.since_last_liveness().as_secs();
    log::warn!("the agent with pid {pid} has shown no sign of life for {silence} s; terminating it to take over");
    let was_replaced = || LockOwner::running(paths).is_some_and(|now| !now.is_same_process(owner));
    terminate(
        owner,
        TERM_TIMEOUT,
        || match LockOwner::running(paths).map(|owner| owner.up_to_date(paths)) {
            Some(now) if !now.is_same_process(owner) => ControlFlow::Break(None),
            Some(now) if !now.is_unresponsive() => {
                log::warn!(
                    "the agent with pid {pid} responds again; it may still stop, then a later call starts a new one"
                );
                ControlFlow::Break(None)
            }
            // A process that has ended has released its lock.
            _ => ControlFlow::Continue(()),
        },
        |signal| match try_lock(paths)? {
            Some(lock) => {
                log::warn!("the agent with pid {pid} ended after {signal}; pid {} takes over", std::process::id());
                Ok(Some(Some(lock)))
            }
            None => Ok(was_replaced().then_some(None)),
        },
    )
}

fn try_lock(paths: &AgentPaths) -> Result<Option<InstanceLock>, TakeoverError> {
    match InstanceLock::acquire(paths) {
        Ok(lock) => Ok(Some(lock)),
        Err(LockError::Held(_) | LockError::HeldElsewhere(_)) => Ok(None),
        Err(e) => Err(TakeoverError::NoLock(e)),
    }
}
