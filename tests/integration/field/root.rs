//! root's `service` on files of other users. The tests need root, and a mount namespace that hides the machine's own units.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::*;

/// `nobody`, who owns the files. The user database has an entry.
const USER: u32 = 65534;
/// A user without an entry.
const UNKNOWN: u32 = 54321;
const TOML: &str =
    "[coordinator]\nurl = \"wss://c.example/\"\n[pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 1\n";

/// A machine with a folder of root and the home of a user.
struct Machine(Scratch);

impl Machine {
    /// `None` if the tests may not act as root here.
    fn new() -> Option<Self> {
        let mounts = Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
        if !nix::unistd::geteuid().is_root() || !mounts.is_ok_and(|ran| ran.status.success()) {
            left_out("it needs root and a mount namespace");
            return None;
        }
        let machine = Self(Scratch::new());
        for (name, text) in [("systemctl", ""), ("crontab", "echo 'no crontab for root' >&2; exit 1\n")] {
            set_mode(machine.0.write(&format!("bin/{name}"), format!("#!/bin/sh\n{text}")), 0o755);
        }
        for folder in ["home", "of-root"] {
            fs::create_dir(machine.path(folder)).expect("a folder");
        }
        chown(machine.path("home"), Some(USER), Some(USER)).expect("the user's home");
        Some(machine)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// An `agent.toml` of this user with this key path.
    fn config(&self, name: &str, owner: u32, key: &str, more: &str) -> PathBuf {
        let path = self.0.write(name, format!("{TOML}[identity]\nkey_path = \"{key}\"\n{more}"));
        chown(&path, Some(owner), Some(owner)).expect("an owner");
        path
    }

    /// Runs a script in which `agent` is the program; at its end, prints the unit that is installed. Its own unit folder is empty.
    fn run(&self, script: &str) -> Ran {
        let unit = "/etc/systemd/system/usepod-agent.service";
        let script = format!(
            "mkdir -p /etc/systemd/system && mount -t tmpfs none /etc/systemd/system || exit 99\n\
             agent() {{ \"$0\" \"$@\"; }}\n{script}\ncode=$?\n[ ! -e {unit} ] || cat {unit}\nexit $code"
        );
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &script]).arg(binary()).current_dir(self.0.path()).env_clear();
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.path("bin").display());
        command.env("HOME", self.path("of-root")).env("PATH", path).env("COLUMNS", "1000");
        command.output().expect("a shell").into()
    }

    fn install(&self, config: &Path) -> Ran {
        self.run(&format!("agent service install --systemd --config '{}'", config.display()))
    }

    #[track_caller]
    fn refuses(&self, config: &Path, words: &[&str]) {
        let printed = self.install(config).fails(1, words);
        assert!(!printed.contains("ExecStart="), "a unit was written: {printed}");
    }
}

#[test]
fn root_installs_a_unit_that_runs_as_the_owner_of_the_configuration_with_folders_of_theirs() {
    let Some(machine) = Machine::new() else { return };
    let key = machine.path("home/a b/c/identity.key");
    let config = machine.config("home/agent.toml", USER, key.to_str().expect("UTF-8"), "");
    let printed = machine.install(&config).ok();
    assert!(printed.contains(&format!("\nUser={USER}\n")), "{printed}");
    for folder in ["home/a b", "home/a b/c"] {
        let found = fs::metadata(machine.path(folder)).expect(folder);
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (USER, USER, 0o700), "{folder}");
    }
}

#[test]
fn root_installs_no_unit_with_a_path_that_would_add_lines_to_it() {
    let Some(machine) = Machine::new() else { return };
    let home = machine.path("home");
    let home = home.display();
    let good = format!("{home}/identity.key");
    let log = |path: &str| format!("[observability]\nlog_file = \"{path}\"\n");
    for (key, more) in [
        (format!("{home}/k\\nUser=0\\nExecStartPre=+/bin/true\\n#/key"), String::new()),
        (format!("{home}/k\\r/key"), String::new()),
        (format!("{home}/k\\\\x0aUser=0/key"), String::new()),
        (good.clone(), log(&format!("{home}/l\\nUser=0\\n/agent.log"))),
        (good.clone(), log(&format!("{home}/l\\u0085/agent.log"))),
    ] {
        let config = machine.config("home/agent.toml", USER, &key, &more);
        machine.refuses(&config, &["control characters", "rename"]);
        assert_eq!(names_in(&machine.path("home")), ["agent.toml"], "nothing is made for a refused unit");
    }
    let config = machine.config("home/new\nline/agent.toml", USER, &good, "");
    machine.refuses(&config, &["control characters"]);
}

