//! The systemd unit: a system unit for root, a user unit for everybody else.
//!
//! Invariants: the unit does not start while the operator's `stopped` marker exists, and an agent that shows no sign of life is
//! replaced after the same time and by the same signals, as under cron.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Uid, User};

use super::{STOP_MARGIN, ServiceCommand, command, error_text};
use crate::config;
use crate::instance::LIVENESS_TIMEOUT;
use crate::instance::takeover::TERM_TIMEOUT;
use crate::sys::{files, user};

/// The unit's name.
pub const UNIT: &str = "usepod-agent.service";
/// Maximum size of a unit's file that is read, in bytes.
const UNIT_BYTES_MAX: u64 = 1 << 20;
const SYSTEM_FOLDER: &str = "/etc/systemd/system";
/// The configuration file, for the other commands; systemd ignores keys that begin with `X-`.
const CONFIG_KEY: &str = "X-Config=";
const USER_KEY: &str = "User=";
const EXEC_KEY: &str = "ExecStart=";

/// Restrictions that need no privileges to enforce.
const HARDENING: &str = "\
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0077
";

/// Restrictions that only the system manager can enforce.
const SYSTEM_HARDENING: &str = "\
CapabilityBoundingSet=
PrivateDevices=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=read-only
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectSystem=strict
";

/// A systemd unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// The unit's file.
    pub path: PathBuf,
    /// Whether this is a user unit, managed by `systemctl --user`.
    pub is_users: bool,
}

/// The content of the unit's file.
pub struct Content<'a> {
    /// The command that the unit starts.
    pub command: &'a ServiceCommand,
    /// The user that the command runs as; only in system units.
    pub uid: Option<u32>,
    /// The marker that keeps the unit from starting.
    pub stopped: &'a Path,
    /// The folders that the agent writes to.
    pub writable: &'a [PathBuf],
    /// How long jobs in flight may take when the agent stops.
    pub drain: Duration,
}

impl Unit {
    /// The unit that this user would install.
    ///
    /// # Errors
    /// HOME is not set.
    pub fn of_this_user() -> Result<Unit, String> {
        if Uid::effective().is_root() {
            return Ok(Unit { path: Path::new(SYSTEM_FOLDER).join(UNIT), is_users: false });
        }
        let base = config::user_config_dir().ok_or("HOME is not set, so the path of the unit is unknown; set it")?;
        Ok(Unit { path: base.join("systemd/user").join(UNIT), is_users: true })
    }

    /// The installed unit: this user's own, or the system unit that runs as this user.
    pub fn installed() -> Option<Unit> {
        let own = Unit::of_this_user().ok().filter(|unit| unit.path.exists());
        own.or_else(|| {
            let system = Unit { path: Path::new(SYSTEM_FOLDER).join(UNIT), is_users: false };
            let runs_as = system.value_of(USER_KEY)?;
            (runs_as == Uid::effective().to_string()).then_some(system)
        })
    }

    /// The configuration file that the unit names.
    pub fn config(&self) -> Option<String> {
        let value = self.value_of(CONFIG_KEY)?;
        Some(value.strip_prefix('"')?.strip_suffix('"')?.to_owned())
    }

    /// The program that the unit starts.
    pub fn program(&self) -> Option<String> {
        let value = self.value_of(EXEC_KEY)?;
        let mut word = String::new();
        let mut characters = value.strip_prefix('"')?.chars();
        loop {
            match characters.next()? {
                '"' => return Some(word.replace("%%", "%")),
                '\\' => word.push(characters.next()?),
                c => word.push(c),
            }
        }
    }

    /// Whether the user's units run while the user is not logged in; `None` if that is unknown, or if this is a system unit.
    pub fn lingers(&self) -> Option<bool> {
        if !self.is_users {
            return None;
        }
        let output = command("loginctl").args(["show-user", &user::name(), "--property=Linger"]).output().ok()?;
        match String::from_utf8_lossy(&output.stdout).trim() {
            "Linger=yes" => Some(true),
            "Linger=no" => Some(false),
            // What `loginctl` says of a user who has no session, as under cron, and does not linger.
            _ => error_text(&output).contains("not logged in or lingering").then_some(false),
        }
    }

