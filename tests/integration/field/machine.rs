//! The clock, the disk, locks, cron and systemd, as they are on real machines.

use std::fs::{self, File};
use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use serde_json::{Value, json};

use crate::support::*;

/// Runs a command to its end, with the files and the environment of the setup.
fn run(setup: &Setup, words: &[&str]) -> Ran {
    let mut command = setup.start_command(words);
    let code = command.wait(2 * SOON).code();
    Ran { code, stdout: command.stdout.whole(), stderr: command.stderr.whole() }
}

/// The output of `status --json`, and its exit code.
fn status(setup: &Setup) -> (Value, i32) {
    let ran = run(setup, &["status", "--json"]);
    let state = serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e}: {ran:?}"));
    (state, ran.code.expect("an exit"))
}

/// A setup with the same files, whose coordinator refuses the connection at once. The doctor waits for one that says nothing.
fn with_refusing_coordinator(setup: &Setup) -> Setup {
    let mut other = Setup::new(&format!("ws://{}/", nobody_at("127.0.0.77")));
    other.scratch = setup.scratch.clone();
    other
}

/// What the doctor prints.
fn doctor(setup: &Setup) -> String {
    run(setup, &["doctor", "--no-inference"]).stdout
}

fn lock_of(setup: &Setup) -> PathBuf {
    setup.identity().with_file_name("identity.key.lock")
}

/// Moves the last sign of life in the lock file 200 s back.
fn age_liveness(setup: &Setup) {
    let text = fs::read_to_string(lock_of(setup)).expect("the lock file");
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let liveness: u64 = lines[2].trim().parse().expect("milliseconds");
    lines[2] = format!("{:<20}", liveness.checked_sub(200_000).expect("a machine that is up for some minutes"));
    fs::write(lock_of(setup), lines.join("\n") + "\n").expect("the lock file");
}

/// As on SD cards that turn read-only (yi-hack#56), and on disks that fail.
#[test]
fn slow_disk_that_turns_read_only_ends_no_agent_and_its_status_is_unknown() {
    side_by_side([Errno::EROFS, Errno::EIO, Errno::ENOSPC], |errno| {
        let backend = Backend::vllm(&["m"]);
        let coordinator = Coordinator::new();
        let setup = Shim::load(Setup::new(&coordinator.url()).backend(backend.toml()));
        let mut agent = setup.start();
        let session = coordinator.session();
        assert_eq!(status(&setup).0["state"], "serving");
        Shim::of(&setup).fail_writes(errno as i32);
        age_liveness(&setup);
        let (state, code) = status(&setup);
        assert_eq!(
            (&state["state"], &state["running"], code),
            (&json!("unknown"), &json!(true), 1),
            "{errno}: {state}"
        );
        assert!(state["silent_seconds"].as_u64().is_some_and(|silent| silent < 100), "{errno}: {state}");
        let mut call = setup.start_by_cron();
        assert_eq!(call.wait(SOON).code(), Some(0), "{errno}");
        assert_eq!(call.stderr.whole(), "", "{errno}");
        agent.assert_running();
        let id = session.job("m", json!({}));
        backend.next().finish();
        session.outcome(&id).done();
        let report = doctor(&Shim::load(with_refusing_coordinator(&setup)));
        assert!(
            report.contains("held by the running agent") && report.contains("cannot write to"),
            "{errno}: {report}"
        );
        // An agent that does not answer is hung, on such a disk too.
        agent.signal("STOP");
        assert_eq!(status(&setup).0["state"], "hung", "{errno}");
        agent.signal("CONT");
    });
}

/// A full or failing disk may lose the content of the lock file.
#[test]
fn agent_whose_lock_file_lost_its_content_is_found_by_its_answer() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    fs::write(lock_of(&rig.setup), "").expect("an empty lock file");
    let (state, code) = status(&rig.setup);
    assert_eq!((&state["state"], &state["pid"], code), (&json!("serving"), &json!(rig.agent.pid()), 0), "{state}");
}

