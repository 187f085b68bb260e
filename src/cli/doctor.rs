//! `doctor`: finds out why no jobs arrive, layer by layer.

use super::CliError;
use super::args::{Doctor, Globals};
use super::stdout::Stdout;
use crate::doctor::{Options, examine};
use crate::logging;
use crate::sys::terminal::Terminal;

/// The exit code if a check failed.
const FAILED: u8 = 1;

/// Runs the checks. Returns an error if a check failed.
pub fn run(globals: &Globals, options: &Doctor) -> Result<(), CliError> {
    // The report contains what the log would contain, so the log is off unless --log-level requests it.
    if let Some(level) = globals.log_level {
        logging::start(level, None);
    }
    let options = Options {
        config: globals.config.as_deref(),
        allow_insecure: globals.allow_insecure,
        inference: !options.no_inference,
    };
    let is_well = examine(&options, &mut Stdout, Terminal::of_stdout());
    if is_well { Ok(()) } else { Err(CliError::AlreadyReported(FAILED)) }
}