    fn value_of(&self, key: &str) -> Option<String> {
        let text = String::from_utf8(files::read_bounded(&self.path, UNIT_BYTES_MAX).ok()?).ok()?;
        text.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned)
    }

    /// The text of the unit's file.
    pub fn text(&self, content: &Content<'_>) -> String {
        let ServiceCommand { binary, config, .. } = content.command;
        let mut command = vec![systemd_quote(binary), "run".into(), "--config".into(), quote_argument(config)];
        command.extend(content.command.options());
        let (after, user) = match content.uid {
            Some(uid) => ("After=network-online.target\nWants=network-online.target\n", format!("{USER_KEY}{uid}\n")),
            None => ("", String::new()),
        };
        let mut text = format!(
            "# Written by `usepod-agent service install --systemd`, removed by `usepod-agent service uninstall`.\n\
             [Unit]\nDescription=Use Pod provider agent\n{CONFIG_KEY}\"{}\"\nConditionPathExists=!{}\n{after}\
             StartLimitIntervalSec=0\n\n\
             [Service]\nType=notify\nWatchdogSec={}\nWatchdogSignal=SIGTERM\nTimeoutAbortSec={}\n{EXEC_KEY}{}\n{user}WorkingDirectory=~\nRestart=always\nRestartSec=10\n\
             KillSignal=SIGTERM\nTimeoutStopSec={}\n\n{HARDENING}",
            config,
            content.stopped.to_string_lossy().replace('%', "%%"),
            LIVENESS_TIMEOUT.as_secs(),
            TERM_TIMEOUT.as_secs(),
            command.join(" "),
            (content.drain + STOP_MARGIN).as_secs(),
        );
        if !self.is_users {
            text.push_str(SYSTEM_HARDENING);
            for folder in content.writable {
                text.push_str(&format!("ReadWritePaths={}\n", systemd_quote(&folder.to_string_lossy())));
            }
        }
        let target = if self.is_users { "default.target" } else { "multi-user.target" };
        text.push_str(&format!("\n[Install]\nWantedBy={target}\n"));
        text
    }

    /// Writes `text` as the unit's file, and enables and starts the unit. Returns whether the file has changed.
    ///
    /// # Errors
    /// The file cannot be written, or systemd refuses it; the previous file is restored. Or the agent did not start; the unit stays.
    pub fn install(&self, text: &str) -> Result<bool, String> {
        let before = files::read_bounded(&self.path, UNIT_BYTES_MAX).ok();
        if before.as_deref() == Some(text.as_bytes()) {
            return Ok(false);
        }
        let failed =
            |e| format!("failed to write `{}`: {e}; check the folder and its permissions", self.path.display());
        self.path.parent().map_or(Ok(()), fs::create_dir_all).map_err(failed)?;
        // With default permissions, because other users may read units.
        fs::write(&self.path, text).map_err(failed)?;
        let taken = self.systemctl(&["daemon-reload"]).and_then(|()| self.systemctl(&["enable", "--now", UNIT]));
        if let Err(why) = &taken {
            // systemd waits until the agent has started, and goes on trying.
            if self.systemctl(&["is-enabled", "--quiet", UNIT]).is_ok() {
                return Err(format!(
                    "installed as `{}`, but the agent did not start: {why}; see `usepod-agent service logs`",
                    self.path.display()
                ));
            }
            let _ = before.map_or_else(|| fs::remove_file(&self.path), |before| fs::write(&self.path, before));
        }
        taken.map(|()| true)
    }

    /// Stops, disables and removes the unit.
    ///
    /// # Errors
    /// systemd refuses, or the file cannot be removed.
    pub fn uninstall(&self) -> Result<(), String> {
        self.systemctl(&["disable", "--now", UNIT])?;
        fs::remove_file(&self.path).map_err(|e| format!("failed to remove `{}`: {e}", self.path.display()))?;
        self.systemctl(&["daemon-reload"])
    }

    /// The options of `systemctl` and `journalctl` that select the unit's manager.
    pub fn scope(&self) -> &'static [&'static str] {
        if self.is_users { &["--user"] } else { &[] }
    }

    /// Runs `systemctl`.
    ///
    /// # Errors
    /// The error message of `systemctl`, or the reason why it could not be run.
    pub fn systemctl(&self, arguments: &[&str]) -> Result<(), String> {
        let arguments = [self.scope(), arguments].concat();
        let shown = format!("systemctl {}", arguments.join(" "));
        match command("systemctl").args(arguments).output() {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(format!("`{shown}` failed: {}", error_text(&output))),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                Err("there is no `systemctl` on this machine; use cron: `usepod-agent service install`".into())
            }
            Err(e) => Err(format!("`{shown}` cannot be run: {e}")),
        }
    }
}

