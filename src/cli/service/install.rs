//! `service install`: what is written, and what the operator has to know about it.

use std::path::{Path, PathBuf};

use super::ServiceTarget;
use crate::cli::args::Globals;
use crate::cli::{CliError, print};
use crate::config::Config;
use crate::service::crontab::Crontab;
use crate::service::systemd::{self, Content, UNIT, Unit};
use crate::service::{ServiceCommand, Supervisor, is_cron_running, this_user};
use crate::sys::files;

/// Variables of a shell that the agent heeds, and a supervisor does not pass on.
const PROXY_VARIABLES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"];

/// Puts the agent under cron, or under systemd.
pub fn run(globals: &Globals, systemd: bool) -> Result<(), CliError> {
    let unit = if systemd { Some(Unit::of_this_user()?) } else { None };
    let target = ServiceTarget::load(&Config::find(globals.config.as_deref())?, globals.allow_insecure, unit.as_ref())?;
    let launch = launch_of(&target, globals)?;
    // Who may have no crontab has none.
    let may_have_none = |e: &String| systemd && e.contains("not allowed");
    let installed = Supervisor::installed().or_else(|e| if may_have_none(&e) { Ok(None) } else { Err(e) })?;
    if let Some(installed) = &installed {
        let is_other = matches!(installed, Supervisor::Systemd(_)) != systemd;
        let config = installed.config().unwrap_or_default();
        if is_other || config != launch.config {
            return Err(CliError::Runtime(format!(
                "already supervised by {}, with `{config}`; take that away first: usepod-agent service uninstall",
                installed.description()
            )));
        }
    }
    make_folders(&target, unit.as_ref()).map_err(|e| {
        let (key, log) = (target.key_path.display(), target.log.display());
        CliError::Runtime(format!("failed to make the folder of `{key}` or `{log}`: {e}; check the rights"))
    })?;
    let (report, known) = match unit {
        Some(unit) => (install_unit(&unit, &launch, &target)?, Vec::new()),
        None => install_block(&launch)?,
    };
    print(&report);
    print(&notes(&launch, &target, systemd, &known));
    Ok(())
}

/// Makes the folders of the identity and the log, which belong to whom the agent runs as: under a system unit it cannot, and one
/// that is not there keeps the unit from starting.
fn make_folders(target: &ServiceTarget, unit: Option<&Unit>) -> std::io::Result<()> {
    let owner = unit.filter(|unit| !unit.is_users).and_then(|_| systemd::owner_of(&target.path));
    for file in [&target.key_path, &target.log] {
        let is_missing = |folder: &&Path| !folder.as_os_str().is_empty() && !folder.exists();
        let missing: Vec<&Path> = file.ancestors().skip(1).take_while(is_missing).collect();
        files::create_folder_of(file)?;
        if let Some((uid, _)) = owner {
            missing.into_iter().try_for_each(|folder| std::os::unix::fs::lchown(folder, Some(uid), None))?;
        }
    }
    Ok(())
}

fn launch_of(target: &ServiceTarget, globals: &Globals) -> Result<ServiceCommand, String> {
    let binary = std::env::current_exe().map_err(|e| format!("this program does not find itself: {e}"))?;
    if !binary.exists() {
        return Err("this program's file has been replaced since it was started; run the new one".into());
    }
    Ok(ServiceCommand {
        binary: ServiceCommand::path(&binary)?,
        config: ServiceCommand::path(&target.path)?,
        log_level: globals.log_level,
        allow_insecure: globals.allow_insecure,
    })
}

/// What was done, and the variables that cron sets for the agent.
fn install_block(launch: &ServiceCommand) -> Result<(String, Vec<String>), CliError> {
    let table = Crontab::read()?.ok_or_else(|| {
        CliError::Runtime(
            "there is no `crontab` on this box: install cron (Debian and Ubuntu: `apt install cron`), or use systemd: \
             `usepod-agent service install --systemd`"
                .into(),
        )
    })?;
    let known = table.environment().into_iter().map(|(name, _)| name).collect();
    let text = table.with_block(launch);
    if text == table.text() {
        return Ok(("already installed in your crontab; nothing was changed\n".into(), known));
    }
    Crontab::write(&text)?;
    let command = Crontab::parse(text).ok().and_then(|table| table.command()).unwrap_or_default();
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

fn install_unit(unit: &Unit, launch: &ServiceCommand, target: &ServiceTarget) -> Result<String, CliError> {
    let owner = systemd::owner_of(&target.path).map(|(uid, _)| uid);
    let folder = |file: &Path| file.parent().map(Path::to_owned).unwrap_or_default();
    let mut writable = vec![folder(&target.key_path), folder(&target.log)];
    writable.dedup();
    let stopped = target.paths.stopped();
    let content = Content {
        launch,
        uid: owner.filter(|_| !unit.is_users),
        stopped: &stopped,
        writable: &writable,
        drain: target.drain,
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
fn notes(launch: &ServiceCommand, target: &ServiceTarget, systemd: bool, known: &[String]) -> String {
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
    if !systemd && is_cron_running() == Some(false) {
        notes.push("no cron daemon seems to run; start it (Debian and Ubuntu: `service cron start`, as root)".into());
    }
    let is_set = |name: &&str| std::env::var_os(name).is_some();
    for name in target.keys.iter().map(String::as_str).chain(PROXY_VARIABLES.into_iter().filter(is_set)) {
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
    if target.paths.stopped().exists() {
        notes.push("the agent was stopped by hand and stays so until: usepod-agent service start".into());
    }
    notes.iter().map(|note| format!("note: {note}\n")).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, lchown};
    use std::time::Duration;

    use super::*;
    use crate::instance::AgentPaths;

    /// Root alone can give a folder away.
    #[test]
    fn every_folder_that_is_made_for_a_system_unit_belongs_to_whom_the_agent_runs_as() {
        const UID: u32 = 65534;
        let folder = std::env::temp_dir().join(format!("usepod-folders-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let (path, key_path, log) = (folder.join("agent.toml"), folder.join("a/b/key"), folder.join("c/log"));
        fs::write(&path, "").expect("a file");
        if lchown(&path, Some(UID), None).is_ok() {
            let paths = AgentPaths::beside(&key_path);
            let drain = Duration::ZERO;
            let target = ServiceTarget { path, key_path, paths, log, is_log_named: true, drain, keys: Vec::new() };
            make_folders(&target, Some(&Unit { path: UNIT.into(), is_users: false })).expect("folders");
            for made in ["a", "a/b", "c"] {
                assert_eq!(fs::metadata(folder.join(made)).expect(made).uid(), UID, "{made}");
            }
        }
        fs::remove_dir_all(folder).expect("removed");
    }
}
