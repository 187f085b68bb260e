//! `service`: its changes to the crontab, the agents that it starts and stops, and its output. A script stands in for `crontab`
//! and keeps the crontab in a file.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use serde_json::json;

use crate::support::*;

/// Keeps the crontab in `tab`, records its calls, and fails with the text of `refuses-OPTION`, if that exists.
const CRONTAB: &str = r#"#!/bin/sh
echo "$*" >>"$HOME/calls"
[ "$LC_ALL" = C ] || { echo "kein crontab" >&2; exit 1; }
[ ! -e "$HOME/refuses-$1" ] || { cat "$HOME/refuses-$1" >&2; exit 1; }
case $1 in
-l) [ -e "$HOME/tab" ] || { echo "no crontab for operator" >&2; exit 1; }; cat "$HOME/tab" ;;
-r) rm "$HOME/tab" ;;
-) cat >"$HOME/tab" ;;
esac
"#;

/// Records its calls, and fails with the text of `refuses-systemctl`, if that exists.
const SYSTEMCTL: &str = r#"#!/bin/sh
echo "$*" >>"$HOME/calls"
[ ! -e "$HOME/refuses-systemctl" ] || { cat "$HOME/refuses-systemctl" >&2; exit 1; }
"#;

const JOURNALCTL: &str = "#!/bin/sh\necho \"journalctl $*\"\n";

/// An operator with a home, an `agent.toml` and a crontab. The supervised agent is killed at the end of the test.
struct Operator {
    setup: Setup,
    environment: Vec<(String, String)>,
}

impl Operator {
    fn new() -> Self {
        Self::of(Setup::new("ws://127.0.0.1:9/provider/connect"))
    }

