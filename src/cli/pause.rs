//! `pause` and `resume`: withdraw and restore the offer. The request is a marker file beside the identity, so that it outlives
//! the agent.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::args::Globals;
use super::{CliError, agent_paths};
use crate::config::Config;
use crate::instance::wake_socket;
use crate::instance::{AgentPaths, LockError, running_agent};
use crate::observe::State;
use crate::sys::shell_quote::shell_quote;
use crate::sys::{files, operator_path};

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
        Applied::Elsewhere => {
            out!(
                "paused: the agent, in another container or on another host, offers nothing from its next heartbeat on\n"
            );
        }
        Applied::NoAgent => {
            out!("paused: no agent is running; the next one will offer nothing until `usepod-agent resume`\n")
        }
        Applied::InFlight(0) => out!("paused: nothing is offered until `usepod-agent resume`\n"),
        Applied::InFlight(jobs) => {
            out!("paused: nothing is offered until `usepod-agent resume`; {jobs} job(s) in flight will finish\n");
        }
    }
    if let Ok(program) = operator_path::this_program() {
        out!("for a schedule, paste lines like these with `crontab -e`:\n");
        for (hour, command) in [(18, "pause"), (23, "resume")] {
            out!("  {}\n", crontab_line(hour, &program, command, globals.config.as_deref()));
        }
    }
    Ok(())
}

/// A crontab line that runs this program each day. cron's PATH does not contain it, and cron treats `%` as a line end.
fn crontab_line(hour: u32, program: &Path, command: &str, config: Option<&Path>) -> String {
    let word = |path: &Path| shell_quote(&path.to_string_lossy()).replace('%', "\\%");
    let config = config.and_then(|path| operator_path::absolute(&Config::named(path)).ok());
    let config = config.map_or_else(String::new, |path| format!(" --config {}", word(&path)));
    // stdout is discarded, because cron would mail it. Errors are still mailed.
    format!("0 {hour} * * * {} {command}{config} >/dev/null", word(program))
}

/// Undoes [`pause`].
pub fn resume(globals: &Globals) -> Result<(), CliError> {
    let paths = agent_paths(globals)?;
    files::remove_marker(&paths.paused()).map_err(|e| {
        CliError::Runtime(format!("failed to remove `{}`: {e}; still paused", paths.paused().display()))
    })?;
    match wait_applied(&paths, false)? {
        Applied::Elsewhere => {
            out!(
                "not paused: the agent, in another container or on another host, offers its models from its next heartbeat on\n"
            );
        }
        Applied::NoAgent => out!("not paused; no agent is running\n"),
        Applied::InFlight(_) => out!("not paused: the agent offers its models\n"),
    }
    Ok(())
}

/// Who has applied a request.
enum Applied {
    /// No agent is running; the next one will.
    NoAgent,
    /// The running agent, which has this many jobs in flight.
    InFlight(u32),
    /// An agent that cannot be seen from here will.
    Elsewhere,
}

/// Waits until the running agent, if there is one, has applied the request.
fn wait_applied(paths: &AgentPaths, paused: bool) -> Result<Applied, CliError> {
    let has_socket = wake_socket::wake_process(&paths.wake());
    let timeout = if has_socket { APPLY_TIMEOUT } else { APPLY_TIMEOUT_NO_SOCKET };
    let deadline = Instant::now() + timeout;
    loop {
        let owner = match running_agent(paths) {
            Ok(Some(owner)) => owner,
            Ok(None) => return Ok(Applied::NoAgent),
            Err(LockError::HeldElsewhere(_)) => return Ok(Applied::Elsewhere),
            Err(e) => return Err(CliError::Runtime(format!("the request is recorded; {e}"))),
        };
        wake_socket::wake_process(&paths.wake());
        if let Some(state) = State::read_own(paths, &owner).filter(|state| state.paused == paused) {
            return Ok(Applied::InFlight(state.jobs.in_flight));
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
}
