//! `doctor`: why no jobs come, layer by layer.

use std::io::IsTerminal;

use super::CliError;
use super::args::{Doctor, Globals};
use crate::doctor::{Options, examine};
use crate::logging;

/// What the doctor exits with when something that matters is broken.
const BROKEN: u8 = 1;

/// Examines; an error when something that matters is broken.
pub fn run(globals: &Globals, options: &Doctor) -> Result<(), CliError> {
    // What the agent would log, the report says; those who ask for the log get it beside.
    if let Some(level) = globals.log_level {
        logging::start(level, None);
    }
    let question = Options {
        config: globals.config.as_deref(),
        allow_insecure: globals.allow_insecure,
        inference: !options.no_inference,
    };
    let stdout = std::io::stdout();
    let live = stdout.is_terminal();
    if examine(&question, &mut stdout.lock(), live) { Ok(()) } else { Err(CliError::AlreadyReported(BROKEN)) }
}
