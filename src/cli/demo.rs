//! `demo`: the agent at work on this machine alone. The exit code is the verdict of [`crate::demo::run`].

use std::sync::Arc;

use log::LevelFilter;

use super::Failure;
use super::args::{Demo, Globals};
use super::run::heed_signals;
use crate::config::Config;
use crate::shutdown::Stop;
use crate::{demo, logging};

/// Runs the demo. Its page is stdout, so that the log keeps to warnings unless more was asked for.
pub fn run(globals: &Globals, options: &Demo) -> Result<(), Failure> {
    logging::start(globals.log_level.unwrap_or(LevelFilter::Warn), None);
    let stop = Arc::new(Stop::default());
    heed_signals(&stop)?;
    let options = demo::Options {
        port: options.port,
        prompt: options.prompt.clone(),
        once: options.once,
        bench: options.bench,
        config: named_config(globals)?,
    };
    demo::run(options, &stop, &mut std::io::stdout().lock()).map_err(|e| Failure::Runtime(e.to_string()))
}

/// Only a file that was named: one that happens to lie about must not decide which servers a stranger's demo asks.
fn named_config(globals: &Globals) -> Result<Option<Config>, Failure> {
    let Some(named) = &globals.config else { return Ok(None) };
    let path = Config::find(Some(named))?;
    // The coordinator in it is not dialled, so that ws:// there is no risk.
    Ok(Some(Config::load(&path, true)?))
}
