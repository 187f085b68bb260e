//! `doctor`: checks everything the agent needs, layer by layer, and says how to fix what is broken.
//!
//! Invariants: the doctor changes nothing, except for a test file that it writes and removes; it creates no identity, does not
//! answer the challenge and takes no lock, so that it can run beside the agent. Every wait is bounded: without inference, all
//! waits together take about 30 s. A layer above a broken layer is skipped, not failed; an invalid part of
//! `agent.toml` leaves the other layers standing. No secret and no model output is printed.

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

use crate::config::{MAX_CONCURRENT_DEFAULT, PartialConfig, Price, Pricing};
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
    let backends: Vec<BackendCheck<'_>> = config.backends.iter().flatten().map(BackendCheck::start).collect();
    let instance = config.key_path.as_ref().ok().map(|key_path| {
        let paths = AgentPaths::beside(key_path);
        local::identity(&mut report, key_path, &config);
        local::folder(&mut report, key_path, &config);
        let is_running = local::lock(&mut report, &paths);
        local::disk(&mut report, key_path);
        (paths, is_running)
    });
    if instance.is_none() {
        report.skip("identity", "skipped: needs `[identity] key_path`");
    }

    match &config.coordinator {
        Ok(coordinator) => {
            report.heading(format_args!("coordinator {}", coordinator.address()));
            coordinator::examine(&mut report, coordinator);
        }
        Err(_) => {
            report.heading("coordinator");
            report.skip("connection", "skipped: needs `[coordinator] url`");
        }
    }

    let servers = backends.len();
    let terms = terms_of(&config);
    let mut models = 0;
    for backend in backends {
        models += backend.report(&mut report, &terms, options.inference);
    }

    if let Some((paths, is_running)) = instance {
        report.heading("supervision");
        supervisor::examine(&mut report, &paths, is_running);
    }
    report.verdict(format_args!("{models} model(s) to offer, from {servers} backend(s)"))
}

/// The terms of the offer. In place of an invalid part, terms with which every model is offered.
fn terms_of(config: &PartialConfig) -> OfferTerms {
    let any_price = Price { input_per_1m: 1, output_per_1m: 1 };
    let any_pricing = |_| Pricing { default: any_price, models: Default::default() };
    OfferTerms {
        pricing: config.pricing.clone().unwrap_or_else(any_pricing),
        max_concurrent: config.limits.as_ref().map_or(MAX_CONCURRENT_DEFAULT, |limits| limits.max_concurrent),
    }
}
