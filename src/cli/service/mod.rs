//! `service`: the agent under a supervisor, installed, started, stopped and watched.
//!
//! What is installed says which configuration it is about, unless `--config` names one.

mod install;

use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::LevelFilter;
use nix::unistd::Uid;

use super::args::{Action, Globals, Service};
use super::{CliError, print, say};
use crate::config::Config;
use crate::instance::{AgentPaths, LockOwner};
use crate::logging::{self, rotated_path};
use crate::service::crontab::Crontab;
use crate::service::systemd::{self, UNIT, Unit};
use crate::service::{
    STOP_MARGIN, Supervisor, command, exit_text, is_cron_running, logs, start_like_cron, terminate, wait_until,
};
use crate::sys::files;

/// What `status` exits with when no agent runs, and the others when no supervisor is installed.
const NOT_RUNNING: u8 = 3;
/// What an agent may take from its start to its lock.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How soon one that cannot serve has ended.
const SETTLE_TIME: Duration = Duration::from_millis(500);
/// Lines of the log that are shown with a failed start.
const LINES_OF_FAILURE: usize = 10;

/// Does as it was told.
pub fn run(globals: &Globals, options: &Service) -> Result<(), CliError> {
    logging::start(globals.log_level.unwrap_or(LevelFilter::Warn), None);
    if options.systemd && options.action != Action::Install {
        return Err(CliError::Usage("--systemd goes with `service install`; the others find what is installed".into()));
    }
    if (options.follow || options.lines.is_some()) && options.action != Action::Logs {
        return Err(CliError::Usage("--follow and --lines go with `service logs`".into()));
    }
    match options.action {
        Action::Install => install::run(globals, options.systemd),
        Action::Uninstall => uninstall(globals),
        Action::Start => start(globals),
        Action::Stop => stop(globals),
        Action::Restart => restart(globals),
        Action::Status => status(globals),
        Action::Logs => show_logs(globals, options),
    }
}

/// The agent that is meant.
struct ServiceTarget {
    path: PathBuf,
    key_path: PathBuf,
    paths: AgentPaths,
    log: PathBuf,
    /// The configuration names it; otherwise systemd keeps what the agent says.
    is_log_named: bool,
    drain: Duration,
    /// The variables that hold its keys.
    keys: Vec<String>,
}

impl ServiceTarget {
    /// Of this configuration file, as a supervisor would read it: from the home folder, not from here.
    fn load(path: &Path, allow_insecure: bool, supervisor: Option<&Unit>) -> Result<ServiceTarget, CliError> {
        let path = std::path::absolute(path).map_err(|e| CliError::Runtime(format!("there is no folder here: {e}")))?;
        let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
        let _ = std::env::set_current_dir(&home);
        let config = Config::load(&path, allow_insecure)?;
        // The system's manager starts the agent as the owner of the file, whose home is another than that of root.
        let owner = supervisor.filter(|unit| !unit.is_users).and_then(|_| systemd::owner_of(&path));
        let theirs = owner.map_or_else(|| home.clone(), |(_, theirs)| theirs);
        let as_theirs = |file: &Path| {
            let file = home.join(file);
            file.strip_prefix(&home).map(|below| theirs.join(below)).unwrap_or(file)
        };
        let key_path = as_theirs(&config.key_path);
        let paths = AgentPaths::beside(&key_path);
        let log = config.log_file.as_deref().map_or_else(|| paths.log(), as_theirs);
        let is_log_named = config.log_file.is_some();
        let keys = config.backends.into_iter().filter_map(|backend| backend.api_key_env).collect();
        Ok(ServiceTarget { path, key_path, paths, log, is_log_named, drain: config.limits.drain, keys })
    }

    /// The last lines of the log, for an error.
    fn end_of_log(&self) -> String {
        let log = &self.log;
        let text = logs::tail(log, &rotated_path(log), LINES_OF_FAILURE).unwrap_or_default();
        if text.is_empty() {
            return format!("nothing is in its log, `{}`; by hand it tells why: usepod-agent run", log.display());
        }
        format!("the end of its log, `{}`:\n{}", log.display(), String::from_utf8_lossy(&text).trim_end())
    }
}

