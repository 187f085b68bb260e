//! Commands, options, exit codes, stdout and stderr.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use nix::pty::{Winsize, openpty};
use serde_json::json;

use crate::support::*;

fn run(setup: &Setup, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
    setup.write();
    cli(setup.scratch.path(), arguments, environment)
}

/// A setup whose `agent.toml` is in the working directory.
fn plain() -> Setup {
    Setup::new("wss://coordinator.example/")
}

#[test]
fn version_prints_the_version() {
    let ran = run(&plain(), &["version"], &[]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    assert!(ran.stdout.trim().ends_with(env!("CARGO_PKG_VERSION")), "{}", ran.stdout);
}

const COMMANDS: [&str; 11] =
    ["run", "setup", "service", "status", "pause", "resume", "doctor", "validate", "enroll", "version", "demo"];

#[test]
fn help_names_every_command_and_has_an_example() {
    for arguments in [&["--help"][..], &["help"], &["-h"]] {
        let ran = run(&plain(), arguments, &[]);
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{arguments:?}");
        for word in ["--config", "--log-level", "--allow-insecure", "xample", "$ usepod-agent"] {
            assert!(ran.stdout.contains(word), "{arguments:?}: no `{word}` in {}", ran.stdout);
        }
        for command in COMMANDS {
            let is_listed = |line: &str| line.starts_with("  ") && line.split_whitespace().next() == Some(command);
            assert!(ran.stdout.lines().any(is_listed), "{arguments:?}: `{command}` is not listed in {}", ran.stdout);
        }
    }
    for command in COMMANDS {
        let ran = run(&plain(), &[command, "--help"], &[]);
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{command} --help");
        let usage = format!("Usage: usepod-agent {command} ");
        assert!(ran.stdout.starts_with(&usage), "{command} --help: {}", ran.stdout);
        assert_eq!(run(&plain(), &[command, "-h"], &[]).stdout, ran.stdout, "{command} -h");
    }
}

#[test]
fn help_of_every_command_has_the_global_options_and_fits_the_terminal() {
    let home = Scratch::new();
    for command in COMMANDS.into_iter().map(Some).chain([None]) {
        for width in [80, 60] {
            let arguments: Vec<&str> = command.into_iter().chain(["--help"]).collect();
            let help = cli(home.path(), &arguments, &[("COLUMNS", &width.to_string())]).stdout;
            assert_fits(&help, width);
            assert!(help.lines().all(|line| line.chars().count() <= width), "{help}");
            for option in
                ["-c, --config <file>", "--log-level <level>", "--allow-insecure", "-h, --help", "-V, --version"]
            {
                assert!(help.contains(&format!("\n  {option} ")), "{command:?}: no `{option}` in {help}");
            }
        }
    }
}

/// Runs the binary with a terminal of 57 columns as one of its streams; returns what the terminal shows. Shells do not export
/// `COLUMNS`.
fn shown_on_a_terminal(argument: &str, attach: impl Fn(&mut Command, OwnedFd)) -> String {
    let size = Winsize { ws_row: 24, ws_col: 57, ws_xpixel: 0, ws_ypixel: 0 };
    let terminal = openpty(&size, None).expect("a pseudo-terminal");
    let mut command = Command::new(binary());
    command.arg(argument).env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    attach(&mut command, terminal.slave);
    command.status().expect("the agent");
    // Its copy of the terminal's end; reading the other end after the last copy is closed is an error.
    drop(command);
    let mut shown = Vec::new();
    let _ = File::from(terminal.master).read_to_end(&mut shown);
    String::from_utf8_lossy(&shown).replace('\r', "")
}

#[test]
fn help_takes_the_width_from_the_terminal_itself() {
    let help = shown_on_a_terminal("--help", |command, terminal| {
        command.stdout(terminal);
    });
    assert!(help.contains("service") && help.lines().all(|line| line.chars().count() <= 57), "{help}");
    assert!(help.lines().any(|line| line.chars().count() > 50), "{help}");
}

/// stdout may be a pipe while an error is shown on the terminal.
#[test]
fn error_takes_the_width_from_the_terminal_on_stderr() {
    let error = shown_on_a_terminal("validate", |command, terminal| {
        command.stderr(terminal);
    });
    assert!(error.contains("usepod-agent setup") && error.lines().all(|line| line.chars().count() <= 57), "{error}");
    assert!(error.lines().any(|line| line.chars().count() > 50), "{error}");
}

#[test]
fn version_is_an_option_of_every_command() {
    for command in COMMANDS {
        let ran = run(&plain(), &[command, "-V"], &[]);
        assert_eq!(
            (ran.code, ran.stdout.trim().rsplit(' ').next()),
            (Some(0), Some(env!("CARGO_PKG_VERSION"))),
            "{command}"
        );
    }
}

#[test]
fn invalid_command_line_exits_2_and_says_why() {
    let cases: [(&[&str], &str); 17] = [
        (&["--no-such-option"], "--no-such-option"),
        (&["validate", "--no-such-option"], "--no-such-option"),
        (&["no-such-command"], "no-such-command"),
        (&["run", "extra"], "extra"),
        (&["--config"], "--config"),
        (&["validate", "-c"], "-c"),
        (&["--log-level"], "--log-level"),
        (&["--log-level", "loud", "validate"], "loud"),
        (&["--log-level=loud", "validate"], "loud"),
        (&["demo", "--port", "many"], "many"),
        (&["demo", "--port", "abc"], "a port is a number from 1 to 65535"),
        (&["demo", "--port", "65536"], "the default is 8788"),
        (&["service"], "install, uninstall, start, stop, restart, status, logs"),
        (&["service", "log"], "install, uninstall, start, stop, restart, status, logs"),
        (&["service", "start", "--follow"], "`service logs`"),
        (&["logs"], "did you mean `usepod-agent service logs`?"),
        (&["validat"], "did you mean `usepod-agent validate`?"),
    ];
    for (arguments, word) in cases {
        let ran = run(&plain(), arguments, &[]);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{arguments:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(word), "{arguments:?}: no `{word}` in {}", ran.stderr);
        // Which command was typed decides which help is named.
        let command = arguments.iter().find(|word| COMMANDS.contains(word));
        let help =
            command.map_or_else(|| "usepod-agent --help".to_owned(), |name| format!("usepod-agent {name} --help"));
        assert!(ran.stderr.ends_with(&format!("\nfor help: {help}\n")), "{arguments:?}: {}", ran.stderr);
    }
}

#[test]
fn options_may_precede_or_follow_the_command_in_any_spelling() {
    let setup = plain();
    let path = setup.scratch.write("other.toml", setup.toml().replace("[limits]", "[limits]\nmax_concurrent = 0"));
    let path = path.to_str().expect("UTF-8");
    let (long, short, short_equals) = (format!("--config={path}"), format!("-c{path}"), format!("-c={path}"));
    let spellings: [&[&str]; 4] = [&["--config", path], &["-c", path], &[&long], &[&short]];
    for spelling in spellings.into_iter().chain([&[short_equals.as_str()][..]]) {
        for before in [true, false] {
            let command = ["validate"];
            let arguments = if before { [spelling, &command].concat() } else { [&command, spelling].concat() };
            let ran = run(&setup, &arguments, &[]);
            // The error proves that this file was read.
            assert_eq!(ran.code, Some(2), "{arguments:?}: {}", ran.stderr);
            assert!(ran.stderr.contains("other.toml:"), "{arguments:?}: {}", ran.stderr);
        }
    }
    for arguments in [
        &["--log-level", "warn", "--allow-insecure", "validate"][..],
        &["validate", "--allow-insecure", "--log-level=warn"],
        &["--allow-insecure", "validate", "--allow-insecure", "--log-level", "ERROR"],
    ] {
        let ran = run(&Setup::new("ws://127.0.0.1:1/"), arguments, &[]);
        assert_eq!(ran.code, Some(0), "{arguments:?}: {}", ran.stderr);
    }
}

#[test]
fn config_is_searched_in_xdg_config_home_then_home_then_the_working_folder() {
    let setup = Setup::new("wss://coordinator.example/");
    let faulty = |name: &str| setup.scratch.write(name, "[coordinator]\nurl = \"nowhere\"\n");
    let xdg = setup.scratch.join("xdg");
    let environment = [("XDG_CONFIG_HOME", xdg.to_str().expect("UTF-8"))];

    assert_eq!(run(&setup, &["validate"], &[]).code, Some(0), "./agent.toml");
    assert_eq!(run(&setup, &["validate"], &environment).code, Some(0), "./agent.toml, with XDG_CONFIG_HOME set");
    let in_home = faulty(".config/usepod-agent/agent.toml");
    assert!(run(&setup, &["validate"], &[]).stderr.contains(in_home.to_str().expect("UTF-8")));
    assert_eq!(run(&setup, &["validate"], &environment).code, Some(0), "XDG_CONFIG_HOME replaces ~/.config");
    let in_xdg = faulty("xdg/usepod-agent/agent.toml");
    assert!(run(&setup, &["validate"], &environment).stderr.contains(in_xdg.to_str().expect("UTF-8")));
}

#[test]
fn missing_config_exits_2_and_names_the_places_searched() {
    let home = Scratch::new();
    for command in ["run", "validate", "enroll"] {
        let Ran { code, stderr, .. } = cli(home.path(), &[command], &[]);
        assert_eq!(code, Some(2), "{command}: {stderr}");
        for word in [".config/usepod-agent/agent.toml", "./agent.toml", "--config"] {
            assert!(stderr.contains(word), "{command}: no `{word}` in {stderr}");
        }
    }
}

#[test]
fn missing_agent_toml_errors_lead_with_setup() {
    let home = Scratch::new();
    let cases: [(&[&str], i32); 16] = [
        (&[], 2),
        (&["run"], 2),
        (&["run", "--cron"], 2),
        (&["status"], 3),
        (&["status", "--json"], 3),
        (&["status", "--watch"], 3),
        (&["pause"], 2),
        (&["resume"], 2),
        (&["validate"], 2),
        (&["enroll"], 2),
        (&["service", "install"], 2),
        (&["service", "start"], 2),
        (&["service", "stop"], 2),
        (&["service", "restart"], 2),
        (&["service", "status"], 3),
        (&["service", "logs"], 2),
    ];
    for (arguments, code) in cases {
        let Ran { code: exit, stdout, stderr } = cli(home.path(), arguments, &[]);
        assert_eq!((exit, stdout.as_str()), (Some(code), ""), "{arguments:?}: {stderr}");
        let message = stderr.split("error: ").nth(1).or(stderr.split("ERROR").nth(1)).unwrap_or_default();
        assert!(message.contains("run `usepod-agent setup` first: no agent.toml found"), "{arguments:?}: {stderr}");
        assert!(message.starts_with("run `usepod-agent setup`") || stderr.contains("ERROR"), "{arguments:?}: {stderr}");
    }
    let doctor = cli(home.path(), &["doctor"], &[]);
    assert!(doctor.stdout.contains("fix: usepod-agent setup;"), "{doctor:?}");
}

#[test]
fn ws_coordinator_is_refused_without_allow_insecure() {
    let setup = Setup::new("ws://192.0.2.7:1/");
    for command in ["run", "validate", "enroll"] {
        let ran = run(&setup, &[command], &[]);
        assert_eq!(ran.code, Some(2), "{command}: {}", ran.stderr);
        assert!(ran.stderr.contains("--allow-insecure"), "{command}: {}", ran.stderr);
    }
}

#[test]
fn enroll_prints_key_and_id_and_only_the_ends_of_the_code() {
    let code = "POD-ENROLL-0123-4567-89ab";
    let setup = plain().coordinator(&format!("enrollment_code = \"{code}\""));
    let ran = run(&setup, &["enroll"], &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let value = |name: &str| {
        let line = ran.stdout.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("no `{name}: …` in {}", ran.stdout))
    };
    assert_eq!(unbase64(value("public_key")).len(), 32);
    assert_eq!(value("provider_id"), "<not yet enrolled>");
    let shown = value("enrollment_code");
    assert!(shown.contains("89ab") && !shown.contains("0123") && !shown.contains("4567"), "{shown}");
}

#[test]
fn second_agent_with_the_same_identity_exits_4_and_names_the_first() {
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url());
    let first = setup.start();
    let session = coordinator.session();
    for _ in 0..2 {
        let mut second = setup.start();
        assert_eq!(second.wait(SOON).code(), Some(4));
        second.stderr.wait_line(&["already running", &first.pid().to_string()]);
    }
    coordinator.assert_not_dialled(std::time::Duration::ZERO);
    // Commands that only read are unaffected.
    let config = setup.write();
    let enroll = ["enroll", "--allow-insecure", "-c", config.to_str().expect("UTF-8")];
    assert_eq!(cli(setup.scratch.path(), &enroll, &[]).code, Some(0));
    // The lock ends with its owner; the file stays and does no harm.
    drop((first, session));
    assert!(setup.scratch.join(".usepod-agent/identity.key.lock").exists());
    let _third = setup.start();
    coordinator.session();
}

