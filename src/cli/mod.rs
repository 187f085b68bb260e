//! The command line: a file a command, and here what they share.
//!
//! stdout is for what a command was asked for, stderr for logs and errors. [`CliError`] is the complete list of what can
//! go wrong, and [`CliError::exit_code`] of what the caller is told.

mod args;
mod countdown;
mod demo;
mod doctor;
mod enroll;
mod pause;
mod run;
mod service;
mod setup;
mod status;
mod validate;

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use args::{Args, Command};
use log::LevelFilter;

use crate::config::{Config, ConfigError};
use crate::discovery::{BackendOffer, OfferTerms};
use crate::instance::AgentPaths;
use crate::instance::identity::IdentityError;
use crate::instance::takeover::TakeoverError;
use crate::link::protocol::AGENT_VERSION;
use crate::logging;

/// Why a command failed.
#[derive(Debug)]
pub enum CliError {
    /// The command line makes no sense.
    Usage(String),
    /// `agent.toml` cannot be used.
    Config(ConfigError),
    /// The identity cannot be used.
    Identity(IdentityError),
    /// Cron can neither leave the agent that runs alone nor take its place.
    Claim(TakeoverError),
    /// Another agent runs on this identity.
    AlreadyRunning {
        /// Its pid, if it could be read.
        pid: Option<u32>,
    },
    /// Anything else.
    Runtime(String),
    /// stdout has told it; what is left to say is this exit code.
    AlreadyReported(u8),
}

impl CliError {
    /// What the process exits with; 0 is left for success.
    pub fn exit_code(&self) -> u8 {
        match self {
            CliError::Identity(_) | CliError::Claim(_) | CliError::Runtime(_) => 1,
            CliError::Usage(_) | CliError::Config(_) => 2,
            CliError::AlreadyRunning { .. } => 4,
            CliError::AlreadyReported(code) => *code,
        }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CliError::Usage(what) | CliError::Runtime(what) => f.write_str(what),
            CliError::Config(e) => e.fmt(f),
            CliError::Identity(e) => e.fmt(f),
            CliError::Claim(e) => e.fmt(f),
            CliError::AlreadyRunning { pid: Some(pid) } => {
                write!(f, "an agent with this identity is already running as pid {pid}; stop that one first")
            }
            CliError::AlreadyRunning { pid: None } => {
                f.write_str("an agent with this identity is already running; stop that one first")
            }
            CliError::AlreadyReported(_) => Ok(()),
        }
    }
}

impl From<ConfigError> for CliError {
    fn from(e: ConfigError) -> CliError {
        CliError::Config(e)
    }
}

impl From<IdentityError> for CliError {
    fn from(e: IdentityError) -> CliError {
        CliError::Identity(e)
    }
}

impl From<String> for CliError {
    fn from(what: String) -> CliError {
        CliError::Runtime(what)
    }
}

impl From<TakeoverError> for CliError {
    fn from(e: TakeoverError) -> CliError {
        CliError::Claim(e)
    }
}

/// Runs the command that the process was started with.
pub fn main(args: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let outcome = match args::parse(args) {
        Ok(args::Parsed::Command(args)) => dispatch(args),
        Ok(args::Parsed::Help(text)) => {
            print(&text);
            Ok(())
        }
        Err(e) => Err(CliError::Usage(e)),
    };
    logging::flush();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(CliError::AlreadyReported(code)) => ExitCode::from(code),
        Err(failure) => {
            // A broken stderr is no reason to end differently.
            let _ = writeln!(std::io::stderr(), "error: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
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
            print(&format!("usepod-agent {AGENT_VERSION}\n"));
            Ok(())
        }
        Command::Doctor(options) => doctor::run(&globals, &options),
        Command::Demo(options) => demo::run(&globals, &options),
        Command::Service(options) => service::run(&globals, &options),
    }
}

/// Writes to stdout. Whoever closed it does not want to read it, which is no failure of ours.
fn print(text: &str) {
    let _ = try_print(text);
}

/// Likewise, put together from its parts.
fn say(what: fmt::Arguments<'_>) {
    print(&what.to_string());
}

/// Likewise; an error when nobody reads it any more.
fn try_print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Micro-units as USDC, with as many digits as it takes.
fn format_usdc(micro_units: u64) -> String {
    let fraction = format!("{:06}", micro_units % 1_000_000);
    let fraction = fraction.trim_end_matches('0');
    format!("{}.{fraction:0<2}", micro_units / 1_000_000)
}

/// The files beside the identity. Whatever else is wrong in the configuration does not matter to who only wants these.
fn places_of(globals: &args::Globals) -> Result<AgentPaths, CliError> {
    let path = Config::find(globals.config.as_deref())?;
    Ok(AgentPaths::beside(&Config::key_path_in(&path)?))
}

/// Reads the configuration, and starts logging to stderr.
fn load_config(globals: &args::Globals) -> Result<Config, CliError> {
    let config = read_config(globals)?;
    logging::start(level_of(globals, &config), None);
    log_reading(&config);
    Ok(config)
}

fn read_config(globals: &args::Globals) -> Result<Config, ConfigError> {
    Config::load(&Config::find(globals.config.as_deref())?, globals.allow_insecure)
}

/// The command line is above the file.
fn level_of(globals: &args::Globals, config: &Config) -> LevelFilter {
    globals.log_level.or(config.log_level).unwrap_or(LevelFilter::Info)
}

fn log_reading(config: &Config) {
    log::debug!("configuration from `{}`", config.path.display());
    for warning in &config.warnings {
        log::warn!("{warning}");
    }
}

/// The backends of a configuration, ready to be asked.
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