/// Whoever can write to the folder of the identity can replace the socket, and must not have a command end another process.
#[test]
fn answer_that_names_another_process_than_its_sender_is_not_believed() {
    let setup = Setup::new(&format!("ws://{}/", nobody_at("127.0.0.97")));
    let path = format!("{}:/usr/bin:/bin", setup.scratch.join("bin").display());
    set_mode(setup.scratch.write("bin/crontab", "#!/bin/sh\necho no crontab for you >&2\nexit 1\n"), 0o755);
    let setup = setup.env("PATH", &path);
    let lock = File::open(setup.scratch.write(".usepod-agent/identity.key.lock", "")).expect("the lock file");
    lock.lock().expect("the lock");
    let mut bystander = Command::new("sleep").arg("600").stdout(Stdio::null()).spawn().expect("a bystander");
    let pid = bystander.id();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("its stat");
    let started = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)).expect("a start");
    let socket = setup.identity().with_file_name("identity.key.wake");
    let liar = UnixDatagram::bind(&socket).expect("a socket");
    set_mode(&socket, 0o600);
    let answer = format!("{pid} {started} 0");
    std::thread::spawn(move || {
        let mut question = [0];
        while let Ok((_, from)) = liar.recv_from(&mut question) {
            if question == *b"?" {
                let _ = liar.send_to_addr(answer.as_bytes(), &from);
            }
        }
    });
    const WHERE: &str = "another container or on another host";
    let (status, stop) = (run(&setup, &["status"]), run(&setup, &["service", "stop"]));
    let is_running = bystander.try_wait().expect("its state").is_none();
    let _ = bystander.kill().and_then(|()| bystander.wait());
    assert!(is_running, "the bystander was ended");
    status.fails(1, &[WHERE]);
    stop.fails(1, &[WHERE]);
}

/// An agent in another container or on another host: its lock is held, and the pid in it means nothing here.
#[test]
fn lock_held_by_nobody_visible_is_an_agent_elsewhere() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    let path = format!("{}:/usr/bin:/bin", setup.scratch.join("bin").display());
    set_mode(setup.scratch.write("bin/crontab", "#!/bin/sh\necho no crontab for you >&2\nexit 1\n"), 0o755);
    let setup = setup.env("PATH", &path);
    run(&setup, &["enroll"]);
    let text = format!("{:<10}\n{:<20}\n{:<20}\n", 7, 7, 7);
    let lock = File::open(setup.scratch.write(".usepod-agent/identity.key.lock", text)).expect("the lock file");
    lock.lock().expect("the lock");
    const WHERE: &str = "another container or on another host";

    let (state, code) = status(&setup);
    assert_eq!((&state["state"], &state["running"], code), (&json!("unknown"), &json!(true), 1), "{state}");
    run(&setup, &["status"]).fails(1, &[WHERE]);
    run(&setup, &["run"]).fails(4, &[WHERE]);
    assert_eq!(run(&setup, &["run", "--cron"]).code, Some(0));
    run(&setup, &["service", "stop"]).fails(1, &[WHERE]);
    assert!(run(&setup, &["pause"]).ok().contains(WHERE));
    coordinator.assert_not_dialled(Duration::ZERO);

    let report = doctor(&with_refusing_coordinator(&setup));
    assert!(report.contains("! lock") && report.contains(WHERE), "{report}");

    fs::remove_file(setup.identity().with_file_name("identity.key.stopped")).expect("the marker of the stop");
    drop(lock);
    assert_eq!(status(&setup).0["state"], "not_running");
    run(&setup, &["resume"]).ok();
    let _agent = setup.start();
    coordinator.session();
}

