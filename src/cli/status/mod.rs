//! `status`: whether the agent serves, and why not. Exit codes for health checks: 0 serving, 1 running but not serving, 3 not
//! running.

mod render;

use std::fs;
use std::io::IsTerminal;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::args::{Globals, Status};
use super::{CliError, places_of, print, try_print};
use crate::instance::wake_socket;
use crate::instance::{AgentPaths, LIVENESS_TIMEOUT, LockOwner};
use crate::observe;

/// The exit code of an agent that runs and does not serve.
const NOT_SERVING: u8 = 1;
/// The exit code where no agent runs.
const NOT_RUNNING: u8 = 3;

/// How long a running agent has to renew its state file; it takes a millisecond.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often the file is looked at meanwhile.
const GLANCE: Duration = Duration::from_millis(5);
/// Time between two looks of `--watch`.
const WATCH: Duration = Duration::from_secs(1);

/// Prints how the agent is, once or for ever.
pub fn run(globals: &Globals, options: &Status) -> Result<(), CliError> {
    let paths = places_of(globals)?;
    if !options.watch {
        let state = look(&paths);
        print(&shown(&state, options.json));
        return verdict(&state);
    }
    let redraw = std::io::stdout().is_terminal() && !options.json;
    loop {
        let shown = shown(&look(&paths), options.json);
        // The page, each line cleared behind its end, from the top of the screen on.
        let page = if redraw { format!("\x1b[H{}\x1b[J", shown.replace('\n', "\x1b[K\n")) } else { shown };
        if try_print(&page).is_err() {
            return Ok(());
        }
        thread::sleep(WATCH);
    }
}

fn verdict(state: &Value) -> Result<(), CliError> {
    match (state["running"] == true, state["serving"] == true) {
        (true, true) => Ok(()),
        (true, false) => Err(CliError::AlreadyReported(NOT_SERVING)),
        (false, _) => Err(CliError::AlreadyReported(NOT_RUNNING)),
    }
}

fn shown(state: &Value, as_json: bool) -> String {
    if as_json { format!("{state}\n") } else { render::of(state) }
}

/// The state file, as new as the agent can make it, and what the lock says of the agent.
fn look(paths: &AgentPaths) -> Value {
    let Some(owner) = LockOwner::running(paths) else {
        let mut state = observe::read(paths).unwrap_or_else(|_| json!({}));
        let last = state["state"].take();
        state["last_state"] = last;
        state["running"] = false.into();
        state["serving"] = false.into();
        state["state"] = if paths.stopped().exists() { "stopped" } else { "not_running" }.into();
        state["reason"] = Value::Null;
        state["paused"] = paths.paused().exists().into();
        return state;
    };
    let mut state = renewed(paths, &owner).unwrap_or_else(|| json!({"state": "starting", "serving": false}));
    let silence = owner.since_last_liveness();
    state["running"] = true.into();
    state["pid"] = owner.pid.into();
    state["silent_seconds"] = silence.as_secs().into();
    if owner.is_unresponsive() {
        state["state"] = "hung".into();
        state["serving"] = false.into();
        state["reason"] = format!("it has shown no sign of life for {} s", silence.as_secs()).into();
    }
    state
}

/// Asks for a new state and waits for it; a hung agent's old one is better than none. One that an agent at work has not renewed
/// for long says nothing any more of whether it serves.
fn renewed(paths: &AgentPaths, owner: &LockOwner) -> Option<Value> {
    let read = || observe::read_own(paths, owner);
    let before = read();
    let is_rung = wake_socket::wake_process(&paths.wake());
    let count = |state: &Option<Value>| state.as_ref().and_then(|state| state["written"].as_u64());
    let until = Instant::now() + PATIENCE;
    while is_rung && Instant::now() < until {
        let now = read();
        if count(&now) > count(&before) {
            return now;
        }
        thread::sleep(GLANCE);
    }
    let mut state = read().or(before)?;
    let age = fs::metadata(paths.state()).and_then(|found| found.modified()).map(|at| at.elapsed().unwrap_or_default());
    if let Some(age) = age.ok().filter(|age| *age >= LIVENESS_TIMEOUT) {
        (state["last_state"], state["since"]) = (state["state"].take(), Value::Null);
        state["state"] = "unknown".into();
        state["serving"] = false.into();
        let what = "it has not been able to write its state file for";
        state["reason"] = format!("{what} {} s; its log says why (is the disk full?)", age.as_secs()).into();
    }
    Some(state)
}
