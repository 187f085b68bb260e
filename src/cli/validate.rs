//! `validate`: what would be offered, and at which prices.

use std::fmt::Write as _;
use std::sync::Arc;

use super::args::Globals;
use super::{Failure, backends_of, load_config, print, terms_of};
use crate::backend::Backend;
use crate::config::Config;
use crate::discovery::{Catalog, Listing, ResolvedModel, probe_all};

/// Prints the number of backends, how each is, and the offer.
pub fn run(globals: &Globals) -> Result<(), Failure> {
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
                let discovered = offered.resolve(listed, &terms);
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
            usdc(m.input_per_1m),
            usdc(m.output_per_1m),
            m.max_concurrent,
            m.backend,
        );
    }
}

/// Micro-units as USDC, with as many digits as it takes.
fn usdc(micro_units: u64) -> String {
    let fraction = format!("{:06}", micro_units % 1_000_000);
    let fraction = fraction.trim_end_matches('0');
    format!("{}.{fraction:0<2}", micro_units / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_are_exact() {
        for (micro_units, shown) in [(500_000, "0.50"), (1, "0.000001"), (2_000_000, "2.00"), (1_234_567, "1.234567")] {
            assert_eq!(usdc(micro_units), shown);
        }
    }
}
