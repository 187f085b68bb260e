//! The syntax of the command line, parsed by argh.
//!
//! argh accepts an option only in the command whose struct has it, and neither `--option=value` nor `-cVALUE`. The words are
//! therefore rearranged into the order that argh accepts before it parses them.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use argh::{ArgsInfo, CommandInfoWithArgs, EarlyExit, FromArgs};
use log::LevelFilter;

use crate::config::parse_level;
use crate::sys::edit_distance::nearest;

/// Puts your GPU on the Use Pod market: offers the models of local inference servers and serves the jobs they receive.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(
    note = "Options may stand before or after the command. Without a command, `run` is assumed. `usepod-agent COMMAND --help` \
            lists the options of a command.",
    example = "See it work, without any configuration:\n$ {command_name} demo",
    example = "Pair this machine and write agent.toml:\n$ {command_name} setup",
    example = "Check agent.toml and show what would be offered at which prices:\n$ {command_name} validate",
    example = "Serve:\n$ {command_name} run",
    example = "Have cron keep the agent running, also after a reboot:\n$ {command_name} service install",
    example = "Find out why no jobs arrive:\n$ {command_name} doctor",
    error_code(1, "runtime error"),
    error_code(2, "usage or configuration error"),
    error_code(3, "status, service: no agent is running, or none is installed"),
    error_code(4, "an agent with this identity is already running")
)]
pub struct Args {
    /// configuration file (default: agent.toml in $XDG_CONFIG_HOME/usepod-agent, else in the working folder)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,
    /// log level: off, error, warn, info, debug or trace (default: the one in agent.toml, else info)
    #[argh(option, from_str_fn(level), arg_name = "level")]
    log_level: Option<LevelFilter>,
    /// allow a ws:// coordinator on another machine, unencrypted
    #[argh(switch)]
    allow_insecure: bool,
    #[argh(subcommand)]
    command: Option<Command>,
}

/// The options that every command accepts.
#[derive(Debug, Clone)]
pub struct Globals {
    pub config: Option<PathBuf>,
    pub log_level: Option<LevelFilter>,
    pub allow_insecure: bool,
}

impl Args {
    /// The options of every command, and the command: `run` if none was given.
    pub fn split(self) -> (Globals, Command) {
        let Args { config, log_level, allow_insecure, command } = self;
        (Globals { config, log_level, allow_insecure }, command.unwrap_or(Command::Run(Run { cron: false })))
    }
}

#[derive(FromArgs, ArgsInfo, Debug)]
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

/// Serves jobs until stopped (the default command). SIGTERM, SIGINT or SIGHUP finishes the jobs in flight, then exits; a second
/// signal aborts them.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand, name = "run")]
pub struct Run {
    /// for a crontab line that runs every minute: serve only if no agent is running, replace an agent that hangs, and log to a
    /// file
    #[argh(switch)]
    pub cron: bool,
}

/// Shows whether the agent is serving, and if not, why. Exits with 0 if it is serving, 1 if it is running but not serving, 3 if
/// it is not running.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand, name = "status")]
pub struct Status {
    /// print the state as JSON
    #[argh(switch)]
    pub json: bool,
    /// refresh every second until Ctrl-C
    #[argh(switch)]
    pub watch: bool,
}

/// Withdraws all models until `resume`, also across restarts. Jobs in flight finish.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand, name = "pause")]
pub struct Pause {}

/// Ends a pause: the agent offers its models again.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand, name = "resume")]
pub struct Resume {}

/// Pairs this machine with the market and writes agent.toml. Shows a code and the page to enter it on.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand, name = "setup")]
pub struct Setup {
    #[allow(rustdoc::bare_urls, reason = "this text is printed by --help")]
    /// coordinator to pair with (default: the market, https://api.usepod.ai)
    #[argh(option, arg_name = "url")]
    pub coordinator: Option<String>,
}

/// Checks agent.toml, queries the backends, and prints what would be offered at which prices.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand, name = "validate")]
pub struct Validate {}

/// Prints the public key, the provider id and the enrollment code. Creates the identity if there is none.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand, name = "enroll")]
pub struct Enroll {}

/// Checks everything the agent needs, layer by layer, and says how to fix what is broken. Exits with 0 if no check fails, else
/// with 1.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand, name = "doctor")]
pub struct Doctor {
    /// skip the test completion on local backends
    #[argh(switch)]
    pub no_inference: bool,
}

/// Prints the version.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand, name = "version")]
pub struct Version {}

/// Serves a real request on this machine alone. It runs a local coordinator and the agent, with the backends of --config, those
/// found on the default ports, or a built-in echo.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand, name = "demo")]
pub struct Demo {
    /// port of the OpenAI-compatible front door, 1-65535, or 0 for any free port (default: 8788, or a free port if 8788 is taken)
    #[argh(option, from_str_fn(port), arg_name = "n")]
    pub port: Option<u16>,
    /// prompt of the sample request
    #[argh(option, arg_name = "text")]
    pub prompt: Option<String>,
    /// exit after the first answer, with 0 only if its bytes were correct
    #[argh(switch)]
    pub once: bool,
    /// after the first answer, measure for about a minute what the agent adds to the first byte and to each event, then exit,
    /// with 0 only if every answer was complete
    #[argh(switch)]
    pub bench: bool,
    /// start no agent: show how to pair one, and serve the front door through it
    #[argh(switch)]
    pub await_agent: bool,
    /// with --await-agent: loopback address and port that agents connect to (default: 127.0.0.1 and a free port)
    #[argh(option, arg_name = "address")]
    pub listen: Option<SocketAddr>,
}