#[test]
fn run_logs_to_stderr_and_prints_nothing() {
    let backend = Backend::vllm(&["m"]);
    let mut rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    backend.next().finish();
    rig.session.outcome(&id).done();
    rig.agent.signal("TERM");
    rig.agent.wait(SOON);
    assert_eq!(rig.agent.stdout.text(), "");
    assert_ne!(rig.agent.stderr.text(), "");
}

#[test]
fn log_level_of_the_command_line_overrides_the_one_in_the_file() {
    let cases =
        [("info", None, [true, false]), ("debug", None, [true, true]), ("debug", Some("error"), [false, false])];
    for (in_file, option, expected) in cases {
        let coordinator = Coordinator::new();
        let setup = Setup::new(&coordinator.url()).more(&format!("[observability]\nlog_level = \"{in_file}\""));
        let mut agent = setup.start_at_level(option);
        coordinator.session();
        agent.signal("TERM");
        agent.wait(SOON);
        let log = agent.stderr.text();
        let shown = ["INFO", "DEBUG"].map(|level| log.lines().any(|line| line.contains(level)));
        assert_eq!(shown, expected, "file {in_file:?}, option {option:?}: {log}");
    }
}

/// 0.3.5 exits when its stdout is closed.
#[test]
fn closed_stdout_and_stderr_do_not_stop_the_agent() {
    let backend = Backend::vllm(&["m"]);
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url()).backend(backend.toml());
    let mut agent = setup.start_with_closed_outputs();
    let session = coordinator.session();
    for _ in 0..3 {
        // Each logs a warning into a closed pipe.
        session.send_text("not json");
        let id = session.job("m", json!({}));
        backend.next().finish();
        session.outcome(&id).done();
    }
    agent.assert_running();
}