/// A lock file that root has left behind, and NFS without a lock manager (anyvm#35).
#[test]
fn lock_that_cannot_be_tried_is_a_failure_with_the_chown_and_no_start() {
    type Break = fn(Setup) -> Setup;
    fn without_locks(setup: Setup, errno: Errno) -> Setup {
        let setup = Shim::load(setup);
        Shim::of(&setup).fail_locks(errno as i32);
        setup
    }
    let cases: [(Break, &str); 3] = [
        (
            |setup| {
                // Cannot be written again once it has mode 0, except by root.
                fs::remove_file(lock_of(&setup)).expect("the lock file is there");
                set_mode(setup.scratch.write(".usepod-agent/identity.key.lock", ""), 0);
                setup.bound_by_modes()
            },
            "chown ",
        ),
        (|setup| without_locks(setup, Errno::ENOLCK), "supports locking"),
        (|setup| without_locks(setup, Errno::EOPNOTSUPP), "supports locking"),
    ];
    side_by_side(cases, |(fault, fix)| {
        let coordinator = Coordinator::new();
        let setup = Setup::new(&coordinator.url());
        run(&setup, &["enroll"]);
        setup.scratch.write(".usepod-agent/identity.key.lock", "");
        let setup = fault(setup);
        for words in [&["run"][..], &["run", "--cron"], &["service", "stop"], &["status"]] {
            run(&setup, words).fails(1, &["identity.key.lock", "cannot be locked", fix, "chown "]);
        }
        coordinator.assert_not_dialled(Duration::ZERO);
        let (state, _) = status(&setup);
        assert_eq!((&state["state"], &state["running"]), (&json!("unknown"), &json!(false)), "{state}");
        let report = doctor(&fault(with_refusing_coordinator(&setup)));
        assert!(report.contains("✗ lock") && report.contains("fix: ") && report.contains(fix), "{report}");
    });
}

/// `status` and the start try the lock at the same moment.
#[test]
fn start_succeeds_while_others_ask_for_the_status() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    run(&setup, &["enroll"]);
    setup.scratch.write(".usepod-agent/identity.key.lock", "");
    let lock = lock_of(&setup);
    for _ in 0..3 {
        let asking = File::open(&lock).expect("the lock file");
        asking.lock_shared().expect("the lock");
        let _agent = setup.start();
        std::thread::sleep(ms(30));
        drop(asking);
        coordinator.session();
    }
}

/// The disk of the identity is not mounted, or the file was deleted: a new identity would serve without being paid, unnoticed.
#[test]
fn identity_that_is_lost_after_a_pairing_is_an_error_and_not_a_new_agent() {
    let coordinator = Coordinator::new();
    // As `setup` writes it, and as an operator may have edited it.
    for comment in ["# provider_id:  prov_paired", "  #provider_id = \"prov_paired\""] {
        let setup = Setup::new(&coordinator.url()).more(comment);
        const ADVICE: [&str; 4] = ["identity.key", "prov_paired", "mount", "usepod-agent setup"];
        for words in [&["run"][..], &["run", "--cron"], &["enroll"]] {
            run(&setup, words).fails(1, &ADVICE);
        }
        assert!(!setup.identity().exists() && !lock_of(&setup).exists());
        coordinator.assert_not_dialled(Duration::ZERO);
        let report = doctor(&with_refusing_coordinator(&setup).more(comment));
        assert!(report.contains("✗ identity") && ADVICE.iter().all(|word| report.contains(word)), "{report}");

        // An enrollment code asks for a new identity.
        let setup = setup.coordinator("enrollment_code = \"POD-ENROLL-abc\"");
        let _agent = setup.start();
        coordinator.session();
    }
    // A first start: `setup` recorded nothing.
    let setup = Setup::new(&coordinator.url()).more("# provider_id:  none was given");
    let _agent = setup.start();
    coordinator.session();
}

