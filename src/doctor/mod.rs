//! `doctor`: checks everything the agent needs, layer by layer, and says how to fix what is broken.
//!
//! Invariants: the doctor changes nothing, except for a test file that it writes and removes; it creates no identity, does not
//! answer the challenge and takes no lock, so that it can run beside the agent. Every wait is bounded: without inference, all
//! waits together take about 30 s. A layer above a broken layer is skipped, not failed. No secret and no model output is printed.

mod backend_fixes;
mod backends;
mod certificate;
mod clock;
mod coordinator;
mod local;
mod report;
mod supervisor;
mod inference_check;

use std::io::Write;
use std::path::Path;

use backends::BackendCheck;
use report::Report;

use crate::discovery::OfferTerms;
use crate::instance::AgentPaths;
use crate::link::protocol::AGENT_VERSION;
use crate::sys::terminal::Terminal;

/// The options of the doctor.
#[derive(Debug)]
pub struct Options<'a> {
    /// The `agent.toml` named by `--config`, if any.
    pub config: Option<&'a Path>,
    /// Whether a `ws://` coordinator is allowed.
    pub allow_insecure: bool,
    /// Whether each local backend gets a test completion.
    pub inference: bool,
}

/// Runs the checks and prints each result to `out`, whose properties `terminal` describes. Returns whether no check failed.
pub fn examine(options: &Options<'_>, out: &mut dyn Write, terminal: Terminal) -> bool {
    let _ = writeln!(out, "usepod-agent {AGENT_VERSION} doctor");
    let mut report = Report::new(out, terminal);
    report.heading("this machine");
    let Some(config) = local::config(&mut report, options.config, options.allow_insecure) else {
        report.skip("all else", "skipped: needs config");
        return report.verdict("");
    };
    // The backends are queried while the coordinator is checked.
    let backends: Vec<BackendCheck<'_>> = config.backends.iter().map(BackendCheck::start).collect();
    let paths = AgentPaths::beside(&config.key_path);
    local::identity(&mut report, &config);
    let is_running = local::lock(&mut report, &paths);
    local::disk(&mut report, &config);

    report.heading(format_args!("coordinator {}", config.coordinator.address()));
    coordinator::examine(&mut report, &config.coordinator);

    let servers = backends.len();
    let terms = OfferTerms { pricing: config.pricing.clone(), max_concurrent: config.limits.max_concurrent };
    let mut models = 0;
    for backend in backends {
        models += backend.report(&mut report, &terms, options.inference);
    }

    report.heading("supervision");
    supervisor::examine(&mut report, &paths, is_running);
    report.verdict(format_args!("{models} model(s) to offer, from {servers} backend(s)"))
}