#[test]
fn output_shows_no_secret_at_any_level() {
    let backend = Backend::vllm(&["m"]);
    let code = "POD-ENROLL-0123-4567-89ab";
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url())
        .coordinator(&format!("enrollment_code = \"{code}\""))
        .backend(format!("{}\napi_key_env = \"THE_KEY\"", backend.toml()))
        .env("THE_KEY", "sk-secret-123");
    let mut agent = setup.start_at_level(Some("trace"));
    let session = coordinator.session();
    let id = session.job("m", json!({"messages": [{"role": "user", "content": "my-private-prompt"}]}));
    let mut held = backend.next();
    held.start_sse();
    held.chunk("data: my-private-answer\n\n");
    held.chunk(sse(1, 1));
    held.end();
    session.outcome(&id).done();
    agent.signal("TERM");
    agent.wait(SOON);
    let log = agent.stderr.text() + &agent.stdout.text();
    let identity = std::fs::read_to_string(setup.identity()).expect("the identity file");
    let seed = identity.lines().find_map(|line| line.strip_prefix("secret: ")).expect("the seed").to_owned();
    for secret in [code, "sk-secret-123", "my-private-prompt", "my-private-answer", &seed] {
        assert!(!log.contains(secret), "`{secret}` is in the log");
    }
}