/// The disk holds the identity of another agent, or the coordinator gave this one another id.
#[test]
fn provider_id_that_differs_from_the_recorded_one_is_a_warning() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url()).more("# provider_id:  prov_paired");
    run(&with_refusing_coordinator(&setup), &["enroll"]);
    let agent = setup.start();
    let paired = coordinator.accept().authenticate(Some("prov_paired"));
    assert_eq!(status(&setup).0["notes"], json!([]));
    assert!(!agent.stderr.text().contains("records"), "{:?}", agent.warnings());
    paired.close(1001, "drain:deploy");
    let _other = coordinator.accept().authenticate(Some("prov_other"));
    const WORDS: [&str; 2] = ["prov_other", "prov_paired"];
    agent.stderr.wait_line(&["WARN", WORDS[0], WORDS[1]]);
    wait_until("a note", || status(&setup).0["notes"].to_string().contains("prov_other"));
    let page = run(&setup, &["status"]).stdout;
    assert!(WORDS.iter().all(|word| page.contains(word)), "{page}");
    let report = doctor(&with_refusing_coordinator(&setup).more("# provider_id:  prov_paired"));
    assert!(report.contains("! enrollment") && WORDS.iter().all(|word| report.contains(word)), "{report}");
    // From the start, too.
    drop(agent);
    setup.start().stderr.wait_line(&["WARN", WORDS[0], WORDS[1]]);
}

#[test]
fn state_file_is_written_after_the_last_job_of_a_drain() {
    let backend = Backend::vllm(&["m"]);
    let mut rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let held = backend.next();
    rig.agent.signal("TERM");
    rig.session.frame("capabilities", SOON);
    wait_until("the drain is shown", || status(&rig.setup).0["state"] == "draining");
    assert_eq!(status(&rig.setup).0["jobs"]["in_flight"], 1);
    held.finish();
    rig.session.outcome(&id).done();
    rig.agent.wait(SOON);
    let (state, code) = status(&rig.setup);
    assert_eq!((&state["state"], code), (&json!("not_running"), 3), "{state}");
    assert_eq!((&state["jobs"]["in_flight"], &state["jobs"]["done"]), (&json!(0), &json!(1)), "{state}");
    assert_eq!(state["connected"], false, "{state}");
}

/// A FIFO without a writer, one that is never written, and a device without end.
#[test]
fn file_that_is_no_file_hangs_no_command() {
    type Place = fn(&Setup) -> PathBuf;
    let state: Place = |setup| setup.identity().with_file_name("identity.key.state");
    let log: Place = |setup| setup.log();
    let commands: [(Place, &[&str], i32); 9] = [
        (state, &["status"], 3),
        (state, &["pause"], 0),
        (lock_of, &["status"], 1),
        (lock_of, &["run"], 1),
        (Setup::identity, &["run"], 1),
        (Setup::identity, &["enroll"], 1),
        (Setup::identity, &["doctor", "--no-inference"], 1),
        (log, &["service", "logs"], 1),
        (|setup| setup.scratch.join("ca.pem"), &["run"], 2),
    ];
    let kinds = ["mkfifo \"$1\"", "ln -s /dev/zero \"$1\"", "mkfifo \"$1\" && sleep 30 <>\"$1\" & sleep 0.1"];
    let cases = kinds.iter().flat_map(|kind| commands.iter().map(move |command| (*kind, command)));
    side_by_side(cases, |(kind, (place, words, code))| {
        let setup = Setup::new(&format!("ws://{}/", nobody_at("127.0.0.78")));
        let setup = if place(&setup).ends_with("ca.pem") { setup.coordinator("ca_file = \"ca.pem\"") } else { setup };
        fs::create_dir(setup.scratch.join(".usepod-agent")).expect("a folder");
        let made = Made::by(kind, &place(&setup));
        let ran = run(&setup, words);
        assert_eq!(ran.code, Some(*code), "{kind}, {words:?}: {ran:?}");
        drop(made);
    });
}

/// A shell command that replaces a file by something else; ended at the end of the test.
struct Made(std::process::Child);

impl Made {
    fn by(shell: &str, path: &Path) -> Made {
        let mut command = Command::new("sh");
        command.args(["-c", shell, "sh"]).arg(path).process_group(0);
        let made = Made(command.spawn().expect("a shell"));
        wait_until("it is there", || path.symlink_metadata().is_ok());
        made
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let group = format!("-{}", self.0.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).stderr(std::process::Stdio::null()).status();
        let _ = self.0.wait();
    }
}