/// Keeps the agent running under cron or systemd. Once stopped, it stays stopped until `service start`; `service status` exits
/// with 0 only while an agent is running.
#[derive(FromArgs, ArgsInfo, Debug)]
#[argh(subcommand, name = "service")]
pub struct Service {
    /// install, uninstall, start, stop, restart, status or logs
    #[argh(positional, from_str_fn(action))]
    pub action: Action,
    /// install: use a systemd unit instead of the crontab; a system unit as root, else a user unit
    #[argh(switch)]
    pub systemd: bool,
    /// logs: print new lines as they are written, until Ctrl-C
    #[argh(switch, short = 'f')]
    pub follow: bool,
    /// logs: number of lines to start with (default: 100)
    #[argh(option, short = 'n', from_str_fn(lines), arg_name = "n")]
    pub lines: Option<usize>,
}

/// The action of `service`.
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

const ACTIONS: [(&str, Action); 7] = [
    ("install", Action::Install),
    ("uninstall", Action::Uninstall),
    ("start", Action::Start),
    ("stop", Action::Stop),
    ("restart", Action::Restart),
    ("status", Action::Status),
    ("logs", Action::Logs),
];

fn action(word: &str) -> Result<Action, String> {
    let found = ACTIONS.iter().find(|(name, _)| *name == word);
    found.map(|(_, action)| *action).ok_or_else(|| format!("use one of: {}", action_names()))
}

fn action_names() -> String {
    ACTIONS.map(|(name, _)| name).join(", ")
}

fn level(name: &str) -> Result<LevelFilter, String> {
    parse_level(name).ok_or_else(|| "use one of: off, error, warn, info, debug, trace".to_owned())
}

fn port(number: &str) -> Result<u16, String> {
    number.parse().map_err(|_| {
        "a port is a number from 1 to 65535, or 0 for any free port; the default is 8788, or a free port if 8788 is taken"
            .to_owned()
    })
}

fn lines(number: &str) -> Result<usize, String> {
    number.parse().map_err(|_| "use a number of lines; the default is 100".to_owned())
}

/// A parsed command line.
pub enum Parsed {
    /// A command to run.
    Command(Args),
    /// Help to print.
    Help,
}

/// Options of every command, with a value.
const GLOBAL_OPTIONS: [&str; 3] = ["--config", "-c", "--log-level"];
/// Options of every command, without a value.
const GLOBAL_SWITCHES: [&str; 1] = ["--allow-insecure"];
/// Options of one command, with a value that may look like an option.
const COMMAND_OPTIONS: [&str; 5] = ["--port", "--prompt", "--lines", "--listen", "--coordinator"];

/// Parses the arguments of the process, the first of which is the program's name. Returns the name of the command, if one was
/// given, and the parsed command line or the reason why it is invalid.
pub fn parse(args: impl Iterator<Item = OsString>) -> (Option<&'static str>, Result<Parsed, String>) {
    let typed = args.skip(1).map(|word| {
        word.into_string().map_err(|word| format!("`{}` is not UTF-8 text", word.to_string_lossy().escape_debug()))
    });
    let normalized = match typed.collect::<Result<Vec<_>, _>>() {
        Ok(typed) => Normalized::from(typed),
        Err(e) => return (None, Err(e)),
    };
    let command = normalized.command();
    if let Some(option) = normalized.without_value {
        return (command, Err(format!("`{option}` needs a value")));
    }
    let words: Vec<&str> = normalized.globals.iter().chain(&normalized.rest).map(String::as_str).collect();
    let parsed = match Args::from_args(&["usepod-agent"], &words) {
        Ok(args) => Ok(Parsed::Command(args)),
        Err(EarlyExit { status: Ok(()), .. }) => Ok(Parsed::Help),
        Err(EarlyExit { output, status: Err(()) }) => Err(explain(&output, command)),
    };
    (command, parsed)
}

/// The command line in the order that argh accepts, each value as a separate word.
#[derive(Default)]
struct Normalized {
    /// Options of every command, with their values.
    globals: Vec<String>,
    /// The command and its own options.
    rest: Vec<String>,
    /// The last word, if it is an option that lacks its value.
    without_value: Option<String>,
}

