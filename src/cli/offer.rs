//! The table of an offer; each row is a model with its prices and its limits.

use super::format_usdc;
use crate::sys::terminal::wrap;

/// A model on offer, as `status`, `validate` and `setup` print it.
pub struct OfferRow<'a> {
    pub model_id: &'a str,
    /// USDC micro-units per million input tokens.
    pub input_per_1m: u64,
    /// USDC micro-units per million output tokens.
    pub output_per_1m: u64,
    pub context_window: Option<u64>,
    pub max_concurrent: u64,
    pub backend: &'a str,
}

/// The rows as a table, `indent` characters from the left.
pub fn table(rows: &[OfferRow<'_>], indent: usize, width: usize) -> String {
    let name_width = rows.iter().map(|row| row.model_id.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows {
        let window = row.context_window.map_or_else(|| "unknown".to_owned(), |tokens| tokens.to_string());
        let price = |name: &str, micro_units| format!("{name}\u{a0}{}", format_usdc(micro_units));
        let terms = format!(
            "{}  {}  context\u{a0}{window}  {}\u{a0}at\u{a0}a\u{a0}time  {}",
            price("input", row.input_per_1m),
            price("output", row.output_per_1m),
            row.max_concurrent,
            row.backend,
        );
        text += &wrap(&format!("{:indent$}{:name_width$}  ", "", row.model_id), &terms, width);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_gets_a_line_of_its_own_and_a_price_stays_beside_its_name() {
        let row = |model_id| OfferRow {
            model_id,
            input_per_1m: 500_000,
            output_per_1m: 1,
            context_window: None,
            max_concurrent: 8,
            backend: "vllm",
        };
        assert_eq!(
            table(&[row("m"), row("mm")], 2, 80),
            "  m   input 0.50  output 0.000001  context unknown  8 at a time  vllm\n  \
               mm  input 0.50  output 0.000001  context unknown  8 at a time  vllm\n"
        );
        assert_eq!(
            table(&[row("meta-llama/Llama-3.3-70B-Instruct")], 2, 60),
            "  meta-llama/Llama-3.3-70B-Instruct\n    input 0.50  output 0.000001  context unknown\n    8 at a time  vllm\n"
        );
    }
}
