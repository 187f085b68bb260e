//! `demo`: the agent at work on this machine alone. The exit code is the verdict of [`crate::demo::run`].

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use log::LevelFilter;

use super::CliError;
use super::args::{Demo, Globals};
use super::run::heed_signals;
use crate::agent::shutdown::Stop;
use crate::config::Config;
use crate::demo;
use crate::logging;

/// Runs the demo. Its page is stdout, so that the log keeps to warnings unless more was asked for.
pub fn run(globals: &Globals, options: &Demo) -> Result<(), CliError> {
    let listen = await_at(globals, options)?;
    logging::start(globals.log_level.unwrap_or(LevelFilter::Warn), None);
    let stop = Arc::new(Stop::default());
    heed_signals(&stop)?;
    if let Some(listen) = listen {
        let ended = demo::await_agent::run(listen, options.port, &stop, &mut std::io::stdout().lock());
        return ended.map_err(|e| CliError::Runtime(e.to_string()));
    }
    let options = demo::Options {
        port: options.port,
        prompt: options.prompt.clone(),
        once: options.once,
        bench: options.bench,
        config: named_config(globals)?,
    };
    demo::run(options, &stop, &mut std::io::stdout().lock()).map_err(|e| CliError::Runtime(e.to_string()))
}

/// Where `--await-agent` listens; `None` without it.
fn await_at(globals: &Globals, options: &Demo) -> Result<Option<SocketAddr>, CliError> {
    let Demo { await_agent, listen, port: _, prompt, once, bench } = options;
    if !await_agent {
        return match listen {
            Some(_) => Err(CliError::Usage("`--listen` is for `demo --await-agent`; add that, or leave it out".into())),
            None => Ok(None),
        };
    }
    if prompt.is_some() || *once || *bench || globals.config.is_some() {
        let what = "`--await-agent` runs no agent of its own: leave out --config, --prompt, --once and --bench";
        return Err(CliError::Usage(what.into()));
    }
    let listen = listen.unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 0).into());
    if !listen.ip().is_loopback() {
        // It takes any agent, and lets any client in.
        return Err(CliError::Usage(format!("`--listen {listen}`: the demo is for this machine alone; use 127.0.0.1")));
    }
    Ok(Some(listen))
}

/// Only a file that was named: one that happens to lie about must not decide which servers a stranger's demo asks.
fn named_config(globals: &Globals) -> Result<Option<Config>, CliError> {
    let Some(named) = &globals.config else { return Ok(None) };
    let path = Config::find(Some(named))?;
    // The coordinator in it is not dialled, so that ws:// there is no risk.
    Ok(Some(Config::load(&path, true)?))
}