/// `--config <(template)` of a shell is a pipe, and is read; one that nobody writes is given up.
#[test]
fn slow_configuration_may_come_from_a_pipe_that_is_written() {
    let setup = Setup::new("ws://127.0.0.1:1/");
    let text = setup.toml();
    let mut child = Command::new(binary());
    child.args(["enroll", "--allow-insecure", "--config", "/dev/stdin"]).env("HOME", setup.scratch.path());
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("started");
    let mut stdin = child.stdin.take().expect("a pipe");
    let (start, end) = text.split_at(text.len() / 2);
    stdin.write_all(start.as_bytes()).expect("written");
    std::thread::sleep(ms(50));
    stdin.write_all(end.as_bytes()).expect("written");
    drop(stdin);
    let output = child.wait_with_output().expect("its end");
    assert!(String::from_utf8_lossy(&output.stdout).contains("public_key: "), "{output:?}");
    for kind in ["mkfifo \"$1\"", "mkfifo \"$1\" && sleep 30 <>\"$1\" & sleep 0.1"] {
        let path = setup.scratch.join("pipe.toml");
        let _ = fs::remove_file(&path);
        let _made = Made::by(kind, &path);
        let ran = cli(setup.scratch.path(), &["status", "--config", path.to_str().expect("UTF-8")], &[]);
        assert!(ran.code.is_some_and(|code| code != 0), "{ran:?}");
    }
}

/// The agent notifies systemd of its start, of each sign of life, and of its stop.
#[test]
fn systemd_is_told_of_start_signs_of_life_and_stop() {
    let name = format!("usepod-test-{}", std::process::id());
    let abstract_address = SocketAddr::from_abstract_name(&name).expect("a name");
    let folder = Scratch::new();
    let path = folder.join("notify");
    let sockets = [
        (UnixDatagram::bind_addr(&abstract_address).expect("a socket"), format!("@{name}")),
        (UnixDatagram::bind(&path).expect("a socket"), path.to_str().expect("UTF-8").to_owned()),
    ];
    side_by_side(sockets, |(socket, name)| {
        socket.set_read_timeout(Some(SOON)).expect("a timeout");
        let next = || {
            let mut text = [0; 64];
            let length = socket.recv(&mut text).expect("a notification");
            String::from_utf8_lossy(&text[..length]).into_owned()
        };
        let backend = Backend::vllm(&["m"]);
        let coordinator = Coordinator::new();
        let setup = Setup::new(&coordinator.url()).backend(backend.toml()).env("NOTIFY_SOCKET", &name);
        let mut agent = setup.start();
        let session = coordinator.session();
        let first = [next(), next()];
        assert!(
            first.iter().any(|text| text == "READY=1") && first.iter().any(|text| text == "WATCHDOG=1"),
            "{first:?}"
        );
        // Reconnecting is a sign of life.
        session.close(1001, "drain:deploy");
        let session = coordinator.session();
        assert_eq!(next(), "WATCHDOG=1");
        let id = session.job("m", json!({}));
        let held = backend.next();
        agent.signal("TERM");
        let stopping = std::iter::repeat_with(&next).find(|text| text != "WATCHDOG=1");
        assert_eq!(stopping.as_deref(), Some("STOPPING=1"));
        agent.assert_running();
        held.finish();
        session.outcome(&id).done();
        assert_eq!(agent.wait(SOON).code(), Some(0));
    });
}

/// A socket that nobody reads, or that is not there.
#[test]
fn notification_that_nobody_takes_disturbs_nothing() {
    let folder = Scratch::new();
    let path = folder.join("notify");
    let _unread = UnixDatagram::bind(&path).expect("a socket");
    let full = UnixDatagram::unbound().expect("a socket");
    full.set_nonblocking(true).expect("set");
    while full.send_to(b"x", &path).is_ok() {}
    for name in [path.to_str().expect("UTF-8"), "/nowhere/notify", "@nobody-here", "vsock:2:1", ""] {
        let coordinator = Coordinator::new();
        let mut agent = Setup::new(&coordinator.url()).env("NOTIFY_SOCKET", name).start();
        let session = coordinator.session();
        agent.signal("TERM");
        session.ended(SOON);
        assert_eq!(agent.wait(SOON).code(), Some(0), "{name}");
    }
}

