//! What may be typed, and its normal form.
//!
//! argh knows an option only where its struct has it, and neither `--option=value` nor `-cVALUE`; so the words are put
//! into the one order that it takes before it sees them.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use argh::{EarlyExit, FromArgs};
use log::LevelFilter;

use crate::config::parse_level;

/// Put your GPU on the Use Pod market: offers the models of local inference servers and serves the jobs that come.
#[derive(FromArgs, Debug)]
#[argh(
    note = "Options may stand before or after the command. Without a command the agent runs.",
    example = "See it work, without any set-up:\n$ {command_name} demo",
    example = "Pair this machine, and write agent.toml:\n$ {command_name} setup",
    example = "Check a configuration, and see what would be offered at which prices:\n$ {command_name} validate --config agent.toml",
    example = "Find out why no jobs come:\n$ {command_name} doctor",
    example = "Serve:\n$ {command_name} run --config agent.toml",
    example = "Have cron keep it running, from now on and after each boot:\n$ {command_name} service install",
    error_code(1, "runtime error"),
    error_code(2, "usage or configuration error"),
    error_code(3, "status, service: no agent runs, or none is installed"),
    error_code(4, "an agent with this identity is already running")
)]
pub struct Args {
    /// agent.toml to use (default: $XDG_CONFIG_HOME/usepod-agent/agent.toml, then ./agent.toml)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,
    /// off, error, warn, info, debug or trace (default: as agent.toml says, else info)
    #[argh(option, from_str_fn(level), arg_name = "level")]
    log_level: Option<LevelFilter>,
    /// allow a ws:// coordinator, which is not encrypted
    #[argh(switch)]
    allow_insecure: bool,
    #[argh(subcommand)]
    command: Option<Command>,
}

/// The options that every command takes.
#[derive(Debug, Clone)]
pub struct Globals {
    pub config: Option<PathBuf>,
    pub log_level: Option<LevelFilter>,
    pub allow_insecure: bool,
}

impl Args {
    /// The command (run, when none was typed) and what is common to all.
    pub fn split(self) -> (Globals, Command) {
        let Args { config, log_level, allow_insecure, command } = self;
        (Globals { config, log_level, allow_insecure }, command.unwrap_or(Command::Run(Run { cron: false })))
    }
}

#[derive(FromArgs, Debug)]
#[argh(subcommand)]
pub enum Command {
    Run(Run),
    Status(Status),
    Pause(Pause),
    Resume(Resume),
    Setup(Setup),
    Validate(Validate),
    Enroll(Enroll),
    Doctor(Doctor),
    Version(Version),
    Demo(Demo),
    Service(Service),
}

/// Serve until stopped (the default). SIGTERM, SIGINT or SIGHUP: finish the jobs in flight, then exit.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "run")]
pub struct Run {
    /// for a line of crontab, each minute: serve if no agent does, replace one that hangs, and log to a file
    #[argh(switch)]
    pub cron: bool,
}

/// Say whether the agent serves, and why not. Exits with 0 when it serves, 1 when it runs but does not serve, 3 when it does not
/// run.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "status")]
pub struct Status {
    /// print the state as JSON
    #[argh(switch)]
    pub json: bool,
    /// print it again each second, in place, until Ctrl-C
    #[argh(switch)]
    pub watch: bool,
}

/// Offer nothing from now on, also after a restart; jobs in flight finish.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "pause")]
pub struct Pause {}

/// End a pause.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "resume")]
pub struct Resume {}

/// Pair this machine with the market, and write agent.toml: shows a code, and the page on which to enter it.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "setup")]
pub struct Setup {
    /// the coordinator to pair with (default: the market, api.usepod.ai)
    #[argh(option, arg_name = "url")]
    pub coordinator: Option<String>,
}

/// Check agent.toml, ask the backends, and print what would be offered at which prices.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "validate")]
pub struct Validate {}

/// Print the public key, the provider id and the enrollment code in use; makes the identity when there is none.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "enroll")]
pub struct Enroll {}

/// Examine everything that an agent needs, layer by layer, and say what mends what is broken. Exits 0 only if all that matters
/// is well.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "doctor")]
pub struct Doctor {
    /// do not have the local backends complete and cancel a tiny request
    #[argh(switch)]
    pub no_inference: bool,
}

/// Print the version.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "version")]
pub struct Version {}

/// Serve a real request on this machine alone: a local coordinator, the agent, and the backends of --config, those
/// found on the default ports, or a built-in echo.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "demo")]
pub struct Demo {
    /// port of the OpenAI-compatible front door (default: 8788, or a free one)
    #[argh(option, arg_name = "n")]
    pub port: Option<u16>,
    /// what to ask
    #[argh(option, arg_name = "text")]
    pub prompt: Option<String>,
    /// exit after the first answer: 0 only if its bytes were right
    #[argh(switch)]
    pub once: bool,
    /// after the first answer, measure what the agent adds to the first byte and to each event, directly and through it in
    /// turn (a minute or so), then exit: 0 only if every answer came through whole
    #[argh(switch)]
    pub bench: bool,
    /// run no agent of its own: show how to pair one, and serve the front door through it
    #[argh(switch)]
    pub await_agent: bool,
    /// with --await-agent: where agents connect, a loopback address and port (default: 127.0.0.1 and a free port)
    #[argh(option, arg_name = "address")]
    pub listen: Option<SocketAddr>,
}

