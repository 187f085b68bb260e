//! `service install`: installs the supervisor and prints the notes for the operator.

use std::path::Path;

use super::{ServiceTarget, print_wrapped};
use crate::cli::CliError;
use crate::cli::args::Globals;
use crate::config::Config;
use crate::service::crontab::Crontab;
use crate::service::systemd::{self, Content, UNIT, Unit};
use crate::service::{ServiceCommand, Supervisor, is_cron_running};
use crate::sys::files;
use crate::sys::user::{self, this_user};

/// Environment variables that the agent uses and that a supervisor does not pass on.
const PROXY_VARIABLES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"];

/// Installs the agent under cron or systemd.
pub fn run(globals: &Globals, systemd: bool) -> Result<(), CliError> {
    let unit = if systemd { Some(Unit::of_this_user()?) } else { None };
    let target = ServiceTarget::load(&Config::find(globals.config.as_deref())?, globals.allow_insecure, unit.as_ref())?;
    let command = service_command(&target, globals)?;
    // A user who is not allowed to use cron has no crontab.
    let has_no_crontab = |e: &String| systemd && e.contains("not allowed");
    let installed = Supervisor::installed().or_else(|e| if has_no_crontab(&e) { Ok(None) } else { Err(e) })?;
    if let Some(installed) = &installed {
        let is_other = matches!(installed, Supervisor::Systemd(_)) != systemd;
        let config = installed.config().unwrap_or_default();
        if is_other || config != command.config {
            return Err(CliError::Runtime(format!(
                "already supervised by {}, with `{config}`; remove that first: usepod-agent service uninstall",
                installed.description()
            )));
        }
    }
    make_folders(&target, unit.as_ref()).map_err(|e| {
        let (key, log) = (target.key_path.display(), target.log.display());
        CliError::Runtime(format!("failed to create the folder of `{key}` or `{log}`: {e}; check the permissions"))
    })?;
    let (report, set_by_cron) = match unit {
        Some(unit) => (install_unit(&unit, &command, &target)?, Vec::new()),
        None => install_block(&command)?,
    };
    for line in report.lines() {
        // Commands are not wrapped.
        if line.starts_with("  ") { out!("{line}\n") } else { print_wrapped(line) }
    }
    for note in notes(&command, &target, systemd, &set_by_cron) {
        print_wrapped(&format!("note: {note}"));
    }
    Ok(())
}

/// Creates the folders of the identity and the log, owned by the user that the agent runs as. Under a system unit the agent cannot
/// create them, and the unit does not start if one is missing.
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

fn service_command(target: &ServiceTarget, globals: &Globals) -> Result<ServiceCommand, String> {
    let binary = std::env::current_exe().map_err(|e| format!("failed to find the file of this program: {e}"))?;
    if !binary.exists() {
        return Err("the file of this program has been replaced since it was started; run the new one".into());
    }
    Ok(ServiceCommand {
        binary: ServiceCommand::path(&binary)?,
        config: ServiceCommand::path(&target.path)?,
        log_level: globals.log_level,
        allow_insecure: globals.allow_insecure,
    })
}

/// Installs the crontab block. Returns a report, and the variables that cron sets for the agent.
fn install_block(command: &ServiceCommand) -> Result<(String, Vec<String>), CliError> {
    let table = Crontab::read()?.ok_or_else(|| {
        CliError::Runtime(
            "there is no `crontab` on this machine: install cron (Debian and Ubuntu: `apt install cron`), or use systemd: \
             `usepod-agent service install --systemd`"
                .into(),
        )
    })?;
    let variables = table.environment().into_iter().map(|(name, _)| name).collect();
    let text = table.with_block(command);
    if text == table.text() {
        return Ok(("already installed in your crontab; nothing was changed\n".into(), variables));
    }
    Crontab::write(&text)?;
    let line = Crontab::parse(text).ok().and_then(|table| table.command()).unwrap_or_default();
    let report = match table.command() {
        None => format!(
            "installed in your crontab, to run at boot and every minute:\n  {line}\n\
             cron starts the agent within a minute; to start it now: `usepod-agent service start`\n"
        ),
        Some(_) => format!(
            "changed in your crontab:\n  {line}\n\
             a running agent is not affected; to apply the change: `usepod-agent service restart`\n"
        ),
    };
    Ok((report, variables))
}

fn install_unit(unit: &Unit, command: &ServiceCommand, target: &ServiceTarget) -> Result<String, CliError> {
    let owner = systemd::owner_of(&target.path).map(|(uid, _)| uid);
    let folder = |file: &Path| file.parent().map(Path::to_owned).unwrap_or_default();
    let mut writable = vec![folder(&target.key_path), folder(&target.log)];
    writable.dedup();
    let stopped = target.paths.stopped();
    let content = Content {
        command,
        uid: owner.filter(|_| !unit.is_users),
        stopped: &stopped,
        writable: &writable,
        drain: target.drain,
    };
    let existed = unit.path.exists();
    let path = unit.path.display();
    if !unit.install(&unit.text(&content))? {
        return Ok(format!("already installed as `{path}`; nothing was changed\n"));
    }
    let mut report = match existed {
        false => format!("installed as `{path}`, and started\n"),
        true => format!("changed `{path}`; to apply the change: `usepod-agent service restart`\n"),
    };
    if unit.is_users {
        report.push_str("to keep it running while you are not logged in: `loginctl enable-linger`\n");
    }
    Ok(report)
}

/// Notes on what the operator must know or do so that the agent starts and serves. `variables` are the variables that cron sets.
fn notes(command: &ServiceCommand, target: &ServiceTarget, systemd: bool, variables: &[String]) -> Vec<String> {
    let mut notes = Vec::new();
    let is_in = |folders: &[&str]| folders.iter().any(|folder| command.binary.contains(folder));
    if is_in(&["/target/debug/", "/target/release/"]) || command.binary.starts_with("/tmp/") {
        notes.push(format!(
            "`{}` is in a folder that may be cleared; move the program to ~/.local/bin or /usr/local/bin, and install it \
             from there",
            command.binary
        ));
    }
    if let (Some(home), Some(user)) = (user::home(), this_user())
        && home != user.dir
        && !variables.iter().any(|name| name == "HOME")
    {
        notes.push(format!(
            "HOME is `{}` here and `{}` for the supervisor; `~` in agent.toml means the latter",
            home.display(),
            user.dir.display()
        ));
    }
    if !systemd && is_cron_running() == Some(false) {
        notes.push(
            "no cron daemon seems to be running; start it (Debian and Ubuntu: `service cron start`, as root)".into(),
        );
    }
    let is_set = |name: &&str| std::env::var_os(name).is_some();
    for name in target.keys.iter().map(String::as_str).chain(PROXY_VARIABLES.into_iter().filter(is_set)) {
        if variables.iter().any(|variable| variable == name) {
            continue;
        }
        let fix = match systemd {
            false => format!("with `crontab -e`, add a line `{name}=VALUE` above the block"),
            true => format!(
                "with `systemctl edit {UNIT}` (`--user` for a user unit), add `Environment={name}=VALUE` below `[Service]`"
            ),
        };
        notes.push(format!("the agent will not get the variable {name} of this shell; {fix}"));
    }
    if target.paths.stopped().exists() {
        notes.push("the agent was stopped by the operator and stays stopped until `usepod-agent service start`".into());
    }
    notes
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, lchown};
    use std::time::Duration;

    use super::*;
    use crate::instance::AgentPaths;

    /// Only root can change the owner of a folder.
    #[test]
    fn make_folders_gives_every_new_folder_to_the_user_of_a_system_unit() {
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