/// Keeps the crontab in `tab`. Above it, `crontab -l` prints the header that `crontab -` has written, as older versions do.
const CRONTAB: &str = r##"#!/bin/sh
[ ! -e "$HOME/refuses" ] || { cat "$HOME/refuses" >&2; exit 1; }
case $1 in
-l) [ -e "$HOME/tab" ] || { echo "no crontab for operator" >&2; exit 1; }; cat "$HOME/tab" ;;
-r) rm "$HOME/tab" ;;
-) {
    echo "# DO NOT EDIT THIS FILE - edit the master and reinstall."
    echo "# (- installed on Thu Nov 26 10:00:00 2026)"
    echo "# (Cron version -- \$Id: crontab.c,v 2.13 \$)"
    cat
   } >"$HOME/tab.new"; mv "$HOME/tab.new" "$HOME/tab" ;;
esac
"##;

/// A setup with this script as its `crontab`.
fn with_crontab(setup: Setup) -> Setup {
    set_mode(setup.scratch.write("bin/crontab", CRONTAB), 0o755);
    let path = format!("{}:/usr/bin:/bin", setup.scratch.join("bin").display());
    setup.env("PATH", &path)
}

/// As Homebrew, asdf and many operators install programs (kandev#1162, sciclaw#15).
#[test]
fn crontab_names_the_program_by_the_operators_own_path() {
    let setup = with_crontab(Setup::new(&format!("ws://{}/", nobody_at("127.0.0.77"))));
    let config = setup.write();
    let home = setup.scratch.path();
    let version = home.join("versions/0.4.0");
    fs::create_dir_all(&version).expect("a folder");
    // By another process: a file that this one writes is busy while another thread's child inherits it.
    let copied = Command::new("cp").arg(binary()).arg(version.join("usepod-agent")).status();
    assert!(copied.expect("cp").success());
    std::os::unix::fs::symlink("versions/0.4.0", home.join("current")).expect("a link");
    std::os::unix::fs::symlink("../current/usepod-agent", home.join("bin/usepod-agent")).expect("a link");
    set_mode(setup.scratch.write("other/usepod-agent", "#!/bin/sh\n"), 0o755);
    let resolved = fs::canonicalize(version.join("usepod-agent")).expect("the copy").display().to_string();
    let (home, config) = (home.display(), config.display());
    let cases = [
        (format!("{home}/current/usepod-agent"), format!("{home}/current/usepod-agent")),
        ("current/usepod-agent".to_owned(), format!("{home}/current/usepod-agent")),
        (format!("cd '{home}/current' && ./usepod-agent"), format!("{home}/current/usepod-agent")),
        ("usepod-agent".to_owned(), format!("{home}/bin/usepod-agent")),
        // Another program of that name comes first on the PATH.
        (format!("PATH={home}/other:$PATH; exec -a usepod-agent {resolved}"), resolved.clone()),
    ];
    for (called, expected) in cases {
        let script = format!("{called} service install --allow-insecure --config '{config}'");
        let mut command = Command::new("bash");
        command.args(["-c", &script]).current_dir(setup.scratch.path()).env_clear();
        command.env("HOME", setup.scratch.path()).env("PATH", format!("{home}/bin:/usr/bin:/bin"));
        Ran::from(command.output().expect("a shell")).ok();
        let tab = fs::read_to_string(setup.scratch.join("tab")).expect("a crontab");
        assert_eq!(tab.matches(&format!("exec '{expected}' run --cron")).count(), 2, "{called}: {tab}");
    }
    assert!(!doctor(&setup).contains("✗ supervisor"));
    fs::remove_dir_all(&version).expect("the version is removed");
    let report = doctor(&setup);
    assert!(report.contains("✗ supervisor") && report.contains("cannot be found"), "{report}");
    assert!(report.contains(&resolved) && report.contains("service install"), "{report}");
}