/// What is installed, and the agent that it is about.
fn found(globals: &Globals) -> Result<(Option<Supervisor>, ServiceTarget), CliError> {
    let supervisor = Supervisor::installed()?;
    let target = target_of(globals, supervisor.as_ref())?;
    Ok((supervisor, target))
}

fn target_of(globals: &Globals, supervisor: Option<&Supervisor>) -> Result<ServiceTarget, CliError> {
    let installed = supervisor.and_then(Supervisor::config).map(PathBuf::from);
    let path = match (&globals.config, installed) {
        (None, Some(installed)) => installed,
        (named, _) => Config::find(named.as_deref())?,
    };
    let unit = match supervisor {
        Some(Supervisor::Systemd(unit)) => Some(unit),
        _ => None,
    };
    // None of these commands dials.
    ServiceTarget::load(&path, true, unit)
}

fn uninstall(globals: &Globals) -> Result<(), CliError> {
    let supervisor = Supervisor::installed()?;
    let Some(supervisor) = supervisor else {
        print("not installed; nothing was changed\n");
        return Ok(());
    };
    // A configuration that cannot be read any more must not keep the supervisor.
    let target = target_of(globals, Some(&supervisor));
    if let Ok(target) = &target {
        keep_stopped(target)?;
    }
    match &supervisor {
        Supervisor::Cron(table) => Crontab::write(&table.without_block()),
        Supervisor::Systemd(unit) => unit.uninstall(),
    }?;
    say(format_args!("removed: {}\n", supervisor.description()));
    let target = target?;
    let ended = end_running(&target);
    // Without a supervisor there is nobody who must not start it.
    let _ = files::remove_marker(&target.paths.stopped());
    ended
}

/// Nobody starts it from here on.
fn keep_stopped(target: &ServiceTarget) -> Result<(), CliError> {
    let marker = target.paths.stopped();
    files::create_marker(&marker).map_err(|e| {
        CliError::Runtime(format!(
            "failed to make `{}`, without which the agent would come back: {e}; check the rights there",
            marker.display()
        ))
    })
}

fn stop(globals: &Globals) -> Result<(), CliError> {
    let (supervisor, target) = found(globals)?;
    keep_stopped(&target)?;
    if let Some(Supervisor::Systemd(unit)) = &supervisor {
        unit.systemctl(&["stop", UNIT])?;
    }
    end_running(&target)?;
    print("it stays stopped until: usepod-agent service start\n");
    Ok(())
}

/// Ends the agent that runs, whoever started it.
fn end_running(target: &ServiceTarget) -> Result<(), CliError> {
    let Some(owner) = LockOwner::running(&target.paths) else {
        print("no agent runs\n");
        return Ok(());
    };
    // Who owns the lock file says who holds it, and must not have root end what belongs to others.
    let user_of = |path: &Path| std::fs::metadata(path).map(|found| found.uid()).ok();
    let process = PathBuf::from(format!("/proc/{}", owner.pid));
    if Uid::effective().is_root() && user_of(&process) != user_of(&target.paths.lock()) {
        let (pid, lock) = (owner.pid, target.paths.lock());
        return Err(CliError::Runtime(format!(
            "`{}` names pid {pid}, of another user than its own; if that is the agent, end it by hand: kill {pid}",
            lock.display()
        )));
    }
    let (began, patience) = (Instant::now(), target.drain + STOP_MARGIN);
    say(format_args!("asked pid {} to finish its jobs and leave; waiting up to {} s\n", owner.pid, patience.as_secs()));
    let is_killed = terminate(&owner, patience)?;
    let how = if is_killed { "did not leave, so it was killed" } else { "has left" };
    say(format_args!("pid {} {how}, after {} ms\n", owner.pid, began.elapsed().as_millis()));
    Ok(())
}

fn start(globals: &Globals) -> Result<(), CliError> {
    let (supervisor, target) = found(globals)?;
    let supervisor = supervisor.ok_or_else(not_installed)?;
    start_by(&supervisor, &target, "start")
}

fn restart(globals: &Globals) -> Result<(), CliError> {
    let (supervisor, target) = found(globals)?;
    let supervisor = supervisor.ok_or_else(not_installed)?;
    // Under cron the lock decides who starts it again: we or cron, it is the same line.
    if matches!(supervisor, Supervisor::Cron(_)) {
        end_running(&target)?;
    }
    start_by(&supervisor, &target, "restart")
}

