//! `status`: prints whether the agent is serving, and if not, why. Exit codes, for health checks: 0 serving, 1 running but not
//! serving, 3 not running.

mod render;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::args::{Globals, Status};
use super::{CliError, agent_paths, print_error, print_raw, try_print_raw};
use crate::config::Config;
use crate::instance::{AgentPaths, LIVENESS_TIMEOUT, LockError, LockOwner, running_agent};
use crate::instance::{identity, wake_socket};
use crate::observe::State;
use crate::sys::printable::printable_json;
use crate::sys::terminal::Terminal;

/// The state of an agent that cannot be seen, or that cannot write its state.
const UNKNOWN: &str = "unknown";
/// The exit code for an agent that is running but not serving.
const NOT_SERVING: u8 = 1;
/// The exit code if no agent is running.
const NOT_RUNNING: u8 = 3;

/// How long a running agent may take to rewrite its state file, which takes a millisecond.
const REFRESH_TIMEOUT: Duration = Duration::from_millis(500);
/// The time between two reads of the state file while waiting.
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
    let report = || Report::new(&paths, recorded_provider_id(globals).as_deref());
    let text = |report: &Report| match options.json {
        true => format!("{}\n", printable_json(&report.to_json().to_string())),
        false => render::page(report, terminal),
    };
    if !options.watch {
        let report = report();
        print_raw(&text(&report));
        return report.exit();
    }
    loop {
        let text = text(&report());
        // The rest of each line is cleared, and the screen below the page.
        let redraws = terminal.is_live && !options.json;
        let page = if redraws { format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")) } else { text };
        if try_print_raw(&page).is_err() {
            return Ok(());
        }
        thread::sleep(WATCH_INTERVAL);
    }
}

/// The provider id that the configuration records.
fn recorded_provider_id(globals: &Globals) -> Option<String> {
    let path = Config::find(globals.config.as_deref()).ok()?;
    Config::recorded_provider_id_in(&path).ok()?
}

/// The report of `status`: the state file, corrected by the lock file.
#[derive(Default)]
struct Report {
    state: State,
    /// Whether there is a state file. Without one, only a few keys of `state` are known.
    has_file: bool,
    is_running: bool,
    /// The state in the file, if it no longer applies.
    last_state: Option<String>,
    /// Time since the last sign of life of a running agent.
    silence: Option<Duration>,
    /// What the operator should do or know, beside what follows from the state.
    notes: Vec<String>,
}

impl Report {
    /// Makes a running agent refresh its state file, and reads it. `recorded` is the provider id of the pairing.
    fn new(paths: &AgentPaths, recorded: Option<&str>) -> Report {
        let mut report = match running_agent(paths) {
            Ok(Some(owner)) => Report::running(paths, &owner),
            Ok(None) => Report::not_running(paths),
            Err(e) => Report::unknown(paths, &e),
        };
        if report.is_running
            && let Some(warning) = identity::unexpected_provider_id(report.state.provider_id.as_deref(), recorded)
        {
            report.notes.push(format!("{warning}; {}", identity::UNEXPECTED_PROVIDER_ID_FIX));
        }
        report
    }

    /// The agent cannot be seen from here, or the lock does not show whether there is one.
    fn unknown(paths: &AgentPaths, why: &LockError) -> Report {
        let state = State { paused: paths.paused().exists(), ..State::default() };
        let is_running = matches!(why, LockError::HeldElsewhere(_));
        let notes = vec![why.fix()];
        let mut report = Report { state, has_file: false, is_running, last_state: None, silence: None, notes };
        report.replace(UNKNOWN, why.fault());
        report
    }

