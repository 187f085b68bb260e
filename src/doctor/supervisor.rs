//! Who starts the agent again: the crontab or a systemd unit, and whether that is alive.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::report::Report;
use crate::instance::AgentPaths;
use crate::service::{Supervisor, is_cron_running, wait_until};
use crate::sys::threads;

/// `crontab -l` reads a small file.
const CRONTAB_TIME: Duration = Duration::from_secs(2);

/// Whether somebody restarts the agent, and whether the operator wants that; `runs` says whether it runs now.
pub fn examine(report: &mut Report<'_>, paths: &AgentPaths, runs: bool) {
    const NAME: &str = "supervisor";
    report.pending(NAME);
    let stopped = paths.stopped().exists();
    match installed() {
        Err(why) => {
            report.fail(NAME, format_args!("{why}"), format_args!("usepod-agent service status, once that is mended"))
        }
        Ok(None) => {
            report.fail(
                NAME,
                format_args!("nobody restarts the agent after a crash or a reboot"),
                format_args!("usepod-agent service install"),
            );
        }
        // Where processes are hidden the daemon may be, too.
        Ok(Some(Supervisor::Cron(_))) if is_cron_running() == Some(false) => report.warn(
            NAME,
            format_args!("the crontab has the agent, but no cron daemon is to be seen"),
            format_args!("as root: service cron start (Debian), systemctl enable --now cron or crond"),
        ),
        Ok(Some(_)) if !runs && !stopped => {
            report.warn(
                NAME,
                format_args!("installed, but no agent runs"),
                format_args!("wait a minute; then see why: usepod-agent service logs"),
            );
        }
        Ok(Some(supervisor)) => report.pass(NAME, format_args!("{}", supervisor.description())),
    }
    if stopped {
        report.warn(
            "stopped",
            format_args!("the operator stopped the agent, and nothing starts it"),
            format_args!("usepod-agent service start"),
        );
    }
    if paths.paused().exists() {
        report.warn(
            "paused",
            format_args!("the operator paused the agent: it offers nothing"),
            format_args!("usepod-agent resume"),
        );
    }
}

/// The one that is installed, if `crontab` answers in time; one that does not is left to itself.
fn installed() -> Result<Option<Supervisor>, String> {
    let found = Arc::new(Mutex::new(None));
    let place = found.clone();
    let ask = move || *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(Supervisor::installed());
    let asking = threads::spawn("crontab", ask).map_err(|e| format!("not asked: {e}"))?;
    wait_until(CRONTAB_TIME, || asking.is_finished());
    let found = found.lock().unwrap_or_else(PoisonError::into_inner).take();
    found.unwrap_or_else(|| Err(format!("`crontab -l` does not answer within {} s", CRONTAB_TIME.as_secs())))
}
