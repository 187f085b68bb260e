//! `service`: installs, starts, stops and shows the agent under a supervisor.
//!
//! The configuration is the file that the installed supervisor names, unless `--config` names another.

mod install;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::LevelFilter;
use nix::unistd::User;

use super::args::{Action, Globals, Service};
use super::stdout::Stdout;
use super::{CliError, print, print_error};
use crate::config::Config;
use crate::instance::{AgentPaths, LockOwner, running_agent};
use crate::logging::{self, rotated_path};
use crate::service::crontab::Crontab;
use crate::service::systemd::{self, UNIT, Unit};
use crate::service::{
    STOP_MARGIN, Supervisor, command, exit_text, is_cron_running, logs, start_like_cron, terminate, wait_until,
};
use crate::sys::file_access::with_access_of;
use crate::sys::printable::PrintableWriter;
use crate::sys::terminal::{Terminal, wrap};
use crate::sys::{files, operator_path, user};

/// The exit code of `status` if no agent is running, and of the other actions if no supervisor is installed.
const NOT_RUNNING: u8 = 3;
/// The exit code of `status` if the agent runs where it cannot be seen, or if it is unknown whether one is running.
const UNKNOWN: u8 = 1;
/// The time an agent may take to acquire its lock.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// The time within which an agent that cannot serve exits.
const SETTLE_TIME: Duration = Duration::from_millis(500);
/// The number of log lines printed after a failed start.
const FAILURE_LINES: usize = 10;

/// Runs the action.
pub fn run(globals: &Globals, options: &Service) -> Result<(), CliError> {
    logging::start(globals.log_level.unwrap_or(LevelFilter::Warn), None);
    if options.systemd && options.action != Action::Install {
        return Err(CliError::Usage(
            "`--systemd` is an option of `service install`; the other actions use what is installed".into(),
        ));
    }
    if (options.follow || options.lines.is_some()) && options.action != Action::Logs {
        return Err(CliError::Usage("`--follow` and `--lines` are options of `service logs`".into()));
    }
    match options.action {
        Action::Install => install::run(globals, options.systemd),
        Action::Uninstall => uninstall(globals),
        Action::Start => start(globals),
        Action::Stop => stop(globals),
        Action::Restart => restart(globals),
        Action::Status => status(globals),
        Action::Logs => print_logs(globals, options),
    }
}

/// The agent that an action applies to.
struct ServiceTarget {
    path: PathBuf,
    key_path: PathBuf,
    paths: AgentPaths,
    log: PathBuf,
    /// Whether the configuration names a log file; otherwise the log is in systemd's journal.
    is_log_named: bool,
    drain: Duration,
    /// The environment variables that contain the agent's API keys.
    keys: Vec<String>,
    /// The user that a system unit runs the agent as. Root acts with their permissions on the files that the configuration names.
    user: Option<User>,
}

impl ServiceTarget {
    /// Loads a configuration as a supervisor does: with the home folder as the working folder.
    fn load(path: &Path, allow_insecure: bool, supervisor: Option<&Unit>) -> Result<ServiceTarget, CliError> {
        let path = operator_path::absolute(path)
            .map_err(|e| CliError::Runtime(format!("the working folder does not exist: {e}")))?;
        let home = user::home().unwrap_or_default();
        let _ = std::env::set_current_dir(&home);
        let config = Config::load(&path, allow_insecure)?;
        // A system unit runs as the owner of the file, whose home folder is not root's.
        let user = supervisor.filter(|unit| !unit.is_users).map(|_| systemd::owner_of(&path)).transpose()?;
        let owners_home = user.as_ref().map_or_else(|| home.clone(), |user| user.dir.clone());
        let in_owners_home = |file: &Path| {
            let file = home.join(file);
            file.strip_prefix(&home).map(|below| owners_home.join(below)).unwrap_or(file)
        };
        let key_path = in_owners_home(&config.key_path);
        let paths = AgentPaths::beside(&key_path);
        let log = config.log_file.as_deref().map_or_else(|| paths.log(), in_owners_home);
        let is_log_named = config.log_file.is_some();
        let keys = config.backends.into_iter().filter_map(|backend| backend.api_key_env).collect();
        Ok(ServiceTarget { path, key_path, paths, log, is_log_named, drain: config.limits.drain, keys, user })
    }

    /// Acts on the agent's files with the permissions that the agent has.
    fn with_access<T: Send>(&self, action: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        match &self.user {
            Some(user) => with_access_of(user, action)?,
            None => action(),
        }
    }

    /// The last lines of the log, for an error.
    fn end_of_log(&self) -> String {
        let log = &self.log;
        let text = self.with_access(|| logs::tail(log, &rotated_path(log), FAILURE_LINES)).unwrap_or_default();
        if text.is_empty() {
            return format!("its log, `{}`, is empty; to see the error, run `usepod-agent run`", log.display());
        }
        format!("the last lines of its log, `{}`:\n{}", log.display(), String::from_utf8_lossy(&text).trim_end())
    }
}

