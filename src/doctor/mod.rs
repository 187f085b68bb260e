//! `doctor`: whether this agent can earn, layer by layer, and what mends the first that is broken.
//!
//! Invariants: nothing is changed, but for a file that is written and removed; no identity is made, the challenge is not
//! answered, no lock is taken, so that it may run beside the agent. Every wait has a limit: without inference all of them together
//! are some 30 s. A layer that rests on a broken one is not called broken. No secret and no answer of a model is printed.

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

/// What is to be examined.
#[derive(Debug)]
pub struct Options<'a> {
    /// The `agent.toml` that was named.
    pub config: Option<&'a Path>,
    /// Whether a `ws://` coordinator is all right.
    pub allow_insecure: bool,
    /// Whether each local backend gets a tiny job.
    pub inference: bool,
}

/// Prints a line for each check as it is done; `live` where `out` is a terminal. True when all that matters is well.
pub fn examine(question: &Options<'_>, out: &mut dyn Write, live: bool) -> bool {
    let _ = writeln!(out, "usepod-agent {AGENT_VERSION} doctor");
    let mut report = Report::new(out, live);
    report.heading(format_args!("this box"));
    let Some(config) = local::config(&mut report, question.config, question.allow_insecure) else {
        report.skip("all else", format_args!("rests on config"));
        return report.verdict(format_args!(""));
    };
    // They answer, or do not, while the coordinator is examined.
    let patients: Vec<BackendCheck<'_>> = config.backends.iter().map(BackendCheck::start).collect();
    let paths = AgentPaths::beside(&config.key_path);
    local::identity(&mut report, &config);
    let runs = local::lock(&mut report, &paths);
    local::disk(&mut report, &config);

    report.heading(format_args!("coordinator {}", config.coordinator.address()));
    coordinator::examine(&mut report, &config.coordinator);

    let servers = patients.len();
    let terms = OfferTerms { pricing: config.pricing.clone(), max_concurrent: config.limits.max_concurrent };
    let mut models = 0;
    for patient in patients {
        models += patient.tell(&mut report, &terms, question.inference);
    }

    report.heading(format_args!("from now on"));
    supervisor::examine(&mut report, &paths, runs);
    report.verdict(format_args!("{models} model(s) to offer, of {servers} backend(s)"))
}
