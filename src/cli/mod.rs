//! The command line: one file per command, and here the code that the commands share.
//!
//! stdout is for the result of a command, stderr for logs and errors. Both get printable text only: `print` and
//! `print_to_stderr` escape the rest, wherever it comes from. [`CliError`] is the complete list of errors, and
//! [`CliError::exit_code`] of exit codes.

/// `print!` for results: a closed stdout is not an error.
macro_rules! out {
    ($($part:tt)*) => {
        $crate::cli::print(&format!($($part)*))
    };
}

mod args;
mod countdown;
mod demo;
mod doctor;
mod enroll;
mod help;
mod offer;
mod pause;
mod run;
mod service;
mod setup;
mod status;
mod stdout;
mod validate;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use args::{Args, Command, Parsed};
use log::LevelFilter;
use stdout::Stdout;

use crate::config::{Config, ConfigError};
use crate::discovery::{BackendOffer, OfferTerms};
use crate::instance::identity::IdentityError;
use crate::instance::takeover::TakeoverError;
use crate::instance::{AgentPaths, LockError};
use crate::link::protocol::AGENT_VERSION;
use crate::logging;
use crate::sys::printable::printable;
use crate::sys::terminal::{self, Terminal};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The command line is invalid.
    #[error("{0}")]
    Usage(String),
    /// `agent.toml` is missing or invalid.
    #[error("{}", config_text(.0))]
    Config(#[from] ConfigError),
    /// The identity file cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// `run --cron` can neither leave the running agent alone nor replace it.
    #[error(transparent)]
    Takeover(#[from] TakeoverError),
    /// Another agent is running with this identity, or the lock does not show whether one is.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Any other error.
    #[error("{0}")]
    Runtime(String),
    /// The command has already printed the reason, and exits with this code.
    #[error("")]
    AlreadyReported(u8),
}

impl CliError {
    /// The exit code of the process; 0 is success.
    pub fn exit_code(&self) -> u8 {
        match self {
            CliError::Lock(LockError::Held(_) | LockError::HeldElsewhere(_)) => 4,
            CliError::Identity(_) | CliError::Lock(_) | CliError::Takeover(_) | CliError::Runtime(_) => 1,
            CliError::Usage(_) | CliError::Config(_) => 2,
            CliError::AlreadyReported(code) => *code,
        }
    }
}

/// The text of a configuration error; without a file, it begins with the command that creates one.
fn config_text(e: &ConfigError) -> String {
    if !e.is_not_found() {
        return e.to_string();
    }
    format!(
        "run `usepod-agent setup` first: {}; to use another file, add --config FILE; \
         to see the agent work without one, run `usepod-agent demo`",
        e.fault()
    )
}

impl From<String> for CliError {
    fn from(what: String) -> CliError {
        CliError::Runtime(what)
    }
}

/// Runs the command given on the command line.
pub fn main(args: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let (command, parsed) = args::parse(args);
    let outcome = match parsed {
        Ok(Parsed::Command(args)) => dispatch(args),
        Ok(Parsed::Help) => {
            print(&help::text(command, Terminal::of_stdout().width));
            Ok(())
        }
        Err(e) => Err(CliError::Usage(e)),
    };
    logging::flush();
    let outcome = outcome.and_then(|()| match Stdout::failure() {
        Some(why) => Err(CliError::Runtime(format!("failed to write to stdout: {why}"))),
        None => Ok(()),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(CliError::AlreadyReported(code)) => ExitCode::from(code),
        Err(failure) => {
            print_error(&failure);
            if matches!(failure, CliError::Usage(_)) {
                let command = command.map_or_else(String::new, |command| format!("{command} "));
                print_to_stderr(&format!("for help: usepod-agent {command}--help\n"));
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

fn print_error(failure: &CliError) {
    let text = format!("error: {failure}");
    // Logs and other programs need unwrapped lines.
    if !std::io::stderr().is_terminal() {
        return print_to_stderr(&format!("{text}\n"));
    }
    let width = Terminal::of_stderr().width;
    print_to_stderr(&text.lines().map(|line| terminal::wrap("", line, width)).collect::<String>());
}

/// Writes to stderr, printable. A closed stderr does not change the exit code.
fn print_to_stderr(text: &str) {
    let _ = std::io::stderr().write_all(printable(text).as_bytes());
}

fn dispatch(args: Args) -> Result<(), CliError> {
    let (globals, command) = args.split();
    match command {
        Command::Run(options) => run::run(&globals, &options),
        Command::Status(options) => status::run(&globals, &options),
        Command::Pause(_) => pause::pause(&globals),
        Command::Resume(_) => pause::resume(&globals),
        Command::Setup(options) => setup::run(&globals, &options),
        Command::Validate(_) => validate::run(&globals),
        Command::Enroll(_) => enroll::run(&globals),
        Command::Version(_) => {
            out!("usepod-agent {AGENT_VERSION}\n");
            Ok(())
        }
        Command::Doctor(options) => doctor::run(&globals, &options),
        Command::Demo(options) => demo::run(&globals, &options),
        Command::Service(options) => service::run(&globals, &options),
    }
}

/// Writes to stdout as printable text: control sequences in quoted text are escaped. A closed stdout is not an error: the reader
/// needs no more output.
fn print(text: &str) {
    let _ = try_print_raw(&printable(text));
}

/// Like `print`, for text with control sequences of this program. Everything in it that comes from outside must already be
/// printable.
fn print_raw(text: &str) {
    let _ = try_print_raw(text);
}

/// Writes to stdout what is printable already.
///
/// # Errors
/// stdout is closed, or full.
fn try_print_raw(text: &str) -> std::io::Result<()> {
    Stdout.write_all(text.as_bytes())
}

/// USDC micro-units in USDC, with at least two decimals and no more than needed.
fn format_usdc(micro_units: u64) -> String {
    let fraction = format!("{:06}", micro_units % 1_000_000);
    let fraction = fraction.trim_end_matches('0');
    format!("{}.{fraction:0<2}", micro_units / 1_000_000)
}

/// The paths of the files beside the identity. Only `key_path` has to be valid in the configuration.
fn agent_paths(globals: &args::Globals) -> Result<AgentPaths, CliError> {
    let path = Config::find(globals.config.as_deref())?;
    Ok(AgentPaths::beside(&Config::key_path_in(&path)?))
}

/// Reads the configuration and starts logging to stderr.
fn load_config(globals: &args::Globals) -> Result<Config, CliError> {
    let config = read_config(globals)?;
    logging::start(level_of(globals, &config), None);
    log_reading(&config);
    Ok(config)
}

fn read_config(globals: &args::Globals) -> Result<Config, ConfigError> {
    Config::load(&Config::find(globals.config.as_deref())?, globals.allow_insecure)
}

/// The log level of the command line, else of the configuration.
fn level_of(globals: &args::Globals, config: &Config) -> LevelFilter {
    globals.log_level.or(config.log_level).unwrap_or(LevelFilter::Info)
}

fn log_reading(config: &Config) {
    crate::debug!("configuration from `{}`", config.path.display());
    for warning in &config.warnings {
        log::warn!("{warning}");
    }
}

/// The backends of a configuration, ready for probes.
fn backends_of(config: &Config) -> Vec<BackendOffer> {
    config.backends.iter().map(BackendOffer::configured).collect()
}

fn terms_of(config: &Config) -> OfferTerms {
    OfferTerms { pricing: config.pricing.clone(), max_concurrent: config.limits.max_concurrent }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_are_exact() {
        for (micro_units, shown) in [(500_000, "0.50"), (1, "0.000001"), (2_000_000, "2.00"), (1_234_567, "1.234567")] {
            assert_eq!(format_usdc(micro_units), shown);
        }
    }
}
