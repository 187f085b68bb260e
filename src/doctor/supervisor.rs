//! Checks the supervisor of the agent: a crontab or a systemd unit.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use super::report::Report;
use crate::instance::AgentPaths;
use crate::service::{Supervisor, is_cron_running, wait_until};
use crate::sys::shell_quote::shell_quote;
use crate::sys::threads;

const NAME: &str = "supervisor";
/// The timeout of `crontab -l`, which reads a small file, and of `loginctl`.
const CRONTAB_TIMEOUT: Duration = Duration::from_secs(2);

/// Checks whether a supervisor restarts the agent, and whether the operator has stopped or paused it.
pub fn examine(report: &mut Report<'_>, paths: &AgentPaths, is_running: bool) {
    report.pending(NAME);
    let stopped = paths.stopped().exists();
    match installed() {
        Err(why) => report.fail(NAME, why, "correct that, then: usepod-agent service status"),
        Ok(None) => {
            report.fail(NAME, "nothing restarts the agent after a crash or a reboot", "usepod-agent service install");
        }
        Ok(Some(installed)) => check(report, &installed, is_running || stopped),
    }
    if stopped {
        report.warn("stopped", "the operator stopped the agent, so nothing starts it", "usepod-agent service start");
    }
    if paths.paused().exists() {
        report.warn("paused", "the operator paused the agent, so it offers nothing", "usepod-agent resume");
    }
}

/// What is installed.
struct Installed {
    supervisor: Supervisor,
    /// Of a user's unit: whether it runs while the user is not logged in, if that is known.
    lingers: Option<bool>,
}

/// Checks whether the supervisor can start the agent. `is_expected` is whether the agent is in the state that the operator wants.
fn check(report: &mut Report<'_>, installed: &Installed, is_expected: bool) {
    let Installed { supervisor, lingers } = installed;
    if let Some((what, fix)) = broken_program(supervisor) {
        report.fail(NAME, what, fix);
    } else if *lingers == Some(false) {
        let what = "the user unit stops when you log out and does not start at boot, because your user does not linger";
        report.fail(NAME, what, "loginctl enable-linger");
    } else if matches!(supervisor, Supervisor::Cron(_)) && is_cron_running() == Some(false) {
        // Only a warning: this user may not be able to see the daemon's process.
        report.warn(
            NAME,
            "the agent is in the crontab, but no cron daemon seems to be running",
            "as root: service cron start (Debian), systemctl enable --now cron or crond",
        );
    } else if is_expected {
        report.pass(NAME, supervisor.description());
    } else {
        let fix = "wait a minute, then look at the log: usepod-agent service logs";
        report.warn(NAME, "installed, but no agent is running", fix);
    }
}

/// Why the supervisor cannot start the program, and the fix.
fn broken_program(supervisor: &Supervisor) -> Option<(String, String)> {
    // `service install` writes absolute paths.
    let program = supervisor.program().filter(|program| Path::new(program).is_absolute())?;
    let who = supervisor.description();
    match fs::metadata(&program) {
        Ok(found) if found.is_file() && found.permissions().mode() & 0o111 == 0 => {
            let fix = format!("chmod +x {}", shell_quote(&program));
            Some((format!("{who} should start `{program}`, which is not executable"), fix))
        }
        Ok(_) => None,
        Err(e) => Some((
            format!("{who} should start `{program}`, which cannot be found: {e}"),
            "put it back, or install the agent from where the program is: usepod-agent service install".to_owned(),
        )),
    }
}

/// Returns what is installed, if `crontab` and `loginctl` respond in time; otherwise their thread is abandoned.
fn installed() -> Result<Option<Installed>, String> {
    let query = || {
        let with_linger = |supervisor| {
            let lingers = if let Supervisor::Systemd(unit) = &supervisor { unit.lingers() } else { None };
            Installed { supervisor, lingers }
        };
        Ok(Supervisor::installed()?.map(with_linger))
    };
    let query = threads::spawn("crontab", query).map_err(|e| format!("`crontab -l` not run: {e}"))?;
    let found = if wait_until(CRONTAB_TIMEOUT, || query.is_finished()) { query.join().ok() } else { None };
    found.unwrap_or_else(|| Err(format!("`crontab -l` does not respond within {} s", CRONTAB_TIMEOUT.as_secs())))
}
