//! `service install`: installs the supervisor and prints the notes for the operator.

use std::path::{Path, PathBuf};

use nix::unistd::Uid;

use super::{ServiceTarget, print_wrapped};
use crate::cli::CliError;
use crate::cli::args::Globals;
use crate::config::{self, Config};
use crate::service::crontab::Crontab;
use crate::service::systemd::{Content, UNIT, Unit};
use crate::service::{ServiceCommand, Supervisor, is_cron_running};
use crate::sys::permissions::{Exposure, check_folder, check_path};
use crate::sys::shell_quote::shell_quote;
use crate::sys::user::{self, this_user};
use crate::sys::{files, operator_path};

/// Environment variables that the agent uses and that a supervisor does not pass on.
const PROXY_VARIABLES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"];

/// Installs the agent under cron or systemd.
pub fn run(globals: &Globals, systemd: bool) -> Result<(), CliError> {
    // In the working folder of the operator, which `load` leaves.
    let program = operator_path::this_program().map_err(|e| format!("failed to find the file of this program: {e}"))?;
    let unit = if systemd { Some(Unit::of_this_user()?) } else { None };
    let target = ServiceTarget::load(&Config::find(globals.config.as_deref())?, globals.allow_insecure, unit.as_ref())?;
    let command = service_command(&program, &target, globals)?;
    check_paths(&target, &command)?;
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
    make_folders(&target)?;
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

/// Creates the folders of the identity and the log as the user that the agent runs as, where that user may. Under a system unit the
/// agent cannot create them, and the unit does not start if one is missing.
fn make_folders(target: &ServiceTarget) -> Result<(), CliError> {
    for file in [&target.key_path, &target.log] {
        target.with_access(|| files::create_folder_of(file)).map_err(|e| {
            let user = target.user.as_ref().map_or_else(String::new, |user| format!(" as {}", user.name));
            let path = file.display();
            CliError::Runtime(format!("failed to create the folder of `{path}`{user}: {e}; check the permissions"))
        })?;
    }
    Ok(())
}

/// Rejects paths that the supervisor cannot represent. If root installs the agent, also rejects files through which a third user
/// could control it.
fn check_paths(target: &ServiceTarget, command: &ServiceCommand) -> Result<(), CliError> {
    for path in [&target.key_path, &target.log] {
        ServiceCommand::path(path)?;
    }
    if !Uid::effective().is_root() {
        return Ok(());
    }
    let (uid, name) = match &target.user {
        Some(user) => (user.uid, &*user.name),
        None => (Uid::effective(), "root"),
    };
    let refused = |what: &str, exposure: Exposure| {
        let fix = exposure.fix();
        CliError::Runtime(format!(
            "the agent would run as {name}, but another user decides about its {what}: {exposure}; {fix}; or run \
             `usepod-agent service install` as the user that the agent is to run as"
        ))
    };
    check_path(&target.path, uid).map_err(|exposure| refused("configuration", exposure))?;
    check_path(Path::new(&command.binary), uid).map_err(|exposure| refused("program", exposure))?;
    let folder = target.key_path.parent().unwrap_or(Path::new("/"));
    check_folder(folder, uid).map_err(|exposure| refused("identity", exposure))
}

fn service_command(program: &Path, target: &ServiceTarget, globals: &Globals) -> Result<ServiceCommand, String> {
    if !program.exists() {
        return Err("the file of this program has been replaced since it was started; run the new one".into());
    }
    Ok(ServiceCommand {
        binary: ServiceCommand::path(program)?,
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
            "changed in your crontab, to run at boot and every minute:\n  {line}\n\
             a running agent is not affected; to apply the change: `usepod-agent service restart`\n"
        ),
    };
    Ok((report, variables))
}

fn install_unit(unit: &Unit, command: &ServiceCommand, target: &ServiceTarget) -> Result<String, CliError> {
    let folder = |file: &Path| file.parent().map(Path::to_owned).unwrap_or_default();
    let mut writable = vec![folder(&target.key_path), folder(&target.log)];
    writable.dedup();
    let stopped = target.paths.stopped();
    let content = Content {
        command,
        uid: target.user.as_ref().map(|user| user.uid.as_raw()),
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
            // Every user can read the settings of a unit, but not this file.
            true => {
                let (scope, file) = environment_file();
                let shown = file.display();
                let create = format!("install -m 600 /dev/null {}", shell_quote(&shown.to_string()));
                format!(
                    "write the line `{name}=VALUE` to `{shown}`, a file that only its owner can read (`{create}` creates it), and \
                     with `systemctl{scope} edit {UNIT}` add `EnvironmentFile={shown}` below `[Service]`"
                )
            }
        };
        notes.push(format!("the agent will not get the variable {name} of this shell; {fix}"));
    }
    if target.paths.stopped().exists() {
        notes.push("the agent was stopped by the operator and stays stopped until `usepod-agent service start`".into());
    }
    notes
}

/// The option of `systemctl` for this user's units, and the file for the variables of a unit.
fn environment_file() -> (&'static str, PathBuf) {
    match config::user_config_dir().filter(|_| !Uid::effective().is_root()) {
        Some(folder) => (" --user", folder.join("usepod-agent/agent.env")),
        None => ("", "/etc/usepod-agent.env".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, chown};
    use std::time::Duration;

    use nix::unistd::User;

    use super::*;
    use crate::instance::AgentPaths;

    /// Only root can create files as another user.
    #[test]
    fn make_folders_creates_every_folder_as_the_user_of_a_system_unit() {
        const UID: u32 = 65534;
        let folder = std::env::temp_dir().join(format!("usepod-folders-{}", std::process::id()));
        fs::create_dir_all(folder.join("of-root")).expect("folders");
        let path = folder.join("agent.toml");
        let user = User::from_uid(Uid::from_raw(UID)).expect("the user database");
        if Uid::effective().is_root() && user.is_some() {
            chown(&folder, Some(UID), None).expect("root may");
            let target = |key: &str| {
                let (key_path, user, drain) = (folder.join(key), user.clone(), Duration::ZERO);
                let (paths, log) = (AgentPaths::beside(&key_path), folder.join("c/log"));
                let (path, keys) = (path.clone(), Vec::new());
                ServiceTarget { path, key_path, paths, log, is_log_named: true, drain, keys, user }
            };
            make_folders(&target("a/b/key")).expect("folders");
            for made in ["a", "a/b", "c"] {
                assert_eq!(fs::metadata(folder.join(made)).expect(made).uid(), UID, "{made}");
            }
            assert!(make_folders(&target("of-root/new/key")).is_err());
            assert!(!folder.join("of-root/new").exists());
        }
        fs::remove_dir_all(folder).expect("removed");
    }
}
