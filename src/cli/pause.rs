//! `pause` and `resume`: withdraw and restore the offer. The request is a marker file beside the identity, so that it outlives
//! the agent.

use std::thread;
use std::time::{Duration, Instant};

use super::args::Globals;
use super::{CliError, agent_paths};
use crate::instance::wake_socket;
use crate::instance::{AgentPaths, LockOwner};
use crate::observe::State;
use crate::sys::files;

/// How long to wait for an agent that can be woken, which takes milliseconds.
const APPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for an agent without a wake socket, which notices the request at its next heartbeat.
const APPLY_TIMEOUT_NO_SOCKET: Duration = Duration::from_secs(20);
/// The time between two reads of the state file while waiting.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Withdraws the offer, now and at every start, until [`resume`].
pub fn pause(globals: &Globals) -> Result<(), CliError> {
    let paths = agent_paths(globals)?;
    files::create_marker(&paths.paused()).map_err(|e| {
        CliError::Runtime(format!("failed to create `{}`: {e}; nothing is paused", paths.paused().display()))
    })?;
    match wait_applied(&paths, true)? {
        None => out!("paused: no agent is running; the next one will offer nothing until `usepod-agent resume`\n"),
        Some(0) => out!("paused: nothing is offered until `usepod-agent resume`\n"),
        Some(jobs) => {
            out!("paused: nothing is offered until `usepod-agent resume`; {jobs} job(s) in flight will finish\n");
        }
    }
    Ok(())
}

/// Undoes [`pause`].
pub fn resume(globals: &Globals) -> Result<(), CliError> {
    let paths = agent_paths(globals)?;
    files::remove_marker(&paths.paused()).map_err(|e| {
        CliError::Runtime(format!("failed to remove `{}`: {e}; still paused", paths.paused().display()))
    })?;
    match wait_applied(&paths, false)? {
        None => out!("not paused; no agent is running\n"),
        Some(_) => out!("not paused: the agent offers its models\n"),
    }
    Ok(())
}

/// Waits until the running agent, if there is one, has applied the request. Returns its jobs in flight.
fn wait_applied(paths: &AgentPaths, paused: bool) -> Result<Option<u32>, CliError> {
    let has_socket = wake_socket::wake_process(&paths.wake());
    let timeout = if has_socket { APPLY_TIMEOUT } else { APPLY_TIMEOUT_NO_SOCKET };
    let deadline = Instant::now() + timeout;
    while let Some(owner) = LockOwner::running(paths) {
        wake_socket::wake_process(&paths.wake());
        if let Some(state) = State::read_own(paths, &owner).filter(|state| state.paused == paused) {
            return Ok(Some(state.jobs.in_flight));
        }
        if Instant::now() >= deadline {
            return Err(CliError::Runtime(format!(
                "the agent (pid {}) has not responded within {} s; the request is recorded and will take effect as soon as the \
                 agent responds: see `usepod-agent status`",
                owner.pid,
                timeout.as_secs()
            )));
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(None)
}
