//! Who starts the agent again: the crontab or a systemd unit, and whether that is alive.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::bounded;

use super::report::Report;
use crate::instance::Places;
use crate::threads;

/// `crontab -l` reads a small file.
const CRONTAB_TIME: Duration = Duration::from_secs(2);
/// The most of a crontab that is read, in bytes.
const CRONTAB_BYTES_MAX: u64 = 1 << 20;
/// How the line above our lines in a crontab begins.
const BLOCK: &str = "# >>> usepod-agent";
const UNIT: &str = "usepod-agent.service";
/// What cron daemons call themselves: Debian's, cronie's and busybox's, fcron.
const DAEMONS: [&str; 3] = ["cron", "crond", "fcron"];

/// What starts the agent again.
enum Supervisor {
    /// Our block in the user's crontab.
    Cron,
    /// A unit file.
    Systemd(PathBuf),
}

/// Whether somebody restarts the agent, and whether the operator wants that; `runs` says whether it runs now.
pub fn examine(report: &mut Report<'_>, places: &Places, runs: bool) {
    const NAME: &str = "supervisor";
    report.pending(NAME);
    let stopped = places.stopped().exists();
    match installed() {
        None => {
            report.fail(NAME, &"nobody restarts the agent after a crash or a reboot", &"usepod-agent service install");
        }
        Some(Supervisor::Cron) if !cron_runs() => report.warn(
            NAME,
            &"the crontab has the agent, but no cron daemon is to be seen",
            &"as root: service cron start (Debian), systemctl enable --now cron or crond",
        ),
        Some(_) if !runs && !stopped => {
            report.warn(
                NAME,
                &"installed, but no agent runs",
                &"wait a minute; then see why: usepod-agent service logs",
            );
        }
        Some(Supervisor::Cron) => report.pass(NAME, &"the user's crontab; a cron daemon runs"),
        Some(Supervisor::Systemd(unit)) => report.pass(NAME, &format_args!("the systemd unit `{}`", unit.display())),
    }
    if stopped {
        report.warn("stopped", &"the operator stopped the agent, and nothing starts it", &"usepod-agent service start");
    }
    if places.paused().exists() {
        report.warn("paused", &"the operator paused the agent: it offers nothing", &"usepod-agent resume");
    }
}

fn installed() -> Option<Supervisor> {
    // The README has the lines for whoever writes them by hand.
    let is_by_hand = |line: &str| !line.trim_start().starts_with('#') && line.contains(" run --cron");
    if crontab().is_some_and(|text| text.lines().any(|line| line.starts_with(BLOCK) || is_by_hand(line))) {
        return Some(Supervisor::Cron);
    }
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let of_user = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
    let of_user = of_user.map(|folder| folder.join("systemd/user"));
    let folders = of_user.into_iter().chain(["/etc/systemd/system".into(), "/etc/systemd/user".into()]);
    folders.map(|folder| folder.join(UNIT)).find(|unit| unit.exists()).map(Supervisor::Systemd)
}

/// The user's crontab, if there is one, and if the program that shows it answers in time.
fn crontab() -> Option<String> {
    let mut command = Command::new("crontab");
    command.arg("-l").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut crontab = command.spawn().ok()?;
    let stdout = crontab.stdout.take()?;
    let text = Arc::new(Mutex::new(Vec::new()));
    let (ended_sender, ended) = bounded::<()>(0);
    let read = {
        let text = text.clone();
        move || {
            // Dropped at the end, whatever it is.
            let _ended = ended_sender;
            let mut read = Vec::new();
            // What is there counts, whatever ends it.
            let _ = stdout.take(CRONTAB_BYTES_MAX).read_to_end(&mut read);
            *text.lock().unwrap_or_else(PoisonError::into_inner) = read;
        }
    };
    if threads::spawn("crontab", read).is_ok() {
        let _ = ended.recv_timeout(CRONTAB_TIME);
    }
    let _ = crontab.kill();
    let _ = crontab.wait();
    let text = text.lock().unwrap_or_else(PoisonError::into_inner);
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// A `/proc` that hides others' processes hides the daemon too, so that its absence proves nothing.
fn cron_runs() -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = processes.filter_map(|process| fs::read_to_string(process.path().join("comm")).ok());
    names.into_iter().any(|name| DAEMONS.contains(&name.trim()))
}
