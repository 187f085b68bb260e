//! `demo`: runs the agent on this machine alone. The exit code is the result of [`crate::demo::run`].

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use log::LevelFilter;

use super::CliError;
use super::args::{Demo, Globals};
use super::run::install_signal_handler;
use super::stdout::Stdout;
use crate::agent::shutdown::Stop;
use crate::config::Config;
use crate::demo;
use crate::logging;

/// Runs the demo. The result is printed on stdout, so the log has warnings only, unless --log-level requests more.
pub fn run(globals: &Globals, options: &Demo) -> Result<(), CliError> {
    let listen = listen_address(globals, options)?;
    logging::start(globals.log_level.unwrap_or(LevelFilter::Warn), None);
    let stop = Arc::new(Stop::default());
    install_signal_handler(&stop)?;
    if let Some(listen) = listen {
        let ended = demo::await_agent::run(listen, options.port, &stop, &mut Stdout);
        return ended.map_err(|e| CliError::Runtime(e.to_string()));
    }
    let options = demo::Options {
        port: options.port,
        prompt: options.prompt.clone(),
        once: options.once,
        bench: options.bench,
        config: named_config(globals)?,
    };
    demo::run(options, &stop, &mut Stdout).map_err(|e| CliError::Runtime(e.to_string()))
}

/// The address that `--await-agent` listens on; `None` without it.
fn listen_address(globals: &Globals, options: &Demo) -> Result<Option<SocketAddr>, CliError> {
    let Demo { await_agent, listen, port: _, prompt, once, bench } = options;
    if !await_agent {
        return match listen {
            Some(_) => Err(CliError::Usage("`--listen` needs `--await-agent`".into())),
            None => Ok(None),
        };
    }
    if prompt.is_some() || *once || *bench || globals.config.is_some() {
        let what = "`--await-agent` starts no agent: omit --config, --prompt, --once and --bench";
        return Err(CliError::Usage(what.into()));
    }
    let listen = listen.unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 0).into());
    if !listen.ip().is_loopback() {
        // The demo accepts any agent and any client.
        return Err(CliError::Usage(format!("`--listen {listen}`: the demo serves this machine alone; use 127.0.0.1")));
    }
    Ok(Some(listen))
}

/// Reads the configuration named by --config. A file at a default path must not decide which servers a demo queries.
fn named_config(globals: &Globals) -> Result<Option<Config>, CliError> {
    let Some(named) = &globals.config else { return Ok(None) };
    let path = Config::find(Some(named))?;
    // The demo does not connect to the configured coordinator, so ws:// is no risk.
    Ok(Some(Config::load(&path, true)?))
}
