//! Warnings about unknown keys and tables, which have no effect and are probably misspelt. In `[[backends]]`, they are errors.

use super::error::ConfigError;
use super::section::Section;
use crate::sys::edit_distance::nearest;

/// Maximum number of warnings.
const WARNINGS_MAX: usize = 20;

/// Every table, and its keys. 0.3.5 reads some that have no effect here.
const TABLES: [(&str, &[&str]); 7] = [
    ("", &["operator", "coordinator", "identity", "backends", "pricing", "limits", "observability"]),
    ("operator", &["display_name", "wallet", "contact_email"]),
    ("coordinator", &["url", "enrollment_code", "ca_file"]),
    ("identity", &["key_path"]),
    ("pricing", &["default_input_per_1m", "default_output_per_1m", "models"]),
    ("limits", &["max_concurrent", "drain_seconds", "max_tokens_per_minute"]),
    ("observability", &["log_level", "log_file", "prometheus_addr"]),
];
const KEYS_OF_A_MODEL: [&str; 2] = ["input_per_1m", "output_per_1m"];

/// A warning for each unknown key, which names the key that was probably meant.
pub fn warnings(root: &Section<'_>) -> Vec<ConfigError> {
    let mut warnings = Vec::new();
    for (table, keys) in TABLES {
        // A table of another type is reported as an error.
        let Ok(section) = (if table.is_empty() { Ok(root.clone()) } else { root.section(table) }) else { continue };
        warnings.extend(unknown_keys(&section, keys));
    }
    if let Ok(models) = root.section("pricing").and_then(|pricing| pricing.section("models")) {
        let of_models = models.keys().filter_map(|model_id| models.section(model_id).ok());
        warnings.extend(of_models.flat_map(|section| unknown_keys(&section, &KEYS_OF_A_MODEL)));
    }
    warnings.truncate(WARNINGS_MAX);
    warnings
}

fn unknown_keys(section: &Section<'_>, known: &[&str]) -> Vec<ConfigError> {
    let unknown = section.keys().filter(|key| !known.contains(key)).take(WARNINGS_MAX);
    unknown.map(|key| section.hidden_fault(key, "unknown key, which has no effect", &fix(key, known))).collect()
}

fn fix(key: &str, known: &[&str]) -> String {
    if let Some((table, _)) = TABLES.iter().find(|(table, keys)| !table.is_empty() && keys.contains(&key)) {
        return format!("move it to [{table}]");
    }
    match nearest(key, known.iter().copied()) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => format!("remove it; the known keys here are: {}", known.join(", ")),
    }
}
