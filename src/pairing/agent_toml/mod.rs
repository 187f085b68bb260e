//! The text of `agent.toml` after a pairing: a complete, commented file if there was none, otherwise the operator's file
//! with only the values changed that the pairing decides.
//!
//! Invariants: an existing file keeps its comments, key order, spelling, line ends and unknown keys. Two exceptions, because
//! `toml_edit` writes them so: dotted keys of the same table that are not adjacent are grouped, and if only some lines end in
//! CRLF, all end in LF, those within a string too. A host token is only shown redacted.
//! The functions are pure; the caller parses the text again before writing it.

use toml_edit::{
    ArrayOfTables, DocumentMut, InlineTable, Item, RawString, Table, TableLike, TomlError, Value, table, value,
};

use super::{CoordinatorUrls, ModelTerms, Paired};
use crate::config::{self, BackendConfig, KEY_PATH_DEFAULT, MAX_CONCURRENT_RANGE, without_bom};
use crate::logging::{redact, sanitize_for_log};

/// Prices of a new file if the pairing names none, in USDC micro-units per million tokens.
const INPUT_DEFAULT: u64 = 500_000;
const OUTPUT_DEFAULT: u64 = 750_000;
/// Limit of concurrent jobs of a new file if the pairing names none.
const MAX_CONCURRENT_DEFAULT: u32 = 4;

/// Start of the comment lines that record the pairing.
const PAIRED_WITH: &str = "# paired with:  ";
const PROVIDER_ID: &str = config::recorded::PROVIDER_ID_COMMENT;
const HOST_TOKEN: &str = "# host token:   ";

/// Returns the new text of the file. `old` is the current text, empty if there is no file; `found` lists discovered backends
/// that `old` does not name.
///
/// # Errors
/// `old` is not TOML, or has a value where a table belongs.
pub fn text(old: &str, urls: &CoordinatorUrls, paired: &Paired, found: &[BackendConfig]) -> Result<String, String> {
    if old.is_empty() {
        return edit(&new_file(paired, found), urls, paired, &[]);
    }
    let body = without_bom(old);
    let mark = &old[..old.len() - body.len()];
    let mut new = edit(body, urls, paired, found)?;
    // `toml_edit` ends every line with a `\n`.
    if !body.ends_with('\n') {
        new.truncate(new.trim_end_matches('\n').len());
    }
    if has_crlf_only(body) {
        new = new.replace('\n', "\r\n");
    }
    Ok(format!("{mark}{new}"))
}

/// Whether there are line ends, and all of them are CRLF.
fn has_crlf_only(text: &str) -> bool {
    let crlf = text.matches("\r\n").count();
    crlf > 0 && crlf == text.matches('\n').count()
}