    fn of(setup: Setup) -> Self {
        let operator = Self { setup, environment: Vec::new() };
        operator.program("crontab", CRONTAB);
        let path = format!("{}:/usr/bin:/bin", operator.file("bin").display());
        operator.setup.write();
        operator.with("PATH", &path)
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    fn program(&self, name: &str, text: &str) {
        let path = self.setup.scratch.write(&format!("bin/{name}"), text);
        set_mode(path, 0o755);
    }

    fn file(&self, name: &str) -> PathBuf {
        self.setup.scratch.join(name)
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let environment: Vec<(&str, &str)> =
            self.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        cli_within(secs(40), self.setup.scratch.path(), arguments, &environment)
    }

    fn service(&self, arguments: &[&str]) -> Ran {
        self.run(&[&["service"], arguments].concat())
    }

    fn install(&self) -> String {
        self.service(&["install", "--allow-insecure"]).ok()
    }

    fn crontab(&self) -> Option<Vec<u8>> {
        fs::read(self.file("tab")).ok()
    }

    /// The calls of `crontab` and `systemctl` since the last call of this.
    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.file("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.file("calls"));
        calls.lines().map(str::to_owned).collect()
    }

    /// The owner of the lock, if it is an agent of this home.
    fn pid(&self) -> Option<u32> {
        let lock = fs::read_to_string(self.file(".usepod-agent/identity.key.lock")).ok()?;
        let pid: u32 = lock.split_whitespace().next()?.parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        String::from_utf8_lossy(&command).contains(self.setup.scratch.path().to_str()?).then_some(pid)
    }

    fn signal(&self, signal: &str) {
        let pid = self.pid().expect("an agent");
        let status = Command::new("sh").arg("-c").arg(format!("kill -{signal} {pid}")).status();
        assert!(status.expect("a shell").success());
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // It is not a child of the test, and would keep running.
        if self.pid().is_some() {
            self.signal("KILL");
        }
    }
}

#[test]
fn crontab_keeps_its_other_lines_and_a_second_install_writes_nothing() {
    let before: [Option<&[u8]>; 4] = [
        None,
        Some(b"MAILTO=\"\"\n# mine\n0 3 * * * date +\\%F >> log\n"),
        Some(b"0 1 * * * a\r\n\r\n# \xff\xfe\n"),
        Some(b"# its last line has no end"),
    ];
    for before in before {
        let operator = Operator::new();
        if let Some(before) = before {
            operator.setup.scratch.write("tab", before);
        }
        let printed = operator.install();
        assert!(printed.contains("within a minute"), "{printed}");
        let installed = operator.crontab().expect("a crontab");
        let text = String::from_utf8_lossy(&installed);
        assert!(installed.starts_with(before.unwrap_or_default()), "{text}");
        let line = format!("--config '{}' --allow-insecure", operator.file("agent.toml").display());
        for times in ["\n@reboot exec '/", "\n* * * * * exec '/"] {
            assert!(text.contains(times) && text.contains(&line), "{text}");
        }
        assert!(operator.calls().contains(&"-".to_owned()));

        let printed = operator.install();
        assert!(printed.contains("nothing was changed"), "{printed}");
        assert_eq!(operator.crontab().as_deref(), Some(&*installed));
        assert!(operator.calls().iter().all(|call| call == "-l"), "a second install must not write");

        let printed = operator.service(&["install", "--allow-insecure", "--log-level", "debug"]).ok();
        assert!(printed.contains("changed") && printed.contains("restart"), "{printed}");
        let text =
            String::from_utf8(operator.crontab().expect("a crontab")[before.unwrap_or_default().len()..].to_vec());
        let text = text.expect("UTF-8");
        assert_eq!(text.matches(" --log-level debug --allow-insecure >").count(), 2, "{text}");

        operator.service(&["uninstall"]).ok();
        assert_eq!(operator.crontab().as_deref(), before);
        let printed = operator.service(&["uninstall"]).ok();
        assert!(printed.contains("not installed"), "{printed}");
    }
}

#[test]
fn install_that_fails_names_the_fix_and_changes_nothing() {
    let tab = "# mine\n";
    let operator = Operator::new();
    operator.setup.scratch.write("tab", tab);
    let unchanged = |ran: Ran, code, words: &[&str]| {
        let printed = ran.fails(code, words);
        assert_eq!(operator.crontab().as_deref(), Some(tab.as_bytes()), "{printed}");
    };
    // ws:// beyond loopback without --allow-insecure, and a missing file.
    let remote = operator.setup.scratch.write("remote.toml", "[coordinator]\nurl = \"ws://192.0.2.7/\"\n");
    let remote = ["install", "--config", remote.to_str().expect("UTF-8")];
    unchanged(operator.service(&remote), 2, &["remote.toml:2", "--allow-insecure"]);
    unchanged(operator.service(&["install", "--config", "/nowhere.toml"]), 2, &["/nowhere.toml"]);
    let install = ["install", "--allow-insecure"];
    let refuses =
        operator.setup.scratch.write("refuses--l", "You (operator) are not allowed to use this program (crontab)\n");
    unchanged(operator.service(&install), 1, &["not allowed to use this program", "left as it is"]);
    fs::remove_file(refuses).expect("removed");
    let refuses = operator.setup.scratch.write("refuses--l", "pam: no crontab access\n");
    unchanged(operator.service(&install), 1, &["no crontab access", "left as it is"]);
    fs::remove_file(refuses).expect("removed");
    let refuses = operator.setup.scratch.write("refuses--", "\"-\":9: bad minute\n");
    unchanged(operator.service(&install), 1, &["bad minute"]);
    fs::remove_file(refuses).expect("removed");
    operator.setup.scratch.write("back\\slash/agent.toml", operator.setup.toml());
    let strange = operator.file("back\\slash/agent.toml");
    let strange = ["install", "--allow-insecure", "--config", strange.to_str().expect("UTF-8")];
    unchanged(operator.service(&strange), 1, &["backslash", "rename"]);
}

#[test]
fn missing_cron_is_reported_with_the_package_to_install() {
    let operator = Operator::new().with("PATH", "/nowhere");
    operator.service(&["install", "--allow-insecure"]).fails(1, &["no `crontab`", "apt install cron", "--systemd"]);
    operator.service(&["status"]).fails(3, &["not installed"]);
}

#[test]
fn crontab_block_that_was_edited_is_left_unchanged() {
    let operator = Operator::new();
    operator.install();
    let edited = String::from_utf8(operator.crontab().expect("a crontab")).expect("UTF-8");
    let edited = edited.replace("\n# <<<", "\n0 3 * * * backup\n# <<<");
    operator.setup.scratch.write("tab", &edited);
    for command in ["install", "uninstall", "start", "status"] {
        operator.service(&[command, "--allow-insecure"]).fails(1, &["line 4", "crontab -e"]);
        assert_eq!(operator.crontab().as_deref(), Some(edited.as_bytes()));
    }
}

#[test]
fn install_does_not_replace_another_supervised_configuration() {
    let operator = Operator::new();
    operator.install();
    let other = operator.setup.scratch.write("other.toml", operator.setup.toml());
    let other = other.to_str().expect("UTF-8");
    let before = operator.crontab();
    let words = ["agent.toml", "service uninstall"];
    operator.service(&["install", "--allow-insecure", "--config", other]).fails(1, &words);
    assert_eq!(operator.crontab(), before);
}

/// With special characters in the paths, and with the environment of cron instead of the calling shell's.
#[test]
fn start_runs_the_crontab_line_and_stop_lasts_until_the_next_start() {
    let coordinator = Coordinator::new();
    let operator = Operator::of(Setup::new(&coordinator.url())).with("SECRET_OF_THIS_SHELL", "1");
    operator.setup.scratch.write("tab", "# NOT=1\nFROM_CRONTAB = \"a b\"\n");
    let path = operator.setup.scratch.write("o'neil & co/100% $HOME/agent.toml", operator.setup.toml());
    fs::remove_file(operator.file("agent.toml")).expect("removed");
    operator.service(&["install", "--allow-insecure", "--config", path.to_str().expect("UTF-8")]).ok();
    operator.service(&["status"]).fails(3, &["cron", "not running"]);

    let printed = operator.service(&["start"]).ok();
    let session = coordinator.session();
    let pid = operator.pid().expect("an agent");
    assert!(printed.contains(&format!("pid {pid}")), "{printed}");
    let environment = fs::read(format!("/proc/{pid}/environ")).expect("the agent's environment");
    let environment: Vec<_> = environment.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
    let names: Vec<_> = environment.iter().filter_map(|variable| variable.split('=').next()).collect();
    assert!(environment.iter().any(|variable| variable == "FROM_CRONTAB=a b"), "{environment:?}");
    for name in ["HOME", "PATH", "SHELL", "LOGNAME"] {
        assert!(names.contains(&name), "{environment:?}");
    }
    assert!(!names.contains(&"SECRET_OF_THIS_SHELL") && !names.contains(&"NOT"), "{environment:?}");
    assert!(operator.service(&["status"]).ok().contains(&format!("running as pid {pid}")));
    let printed = operator.service(&["start"]).ok();
    assert!(printed.contains(&format!("pid {pid}")), "one that runs is not started again: {printed}");

    assert!(operator.service(&["stop"]).ok().contains("stays stopped"));
    assert_eq!(session.ended(SOON).map(|(code, _)| code), Some(1000));
    assert_eq!(operator.pid(), None);
    operator.service(&["status"]).fails(3, &["stopped by the operator", "service start"]);
    // The call that cron makes within the minute.
    let cron = ["run", "--cron", "--allow-insecure", "--config", path.to_str().expect("UTF-8")];
    assert_eq!(operator.run(&cron).code, Some(0));
    coordinator.assert_not_dialled(QUIET);
    let printed = operator.service(&["install", "--allow-insecure", "--config", path.to_str().expect("UTF-8")]).ok();
    assert!(printed.contains("nothing was changed") && printed.contains("stopped by the operator"), "{printed}");
    assert!(operator.service(&["stop"]).ok().contains("no agent is running"));

    operator.service(&["start"]).ok();
    let session = coordinator.session();
    let before = operator.pid();
    operator.service(&["restart"]).ok();
    assert_eq!(session.ended(SOON).map(|(code, _)| code), Some(1000));
    let session = coordinator.session();
    assert_ne!(operator.pid(), before);
    operator.service(&["uninstall"]).ok();
    assert_eq!(session.ended(SOON).map(|(code, _)| code), Some(1000));
    assert_eq!(operator.pid(), None);
    assert!(!operator.file(".usepod-agent/identity.key.stopped").exists());
    assert_eq!(operator.crontab().as_deref(), Some(&b"# NOT=1\nFROM_CRONTAB = \"a b\"\n"[..]));
}

/// Cron starts the agent at the same time: the one that `start` started finds another at work, and exits.
#[test]
fn start_succeeds_if_cron_was_faster() {
    let coordinator = Coordinator::new();
    let operator = Operator::of(Setup::new(&coordinator.url()));
    let lock = operator.file(".usepod-agent/identity.key.lock");
    let faster = format!("#!/bin/sh\n/bin/sh \"$@\" &\nuntil [ -s '{}' ]; do sleep 0.01; done\n", lock.display());
    operator.program("faster", &faster);
    operator.setup.scratch.write("tab", format!("SHELL={}\n", operator.file("bin/faster").display()));
    operator.install();
    let printed = operator.service(&["start"]).ok();
    assert!(printed.contains("the agent is running as pid"), "{printed}");
}

#[test]
fn root_does_not_end_the_process_that_a_users_lock_file_names() {
    if !nix::unistd::geteuid().is_root() {
        return left_out("only root could end it");
    }
    let operator = Operator::new();
    operator.install();
    let mut bystander = Command::new("sleep").arg("600").spawn().expect("a bystander");
    let stat = fs::read_to_string(format!("/proc/{}/stat", bystander.id())).expect("its stat");
    let started = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().nth(19)).expect("a start");
    let holder = format!("{:<10}\n{started:<20}\n{:<20}\n", bystander.id(), 0);
    let lock = operator.setup.scratch.write(".usepod-agent/identity.key.lock", holder);
    std::os::unix::fs::chown(&lock, Some(65534), None).expect("another owner");
    operator.service(&["stop"]).fails(1, &["of another user", &format!("kill {}", bystander.id())]);
    assert!(bystander.try_wait().expect("its state").is_none());
    bystander.kill().expect("killed");
    bystander.wait().expect("ended");
}