fn start_by(supervisor: &Supervisor, target: &ServiceTarget, verb: &str) -> Result<(), CliError> {
    let marker = target.paths.stopped();
    files::remove_marker(&marker)
        .map_err(|e| format!("failed to remove `{}`, which keeps the agent stopped: {e}", marker.display()))?;
    let mut child = None;
    match supervisor {
        Supervisor::Systemd(unit) => unit.systemctl(&[verb, UNIT])?,
        Supervisor::Cron(_) if LockOwner::running(&target.paths).is_some() => {}
        Supervisor::Cron(table) => {
            let started = start_like_cron(table);
            child = Some(started.map_err(|e| CliError::Runtime(format!("no shell can be started: {e}")))?);
        }
    }
    let mut exit = None;
    let mut has_failed = || {
        exit = child.as_mut().and_then(|child| child.try_wait().ok().flatten());
        // An agent that exits with 0 has found another at work, which cron started at this very moment.
        exit.is_some_and(|status| !status.success())
    };
    let runs = || LockOwner::running(&target.paths).is_some();
    let is_up = wait_until(START_TIMEOUT, || has_failed() || runs()) && runs();
    // It has the lock before it has read its identity.
    if is_up
        && !wait_until(SETTLE_TIME, || has_failed() || !runs())
        && let Some(owner) = LockOwner::running(&target.paths)
    {
        say(format_args!("the agent runs, as pid {}\n", owner.pid));
        return Ok(());
    }
    let how = match exit {
        Some(status) if !status.success() => format!("the agent ended at once ({})", exit_text(status)),
        exit if is_up || exit.is_some() => "the agent ended at once".to_owned(),
        _ => format!("no agent runs after {} s", START_TIMEOUT.as_secs()),
    };
    Err(CliError::Runtime(format!("{how}; {}", target.end_of_log())))
}

fn not_installed() -> CliError {
    print("not installed; to have cron keep the agent running: usepod-agent service install\n");
    CliError::AlreadyReported(NOT_RUNNING)
}

fn status(globals: &Globals) -> Result<(), CliError> {
    let supervisor = Supervisor::installed()?;
    let Some(supervisor) = supervisor else { return Err(not_installed()) };
    say(format_args!("supervisor  {}\n", supervisor.description()));
    let target = target_of(globals, Some(&supervisor))?;
    let is_stopped = target.paths.stopped().exists();
    let Some(owner) = LockOwner::running(&target.paths) else {
        print(match is_stopped {
            true => "agent       stopped by hand; it stays so until: usepod-agent service start\n",
            false => "agent       not running; why: usepod-agent service logs\n",
        });
        if matches!(supervisor, Supervisor::Cron(_)) && is_cron_running() == Some(false) {
            print("cron        no cron daemon seems to run, so that nobody starts the agent\n");
        }
        return Err(CliError::AlreadyReported(NOT_RUNNING));
    };
    let silence = owner.since_last_liveness().as_secs();
    say(format_args!("agent       running as pid {}, last sign of life {silence} s ago\n", owner.pid));
    if is_stopped {
        print("            it is to stop, by `service stop`, and has not left yet\n");
    }
    Ok(())
}

fn show_logs(globals: &Globals, options: &Service) -> Result<(), CliError> {
    let lines = options.lines.unwrap_or(100);
    let (supervisor, target) = found(globals)?;
    if let (Some(Supervisor::Systemd(unit)), false) = (&supervisor, target.is_log_named) {
        let lines = lines.to_string();
        let mut journalctl = command("journalctl");
        journalctl.args(unit.scope()).args(["-u", UNIT, "-n", &lines]).args(options.follow.then_some("-f"));
        return match journalctl.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(CliError::Runtime(format!("`journalctl` failed: {}", exit_text(status)))),
            Err(e) => Err(CliError::Runtime(format!("`journalctl` cannot be run: {e}"))),
        };
    }
    let log = &target.log;
    let mut stdout = std::io::stdout().lock();
    let shown = if options.follow {
        logs::follow(log, &rotated_path(log), lines, &mut stdout)
    } else {
        logs::tail(log, &rotated_path(log), lines).map(|text| {
            // Whoever closed it does not want to read it.
            let _ = stdout.write_all(&text);
        })
    };
    shown.map_err(|e| CliError::Runtime(format!("failed to read `{}`: {e}", log.display())))
}
