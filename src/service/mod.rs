//! Who starts the agent, and starts it again: cron, or systemd where the operator prefers it.
//!
//! Invariants: one supervisor at a time; what the operator has stopped stays so under both, by the file
//! [`AgentPaths::stopped`](crate::instance::AgentPaths::stopped); a signal goes to the process that holds the lock and to no other.

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
use nix::unistd::{Uid, User};

use crate::instance::LockOwner;
use crate::instance::terminate::{self, TerminateError};
use crontab::Crontab;
use systemd::Unit;

/// How often a process is looked at that is to end or to start.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Between the end of the drain and SIGKILL.
pub const STOP_MARGIN: Duration = Duration::from_secs(15);
/// What cron has its commands find.
const CRON_PATH: &str = "/usr/bin:/bin";

/// What the supervisor starts.
#[derive(Debug, Clone)]
pub struct ServiceCommand {
    /// The program, as an absolute path.
    pub binary: String,
    /// The configuration file, as an absolute path.
    pub config: String,
    /// `--log-level`, if it was given.
    pub log_level: Option<LevelFilter>,
    /// `--allow-insecure`.
    pub allow_insecure: bool,
}

impl ServiceCommand {
    /// A path that every supervisor can be told.
    ///
    /// # Errors
    /// It holds what they cannot carry.
    pub fn path(path: &Path) -> Result<String, String> {
        let shown = path.to_string_lossy();
        match path.to_str() {
            // A backslash before `%` is read differently by every cron.
            Some(text) if !text.contains(|c: char| c.is_control() || c == '\\') => Ok(text.to_owned()),
            _ => Err(format!(
                "`{}`: no supervisor can be given a path with a line end, a backslash or what is not UTF-8; rename it",
                shown.escape_debug()
            )),
        }
    }

    /// The options behind the configuration file.
    fn options(&self) -> Vec<String> {
        let level = self.log_level.map(|level| format!("--log-level {}", level.as_str().to_ascii_lowercase()));
        level.into_iter().chain(self.allow_insecure.then(|| "--allow-insecure".into())).collect()
    }
}

/// Who supervises the agent of this user.
pub enum Supervisor {
    /// cron, by the block in this crontab.
    Cron(Crontab),
    /// systemd, by this unit.
    Systemd(Unit),
}

impl Supervisor {
    /// The one that is installed.
    ///
    /// # Errors
    /// The crontab cannot be read, or somebody edited the block in it.
    pub fn installed() -> Result<Option<Supervisor>, String> {
        if let Some(unit) = Unit::installed() {
            return Ok(Some(Supervisor::Systemd(unit)));
        }
        Ok(Crontab::read()?.filter(|table| table.command().is_some()).map(Supervisor::Cron))
    }

    /// The configuration file that it was given.
    pub fn config(&self) -> Option<String> {
        match self {
            Supervisor::Cron(table) => table.config(),
            Supervisor::Systemd(unit) => unit.config(),
        }
    }

    /// Where it was installed, in a few words.
    pub fn description(&self) -> String {
        match self {
            Supervisor::Cron(_) => "cron, by your crontab".into(),
            Supervisor::Systemd(unit) => format!("systemd, by `{}`", unit.path.display()),
        }
    }
}

/// A program on the PATH, with its messages in English: some of them are recognized.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C");
    command
}

/// Why a program failed: its error messages, or how it ended when it wrote none.
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

/// Starts what cron would start, as cron would: its shell, its environment. In a process group of its own, so that closing the
/// terminal does not end it.
///
/// # Errors
/// There is no shell.
pub fn start_like_cron(table: &Crontab) -> io::Result<Child> {
    let mut variables = table.environment();
    // The crontab's own win.
    for (name, value) in [
        ("HOME", std::env::var("HOME").unwrap_or_default()),
        ("LOGNAME", this_user().map(|user| user.name).unwrap_or_default()),
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

/// Who runs this, by the box's own list.
pub fn this_user() -> Option<User> {
    User::from_uid(Uid::effective()).ok().flatten()
}

/// Whether a cron daemon runs; `None` where that cannot be seen.
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
/// A signal was refused, or the process outlived SIGKILL.
pub fn terminate(owner: &LockOwner, grace: Duration) -> Result<bool, String> {
    let before_signal = || if owner.is_running() { ControlFlow::Continue(()) } else { ControlFlow::Break(false) };
    let has_ended = |signal| Ok((!owner.is_running()).then_some(signal == Signal::SIGKILL));
    terminate::terminate(owner, grace, before_signal, has_ended).map_err(|e: TerminateError| e.to_string())
}

/// Whether `holds` did within `limit`.
pub fn wait_until(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    loop {
        if holds() {
            return true;
        }
        if began.elapsed() >= limit {
            return false;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
