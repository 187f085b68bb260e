//! The supervisor that starts and restarts the agent: cron, or systemd if the operator prefers it.
//!
//! Invariants: at most one supervisor is installed. An agent that the operator has stopped stays stopped under both, because of the
//! marker file [`AgentPaths::stopped`](crate::instance::AgentPaths::stopped). Only the owner of the lock is ever signaled.

pub mod crontab;
pub mod logs;
pub mod systemd;

use std::io;
use std::ops::ControlFlow;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use log::LevelFilter;
use nix::sys::signal::Signal;

use crate::instance::LockOwner;
use crate::instance::terminate::{self, TerminateError};
use crontab::Crontab;
use systemd::Unit;

use crate::sys::user;

/// How often [`wait_until`] checks its condition.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Time between the end of the drain timeout and SIGKILL.
pub const STOP_MARGIN: Duration = Duration::from_secs(15);
/// The PATH of cron's commands.
const CRON_PATH: &str = "/usr/bin:/bin";

/// The command that the supervisor runs.
#[derive(Debug, Clone)]
pub struct ServiceCommand {
    /// The absolute path of the program.
    pub binary: String,
    /// The absolute path of the configuration file.
    pub config: String,
    /// `--log-level`, if it was given.
    pub log_level: Option<LevelFilter>,
    /// `--allow-insecure`.
    pub allow_insecure: bool,
}

impl ServiceCommand {
    /// Checks that both supervisors can represent a path.
    ///
    /// # Errors
    /// The path contains characters that they cannot represent.
    pub fn path(path: &Path) -> Result<String, String> {
        match path.to_str() {
            // Implementations of cron differ in how they interpret a backslash before `%`.
            Some(text) if !text.contains(|c: char| c.is_control() || c == '\\') => Ok(text.to_owned()),
            _ => Err(format!(
                "`{}`: the path of a supervised agent must be UTF-8 without control characters and backslashes; rename it",
                path.to_string_lossy().escape_debug()
            )),
        }
    }

    /// The options after the configuration file.
    fn options(&self) -> Vec<String> {
        let level = self.log_level.map(|level| format!("--log-level {}", level.as_str().to_ascii_lowercase()));
        level.into_iter().chain(self.allow_insecure.then(|| "--allow-insecure".into())).collect()
    }
}

/// The supervisor of this user's agent.
pub enum Supervisor {
    /// cron, through the block in this crontab.
    Cron(Crontab),
    /// systemd, through this unit.
    Systemd(Unit),
}

impl Supervisor {
    /// The supervisor that is installed.
    ///
    /// # Errors
    /// The crontab cannot be read, or its block was edited.
    pub fn installed() -> Result<Option<Supervisor>, String> {
        if let Some(unit) = Unit::installed() {
            return Ok(Some(Supervisor::Systemd(unit)));
        }
        Ok(Crontab::read()?.filter(|table| table.command().is_some()).map(Supervisor::Cron))
    }

    /// The configuration file that the supervisor was installed with.
    pub fn config(&self) -> Option<String> {
        match self {
            Supervisor::Cron(table) => table.config(),
            Supervisor::Systemd(unit) => unit.config(),
        }
    }

    /// The program that the supervisor starts.
    pub fn program(&self) -> Option<String> {
        match self {
            Supervisor::Cron(table) => table.program(),
            Supervisor::Systemd(unit) => unit.program(),
        }
    }

    /// The name of the supervisor and where it is installed, for the operator.
    pub fn description(&self) -> String {
        match self {
            Supervisor::Cron(_) => "cron, in your crontab".into(),
            Supervisor::Systemd(unit) => format!("systemd, in `{}`", unit.path.display()),
        }
    }
}

/// A command that runs a program on the PATH with English messages, because some of them are parsed.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C");
    command
}

/// The reason why a program failed: its error messages, or its exit status if it wrote none.
pub fn error_text(output: &Output) -> String {
    match String::from_utf8_lossy(&output.stderr).trim() {
        "" => exit_text(output.status),
        messages => messages.to_owned(),
    }
}

/// `exit code 1`, `SIGKILL`.
pub fn exit_text(status: ExitStatus) -> String {
    let signal = status.signal().and_then(|number| Signal::try_from(number).ok());
    match (status.code(), signal) {
        (Some(code), _) => format!("exit code {code}"),
        (_, Some(signal)) => signal.to_string(),
        _ => status.to_string(),
    }
}

/// Starts the agent as cron would, with cron's shell and environment, in a process group of its own, so that closing the terminal
/// does not end it.
///
/// # Errors
/// The shell cannot be started.
pub fn start_like_cron(table: &Crontab) -> io::Result<Child> {
    let mut variables = table.environment();
    // Variables that the crontab sets take precedence.
    for (name, value) in [
        ("HOME", user::home().unwrap_or_default().to_string_lossy().into_owned()),
        ("LOGNAME", user::name()),
        ("SHELL", "/bin/sh".to_owned()),
        ("PATH", CRON_PATH.to_owned()),
    ] {
        if !variables.iter().any(|(known, _)| known == name) {
            variables.push((name.to_owned(), value));
        }
    }
    let shell = variables.iter().find(|(name, _)| name == "SHELL").map_or("/bin/sh", |(_, shell)| shell);
    Command::new(shell)
        .arg("-c")
        .arg(table.command().unwrap_or_default())
        .env_clear()
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

/// Whether a cron daemon is running; `None` if processes cannot be listed.
pub fn is_cron_running() -> Option<bool> {
    let is_cron = |entry: std::fs::DirEntry| {
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        ["cron", "crond", "fcron", "busybox-crond"].contains(&name.trim())
    };
    Some(std::fs::read_dir("/proc").ok()?.flatten().any(is_cron))
}

/// Terminates the agent: SIGTERM, then SIGKILL once `grace` has passed. Returns whether SIGKILL was needed.
///
/// # Errors
/// A signal was refused, or the process survived SIGKILL.
pub fn terminate(owner: &LockOwner, grace: Duration) -> Result<bool, String> {
    let before_signal = || if owner.is_running() { ControlFlow::Continue(()) } else { ControlFlow::Break(false) };
    let has_ended = |signal| Ok((!owner.is_running()).then_some(signal == Signal::SIGKILL));
    terminate::terminate(owner, grace, before_signal, has_ended).map_err(|e: TerminateError| e.to_string())
}

/// Waits until `condition` is true. Returns false if `timeout` passes first.
pub fn wait_until(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if began.elapsed() >= timeout {
            return false;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
