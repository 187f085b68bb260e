//! `validate`: prints the models that would be offered, and their prices.

use std::sync::Arc;

use super::args::Globals;
use super::offer::{OfferRow, table};
use super::{CliError, backends_of, load_config, terms_of};
use crate::backend::Backend;
use crate::config::Config;
use crate::discovery::{Catalog, Listing, ResolvedModel, probe_all};
use crate::logging::sanitize_for_log;
use crate::sys::terminal::{Terminal, wrap};

/// Prints the number of backends, the condition of each, and the offer.
pub fn run(globals: &Globals) -> Result<(), CliError> {
    let config = load_config(globals)?;
    let (report, _) = offer(&config);
    out!("ok: parsed {} backend(s)\n{report}", config.backends.len());
    Ok(())
}

/// Queries the backends. Returns the condition of each and the offer as text, and the offer, which may be empty.
pub(super) fn offer(config: &Config) -> (String, Vec<ResolvedModel>) {
    let width = Terminal::of_stdout().width;
    let backends = backends_of(config);
    let terms = terms_of(config);
    let mut report = String::new();
    let probed: Vec<Arc<dyn Backend>> = backends.iter().map(|b| b.backend.clone()).collect();
    let mut serving = Vec::new();
    for (offered, answer) in backends.iter().zip(probe_all(&probed)) {
        let condition = match offered.backend.ready().and(answer) {
            Ok(probed) => {
                let count = probed.count();
                let selected = offered.select(probed);
                let exclusions = selected.exclusions().map_or_else(String::new, |exclusions| format!("; {exclusions}"));
                let discovered = offered.price(selected.models, &terms);
                let to_offer = discovered.models.len();
                serving.push(Listing::of(discovered, offered.slots_max(&terms)));
                format!("lists {count} model(s), {to_offer} to offer{exclusions}")
            }
            Err(e) => format!("would not be offered: {}", e.for_operator()),
        };
        report += &wrap("", &format!("{}: {condition}", offered.backend.id()), width);
    }
    let offer = Catalog::new(serving, Vec::new()).offer;
    report += &offer_table(&offer, width);
    (report, offer)
}

fn offer_table(offer: &[ResolvedModel], width: usize) -> String {
    if offer.is_empty() {
        return "nothing would be offered\n".to_owned();
    }
    let names: Vec<String> = offer.iter().map(|model| sanitize_for_log(&model.model_id)).collect();
    let rows: Vec<OfferRow<'_>> = offer
        .iter()
        .zip(&names)
        .map(|(model, model_id)| OfferRow {
            model_id,
            input_per_1m: model.input_per_1m,
            output_per_1m: model.output_per_1m,
            context_window: model.context_window.map(u64::from),
            max_concurrent: model.max_concurrent.into(),
            backend: &model.backend,
        })
        .collect();
    let heading = format!("would offer {} model(s), prices in USDC per million tokens:", offer.len());
    wrap("", &heading, width) + &table(&rows, 2, width)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::http_server::{self, HttpServer};

    #[test]
    fn offer_escapes_the_error_of_a_backend() {
        let error = json!("\u{9b}31m\u{202e}no memory");
        let handler = Arc::new(move |exchange: &mut http_server::connection::Exchange<'_>| {
            exchange.respond_json(500, &error);
        });
        let server = HttpServer::start(http_server::bind(0).unwrap(), "failing", handler).unwrap();
        let text = format!(
            "[coordinator]\nurl = \"wss://c.example/\"\n[[backends]]\nkind = \"openai\"\nurl = \"http://{}\"\n\
             [pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 1\n",
            server.address
        );
        let (report, _) = offer(&Config::parse(&text, Path::new("agent.toml"), false).unwrap());
        assert!(report.contains("\\u{9b}31m\\u{202e}no"), "{report}");
        assert!(!report.contains(['\u{9b}', '\u{202e}']), "{report}");
    }
}
