//! Checks the supervisor of the agent: a crontab or a systemd unit.

use std::time::Duration;

use super::report::Report;
use crate::instance::AgentPaths;
use crate::service::{Supervisor, is_cron_running, wait_until};
use crate::sys::threads;

/// The timeout of `crontab -l`, which reads a small file.
const CRONTAB_TIMEOUT: Duration = Duration::from_secs(2);

/// Checks whether a supervisor restarts the agent, and whether the operator has stopped or paused it.
pub fn examine(report: &mut Report<'_>, paths: &AgentPaths, is_running: bool) {
    const NAME: &str = "supervisor";
    report.pending(NAME);
    let stopped = paths.stopped().exists();
    match installed() {
        Err(why) => report.fail(NAME, why, "correct that, then: usepod-agent service status"),
        Ok(None) => {
            report.fail(NAME, "nothing restarts the agent after a crash or a reboot", "usepod-agent service install");
        }
        // Only a warning: the daemon may be a process that this user cannot see.
        Ok(Some(Supervisor::Cron(_))) if is_cron_running() == Some(false) => report.warn(
            NAME,
            "the agent is in the crontab, but no cron daemon seems to be running",
            "as root: service cron start (Debian), systemctl enable --now cron or crond",
        ),
        Ok(Some(_)) if !is_running && !stopped => {
            report.warn(
                NAME,
                "installed, but no agent is running",
                "wait a minute, then look at the log: usepod-agent service logs",
            );
        }
        Ok(Some(supervisor)) => report.pass(NAME, supervisor.description()),
    }
    if stopped {
        report.warn("stopped", "the operator stopped the agent, so nothing starts it", "usepod-agent service start");
    }
    if paths.paused().exists() {
        report.warn("paused", "the operator paused the agent, so it offers nothing", "usepod-agent resume");
    }
}

/// Returns the installed supervisor, if `crontab` responds in time; otherwise its thread is abandoned.
fn installed() -> Result<Option<Supervisor>, String> {
    let query = threads::spawn("crontab", Supervisor::installed).map_err(|e| format!("`crontab -l` not run: {e}"))?;
    let found = if wait_until(CRONTAB_TIMEOUT, || query.is_finished()) { query.join().ok() } else { None };
    found.unwrap_or_else(|| Err(format!("`crontab -l` does not respond within {} s", CRONTAB_TIMEOUT.as_secs())))
}