/// Returns a complete, commented file, for [`edit`] to fill in what the pairing decides.
fn new_file(Paired { models, .. }: &Paired, found: &[BackendConfig]) -> String {
    let backends = if found.is_empty() {
        "# [[backends]]\n# kind = \"llamacpp\"\n# url = \"http://localhost:8080\"\n".to_owned()
    } else {
        found.iter().map(|backend| format!("[[backends]]\n{}", backend_table(backend))).collect()
    };
    let default_price = |of_model: fn(&ModelTerms) -> Option<u64>, otherwise: u64| {
        // With a default of 0, models that the pairing does not name would not be offered.
        match models.first().and_then(of_model).filter(|price| *price > 0) {
            Some(price) => price.to_string(),
            None => format!("{otherwise}        # the pairing named none; set your own"),
        }
    };
    let input = default_price(|model| model.input_per_1m, INPUT_DEFAULT);
    let output = default_price(|model| model.output_per_1m, OUTPUT_DEFAULT);
    let model_hint = if models.is_empty() {
        "# \"my-big-model\" = { input_per_1m = 900_000, output_per_1m = 1_800_000 }\n"
    } else {
        ""
    };
    format!(
        r#"# Written by `usepod-agent setup`. You may edit this file: a later setup changes only what the pairing decides, and
# keeps a copy of the previous file. `usepod-agent validate` checks the file.
#
{PAIRED_WITH}
{PROVIDER_ID}
{HOST_TOKEN}

[operator]                            # notes for yourself; optional
# display_name = "BlueBoxRig-01"
# wallet = "…"
# contact_email = "…"

[coordinator]                         # the agent connects out; no port is opened
url = ""
# ca_file = "/etc/ssl/own-ca.pem"      # trusted in addition to the public authorities

[identity]                            # keep a copy of this file: it is your account
# key_path = "{KEY_PATH_DEFAULT}"

# The servers whose models are offered. If several list a model, the one whose kind comes first serves it: vllm,
# llamacpp, lmstudio, ollama, openai, venice, openrouter.
{backends}# models = ["only-this-one"]          # of a backend: offer only these models
# max_concurrent = 4                  # of a backend: limit of concurrent jobs

[pricing]                             # USDC micro-units per million tokens: 500_000 is 0.50 USDC
default_input_per_1m = {input}
default_output_per_1m = {output}

[pricing.models]                      # prices of single models; a model whose price is 0 is not offered
{model_hint}
[limits]
max_concurrent = {MAX_CONCURRENT_DEFAULT}                    # concurrent jobs, 1 to 256
# drain_seconds = 30                  # time for jobs in flight to finish when the agent stops
# max_tokens_per_minute = 200_000     # prompts and answers over the last 60 s; beyond it jobs are rejected

[observability]
# log_level = "info"                  # off, error, warn, info, debug or trace
# log_file = "~/.usepod-agent/agent.log"    # instead of stderr; 8 MB, and one older file of that size
"#
    )
}

/// Applies what the pairing decides to the text of a file.
fn edit(old: &str, urls: &CoordinatorUrls, paired: &Paired, found: &[BackendConfig]) -> Result<String, String> {
    let mut document: DocumentMut =
        with_head(old, urls, paired).parse().map_err(|e: TomlError| e.message().to_owned())?;
    let root = document.as_item_mut();
    edit_coordinator(entry(root, "coordinator", table())?, urls)?;
    add_backends(root, found)?;
    edit_prices(entry(root, "pricing", table())?, &paired.models)?;
    if let Some(jobs) = paired.models.first().and_then(|model| model.max_concurrent).filter(|jobs| *jobs > 0) {
        let jobs = jobs.min(u64::from(*MAX_CONCURRENT_RANGE.end()));
        set(entry(root, "limits", table())?, "max_concurrent", integer(jobs))?;
    }
    Ok(document.to_string())
}

/// Records the pairing in the comment at the top, replacing the record of an earlier pairing.
fn with_head(text: &str, urls: &CoordinatorUrls, paired: &Paired) -> String {
    let known = |text: &Option<String>, show: fn(&str) -> String| {
        text.as_deref().map_or_else(|| "none was given".to_owned(), show)
    };
    let facts = [
        (PAIRED_WITH, sanitize_for_log(urls.base())),
        (PROVIDER_ID, known(&paired.provider_id, sanitize_for_log)),
        (HOST_TOKEN, known(&paired.host_token, redact)),
    ];
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let head = lines.iter().take_while(|line| line.is_empty() || line.starts_with('#')).count();
    let mut new = String::new();
    for (label, fact) in facts {
        match lines[..head].iter_mut().find(|line| line.starts_with(label)) {
            Some(line) => *line = format!("{label}{fact}"),
            None => new.extend([label, &fact, "\n"]),
        }
    }
    if !new.is_empty() {
        new.push('\n');
    }
    new + &lines.join("\n") + "\n"
}

