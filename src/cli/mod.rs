//! The command line: a file a command, and here what they share.
//!
//! stdout is for what a command was asked for, stderr for logs and errors. [`Failure`] is the complete list of what can
//! go wrong, and [`Failure::exit_code`] of what the caller is told.

mod args;
mod demo;
mod doctor;
mod enroll;
mod run;
mod validate;

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use args::{Args, Command};

use crate::config::{Config, ConfigError};
use crate::discovery::{OfferedBackend, Terms};
use crate::identity::IdentityError;
use crate::logging;
use crate::protocol::AGENT_VERSION;

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// The command line makes no sense.
    Usage(String),
    /// `agent.toml` cannot be used.
    Config(ConfigError),
    /// The identity cannot be used.
    Identity(IdentityError),
    /// Another agent runs on this identity.
    AlreadyRunning {
        /// Its pid, if it could be read.
        pid: Option<u32>,
    },
    /// Anything else.
    Runtime(String),
    /// stdout has told it; what is left to say is this exit code.
    Told(u8),
}

impl Failure {
    /// What the process exits with; 0 is left for success.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Identity(_) | Failure::Runtime(_) => 1,
            Failure::Usage(_) | Failure::Config(_) => 2,
            Failure::AlreadyRunning { .. } => 4,
            Failure::Told(code) => *code,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(what) | Failure::Runtime(what) => f.write_str(what),
            Failure::Config(e) => e.fmt(f),
            Failure::Identity(e) => e.fmt(f),
            Failure::AlreadyRunning { pid: Some(pid) } => {
                write!(f, "an agent with this identity is already running as pid {pid}; stop that one first")
            }
            Failure::AlreadyRunning { pid: None } => {
                f.write_str("an agent with this identity is already running; stop that one first")
            }
            Failure::Told(_) => Ok(()),
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(e: ConfigError) -> Failure {
        Failure::Config(e)
    }
}

impl From<IdentityError> for Failure {
    fn from(e: IdentityError) -> Failure {
        Failure::Identity(e)
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
        Err(e) => Err(Failure::Usage(e)),
    };
    logging::flush();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Told(code)) => ExitCode::from(code),
        Err(failure) => {
            // A broken stderr is no reason to end differently.
            let _ = writeln!(std::io::stderr(), "error: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn dispatch(args: Args) -> Result<(), Failure> {
    let (globals, command) = args.split();
    match command {
        Command::Run(_) => run::run(&globals),
        Command::Validate(_) => validate::run(&globals),
        Command::Enroll(_) => enroll::run(&globals),
        Command::Version(_) => {
            print(&format!("usepod-agent {AGENT_VERSION}\n"));
            Ok(())
        }
        Command::Doctor(options) => doctor::run(&globals, &options),
        Command::Demo(options) => demo::run(&globals, &options),
    }
}

/// Writes to stdout. Whoever closed it does not want to read it, which is no failure of ours.
fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// Reads the configuration and starts logging as it says, and the command line above it.
fn load_config(globals: &args::Globals) -> Result<Config, Failure> {
    let path = Config::find(globals.config.as_deref())?;
    let config = Config::load(&path, globals.allow_insecure)?;
    logging::start(globals.log_level.or(config.log_level).unwrap_or(log::LevelFilter::Info));
    crate::debug!("configuration from `{}`", path.display());
    for warning in &config.warnings {
        log::warn!("{warning}");
    }
    Ok(config)
}

/// The backends of a configuration, ready to be asked.
fn backends_of(config: &Config) -> Vec<OfferedBackend> {
    config.backends.iter().map(OfferedBackend::configured).collect()
}

fn terms_of(config: &Config) -> Terms {
    Terms { pricing: config.pricing.clone(), max_concurrent: config.limits.max_concurrent }
}
