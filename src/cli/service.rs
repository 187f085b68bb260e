//! `service`: the agent under a supervisor, installed, started, stopped and watched.
//!
//! What is installed says which configuration it is about, unless `--config` names one.

use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::LevelFilter;
use nix::unistd::Uid;

use super::args::{Action, Globals, Service};
use super::{Failure, print};
use crate::config::Config;
use crate::instance::{Holder, Places};
use crate::service::crontab::Table;
use crate::service::program::Running;
use crate::service::systemd::{self, Content, UNIT, Unit};
use crate::service::{Launch, Supervisor, cron_runs, end, logs, program, start_like_cron, this_user, wait_until};
use crate::{files, logging};

/// What `status` exits with when no agent runs, and the others when no supervisor is installed.
const NOT_RUNNING: u8 = 3;
/// What `stop` waits beyond the drain.
const STOP_MARGIN: Duration = Duration::from_secs(15);
/// What an agent may take from its start to its lock.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How soon one that cannot serve has ended.
const SETTLE_TIME: Duration = Duration::from_millis(500);
/// Lines of the log that are shown with a failed start.
const LINES_OF_FAILURE: usize = 10;
/// Variables of a shell that the agent heeds, and a supervisor does not pass on.
const PROXY_VARIABLES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"];

impl From<String> for Failure {
    fn from(what: String) -> Failure {
        Failure::Runtime(what)
    }
}

/// Prints it, as [`print()`] does.
fn tell(text: std::fmt::Arguments<'_>) {
    let _ = std::io::stdout().lock().write_fmt(text);
}

/// Does as it was told.
pub fn run(globals: &Globals, options: &Service) -> Result<(), Failure> {
    logging::start(globals.log_level.unwrap_or(LevelFilter::Warn), None);
    if options.systemd && options.action != Action::Install {
        return Err(Failure::Usage("--systemd goes with `service install`; the others find what is installed".into()));
    }
    if (options.follow || options.lines.is_some()) && options.action != Action::Logs {
        return Err(Failure::Usage("--follow and --lines go with `service logs`".into()));
    }
    match options.action {
        Action::Install => install(globals, options.systemd),
        Action::Uninstall => uninstall(globals),
        Action::Start => start(globals),
        Action::Stop => stop(globals),
        Action::Restart => restart(globals),
        Action::Status => status(globals),
        Action::Logs => show_logs(globals, options),
    }
}

/// The agent that is meant.
struct Site {
    path: PathBuf,
    key_path: PathBuf,
    places: Places,
    log: PathBuf,
    /// The configuration names it; otherwise systemd keeps what the agent says.
    is_log_named: bool,
    drain: Duration,
    /// The variables that hold its keys.
    keys: Vec<String>,
}

impl Site {
    /// Of this configuration file, as a supervisor would read it: from the home folder, not from here.
    fn load(path: &Path, allow_insecure: bool, supervisor: Option<&Unit>) -> Result<Site, Failure> {
        let path = std::path::absolute(path).map_err(|e| Failure::Runtime(format!("there is no folder here: {e}")))?;
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
        let places = Places::beside(&key_path);
        let log = config.log_file.as_deref().map_or_else(|| places.log(), as_theirs);
        let is_log_named = config.log_file.is_some();
        let keys = config.backends.into_iter().filter_map(|backend| backend.api_key_env).collect();
        Ok(Site { path, key_path, places, log, is_log_named, drain: config.limits.drain, keys })
    }

    /// The last lines of the log, for an error.
    fn end_of_log(&self) -> String {
        let log = &self.log;
        let text = logs::tail(log, &older(log), LINES_OF_FAILURE).unwrap_or_default();
        if text.is_empty() {
            return format!("nothing is in its log, `{}`; by hand it tells why: usepod-agent run", log.display());
        }
        format!("the end of its log, `{}`:\n{}", log.display(), String::from_utf8_lossy(&text).trim_end())
    }
}