/// The owner of a file.
///
/// # Errors
/// The file cannot be examined, or its owner is not in the user database, so that no unit could run as them.
pub fn owner_of(path: &Path) -> Result<User, String> {
    let failed = |why: String| format!("`{}`: {why}", path.display());
    let uid = fs::metadata(path).map_err(|e| failed(e.to_string()))?.uid();
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.ok_or_else(|| {
        failed(format!("its owner, uid {uid}, has no entry in the user database; chown it to a user who has"))
    })
}

/// Quotes one word by systemd's rules.
fn systemd_quote(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%"))
}

/// Quotes one argument of a command, in which `$` would otherwise begin a variable.
fn quote_argument(text: &str) -> String {
    systemd_quote(text).replace('$', "$$")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn text(unit: &Unit, command: &ServiceCommand, uid: Option<u32>) -> String {
        let content = Content {
            command,
            uid,
            stopped: Path::new("/home/a/.usepod-agent/identity.key.stopped"),
            writable: &["/home/a b/.usepod-agent".into()],
            drain: Duration::from_secs(30),
        };
        unit.text(&content)
    }

    fn command() -> ServiceCommand {
        let config = "/srv/100% $HOME \"x\"/agent.toml".to_owned();
        ServiceCommand {
            binary: "/bin/sh".into(),
            config,
            log_level: Some(log::LevelFilter::Debug),
            allow_insecure: true,
        }
    }

    #[test]
    fn text_quotes_the_command_by_systemds_rules() {
        let unit = Unit { path: UNIT.into(), is_users: true };
        let exec = "ExecStart=\"/bin/sh\" run --config \"/srv/100%% $$HOME \\\"x\\\"/agent.toml\" --log-level debug --allow-insecure\n";
        let text = text(&unit, &command(), None);
        assert!(text.contains(exec), "{text}");
        assert!(text.contains("Type=notify\nWatchdogSec=180\nWatchdogSignal=SIGTERM\nTimeoutAbortSec=10\n"), "{text}");
        assert!(text.contains("TimeoutStopSec=45\n") && !text.contains(USER_KEY) && !text.contains("ProtectSystem"));
    }

    #[test]
    fn program_is_read_as_it_was_written() {
        let path = std::env::temp_dir().join(format!("usepod-program-{}", std::process::id()));
        let unit = Unit { path: path.clone(), is_users: true };
        let binary = "/opt/100% \"x\" \\y/usepod-agent";
        fs::write(&path, text(&unit, &ServiceCommand { binary: binary.into(), ..command() }, None)).expect("written");
        assert_eq!(unit.program().as_deref(), Some(binary));
        fs::remove_file(path).expect("removed");
    }

    #[test]
    fn text_is_accepted_by_systemd() {
        let folder = std::env::temp_dir().join(format!("usepod-unit-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        for is_users in [false, true] {
            let unit = Unit { path: folder.join(UNIT), is_users };
            let uid = (!is_users).then(|| Uid::current().as_raw());
            fs::write(&unit.path, text(&unit, &command(), uid)).expect("written");
            assert_eq!((unit.config(), unit.program()), (Some(command().config), Some(command().binary)));
            match std::process::Command::new("systemd-analyze").arg("verify").arg("--man=no").arg(&unit.path).output() {
                Ok(output) => {
                    let said = String::from_utf8_lossy(&output.stderr).into_owned();
                    assert!(!said.contains(UNIT), "{said}");
                }
                // Past the capture of output, for the test passes.
                Err(e) => {
                    let mut stderr = std::io::stderr();
                    writeln!(stderr, "the check of the units by systemd-analyze was left out: {e}").expect("written");
                }
            }
        }
        fs::remove_dir_all(folder).expect("removed");
    }
}
