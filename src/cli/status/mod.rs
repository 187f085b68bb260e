//! `status`: whether the agent is serving, and if not, why. Exit codes for health checks: 0 serving, 1 running but not serving, 3
//! not running.

mod render;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::args::{Globals, Status};
use super::{CliError, agent_paths, print, print_error, try_print};
use crate::instance::wake_socket;
use crate::instance::{AgentPaths, LIVENESS_TIMEOUT, LockOwner};
use crate::observe;
use crate::sys::terminal::Terminal;

/// The exit code for an agent that is running but not serving.
const NOT_SERVING: u8 = 1;
/// The exit code if no agent is running.
const NOT_RUNNING: u8 = 3;

/// How long a running agent has to rewrite its state file; it takes a millisecond.
const REFRESH_TIMEOUT: Duration = Duration::from_millis(500);
/// The time between two looks at the file meanwhile.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// The time between two pages of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Prints the state of the agent, once or every second.
pub fn run(globals: &Globals, options: &Status) -> Result<(), CliError> {
    let paths = match agent_paths(globals) {
        // Without a configuration no agent is running.
        Err(CliError::Config(e)) if e.is_not_found() => {
            print_error(&CliError::Config(e));
            return Err(CliError::AlreadyReported(NOT_RUNNING));
        }
        paths => paths?,
    };
    let terminal = Terminal::of_stdout();
    let text = |state: &Value| if options.json { format!("{state}\n") } else { render::page(state, terminal) };
    if !options.watch {
        let state = current_state(&paths);
        print(&text(&state));
        return verdict(&state);
    }
    loop {
        let text = text(&current_state(&paths));
        // Each line is cleared behind its end, and the screen below the page.
        let redraws = terminal.is_live && !options.json;
        let page = if redraws { format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")) } else { text };
        if try_print(&page).is_err() {
            return Ok(());
        }
        thread::sleep(WATCH_INTERVAL);
    }
}

fn verdict(state: &Value) -> Result<(), CliError> {
    match (state["running"] == true, state["serving"] == true) {
        (true, true) => Ok(()),
        (true, false) => Err(CliError::AlreadyReported(NOT_SERVING)),
        (false, _) => Err(CliError::AlreadyReported(NOT_RUNNING)),
    }
}

/// The state file, refreshed by the agent if it responds, and what the lock says about the agent.
fn current_state(paths: &AgentPaths) -> Value {
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
    let mut state = refreshed(paths, &owner).unwrap_or_else(|| json!({"state": "starting", "serving": false}));
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

/// Has the agent rewrite its state file and waits for that; if the agent hangs, its last state. A state that an agent at work has
/// not rewritten for long no longer says whether it serves.
fn refreshed(paths: &AgentPaths, owner: &LockOwner) -> Option<Value> {
    let read = || observe::read_own(paths, owner);
    let before = read();
    let is_woken = wake_socket::wake_process(&paths.wake());
    let count = |state: &Option<Value>| state.as_ref().and_then(|state| state["written"].as_u64());
    let deadline = Instant::now() + REFRESH_TIMEOUT;
    while is_woken && Instant::now() < deadline {
        let now = read();
        if count(&now) > count(&before) {
            return now;
        }
        thread::sleep(POLL_INTERVAL);
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