#[test]
fn stop_waits_for_the_jobs_in_flight() {
    let (backend, coordinator) = (Backend::vllm(&["m"]), Coordinator::new());
    let operator = Operator::of(Setup::new(&coordinator.url()).backend(backend.toml()));
    operator.install();
    operator.service(&["start"]).ok();
    let session = coordinator.session();
    let job = session.job("m", json!({}));
    let mut held = backend.next();
    held.start_sse();
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| operator.service(&["stop"]).ok());
        session.frame("capabilities", SOON);
        assert!(!stop.is_finished(), "a job is in flight");
        held.chunk(sse(7, 13));
        held.end();
        session.outcome(&job).done();
        let printed = stop.join().expect("stop");
        assert!(printed.contains("waiting up to 45 s") && printed.contains("exited after"), "{printed}");
    });
}

#[test]
fn slow_stop_kills_an_agent_that_outlasts_its_drain() {
    let coordinator = Coordinator::new();
    let operator = Operator::of(Setup::new(&coordinator.url()).limits("drain_seconds = 0"));
    operator.install();
    operator.service(&["start"]).ok();
    let _session = coordinator.session();
    operator.signal("STOP");
    let began = Instant::now();
    assert!(operator.service(&["stop"]).ok().contains("killed"));
    assert!(began.elapsed() >= secs(15), "it had {:?}", began.elapsed());
    assert_eq!(operator.pid(), None);
}