    fn not_running(paths: &AgentPaths) -> Report {
        let file = State::read(paths).ok();
        let state = if paths.stopped().exists() { "stopped" } else { "not_running" };
        Report {
            has_file: file.is_some(),
            is_running: false,
            last_state: file.as_ref().map(|file| file.state.clone()),
            silence: None,
            notes: Vec::new(),
            state: State {
                state: state.to_owned(),
                serving: false,
                reason: None,
                paused: paths.paused().exists(),
                ..file.unwrap_or_default()
            },
        }
    }

    fn running(paths: &AgentPaths, owner: &LockOwner) -> Report {
        let silence = owner.since_last_liveness();
        let (file, is_fresh) = refreshed(paths, owner);
        let starting = || State { state: "starting".to_owned(), paused: paths.paused().exists(), ..State::default() };
        let mut report = Report {
            has_file: file.is_some(),
            is_running: true,
            last_state: None,
            silence: Some(silence),
            notes: Vec::new(),
            state: State { pid: owner.pid, ..file.unwrap_or_else(starting) },
        };
        // A state that a working agent has not rewritten for a long time no longer shows whether the agent serves. A state that
        // was just rewritten does, whatever the clock of its file system shows.
        let is_old = |age: &Duration| report.has_file && !is_fresh && *age >= LIVENESS_TIMEOUT;
        let is_unwritable = |age: Duration| is_old(&age) || (report.has_file && !is_fresh && !owner.is_recorded);
        if file_age(paths).max(report.state.age()).is_some_and(is_unwritable) {
            let what = "it cannot write its files; its log says why (is the disk full? is it read-only?)";
            report.last_state = Some(report.state.state.clone());
            report.state.since = None;
            report.replace(UNKNOWN, what.to_owned());
        }
        if owner.is_unresponsive() {
            report.replace("hung", format!("it has shown no sign of life for {} s", silence.as_secs()));
        }
        report
    }

    /// Replaces the state from the file with `state`, in which the agent is not serving.
    fn replace(&mut self, state: &str, reason: String) {
        self.state.state = state.to_owned();
        self.state.serving = false;
        self.state.reason = Some(reason);
    }

    fn to_json(&self) -> Value {
        let mut json = json!(self.state);
        if !self.has_file {
            json =
                json!({"state": json["state"], "serving": false, "reason": json["reason"], "paused": json["paused"]});
        }
        if self.is_running && self.state.pid != 0 {
            json["pid"] = self.state.pid.into();
        }
        if !self.is_running || self.last_state.is_some() {
            json["last_state"] = self.last_state.clone().into();
        }
        json["running"] = self.is_running.into();
        json["notes"] = self.notes.clone().into();
        if let Some(silence) = self.silence {
            json["silent_seconds"] = silence.as_secs().into();
        }
        json
    }

    fn exit(&self) -> Result<(), CliError> {
        match (self.is_running, self.state.serving) {
            (true, true) => Ok(()),
            (false, _) if self.state.state != UNKNOWN => Err(CliError::AlreadyReported(NOT_RUNNING)),
            _ => Err(CliError::AlreadyReported(NOT_SERVING)),
        }
    }
}

/// Makes the agent rewrite its state file. Returns the new state and true, or, if the agent does not respond, the last state, if
/// any, and false.
fn refreshed(paths: &AgentPaths, owner: &LockOwner) -> (Option<State>, bool) {
    let read = || State::read_own(paths, owner);
    let before = read();
    let is_woken = wake_socket::wake_process(&paths.wake());
    let count = |state: &Option<State>| state.as_ref().map(|state| state.written);
    let deadline = Instant::now() + REFRESH_TIMEOUT;
    while is_woken && Instant::now() < deadline {
        let now = read();
        if count(&now) > count(&before) {
            return (now, true);
        }
        thread::sleep(POLL_INTERVAL);
    }
    (read().or(before), false)
}

/// Time since the state file was written.
fn file_age(paths: &AgentPaths) -> Option<Duration> {
    let written = fs::metadata(paths.state()).and_then(|found| found.modified()).ok()?;
    Some(written.elapsed().unwrap_or_default())
}