/// whenever#15: each deployment added another header.
#[test]
fn header_that_crontab_l_prints_does_not_grow_and_edited_times_can_be_uninstalled() {
    const HEADER: &str = "# DO NOT EDIT";
    let setup = with_crontab(Setup::new("ws://127.0.0.1:1/"));
    setup.scratch.write("tab", "# mine\n0 3 * * * backup\n");
    let tab = || fs::read_to_string(setup.scratch.join("tab")).expect("a crontab");
    run(&setup, &["service", "install"]).ok();
    for level in ["debug", "warn", "info"] {
        run(&setup, &["service", "install", "--log-level", level]).ok();
        assert_eq!(tab().matches(HEADER).count(), 1, "{}", tab());
        assert!(tab().contains("2.13 $)\n# mine\n0 3 * * * backup\n# >>> usepod-agent"), "{}", tab());
    }
    let edited = tab().replace("\n* * * * * exec", "\n*/10 8-20 * * mon-fri  exec").replace("\n@reboot", "\n#@reboot");
    setup.scratch.write("tab", &edited);
    run(&setup, &["service", "status"]).fails(3, &["cron", "not running"]);
    run(&setup, &["service", "uninstall"]).ok();
    assert!(tab().ends_with("2.13 $)\n# mine\n0 3 * * * backup\n") && !tab().contains("usepod-agent"), "{}", tab());
}

#[test]
fn user_who_may_not_use_cron_is_told_of_systemd() {
    let setup = with_crontab(Setup::new(&format!("ws://{}/", nobody_at("127.0.0.77"))));
    const SAID: [&str; 2] = [
        "You (operator) are not allowed to use this program (crontab)\nSee crontab(1) for more information\n",
        "crontab: user `operator' not allowed to use cron\n",
    ];
    for said in SAID {
        setup.scratch.write("refuses", said);
        run(&setup, &["service", "install"]).fails(1, &["not allowed", "cron.deny", "service install --systemd"]);
        let report = doctor(&setup);
        assert!(report.contains("✗ supervisor") && report.contains("--systemd"), "{report}");
    }
}

/// cron's PATH contains neither ~/.local/bin nor ~/.cargo/bin.
#[test]
fn pause_prints_crontab_lines_that_work_under_cron() {
    let setup = Setup::new("ws://127.0.0.1:1/");
    let config = setup.scratch.write("100% o'neil/agent.toml", setup.toml());
    let printed = cli(setup.scratch.path(), &["pause", "--config", config.to_str().expect("UTF-8")], &[]).ok();
    let marker = setup.identity().with_file_name("identity.key.paused");
    for (times, command, exists) in [("0 23 * * * ", "resume", false), ("0 18 * * * ", "pause", true)] {
        let line = printed.lines().find_map(|line| line.trim().strip_prefix(times)).expect("a line to paste");
        assert!(line.starts_with('/') && line.contains(command) && !line.replace("\\%", "").contains('%'), "{line}");
        // As cron runs it.
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &line.replace("\\%", "%")]).env_clear().env("HOME", setup.scratch.path());
        let ran = Ran::from(shell.env("PATH", "/usr/bin:/bin").current_dir("/").output().expect("a shell"));
        assert_eq!(ran.ok(), "");
        assert_eq!(marker.exists(), exists);
    }
}

/// As in some containers, init scripts and systemd units.
#[test]
fn home_comes_from_the_user_database_if_it_is_not_set() {
    let home = nix::unistd::User::from_uid(nix::unistd::geteuid()).expect("the user database").expect("a user").dir;
    for unset in ["unset HOME", "export HOME="] {
        let setup = Setup::new(&format!("ws://{}/", nobody_at("127.0.0.77"))).after(unset);
        let report = doctor(&setup);
        let key = home.join(".usepod-agent/identity.key");
        assert!(report.contains(key.to_str().expect("UTF-8")), "{report}");
    }
}