#[test]
fn start_that_fails_points_to_the_log() {
    let operator = Operator::new();
    operator.setup.scratch.write(".usepod-agent/identity.key", "no key\n");
    operator.install();
    operator.service(&["start"]).fails(1, &["exited at once", "agent.log"]);
    operator.service(&["status"]).fails(3, &["service logs"]);
    for command in ["start", "restart"] {
        Operator::new().service(&[command]).fails(3, &["service install"]);
    }
}

#[test]
fn install_names_the_variables_that_cron_lacks_and_shows_no_value() {
    let hosted =
        ["SET_ABOVE", "OPENROUTER_API_KEY"].map(|key| format!("kind = \"openrouter\"\napi_key_env = \"{key}\""));
    let setup = Setup::new("ws://127.0.0.1:9/provider/connect");
    let setup = hosted.into_iter().fold(setup, Setup::backend);
    let operator =
        Operator::of(setup).with("OPENROUTER_API_KEY", "the-secret").with("HTTPS_PROXY", "http://u:the-secret@p:1");
    operator.setup.scratch.write("tab", "SET_ABOVE=the-secret\n");
    let printed = operator.install();
    assert!(!printed.contains("the-secret") && !printed.contains("SET_ABOVE"), "{printed}");
    for line in ["`OPENROUTER_API_KEY=VALUE`", "`HTTPS_PROXY=VALUE`"] {
        assert!(printed.contains(line), "no {line} in {printed}");
    }
}

