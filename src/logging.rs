//! Log lines: to stderr, dated, with the thread that wrote them.

use log::LevelFilter;
use simplelog::{ConfigBuilder, WriteLogger};

/// Crates whose lines would show what ours never do: headers, bodies, frames.
const QUIET: [&str; 3] = ["ureq", "rustls", "tungstenite"];

/// Starts logging at `level`. A broken stderr loses the lines and nothing else.
pub fn start(level: LevelFilter) {
    let mut config = ConfigBuilder::new();
    config
        .set_time_format_rfc3339()
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .set_thread_level(LevelFilter::Error)
        .set_thread_mode(simplelog::ThreadLogMode::Names);
    for name in QUIET {
        config.add_filter_ignore_str(name);
    }
    // Fails only when a logger is there already, and then that one is as good.
    let _ = WriteLogger::init(level, config.build(), std::io::stderr());
}