/// What a log file is called when a new one has taken its place.
fn older(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// What is installed, and the agent that it is about.
fn found(globals: &Globals) -> Result<(Option<Supervisor>, Site), Failure> {
    let supervisor = Supervisor::installed()?;
    let site = site_of(globals, supervisor.as_ref())?;
    Ok((supervisor, site))
}

fn site_of(globals: &Globals, supervisor: Option<&Supervisor>) -> Result<Site, Failure> {
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
    Site::load(&path, true, unit)
}

fn install(globals: &Globals, systemd: bool) -> Result<(), Failure> {
    let unit = if systemd { Some(Unit::of_this_user()?) } else { None };
    let site = Site::load(&Config::find(globals.config.as_deref())?, globals.allow_insecure, unit.as_ref())?;
    let launch = launch_of(&site, globals)?;
    // Who may have no crontab has none.
    let may_have_none = |e: &String| systemd && e.contains("not allowed");
    let installed = Supervisor::installed().or_else(|e| if may_have_none(&e) { Ok(None) } else { Err(e) })?;
    if let Some(installed) = &installed {
        let is_other = matches!(installed, Supervisor::Systemd(_)) != systemd;
        let config = installed.config().unwrap_or_default();
        if is_other || config != launch.config {
            return Err(Failure::Runtime(format!(
                "already supervised by {}, with `{config}`; take that away first: usepod-agent service uninstall",
                installed.place()
            )));
        }
    }
    make_folders(&site, unit.as_ref()).map_err(|e| {
        let (key, log) = (site.key_path.display(), site.log.display());
        Failure::Runtime(format!("failed to make the folder of `{key}` or `{log}`: {e}; check the rights"))
    })?;
    let (report, known) = match unit {
        Some(unit) => (install_unit(&unit, &launch, &site)?, Vec::new()),
        None => install_block(&launch)?,
    };
    print(&report);
    print(&notes(&launch, &site, systemd, &known));
    Ok(())
}

/// Makes the folders of the identity and the log, which belong to whom the agent runs as: under a system unit it cannot, and one
/// that is not there keeps the unit from starting.
fn make_folders(site: &Site, unit: Option<&Unit>) -> std::io::Result<()> {
    let owner = unit.filter(|unit| !unit.is_users).and_then(|_| systemd::owner_of(&site.path));
    for file in [&site.key_path, &site.log] {
        let is_missing = |folder: &&Path| !folder.as_os_str().is_empty() && !folder.exists();
        let missing: Vec<&Path> = file.ancestors().skip(1).take_while(is_missing).collect();
        files::create_folder_of(file)?;
        if let Some((uid, _)) = owner {
            missing.into_iter().try_for_each(|folder| std::os::unix::fs::lchown(folder, Some(uid), None))?;
        }
    }
    Ok(())
}

fn launch_of(site: &Site, globals: &Globals) -> Result<Launch, String> {
    let binary = std::env::current_exe().map_err(|e| format!("this program does not find itself: {e}"))?;
    if !binary.exists() {
        return Err("this program's file has been replaced since it was started; run the new one".into());
    }
    Ok(Launch {
        binary: Launch::path(&binary)?,
        config: Launch::path(&site.path)?,
        log_level: globals.log_level,
        allow_insecure: globals.allow_insecure,
    })
}

/// What was done, and the variables that cron sets for the agent.
fn install_block(launch: &Launch) -> Result<(String, Vec<String>), Failure> {
    let table = Table::read()?.ok_or_else(|| {
        Failure::Runtime(
            "there is no `crontab` on this box: install cron (Debian and Ubuntu: `apt install cron`), or use systemd: \
             `usepod-agent service install --systemd`"
                .into(),
        )
    })?;
    let known = table.environment().into_iter().map(|(name, _)| name).collect();
    let text = table.with(launch);
    if text == table.text() {
        return Ok(("already installed in your crontab; nothing was changed\n".into(), known));
    }
    Table::write(&text)?;
    let command = Table::parse(text).ok().and_then(|table| table.command()).unwrap_or_default();
    let report = match table.command() {
        None => format!(
            "installed in your crontab, to be run at each boot and every minute:\n  {command}\n\
             cron starts the agent within a minute; to have it at once: usepod-agent service start\n"
        ),
        Some(_) => format!(
            "changed in your crontab:\n  {command}\n\
             an agent that runs goes on as it was started; for the change: usepod-agent service restart\n"
        ),
    };
    Ok((report, known))
}

fn install_unit(unit: &Unit, launch: &Launch, site: &Site) -> Result<String, Failure> {
    let owner = systemd::owner_of(&site.path).map(|(uid, _)| uid);
    let folder = |file: &Path| file.parent().map(Path::to_owned).unwrap_or_default();
    let mut writable = vec![folder(&site.key_path), folder(&site.log)];
    writable.dedup();
    let stopped = site.places.stopped();
    let content = Content {
        launch,
        uid: owner.filter(|_| !unit.is_users),
        stopped: &stopped,
        writable: &writable,
        drain: site.drain,
    };
    let was_there = unit.path.exists();
    let place = unit.path.display();
    if !unit.install(&unit.text(&content))? {
        return Ok(format!("already installed as `{place}`; nothing was changed\n"));
    }
    let mut report = match was_there {
        false => format!("installed as `{place}`, and started\n"),
        true => format!("changed `{place}`; for the change: usepod-agent service restart\n"),
    };
    if unit.is_users {
        report.push_str("to have it run also while you are not logged in: loginctl enable-linger\n");
    }
    Ok(report)
}

/// What the operator has to know, or to do, for the agent to start and to serve.
fn notes(launch: &Launch, site: &Site, systemd: bool, known: &[String]) -> String {
    let mut notes = Vec::new();
    let lies_in = |folders: &[&str]| folders.iter().any(|folder| launch.binary.contains(folder));
    if lies_in(&["/target/debug/", "/target/release/"]) || launch.binary.starts_with("/tmp/") {
        notes.push(format!(
            "`{}` lies in a folder that is cleared at times; keep the program in ~/.local/bin or /usr/local/bin, and \
             install it from there",
            launch.binary
        ));
    }
    let home = std::env::var_os("HOME").map(PathBuf::from);
    if let (Some(home), Some(user)) = (home, this_user())
        && home != user.dir
        && !known.iter().any(|name| name == "HOME")
    {
        notes.push(format!(
            "HOME is `{}` here, but `{}` for a supervisor: `~` in agent.toml means that one",
            home.display(),
            user.dir.display()
        ));
    }
    if !systemd && cron_runs() == Some(false) {
        notes.push("no cron daemon seems to run; start it (Debian and Ubuntu: `service cron start`, as root)".into());
    }
    let is_set = |name: &&str| std::env::var_os(name).is_some();
    for name in site.keys.iter().map(String::as_str).chain(PROXY_VARIABLES.into_iter().filter(is_set)) {
        if known.iter().any(|known| known == name) {
            continue;
        }
        let place = match systemd {
            false => format!("with `crontab -e`, put a line `{name}=…` above the block"),
            true => format!(
                "with `systemctl edit {UNIT}` (`--user` for your own), put `Environment={name}=…` below `[Service]`"
            ),
        };
        notes.push(format!("the agent will not see the variable {name} of this shell; {place}"));
    }
    if site.places.stopped().exists() {
        notes.push("the agent was stopped by hand and stays so until: usepod-agent service start".into());
    }
    notes.iter().map(|note| format!("note: {note}\n")).collect()
}

fn uninstall(globals: &Globals) -> Result<(), Failure> {
    let supervisor = Supervisor::installed()?;
    let Some(supervisor) = supervisor else {
        print("not installed; nothing was changed\n");
        return Ok(());
    };
    // A configuration that cannot be read any more must not keep the supervisor.
    let site = site_of(globals, Some(&supervisor));
    if let Ok(site) = &site {
        keep_stopped(site)?;
    }
    match &supervisor {
        Supervisor::Cron(table) => Table::write(&table.without()),
        Supervisor::Systemd(unit) => unit.uninstall(),
    }?;
    tell(format_args!("removed: {}\n", supervisor.place()));
    let site = site?;
    let ended = end_running(&site);
    // Without a supervisor there is nobody who must not start it.
    let _ = std::fs::remove_file(site.places.stopped());
    ended
}

/// Nobody starts it from here on.
fn keep_stopped(site: &Site) -> Result<(), Failure> {
    let marker = site.places.stopped();
    files::mark(&marker).map_err(|e| {
        Failure::Runtime(format!(
            "failed to make `{}`, without which the agent would come back: {e}; check the rights there",
            marker.display()
        ))
    })
}

fn stop(globals: &Globals) -> Result<(), Failure> {
    let (supervisor, site) = found(globals)?;
    keep_stopped(&site)?;
    if let Some(Supervisor::Systemd(unit)) = &supervisor {
        unit.systemctl(&["stop", UNIT])?;
    }
    end_running(&site)?;
    print("it stays stopped until: usepod-agent service start\n");
    Ok(())
}

/// Ends the agent that runs, whoever started it.
fn end_running(site: &Site) -> Result<(), Failure> {
    let Some(holder) = Holder::running(&site.places) else {
        print("no agent runs\n");
        return Ok(());
    };
    // Who owns the lock file says who holds it, and must not have root end what belongs to others.
    let owner = |path: &Path| std::fs::metadata(path).map(|found| found.uid()).ok();
    let process = PathBuf::from(format!("/proc/{}", holder.pid));
    if Uid::effective().is_root() && owner(&process) != owner(&site.places.lock()) {
        let (pid, lock) = (holder.pid, site.places.lock());
        return Err(Failure::Runtime(format!(
            "`{}` names pid {pid}, of another user than its own; if that is the agent, end it by hand: kill {pid}",
            lock.display()
        )));
    }
    let (began, patience) = (Instant::now(), site.drain + STOP_MARGIN);
    tell(format_args!(
        "asked pid {} to finish its jobs and leave; waiting up to {} s\n",
        holder.pid,
        patience.as_secs()
    ));
    let is_killed = end(&holder, patience)?;
    let how = if is_killed { "did not leave, so it was killed" } else { "has left" };
    tell(format_args!("pid {} {how}, after {} ms\n", holder.pid, began.elapsed().as_millis()));
    Ok(())
}

fn start(globals: &Globals) -> Result<(), Failure> {
    let (supervisor, site) = found(globals)?;
    let supervisor = supervisor.ok_or_else(not_installed)?;
    start_by(&supervisor, &site, "start")
}

fn restart(globals: &Globals) -> Result<(), Failure> {
    let (supervisor, site) = found(globals)?;
    let supervisor = supervisor.ok_or_else(not_installed)?;
    // Under cron the lock decides who starts it again: we or cron, it is the same line.
    if matches!(supervisor, Supervisor::Cron(_)) {
        end_running(&site)?;
    }
    start_by(&supervisor, &site, "restart")
}

fn start_by(supervisor: &Supervisor, site: &Site, verb: &str) -> Result<(), Failure> {
    let marker = site.places.stopped();
    match std::fs::remove_file(&marker) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            let why = format!("failed to remove `{}`, which keeps the agent stopped: {e}", marker.display());
            return Err(Failure::Runtime(why));
        }
        _ => {}
    }
    let mut child = None;
    match supervisor {
        Supervisor::Systemd(unit) => unit.systemctl(&[verb, UNIT])?,
        Supervisor::Cron(_) if Holder::running(&site.places).is_some() => {}
        Supervisor::Cron(table) => {
            let started = start_like_cron(table);
            child = Some(started.map_err(|e| Failure::Runtime(format!("no shell can be started: {e}")))?);
        }
    }
    let mut ending = None;
    let mut has_failed = || {
        ending = ending.take().or_else(|| child.as_ref().and_then(Running::ended));
        // One that ended well found another at work, whom cron started at this very moment.
        ending.as_ref().is_some_and(|ending| !ending.is_empty())
    };
    let runs = || Holder::running(&site.places).is_some();
    let is_up = wait_until(START_TIMEOUT, || has_failed() || runs()) && runs();
    // It has the lock before it has read its identity.
    if is_up
        && !wait_until(SETTLE_TIME, || has_failed() || !runs())
        && let Some(holder) = Holder::running(&site.places)
    {
        tell(format_args!("the agent runs, as pid {}\n", holder.pid));
        return Ok(());
    }
    let how = match ending {
        Some(ending) if !ending.is_empty() => format!("the agent ended at once ({ending})"),
        ending if is_up || ending.is_some() => "the agent ended at once".to_owned(),
        _ => format!("no agent runs after {} s", START_TIMEOUT.as_secs()),
    };
    Err(Failure::Runtime(format!("{how}; {}", site.end_of_log())))
}

