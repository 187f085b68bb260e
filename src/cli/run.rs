//! `run`: serves until a signal. `run --cron`: serves only if no agent is running.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use log::LevelFilter;

use super::args::{Globals, Run};
use super::{CliError, backends_of, level_of, log_reading, print_to_stderr, read_config, terms_of};
use crate::agent::shutdown::Stop;
use crate::agent::{Agent, InstanceHandle};
use crate::config::Config;
use crate::instance::identity::{Identity, IdentityError};
use crate::instance::takeover;
use crate::instance::{AgentPaths, InstanceLock, LockError};
use crate::link::protocol::AGENT_VERSION;
use crate::logging;
use crate::sys::{files, malloc, oom};

/// The number of signals after which the process exits at once, without flushing its log.
const SIGNALS_TO_EXIT: u32 = 3;

/// Runs the agent.
pub fn run(globals: &Globals, options: &Run) -> Result<(), CliError> {
    malloc::configure();
    files::block_sigxfsz();
    if options.cron { run_by_cron(globals) } else { run_by_hand(globals) }
}

fn run_by_hand(globals: &Globals) -> Result<(), CliError> {
    let config = read_config(globals)?;
    logging::start(level_of(globals, &config), config.log_file.clone());
    Identity::check_not_lost(&config.key_path, config.paired_provider_id())?;
    create_folder(&config.key_path)?;
    let lock = match InstanceLock::acquire(&AgentPaths::beside(&config.key_path)) {
        Ok(lock) => lock,
        Err(e @ LockError::Missing { .. }) => {
            log::warn!("{e}; make sure that only one agent runs");
            InstanceLock::none()
        }
        Err(e) => return Err(e.into()),
    };
    if let Some(path) = &config.log_file {
        print_log_path(path);
    }
    serve(config, lock)
}

/// Runs `run --cron`, which cron starts every minute. Nobody sees the output under cron, so errors are also written to the log file.
fn run_by_cron(globals: &Globals) -> Result<(), CliError> {
    match acquire(globals) {
        Ok(Some((config, lock))) => serve(config, lock),
        Ok(None) => Ok(()),
        Err(failure) => Err(failure),
    }
    .inspect_err(|failure| log::error!("{failure}"))
}

/// Acquires the lock and returns it with the configuration; `None` if the operator stopped the agent or an agent is running.
fn acquire(globals: &Globals) -> Result<Option<(Config, InstanceLock)>, CliError> {
    let config = read_config(globals).inspect_err(|_| {
        let log = Config::default_key_path().map(|key| AgentPaths::beside(&key).log());
        logging::start(globals.log_level.unwrap_or(LevelFilter::Info), log);
    })?;
    let paths = AgentPaths::beside(&config.key_path);
    let log = config.log_file.clone().unwrap_or_else(|| paths.log());
    logging::start(level_of(globals, &config), Some(log.clone()));
    if paths.stopped().exists() {
        return Ok(None);
    }
    Identity::check_not_lost(&config.key_path, config.paired_provider_id())?;
    create_folder(&config.key_path)?;
    let Some(lock) = takeover::acquire_or_take_over(&paths)? else { return Ok(None) };
    // The operator may have stopped the agent that held the lock. From here on, a stop reaches this process.
    if paths.stopped().exists() {
        return Ok(None);
    }
    print_log_path(&log);
    Ok(Some((config, lock)))
}

/// Creates the folder of the identity.
pub(super) fn create_folder(key_path: &Path) -> Result<(), IdentityError> {
    files::create_folder_of(key_path).map_err(|error| IdentityError::Io {
        action: "create the folder of",
        path: key_path.to_owned(),
        error,
    })
}

/// Prints the log's path, for an operator who started the agent in a terminal and expects log lines there.
fn print_log_path(log: &Path) {
    if std::io::stderr().is_terminal() {
        print_to_stderr(&format!("logging to `{}`\n", log.display()));
    }
}

fn serve(config: Config, lock: InstanceLock) -> Result<(), CliError> {
    log_reading(&config);
    if let Err(e) = oom::end_this_process_first() {
        crate::debug!("the kernel may end the inference server before the agent when memory is short: {e}");
    }
    let paths = AgentPaths::beside(&config.key_path);
    if lock.is_exclusive() {
        files::remove_leftovers(&config.key_path);
    }
    let mut identity = Identity::load_or_create(&config.key_path)?;
    identity.expect_provider_id(config.recorded_provider_id.clone());
    if config.backends.is_empty() {
        log::warn!("no [[backends]] in the configuration: nothing to offer");
    }
    let stop = Arc::new(Stop::default());
    install_signal_handler(&stop)?;
    log::info!(
        "usepod-agent {AGENT_VERSION}, {} backend(s), public key {}",
        config.backends.len(),
        identity.public_key_base64()
    );
    let agent = Agent {
        backends: backends_of(&config),
        terms: terms_of(&config),
        max_tokens_per_minute: config.limits.max_tokens_per_minute,
        drain: config.limits.drain,
        coordinator: config.coordinator,
        identity,
        instance: Some(InstanceHandle { paths, lock }),
    };
    agent.run(&stop).map_err(|e| CliError::Runtime(format!("failed to start a thread: {e}")))
}

/// Handles SIGTERM, SIGINT and SIGHUP: the first drains, the second aborts, the third exits.
pub(super) fn install_signal_handler(stop: &Arc<Stop>) -> Result<(), CliError> {
    let stop = stop.clone();
    let signals = AtomicU32::new(0);
    ctrlc::set_handler(move || {
        if signals.fetch_add(1, Ordering::SeqCst) + 1 >= SIGNALS_TO_EXIT {
            std::process::exit(1);
        }
        stop.request();
    })
    .map_err(|e| {
        // ctrlc's message for a system error omits the error itself.
        let why = match e {
            ctrlc::Error::System(e) => e.to_string(),
            other => other.to_string(),
        };
        CliError::Runtime(format!("failed to install the signal handler: {why}"))
    })
}
