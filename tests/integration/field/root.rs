//! root's `service` on files of other users. The tests need root, and a mount namespace that hides the machine's own units.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

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
        for folder in ["home", "of-root", "home-of-root"] {
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
        command.env("HOME", self.path("home-of-root")).env("PATH", path).env("COLUMNS", "1000");
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
    // An owner without an entry in the user database: without `User=`, the unit would run as root.
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

/// Runs a command as this user, in a home of theirs.
fn as_user(machine: &Machine, uid: u32, arguments: &[&str], folder: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args([&*format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups"]).args(arguments);
    command
        .current_dir(folder)
        .env_clear()
        .env("HOME", machine.path("home"))
        .env("COLUMNS", "1000")
        .env("LANG", "C.UTF-8");
    command.env("PATH", format!("{}:/usr/bin:/bin", machine.path("bin").display()));
    command
}

/// A process that must survive until the end of the test.
struct Bystander(Child);

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Another user, who may write to the folder of the identity.
const STRANGER: u32 = 65533;

#[test]
fn root_lock_that_another_user_planted_names_nobody() {
    let Some(machine) = Machine::new() else { return };
    let home = machine.path("home");
    let agent = binary();
    let agent = agent.to_str().expect("UTF-8");
    let key = home.join("identity.key");
    let config = machine.config("home/agent.toml", USER, key.to_str().expect("UTF-8"), "");
    let config = config.to_str().expect("UTF-8");
    set_mode(&home, 0o777);
    for victim in [USER, 0] {
        let mut bystander =
            Bystander(as_user(&machine, victim, &["sleep", "600"], &home).spawn().expect("a bystander"));
        let pid = bystander.0.id();
        wait_until("it is the user's", || {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep")
        });
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("its stat");
        let started = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)).expect("a start");
        // Its last sign of life was long ago, or will be: it looks hung, or at work.
        for liveness in ["0", "99999999999"] {
            let lock = machine.0.write("home/identity.key.lock", format!("{pid}\n{started}\n{liveness}\n"));
            chown(&lock, Some(STRANGER), Some(STRANGER)).expect("an owner");
            set_mode(&lock, 0o666);
            let run = |arguments: &[&str]| {
                let arguments = [&[agent], arguments, &["-c", config]].concat();
                Ran::from(as_user(&machine, victim, &arguments, &home).output().expect("the agent"))
            };
            run(&["status"]).fails(3, &["not running"]);
            run(&["service", "stop"]).fails(1, &["of another user"]);
            let doctor = run(&["doctor", "--no-inference"]);
            assert!(!doctor.stdout.contains(&pid.to_string()) && doctor.stdout.contains("✗ folder"), "{doctor:?}");
            assert!(bystander.0.try_wait().expect("its state").is_none(), "uid {victim}: the bystander was ended");
        }
        let _ = fs::remove_file(home.join("identity.key.stopped"));
    }
}

/// As in a container that runs as root, with the folder of a user of the host.
#[test]
fn root_agent_whose_lock_file_belongs_to_another_user_is_found_and_stopped() {
    let Some(machine) = Machine::new() else { return };
    let coordinator = Coordinator::new();
    let path = format!("{}:/usr/bin:/bin", machine.path("bin").display());
    let setup = Setup::new(&coordinator.url()).env("PATH", &path);
    let lock = setup.scratch.write(".usepod-agent/identity.key.lock", "");
    chown(&lock, Some(USER), Some(USER)).expect("an owner");
    let mut agent = setup.start();
    let _session = coordinator.session();
    let config = setup.write();
    let run = |arguments: &[&str]| {
        let arguments = [arguments, &["-c", config.to_str().expect("UTF-8")]].concat();
        cli(setup.scratch.path(), &arguments, &[("PATH", &path)])
    };
    assert!(run(&["status"]).stdout.contains(&format!("pid {}", agent.pid())));
    assert!(run(&["service", "stop"]).ok().contains("exited"));
    assert_eq!(agent.wait(SOON).code(), Some(0));
}

#[test]
fn root_files_are_not_written_through_links_of_another_user() {
    let Some(machine) = Machine::new() else { return };
    let coordinator = Coordinator::new();
    let folder = machine.path("of-root");
    let key = folder.join("identity.key");
    let toml = TOML.replace("wss://c.example/", &coordinator.url());
    let toml = machine.0.write("agent.toml", format!("{toml}[identity]\nkey_path = {key:?}\n"));
    let precious = machine.0.write("precious", "a file of root");
    let link = |name: &str, target: &Path, owner: u32| {
        let path = folder.join(name);
        let _ = fs::remove_file(&path);
        symlink(target, &path).expect("a link");
        std::os::unix::fs::lchown(&path, Some(owner), Some(owner)).expect("an owner");
    };
    set_mode(&folder, 0o777);
    link("agent.log", &precious, STRANGER);
    link("agent.log.1", &precious, STRANGER);
    let arguments = ["run", "--cron", "--allow-insecure", "-c", toml.to_str().expect("UTF-8")];
    let mut agent = Agent::run(machine.0.path(), &arguments);
    let session = coordinator.session();
    agent.stderr.wait_line(&["log lines are lost", "symlink of another user"]);
    agent.signal("TERM");
    agent.wait(SOON);
    drop(session);
    assert_eq!(fs::read_to_string(&precious).expect("the file"), "a file of root");
    // The identity and the log may be links of the agent's own user, or of root.
    let (elsewhere, log) = (machine.path("key"), machine.path("log"));
    fs::rename(&key, &elsewhere).expect("moved");
    link("identity.key", &elsewhere, 0);
    for (owner, is_followed) in [(0, true), (STRANGER, false)] {
        let log = log.with_file_name(format!("log-{owner}"));
        let toml = machine.0.write("agent.toml", {
            let text = TOML.replace("wss://c.example/", &coordinator.url());
            format!("{text}[identity]\nkey_path = {key:?}\n[observability]\nlog_file = {:?}\n", folder.join("own.log"))
        });
        link("own.log", &log, owner);
        link("identity.key", &elsewhere, owner);
        let mut agent = Agent::run(machine.0.path(), &["run", "--allow-insecure", "-c", toml.to_str().expect("UTF-8")]);
        let session = coordinator.accept().authenticate(Some(&format!("prov_{owner}")));
        if is_followed {
            wait_line_in(&log, &["connected as"]);
        }
        agent.signal("TERM");
        agent.wait(SOON);
        drop(session);
        assert_eq!(log.exists(), is_followed, "{owner}");
        let stored = fs::read_to_string(&elsewhere).expect("the identity").contains(&format!("prov_{owner}"));
        assert_eq!(stored, is_followed, "{owner}");
    }
}

#[test]
fn root_and_users_take_no_agent_toml_from_a_stranger_in_the_working_folder() {
    let Some(machine) = Machine::new() else { return };
    let agent = binary();
    let agent = agent.to_str().expect("UTF-8");
    let shared = machine.path("shared");
    fs::create_dir(&shared).expect("a folder");
    let key = machine.path("home/identity.key");
    let enroll = |uid: u32| {
        let ran = as_user(&machine, uid, &[agent, "enroll"], &shared).output().expect("the agent");
        Ran::from(ran)
    };
    let refuses = |uid: u32| enroll(uid).fails(2, &["no agent.toml found", "./agent.toml", "belongs to another user"]);
    let config = machine.config("shared/agent.toml", STRANGER, key.to_str().expect("UTF-8"), "");
    set_mode(&shared, 0o1777);
    // The file of a stranger, in a folder of root.
    refuses(USER);
    refuses(0);
    // The user's own file, and root's.
    for owner in [USER, 0] {
        chown(&config, Some(owner), None).expect("an owner");
        assert_eq!(enroll(USER).code, Some(0), "{owner}");
    }
    // In a folder of a stranger.
    chown(&shared, Some(STRANGER), None).expect("an owner");
    refuses(USER);
    refuses(0);
    // A link of a stranger to a file of the user.
    chown(&shared, Some(0), None).expect("an owner");
    let target = machine.config("home/other.toml", USER, key.to_str().expect("UTF-8"), "");
    fs::remove_file(&config).expect("removed");
    symlink(target, &config).expect("a link");
    std::os::unix::fs::lchown(&config, Some(STRANGER), None).expect("an owner");
    refuses(USER);
    refuses(0);
    std::os::unix::fs::lchown(&config, Some(USER), None).expect("an owner");
    assert_eq!(enroll(USER).code, Some(0));
    // Named on the command line, it is the operator's decision.
    let config = machine.config("shared/named.toml", STRANGER, key.to_str().expect("UTF-8"), "");
    let named = [agent, "enroll", "-c", config.to_str().expect("UTF-8")];
    assert!(as_user(&machine, USER, &named, &shared).output().expect("the agent").status.success());
}