/// The installed supervisor, and the agent that it runs.
fn installed(globals: &Globals) -> Result<(Option<Supervisor>, ServiceTarget), CliError> {
    let supervisor = Supervisor::installed()?;
    let target = target_of(globals, supervisor.as_ref())?;
    Ok((supervisor, target))
}

fn target_of(globals: &Globals, supervisor: Option<&Supervisor>) -> Result<ServiceTarget, CliError> {
    let supervised = supervisor.and_then(Supervisor::config).map(PathBuf::from);
    let path = match (&globals.config, supervised) {
        (None, Some(supervised)) => supervised,
        (named, _) => Config::find(named.as_deref())?,
    };
    let unit = match supervisor {
        Some(Supervisor::Systemd(unit)) => Some(unit),
        _ => None,
    };
    // None of these actions connects to the coordinator, so ws:// is no risk.
    ServiceTarget::load(&path, true, unit)
}

fn uninstall(globals: &Globals) -> Result<(), CliError> {
    let supervisor = Supervisor::installed()?;
    let Some(supervisor) = supervisor else {
        print("not installed; nothing was changed\n");
        return Ok(());
    };
    // A configuration that can no longer be read must not prevent the removal.
    let target = target_of(globals, Some(&supervisor));
    if let Ok(target) = &target {
        mark_stopped(target)?;
    }
    match &supervisor {
        Supervisor::Cron(table) => Crontab::write(&table.without_block()),
        Supervisor::Systemd(unit) => unit.uninstall(),
    }?;
    print_wrapped(&format!("removed: {}", supervisor.description()));
    let target = target?;
    let ended = stop_running(&target);
    // The marker is meant for the supervisor, which is now removed.
    let _ = target.with_access(|| files::remove_marker(&target.paths.stopped()));
    ended
}

/// Keeps the supervisor from starting the agent.
fn mark_stopped(target: &ServiceTarget) -> Result<(), CliError> {
    let marker = target.paths.stopped();
    target.with_access(|| files::create_marker(&marker)).map_err(|e| {
        CliError::Runtime(format!(
            "failed to create `{}`, without which the agent would be started again: {e}; check the permissions of its folder",
            marker.display()
        ))
    })
}

fn stop(globals: &Globals) -> Result<(), CliError> {
    let (supervisor, target) = installed(globals)?;
    mark_stopped(&target)?;
    if let Some(Supervisor::Systemd(unit)) = &supervisor {
        unit.systemctl(&["stop", UNIT])?;
    }
    stop_running(&target)?;
    print_wrapped("the agent stays stopped until `usepod-agent service start`");
    Ok(())
}

/// Stops the running agent, regardless of how it was started.
fn stop_running(target: &ServiceTarget) -> Result<(), CliError> {
    let running = running_agent(&target.paths);
    // The owner of the lock file controls the pid in it, and must not have this process kill that of another user.
    if !matches!(running, Ok(Some(_)))
        && let Some(pid) = LockOwner::foreign(&target.paths)
    {
        let lock = target.paths.lock();
        return Err(CliError::Runtime(format!(
            "`{}` names pid {pid}, a process of another user; if that is the agent, stop it by hand: kill {pid}",
            lock.display()
        )));
    }
    let Some(owner) = running.map_err(|e| e.to_string())? else {
        print("no agent is running\n");
        return Ok(());
    };
    let (began, timeout) = (Instant::now(), target.drain + STOP_MARGIN);
    let pid = owner.pid;
    print_wrapped(&format!("stopping pid {pid}: it finishes its jobs; waiting up to {} s", timeout.as_secs()));
    let is_killed = terminate(&owner, timeout)?;
    let how = if is_killed { "did not exit and was killed" } else { "exited" };
    print_wrapped(&format!("pid {pid} {how} after {} ms", began.elapsed().as_millis()));
    Ok(())
}

fn start(globals: &Globals) -> Result<(), CliError> {
    let (supervisor, target) = installed(globals)?;
    let supervisor = supervisor.ok_or_else(|| not_installed(globals))?;
    start_by(&supervisor, &target, "start")
}

fn restart(globals: &Globals) -> Result<(), CliError> {
    let (supervisor, target) = installed(globals)?;
    let supervisor = supervisor.ok_or_else(|| not_installed(globals))?;
    // Under cron, either this process or cron starts the agent, with the same command; the lock decides which.
    if matches!(supervisor, Supervisor::Cron(_)) {
        stop_running(&target)?;
    }
    start_by(&supervisor, &target, "restart")
}