#[test]
fn root_makes_no_folder_where_the_owner_of_the_configuration_could_not() {
    let Some(machine) = Machine::new() else { return };
    let (home, of_root) = (machine.path("home"), machine.path("of-root"));
    symlink(&of_root, home.join("link")).expect("a link");
    for path in
        [of_root.join("new/identity.key"), home.join("link/new/deeper/identity.key"), home.join("../of-root/new/key")]
    {
        let path = path.to_str().expect("UTF-8");
        let config = machine.config("home/agent.toml", USER, path, "");
        machine.refuses(&config, &["failed to create the folder", "as nobody"]);
        let log = format!("[observability]\nlog_file = \"{path}\"\n");
        let config = machine.config("home/agent.toml", USER, home.join("key").to_str().expect("UTF-8"), &log);
        machine.refuses(&config, &["failed to create the folder", "as nobody"]);
        assert!(names_in(&of_root).is_empty(), "{path}");
    }
    // The marker of a stop is not created there either.
    let good = machine.config("home/agent.toml", USER, home.join("key").to_str().expect("UTF-8"), "");
    let bad = machine.config("home/bad.toml", USER, of_root.join("key").to_str().expect("UTF-8"), "");
    let script = format!(
        "agent service install --systemd --config '{0}' && cp '{1}' '{0}' && agent service stop",
        good.display(),
        bad.display()
    );
    machine.run(&script).fails(1, &["failed to create", "key.stopped"]);
    assert!(names_in(&of_root).is_empty());
}

#[test]
fn root_refuses_a_configuration_that_another_user_can_change_or_replace() {
    let Some(machine) = Machine::new() else { return };
    let (home, of_root) = (machine.path("home"), machine.path("of-root"));
    let key = |folder: &Path| folder.join("identity.key").to_str().expect("UTF-8").to_owned();
    let refuses = |config: &Path, words: &[&str]| {
        machine.refuses(config, words);
        // Cron would run the agent as root.
        let cron = format!("agent service install --config '{}'", config.display());
        machine.run(&cron).fails(1, &["as root"]);
    };
    // A file of root, which the owner of the folder can replace.
    let config = machine.config("home/agent.toml", 0, &key(&of_root), "");
    refuses(&config, &["would run as root", "belongs to nobody", "chown"]);
    // The same, by a link of that user.
    let config = machine.config("of-root/agent.toml", 0, &key(&of_root), "");
    symlink(&config, home.join("link.toml")).expect("a link");
    refuses(&home.join("link.toml"), &["would run as root", "belongs to nobody"]);
    // Folders, a file and an identity that everybody can write to.
    let config = machine.config("home/open/agent.toml", USER, &key(&home), "");
    chown(machine.path("home/open"), Some(USER), Some(USER)).expect("an owner");
    for (path, mode) in [("home/open", 0o777), ("home", 0o773), ("home/open/agent.toml", 0o666)] {
        let before = self::mode(machine.path(path));
        set_mode(machine.path(path), mode);
        refuses(&config, &["other users can write", "chmod go-w"]);
        set_mode(machine.path(path), before);
    }
    set_mode(machine.path("home/open"), 0o1777);
    let with_open_identity = machine.config("home/agent.toml", USER, &key(&home.join("open")), "");
    refuses(&with_open_identity, &["its identity", "other users can write"]);
    // An owner as whom no unit could run: without `User=`, it would run as root.
    let unknown = machine.config("unknown/agent.toml", UNKNOWN, &key(&home), "");
    chown(machine.path("unknown"), Some(UNKNOWN), None).expect("an owner");
    refuses(&unknown, &["54321", "no entry in the user database"]);
    assert!(names_in(&of_root).iter().all(|name| name == "agent.toml"));
}

/// Every user can read the settings of a unit.
#[test]
fn root_is_told_to_keep_keys_in_a_file_that_only_its_owner_can_read() {
    let Some(machine) = Machine::new() else { return };
    let backend = "[[backends]]\nkind = \"openrouter\"\napi_key_env = \"OPENROUTER_API_KEY\"\n";
    let key = machine.path("home/key");
    let config = machine.config("home/agent.toml", USER, key.to_str().expect("UTF-8"), backend);
    let install = format!("agent service install --systemd --config '{}'", config.display());
    let printed = machine.run(&format!("export HTTPS_PROXY=http://u:secret@p:1; {install}")).ok();
    for word in ["`OPENROUTER_API_KEY=VALUE`", "`HTTPS_PROXY=VALUE`", "EnvironmentFile=/etc/", "install -m 600"] {
        assert!(printed.contains(word), "no {word} in {printed}");
    }
    assert!(!printed.contains("Environment=") && !printed.contains("secret"), "{printed}");
    // A user's own units, and a user's own file.
    let script = format!(
        "exec setpriv --reuid={USER} --regid={USER} --clear-groups env HOME='{0}' \"$0\" service install --systemd --config '{1}'",
        machine.path("home").display(),
        config.display()
    );
    let printed = machine.run(&script).ok();
    let file = machine.path("home/.config/usepod-agent/agent.env");
    let words = ["systemctl --user edit", &format!("EnvironmentFile={}", file.display())];
    assert!(words.iter().all(|word| printed.contains(word)) && !printed.contains("Environment="), "{printed}");
}