fn edit_coordinator(coordinator: &mut Item, urls: &CoordinatorUrls) -> Result<(), String> {
    set(coordinator, "url", urls.connect().into())?;
    // The pairing has enrolled this identity: the code is used up.
    let coordinator = as_table(coordinator)?;
    let comment = coordinator.key("enrollment_code").and_then(|key| key.leaf_decor().prefix()?.as_str());
    let comment = comment.filter(|text| text.contains('#')).map(str::to_owned);
    coordinator.remove("enrollment_code");
    // The comment above it may be about something else.
    if let (Some(comment), Some(mut url)) = (comment, coordinator.key_mut("url")) {
        let decor = url.leaf_decor_mut();
        let own = decor.prefix().and_then(RawString::as_str).unwrap_or_default();
        decor.set_prefix(comment + own);
    }
    Ok(())
}

fn add_backends(root: &mut Item, found: &[BackendConfig]) -> Result<(), String> {
    if found.is_empty() {
        return Ok(());
    }
    let backends = entry(root, "backends", Item::ArrayOfTables(ArrayOfTables::new()))?;
    for backend in found.iter().map(backend_table) {
        match backends {
            Item::ArrayOfTables(tables) => tables.push(backend),
            Item::Value(Value::Array(list)) => list.push(backend.into_inline_table()),
            other => return Err(format!("backends is of type {}", other.type_name())),
        }
    }
    Ok(())
}

fn backend_table(backend: &BackendConfig) -> Table {
    let url = backend.url.as_ref().map(|url| ("url", value(url.as_str())));
    [("kind", value(backend.kind.name()))].into_iter().chain(url).collect()
}

/// Sets the prices that the pairing names, and keeps the others.
fn edit_prices(pricing: &mut Item, models: &[ModelTerms]) -> Result<(), String> {
    for ModelTerms { model_id, input_per_1m, output_per_1m, .. } in models {
        for (key, price) in [("input_per_1m", input_per_1m), ("output_per_1m", output_per_1m)] {
            if let Some(price) = price {
                let of_models = entry(pricing, "models", table())?;
                set(entry(of_models, model_id, InlineTable::new().into())?, key, integer(*price))?;
            }
        }
    }
    Ok(())
}

/// Returns an entry of a table, however the table is spelled; inserts `absent` if there is none.
fn entry<'a>(table: &'a mut Item, key: &str, absent: Item) -> Result<&'a mut Item, String> {
    let table = as_table(table)?;
    if !table.contains_key(key) {
        table.insert(key, absent);
    }
    table.get_mut(key).ok_or_else(|| format!("{key} is missing"))
}

/// Sets a value and keeps the comment beside it. An equal value keeps its spelling.
fn set(table: &mut Item, key: &str, mut new: Value) -> Result<(), String> {
    if let Item::Value(Value::InlineTable(table)) = table
        && !table.contains_key(key)
    {
        // `toml_edit` stores the space before the closing brace with the last value.
        if let Some((_, last)) = table.iter_mut().last() {
            let decor = last.decor_mut();
            if decor.suffix().and_then(RawString::as_str).is_some_and(|suffix| suffix.trim().is_empty()) {
                decor.set_suffix("");
            }
        }
    }
    let table = as_table(table)?;
    match table.get_mut(key) {
        Some(Item::Value(old)) => {
            let is_same = match (&*old, &new) {
                (Value::Integer(old), Value::Integer(new)) => old.value() == new.value(),
                (Value::String(old), Value::String(new)) => old.value() == new.value(),
                _ => false,
            };
            if !is_same {
                *new.decor_mut() = old.decor().clone();
                *old = new;
            }
        }
        _ => {
            table.insert(key, new.into());
        }
    }
    Ok(())
}

fn as_table(item: &mut Item) -> Result<&mut dyn TableLike, String> {
    let kind = item.type_name();
    item.as_table_like_mut().ok_or_else(|| format!("a {kind} stands where a table belongs"))
}

/// Converts a number; TOML has none above `i64::MAX`.
fn integer(number: u64) -> Value {
    i64::try_from(number).unwrap_or(i64::MAX).into()
}

#[cfg(test)]
mod tests;