fn not_installed() -> Failure {
    print("not installed; to have cron keep the agent running: usepod-agent service install\n");
    Failure::Told(NOT_RUNNING)
}

fn status(globals: &Globals) -> Result<(), Failure> {
    let supervisor = Supervisor::installed()?;
    let Some(supervisor) = supervisor else { return Err(not_installed()) };
    tell(format_args!("supervisor  {}\n", supervisor.place()));
    let site = site_of(globals, Some(&supervisor))?;
    let is_stopped = site.places.stopped().exists();
    let Some(holder) = Holder::running(&site.places) else {
        print(match is_stopped {
            true => "agent       stopped by hand; it stays so until: usepod-agent service start\n",
            false => "agent       not running; why: usepod-agent service logs\n",
        });
        if matches!(supervisor, Supervisor::Cron(_)) && cron_runs() == Some(false) {
            print("cron        no cron daemon seems to run, so that nobody starts the agent\n");
        }
        return Err(Failure::Told(NOT_RUNNING));
    };
    let silence = holder.silence().as_secs();
    tell(format_args!("agent       running as pid {}, last sign of life {silence} s ago\n", holder.pid));
    if is_stopped {
        print("            it is to stop, by `service stop`, and has not left yet\n");
    }
    Ok(())
}

fn show_logs(globals: &Globals, options: &Service) -> Result<(), Failure> {
    let lines = options.lines.unwrap_or(100);
    let (supervisor, site) = found(globals)?;
    if let (Some(Supervisor::Systemd(unit)), false) = (&supervisor, site.is_log_named) {
        let lines = lines.to_string();
        let mut words = [&["journalctl"], unit.scope(), &["-u", UNIT, "-n", &lines]].concat();
        words.extend(options.follow.then_some("-f"));
        return match program::in_front(&words) {
            Ok(None) => Ok(()),
            Ok(Some(failure)) => Err(Failure::Runtime(format!("`journalctl` failed: {failure}"))),
            Err(e) => Err(Failure::Runtime(format!("`journalctl` cannot be run: {e}"))),
        };
    }
    let log = &site.log;
    let mut stdout = std::io::stdout().lock();
    let shown = if options.follow {
        logs::follow(log, &older(log), lines, &mut stdout)
    } else {
        logs::tail(log, &older(log), lines).map(|text| {
            // Whoever closed it does not want to read it.
            let _ = stdout.write_all(&text);
        })
    };
    shown.map_err(|e| Failure::Runtime(format!("failed to read `{}`: {e}", log.display())))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::lchown;

    use super::*;

    /// Root alone can give a folder away.
    #[test]
    fn every_folder_that_is_made_for_a_system_unit_belongs_to_whom_the_agent_runs_as() {
        const UID: u32 = 65534;
        let folder = std::env::temp_dir().join(format!("usepod-folders-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let (path, key_path, log) = (folder.join("agent.toml"), folder.join("a/b/key"), folder.join("c/log"));
        fs::write(&path, "").expect("a file");
        if lchown(&path, Some(UID), None).is_ok() {
            let places = Places::beside(&key_path);
            let drain = Duration::ZERO;
            let site = Site { path, key_path, places, log, is_log_named: true, drain, keys: Vec::new() };
            make_folders(&site, Some(&Unit { path: UNIT.into(), is_users: false })).expect("folders");
            for made in ["a", "a/b", "c"] {
                assert_eq!(fs::metadata(folder.join(made)).expect(made).uid(), UID, "{made}");
            }
        }
        fs::remove_dir_all(folder).expect("removed");
    }
}