#[test]
fn logs_show_the_last_lines_and_follow_a_rotation() {
    let operator = Operator::new();
    operator.install();
    let log = operator.setup.scratch.write(".usepod-agent/agent.log", "four\nfive\n");
    operator.setup.scratch.write(".usepod-agent/agent.log.1", "one\ntwo\nthree\n");
    assert_eq!(operator.service(&["logs", "--lines=3"]).ok(), "three\nfour\nfive\n");
    assert_eq!(operator.service(&["logs"]).ok(), "one\ntwo\nthree\nfour\nfive\n");

    let follower = Agent::run(operator.setup.scratch.path(), &["service", "logs", "-f", "-n", "1"]);
    follower.stdout.wait_line(&["five"]);
    let append = |text: &str| {
        let mut file = fs::OpenOptions::new().append(true).create(true).open(&log).expect("the log");
        file.write_all(text.as_bytes()).expect("written");
    };
    append("six\n");
    follower.stdout.wait_line(&["six"]);
    fs::rename(&log, operator.file(".usepod-agent/agent.log.1")).expect("renamed");
    append("seven\n");
    follower.stdout.wait_line(&["seven"]);
    fs::write(&log, "").expect("emptied");
    assert!(!follower.stdout.has_line(&["eight"], ms(600)), "time to see that it is empty");
    append("eight\n");
    follower.stdout.wait_line(&["eight"]);
    assert_eq!(follower.stdout.text(), "five\nsix\nseven\neight\n");
}

#[test]
fn option_of_another_command_is_refused() {
    let operator = Operator::new();
    for arguments in [&["stop", "--systemd"][..], &["status", "-f"], &["install", "--lines", "3"], &["enable"], &[]] {
        operator.service(arguments).fails(2, &[]);
    }
    assert_eq!(operator.crontab(), None);
}

/// Runs `service` as an unprivileged user, as root would write a system unit.
fn as_user(operator: &Operator, arguments: &[&str]) -> Ran {
    let home = operator.setup.scratch.path();
    let mut command = if nix::unistd::geteuid().is_root() {
        let opened = Command::new("chmod").args(["-R", "a+rwX"]).arg(home).status();
        assert!(opened.expect("chmod").success());
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(binary());
        command
    } else {
        Command::new(binary())
    };
    command.arg("service").args(arguments).current_dir(home).env_clear().env("HOME", home).env("COLUMNS", "1000");
    command.envs(operator.environment.iter().map(|(name, value)| (name, value)));
    command.output().expect("the agent").into()
}

