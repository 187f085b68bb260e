//! `validate`: what would be offered, and at which prices.

use std::fmt::Write as _;
use std::sync::Arc;

use super::args::Globals;
use super::{CliError, backends_of, format_usdc, load_config, print, terms_of};
use crate::backend::Backend;
use crate::config::Config;
use crate::discovery::{Catalog, Listing, ResolvedModel, probe_all};

/// Prints the number of backends, how each is, and the offer.
pub fn run(globals: &Globals) -> Result<(), CliError> {
    let config = load_config(globals)?;
    let (report, _) = offer(&config);
    print(&format!("ok: parsed {} backend(s)\n{report}", config.backends.len()));
    Ok(())
}

/// Asks the backends: how each is, and what would be offered, which may be nothing, at which prices.
pub(super) fn offer(config: &Config) -> (String, Vec<ResolvedModel>) {
    let backends = backends_of(config);
    let terms = terms_of(config);
    // A string takes whatever is written to it.
    let mut report = String::new();
    let probed: Vec<Arc<dyn Backend>> = backends.iter().map(|b| b.backend.clone()).collect();
    let mut serving = Vec::new();
    for (offered, answer) in backends.iter().zip(probe_all(&probed)) {
        let id = offered.backend.id();
        match offered.backend.ready().and(answer) {
            Ok(listed) => {
                let count = listed.len();
                let discovered = offered.price(listed, &terms);
                let _ = writeln!(report, "{id}: lists {count} model(s), {} to offer", discovered.models.len());
                serving.push(Listing::of(discovered, offered.slots_max(&terms)));
            }
            Err(e) => {
                let _ = writeln!(report, "{id}: would not be offered: {e}");
            }
        }
    }
    let offer = Catalog::new(serving, Vec::new()).offer;
    offer_table(&mut report, &offer);
    (report, offer)
}

fn offer_table(report: &mut String, offer: &[ResolvedModel]) {
    if offer.is_empty() {
        report.push_str("nothing would be offered\n");
        return;
    }
    let width = offer.iter().map(|m| m.model_id.chars().count()).max().unwrap_or(0);
    let _ = writeln!(report, "would offer {} model(s), prices in USDC per million tokens:", offer.len());
    for m in offer {
        let window = m.context_window.map_or_else(|| "unknown".to_owned(), |w| w.to_string());
        let _ = writeln!(
            report,
            "  {:width$}  input {}  output {}  context {window}  up to {} at a time  {}",
            m.model_id,
            format_usdc(m.input_per_1m),
            format_usdc(m.output_per_1m),
            m.max_concurrent,
            m.backend,
        );
    }
}