fn start_by(supervisor: &Supervisor, target: &ServiceTarget, verb: &str) -> Result<(), CliError> {
    let marker = target.paths.stopped();
    target
        .with_access(|| files::remove_marker(&marker))
        .map_err(|e| format!("failed to remove `{}`, which keeps the agent stopped: {e}", marker.display()))?;
    let mut child = None;
    match supervisor {
        Supervisor::Systemd(unit) => unit.systemctl(&[verb, UNIT])?,
        Supervisor::Cron(_) if running_agent(&target.paths).map_err(|e| e.to_string())?.is_some() => {}
        Supervisor::Cron(table) => {
            let started = start_like_cron(table);
            child = Some(started.map_err(|e| CliError::Runtime(format!("failed to start a shell: {e}")))?);
        }
    }
    let mut exit = None;
    let mut has_failed = || {
        exit = child.as_mut().and_then(|child| child.try_wait().ok().flatten());
        // An agent that exits with 0 has found an agent that cron started at the same time.
        exit.is_some_and(|status| !status.success())
    };
    let running = || running_agent(&target.paths).ok().flatten();
    let runs = || running().is_some();
    let is_up = wait_until(START_TIMEOUT, || has_failed() || runs()) && runs();
    // The agent acquires the lock before it reads its identity, which may fail.
    if is_up
        && !wait_until(SETTLE_TIME, || has_failed() || !runs())
        && let Some(owner) = running()
    {
        out!("the agent is running as pid {}\n", owner.pid);
        return Ok(());
    }
    let how = match exit {
        Some(status) if !status.success() => format!("the agent exited at once ({})", exit_text(status)),
        exit if is_up || exit.is_some() => "the agent exited at once".to_owned(),
        _ => format!("no agent is running after {} s", START_TIMEOUT.as_secs()),
    };
    Err(CliError::Runtime(format!("{how}; {}", target.end_of_log())))
}

fn not_installed(globals: &Globals) -> CliError {
    match Config::find(globals.config.as_deref()) {
        Err(e) => print_error(&CliError::Config(e)),
        Ok(_) => {
            print_wrapped("not installed; to have cron keep the agent running: `usepod-agent service install`");
        }
    }
    CliError::AlreadyReported(NOT_RUNNING)
}

fn status(globals: &Globals) -> Result<(), CliError> {
    let supervisor = Supervisor::installed()?;
    let Some(supervisor) = supervisor else { return Err(not_installed(globals)) };
    print_line("supervisor", &supervisor.description());
    let target = target_of(globals, Some(&supervisor))?;
    let is_stopped = target.paths.stopped().exists();
    let running = running_agent(&target.paths).inspect_err(|e| print_line("agent", &e.to_string()));
    let Some(owner) = running.map_err(|_| CliError::AlreadyReported(UNKNOWN))? else {
        match is_stopped {
            true => print_line("agent", "stopped by the operator until `usepod-agent service start`"),
            false => print_line("agent", "not running; `usepod-agent service logs` says why"),
        }
        if matches!(supervisor, Supervisor::Cron(_)) && is_cron_running() == Some(false) {
            print_line("cron", "no cron daemon seems to be running, so nothing starts the agent");
        }
        return Err(CliError::AlreadyReported(NOT_RUNNING));
    };
    let silence = owner.since_last_liveness().as_secs();
    print_line("agent", &format!("running as pid {}, last sign of life {silence} s ago", owner.pid));
    if is_stopped {
        print_line("", "it is stopping, after `service stop`");
    }
    Ok(())
}

fn print_line(label: &str, text: &str) {
    print(&wrap(&format!("{label:12}"), text, Terminal::of_stdout().width));
}

fn print_wrapped(text: &str) {
    print(&wrap("", text, Terminal::of_stdout().width));
}

fn print_logs(globals: &Globals, options: &Service) -> Result<(), CliError> {
    let lines = options.lines.unwrap_or(100);
    let (supervisor, target) = installed(globals)?;
    if let (Some(Supervisor::Systemd(unit)), false) = (&supervisor, target.is_log_named) {
        let lines = lines.to_string();
        let mut journalctl = command("journalctl");
        journalctl.args(unit.scope()).args(["-u", UNIT, "-n", &lines]).args(options.follow.then_some("-f"));
        return match journalctl.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(CliError::Runtime(format!("`journalctl` failed: {}", exit_text(status)))),
            Err(e) => Err(CliError::Runtime(format!("failed to run `journalctl`: {e}"))),
        };
    }
    let log = &target.log;
    let printed = target.with_access(|| {
        let mut stdout = PrintableWriter(Stdout);
        if options.follow {
            return logs::follow(log, &rotated_path(log), lines, &mut stdout);
        }
        // `Stdout` records the error.
        logs::tail(log, &rotated_path(log), lines).map(|text| drop(stdout.write_all(&text)))
    });
    printed.map_err(|e| CliError::Runtime(format!("failed to read `{}`: {e}", log.display())))
}