/// A system unit with a missing folder does not start, and could not create it.
#[test]
fn install_creates_the_folder_of_the_log() {
    let operator = Operator::new();
    let log = operator.file("logs/of/agent.log");
    let toml = format!("{}\n[observability]\nlog_file = {log:?}\n", operator.setup.toml());
    operator.setup.scratch.write("agent.toml", toml);
    operator.install();
    assert!(operator.file("logs/of").is_dir());
}

#[test]
fn systemd_user_unit_is_written_enabled_and_removed() {
    let operator = Operator::new();
    operator.program("systemctl", SYSTEMCTL);
    operator.program("journalctl", JOURNALCTL);
    let refuses = operator.setup.scratch.write("refuses-systemctl", "Failed to connect to bus\n");
    let unit = operator.file(".config/systemd/user/usepod-agent.service");
    let install = ["install", "--systemd", "--allow-insecure"];
    as_user(&operator, &install).fails(1, &["systemctl --user daemon-reload", "Failed to connect to bus"]);
    assert!(!unit.exists(), "a unit that systemd did not take must not pass for an installed one");
    fs::remove_file(refuses).expect("removed");
    operator.calls();

    // A user who may not have a crontab can install a unit.
    let refuses = operator.setup.scratch.write("refuses--l", "You (operator) are not allowed to use this program\n");
    let printed = as_user(&operator, &install).ok();
    fs::remove_file(refuses).expect("removed");
    assert!(printed.contains("enable-linger"), "{printed}");
    let text = fs::read_to_string(&unit).expect("a unit");
    let exec = format!(" run --config \"{}\" --allow-insecure\n", operator.file("agent.toml").display());
    let condition =
        format!("\nConditionPathExists=!{}\n", operator.file(".usepod-agent/identity.key.stopped").display());
    for part in [&*exec, &condition, "\nRestart=always\n", "\nTimeoutStopSec=45\n", "\nWantedBy=default.target\n"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    assert!(!text.contains("\nUser=") && !text.contains("--cron"), "{text}");
    let calls = ["-l", "--user daemon-reload", "--user enable --now usepod-agent.service"];
    assert_eq!(operator.calls(), calls);

    assert!(as_user(&operator, &install).ok().contains("nothing was changed"));
    // A change that systemd refuses is undone, and may be retried.
    let refuses = operator.setup.scratch.write("refuses-systemctl", "Failed to connect to bus\n");
    let other = [&install[..], &["--log-level", "debug"]].concat();
    as_user(&operator, &other).fails(1, &["Failed to connect to bus"]);
    assert_eq!(fs::read_to_string(&unit).expect("a unit"), text);
    fs::remove_file(refuses).expect("removed");
    operator.calls();
    let printed = as_user(&operator, &["install", "--allow-insecure"]).fails(1, &["service uninstall"]);
    assert!(printed.contains(unit.to_str().expect("UTF-8")), "it says which supervisor is there: {printed}");
    assert_eq!(operator.calls(), [""; 0]);

    as_user(&operator, &["status"]).fails(3, &["systemd", "not running"]);
    as_user(&operator, &["stop"]).ok();
    as_user(&operator, &["status"]).fails(3, &["stopped by the operator"]);
    assert_eq!(operator.calls(), ["--user stop usepod-agent.service"]);
    assert_eq!(as_user(&operator, &["logs", "-f"]).ok(), "journalctl --user -u usepod-agent.service -n 100 -f\n");
    as_user(&operator, &["uninstall"]).ok();
    assert_eq!(operator.calls(), ["--user disable --now usepod-agent.service", "--user daemon-reload"]);
    assert!(!unit.exists() && !operator.file(".usepod-agent/identity.key.stopped").exists());
}