impl From<Vec<String>> for Normalized {
    fn from(typed: Vec<String>) -> Normalized {
        let Normalized { mut globals, mut rest, mut without_value } = Normalized::default();
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
                let Some(value) = attached.map(str::to_owned).or_else(|| words.next()) else {
                    without_value = Some(word);
                    break;
                };
                let target = if is_global { &mut globals } else { &mut rest };
                target.extend([option.to_owned(), value]);
            } else if GLOBAL_SWITCHES.contains(&word.as_str()) {
                // argh rejects a repeated switch.
                if !globals.contains(&word) {
                    globals.push(word);
                }
            } else if matches!(word.as_str(), "-V" | "--version") {
                return Normalized { rest: vec!["version".to_owned()], ..Normalized::default() };
            } else {
                rest.push(if word == "-h" { "--help".to_owned() } else { word });
            }
        }
        Normalized { globals, rest, without_value }
    }
}

impl Normalized {
    fn command(&self) -> Option<&'static str> {
        let known = Args::get_args_info().commands;
        self.rest.iter().find_map(|word| known.iter().find(|command| command.name == word)).map(|command| command.name)
    }
}

/// `--option=value` and `-cVALUE`, split.
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

/// The error message of argh, with a suggestion if a similar word exists.
fn explain(output: &str, command: Option<&str>) -> String {
    let message = output.split("\n\nRun ").next().unwrap_or_default().trim();
    if let Some(word) = message.strip_prefix("Unrecognized argument: ") {
        return unrecognized(word, command);
    }
    if message.starts_with("Required positional") && command == Some("service") {
        return format!("`service` needs one of: {}", action_names());
    }
    let of_value = message.split_once(" with value '").and_then(|(place, rest)| {
        let (value, why) = rest.split_once("': ")?;
        let option = place.strip_prefix("Error parsing option '").and_then(|option| option.strip_suffix('\''));
        let option = option.map_or_else(String::new, |option| format!("{option} "));
        Some(format!("`{option}{value}`: {why}"))
    });
    of_value.unwrap_or_else(|| message.to_owned())
}

fn unrecognized(word: &str, command: Option<&str>) -> String {
    let program = Args::get_args_info();
    let own = command.and_then(|name| program.commands.iter().find(|command| command.name == name));
    if word.starts_with('-') {
        let flags_of = |command: &CommandInfoWithArgs| command.flags.iter().map(|flag| flag.long);
        let flags = flags_of(&program).chain(own.into_iter().flat_map(|own| flags_of(&own.command)));
        let hint = nearest(word, flags).map_or_else(String::new, |flag| format!("; did you mean `{flag}`?"));
        return format!("there is no option `{word}`{hint}");
    }
    if let Some(command) = command {
        return format!("`{command}` does not take the argument `{word}`");
    }
    let actions = ACTIONS.iter().map(|(name, _)| *name);
    let meant = match ACTIONS.iter().any(|(name, _)| *name == word) {
        true => Some(format!("service {word}")),
        false => nearest(word, program.commands.iter().map(|command| command.name))
            .map(str::to_owned)
            .or_else(|| nearest(word, actions).map(|action| format!("service {action}"))),
    };
    let hint = meant.map_or_else(String::new, |meant| format!("; did you mean `usepod-agent {meant}`?"));
    format!("there is no command `{word}`{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalized(words: &[&str]) -> Normalized {
        Normalized::from(words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>())
    }

    fn normal(words: &[&str]) -> Vec<String> {
        let Normalized { globals, rest, without_value } = normalized(words);
        assert_eq!(without_value, None);
        [globals, rest].concat()
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
        assert_eq!(normalized(&["run", "-c"]).without_value.as_deref(), Some("-c"));
        assert_eq!(normal(&["run", "-c", "x", "-V"]), ["version"]);
    }

    #[test]
    fn a_usage_error_knows_the_command_and_suggests_what_was_meant() {
        for (words, command, text) in [
            (&["logs"][..], None, "there is no command `logs`; did you mean `usepod-agent service logs`?"),
            (&["--allow-insecure", "uninstal"], None, "did you mean `usepod-agent service uninstall`?"),
            (&["statsu"], None, "did you mean `usepod-agent status`?"),
            (&["frobnicate"], None, "there is no command `frobnicate`"),
            (&["validate", "--config"], Some("validate"), "`--config` needs a value"),
            (&["run", "extra"], Some("run"), "`run` does not take the argument `extra`"),
            (&["status", "--wach"], Some("status"), "there is no option `--wach`; did you mean `--watch`?"),
            (&["status", "--confg", "x"], Some("status"), "did you mean `--config`?"),
            (&["demo", "--port", "abc"], Some("demo"), "`--port abc`: a port is a number from 1 to 65535"),
            (&["demo", "--listen", "8080"], Some("demo"), "`--listen 8080`: "),
            (&["service", "log"], Some("service"), "`log`: use one of: install, uninstall, start"),
            (&["service"], Some("service"), "`service` needs one of: install, uninstall, start"),
            (&["--log-level=loud"], None, "`--log-level loud`: use one of: off, error"),
        ] {
            let (named, parsed) = parse(["usepod-agent"].iter().chain(words).map(OsString::from));
            assert_eq!(named, command, "{words:?}");
            assert!(parsed.is_err_and(|e| e.contains(text)), "{words:?}");
        }
    }
}