/// A user unit of a user who does not linger ends with the last session, and does not start at boot.
#[test]
fn user_unit_without_linger_is_a_failure_with_the_command() {
    const ANSWERS: [(&str, &str); 4] = [
        ("echo Linger=no", "✗ supervisor"),
        ("echo Linger=yes", "! supervisor"),
        ("echo 'Failed to get user: User ID 65534 is not logged in or lingering' >&2; exit 1", "✗ supervisor"),
        ("echo 'System has not been booted with systemd as init system' >&2; exit 1", "! supervisor"),
    ];
    side_by_side(ANSWERS, |(answer, expected)| {
        let setup = Setup::new(&format!("ws://{}/", nobody_at("127.0.0.77")));
        let setup = with_crontab(setup)
            .after("[ \"$(id -u)\" != 0 ] || exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$0\" \"$@\"");
        set_mode(setup.scratch.write("bin/loginctl", format!("#!/bin/sh\n{answer}\n")), 0o755);
        let unit = format!("[Service]\nExecStart=\"{}\" run\n", binary().display());
        setup.scratch.write(".config/systemd/user/usepod-agent.service", unit);
        setup.write();
        let opened = Command::new("chmod").args(["-R", "a+rX"]).arg(setup.scratch.path()).status();
        assert!(opened.expect("chmod").success());
        let report = doctor(&setup);
        assert!(report.contains(expected), "{answer}: {report}");
        assert_eq!(report.contains("loginctl enable-linger"), expected.starts_with('✗'), "{answer}: {report}");
    });
}

/// A machine without a battery for its clock starts in 1970, and steps to the present once it has a network; or back (collectd#1510,
/// psutil#658).
#[test]
fn clock_that_steps_56_years_changes_no_duration() {
    const YEARS: i64 = 56 * 365 * 86_400;
    for (before, after) in [(-YEARS, 0), (0, -YEARS), (0, 3 * YEARS)] {
        let backend = Backend::vllm(&["m"]);
        let coordinator = Coordinator::new();
        let setup = Shim::load(Setup::new(&coordinator.url()).backend(backend.toml()));
        let shim = Shim::of(&setup);
        shim.set_clock_off_by(before);
        let mut agent = setup.start();
        let session = coordinator.session();
        let id = session.job("m", json!({}));
        backend.next().finish();
        session.outcome(&id).done();
        wait_until("it serves", || status(&setup).0["state"] == "serving");
        shim.set_clock_off_by(after);
        let assert_durations = |page: &str| {
            assert!(!page.contains("\u{a0}d\u{a0}"), "days, {before} to {after}: {page}");
        };
        // With the new clock in both, and with `status` still on another one.
        let page = run(&setup, &["status"]).ok();
        assert_durations(&page);
        assert!(page.starts_with("serving for ") && page.contains("last job"), "{page}");
        let other_clock = with_refusing_coordinator(&setup);
        assert_durations(&run(&other_clock, &["status"]).ok());
        // The dates are those of the clock.
        let started = status(&setup).0["started_at"].as_str().expect("a date").to_owned();
        let shown = time::OffsetDateTime::now_utc() + time::Duration::seconds(after);
        assert!(started.starts_with(&shown.year().to_string()), "{started} is not of {shown}");
        agent.signal("TERM");
        agent.wait(SOON);
        let page = run(&other_clock, &["status"]);
        assert!(page.stdout.starts_with("not running (last seen "), "{page:?}");
        assert_durations(&page.stdout);
    }
}

#[test]
fn state_of_an_earlier_boot_has_no_duration() {
    let rig = Rig::new(&Backend::vllm(&["m"]));
    drop(rig.agent);
    let path = rig.setup.identity().with_file_name("identity.key.state");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).expect("the state file")).expect("JSON");
    state["boot_id"] = json!("00000000-0000-4000-8000-000000000000");
    fs::write(&path, state.to_string()).expect("the state file");
    run(&rig.setup, &["status"]).fails(3, &["not running (last seen before the last boot)"]);
}