/// Have cron (or systemd) keep the agent running: install, uninstall, start, stop, restart, status or logs. It stays stopped
/// until started; status exits with 0 only while an agent runs.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "service", error_code(3, "not installed, or not running"))]
pub struct Service {
    /// install, uninstall, start, stop, restart, status or logs
    #[argh(positional, from_str_fn(action))]
    pub action: Action,
    /// install: a systemd unit in place of lines in the crontab, a system unit as root, else a user unit
    #[argh(switch)]
    pub systemd: bool,
    /// logs: show what is added, too, until Ctrl-C
    #[argh(switch, short = 'f')]
    pub follow: bool,
    /// logs: so many lines of what is there (default: 100)
    #[argh(option, short = 'n', arg_name = "n")]
    pub lines: Option<usize>,
}

/// What `service` is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Install,
    Uninstall,
    Start,
    Stop,
    Restart,
    Status,
    Logs,
}

fn action(word: &str) -> Result<Action, String> {
    Ok(match word {
        "install" => Action::Install,
        "uninstall" => Action::Uninstall,
        "start" => Action::Start,
        "stop" => Action::Stop,
        "restart" => Action::Restart,
        "status" => Action::Status,
        "logs" => Action::Logs,
        _ => return Err("use one of: install, uninstall, start, stop, restart, status, logs".into()),
    })
}

/// What the words came to.
pub enum Parsed {
    /// To be run.
    Command(Args),
    /// To be printed.
    Help(String),
}

/// Options of every command, with a value.
const GLOBAL_OPTIONS: [&str; 3] = ["--config", "-c", "--log-level"];
/// Options of every command, without one.
const GLOBAL_SWITCHES: [&str; 1] = ["--allow-insecure"];
/// Options of one command, with a value, which may look like anything.
const COMMAND_OPTIONS: [&str; 5] = ["--port", "--prompt", "--lines", "--listen", "--coordinator"];

/// Parses the process's arguments, the program's name first.
///
/// # Errors
/// What is wrong, for the person who typed it.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Parsed, String> {
    let typed = args.skip(1).map(|word| {
        word.into_string().map_err(|word| format!("`{}` is not UTF-8 text", word.to_string_lossy().escape_debug()))
    });
    let words = normalised(typed.collect::<Result<_, _>>()?)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match Args::from_args(&["usepod-agent"], &words) {
        Ok(args) => Ok(Parsed::Command(args)),
        Err(EarlyExit { output, status: Ok(()) }) => Ok(Parsed::Help(output)),
        Err(EarlyExit { output, status: Err(()) }) => Err(format!(
            "{}\nfor help: usepod-agent --help",
            output.split("\n\nRun ").next().unwrap_or_default().trim()
        )),
    }
}

/// Options of every command first, then the command with its own; each value a word of its own.
fn normalised(typed: Vec<String>) -> Result<Vec<String>, String> {
    let (mut globals, mut rest) = (Vec::new(), Vec::new());
    let mut words = typed.into_iter();
    while let Some(word) = words.next() {
        if word == "--" {
            rest.push(word);
            rest.extend(words);
            break;
        }
        let (option, attached) = split_value(&word);
        let is_global = GLOBAL_OPTIONS.contains(&option);
        if is_global || COMMAND_OPTIONS.contains(&option) {
            let value = attached.map(str::to_owned).or_else(|| words.next());
            let value = value.ok_or_else(|| format!("`{option}` needs a value; for help: usepod-agent --help"))?;
            let target = if is_global { &mut globals } else { &mut rest };
            target.extend([option.to_owned(), value]);
        } else if GLOBAL_SWITCHES.contains(&word.as_str()) {
            // Twice is as good as once.
            if !globals.contains(&word) {
                globals.push(word);
            }
        } else {
            rest.push(match word.as_str() {
                "-h" => "--help".to_owned(),
                "-V" | "--version" => "version".to_owned(),
                _ => word,
            });
        }
    }
    globals.append(&mut rest);
    Ok(globals)
}

/// `--option=value` and `-cVALUE`, taken apart.
fn split_value(word: &str) -> (&str, Option<&str>) {
    if let Some(long) = word.strip_prefix("--") {
        return match long.find('=') {
            Some(at) => (&word[..at + 2], Some(&long[at + 1..])),
            None => (word, None),
        };
    }
    match word.strip_prefix("-c") {
        Some(value) if !value.is_empty() => ("-c", Some(value.strip_prefix('=').unwrap_or(value))),
        _ => (word, None),
    }
}

fn level(name: &str) -> Result<LevelFilter, String> {
    parse_level(name).ok_or_else(|| "use one of: off, error, warn, info, debug, trace".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(words: &[&str]) -> Vec<String> {
        normalised(words.iter().map(|w| (*w).to_owned()).collect()).expect("values")
    }

    #[test]
    fn options_are_taken_in_every_place_and_spelling() {
        for words in [&["-c", "x", "run"][..], &["run", "-c", "x"], &["-cx", "run"], &["run", "-c=x"]] {
            assert_eq!(normal(words), ["-c", "x", "run"]);
        }
        assert_eq!(normal(&["run", "--config=a=b"]), ["--config", "a=b", "run"]);
        assert_eq!(normal(&["demo", "--prompt", "-c"]), ["demo", "--prompt", "-c"]);
        assert_eq!(normal(&["demo", "--prompt=--config", "--once"]), ["demo", "--prompt", "--config", "--once"]);
        assert_eq!(normal(&["run", "--allow-insecure", "--allow-insecure"]), ["--allow-insecure", "run"]);
        assert!(normalised(vec!["run".into(), "-c".into()]).is_err());
    }
}
