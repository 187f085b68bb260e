//! `pause` and `resume`: whether anything is offered. The wish is a file beside the identity, so that it outlives the agent.

use std::thread;
use std::time::{Duration, Instant};

use super::args::Globals;
use super::{CliError, places_of, print};
use crate::instance::wake_socket;
use crate::instance::{AgentPaths, LockOwner};
use crate::observe;
use crate::sys::files;

/// A running agent heeds the wish in milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// One that has no socket to be woken by heeds it with its next heartbeat.
const PATIENCE_UNHEARD: Duration = Duration::from_secs(20);
/// How often its state file is looked at meanwhile.
const GLANCE: Duration = Duration::from_millis(20);

/// Has the offer emptied, now and at every start, until [`resume`].
pub fn pause(globals: &Globals) -> Result<(), CliError> {
    let paths = places_of(globals)?;
    files::create_marker(&paths.paused()).map_err(|e| {
        CliError::Runtime(format!("failed to make `{}`: {e}; nothing is paused", paths.paused().display()))
    })?;
    print(&match heeded(&paths, true)? {
        None => "paused: no agent runs; the next one will offer nothing until `usepod-agent resume`\n".to_owned(),
        Some(0) => "paused: nothing is offered until `usepod-agent resume`\n".to_owned(),
        Some(jobs) => {
            format!("paused: nothing is offered until `usepod-agent resume`; {jobs} job(s) in flight finish\n")
        }
    });
    Ok(())
}

/// Undoes [`pause`].
pub fn resume(globals: &Globals) -> Result<(), CliError> {
    let paths = places_of(globals)?;
    files::remove_marker(&paths.paused()).map_err(|e| {
        CliError::Runtime(format!("failed to remove `{}`: {e}; still paused", paths.paused().display()))
    })?;
    print(match heeded(&paths, false)? {
        None => "not paused; no agent runs\n",
        Some(_) => "not paused: the agent offers its models\n",
    });
    Ok(())
}

/// Waits until the running agent, if there is one, has heeded the wish; returns its jobs in flight.
fn heeded(paths: &AgentPaths, paused: bool) -> Result<Option<u64>, CliError> {
    let patience = if wake_socket::wake_process(&paths.wake()) { PATIENCE } else { PATIENCE_UNHEARD };
    let until = Instant::now() + patience;
    while let Some(owner) = LockOwner::running(paths) {
        wake_socket::wake_process(&paths.wake());
        if let Some(state) = observe::read_own(paths, &owner).filter(|state| state["paused"] == paused) {
            return Ok(state["jobs"]["in_flight"].as_u64().or(Some(0)));
        }
        if Instant::now() >= until {
            return Err(CliError::Runtime(format!(
                "the agent (pid {}) has not answered within {} s; the wish is noted, and it will heed it when it can: see `usepod-agent status`",
                owner.pid,
                patience.as_secs()
            )));
        }
        thread::sleep(GLANCE);
    }
    Ok(None)
}
