//! The validation rules for `agent.toml`, each with its fix.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;
use toml_edit::Document;
use tungstenite::http::Uri;

use super::error::ConfigError;
use super::recorded;
use super::section::{Field, Section};
use super::unknown_keys;
use super::{
    BackendConfig, CoordinatorConfig, DRAIN_SECONDS_DEFAULT, DRAIN_SECONDS_RANGE, KEY_PATH_DEFAULT, Limits,
    MAX_CONCURRENT_DEFAULT, MAX_CONCURRENT_RANGE, PartialConfig, Price, Pricing, expand_home, parse_level,
};
use crate::backend::{BaseUrl, Kind};
use crate::config::error::Source;
use crate::net::is_loopback;
use crate::net::tls::ExtraRoots;

/// The fix for an invalid price.
const PRICE_FIX: &str = "write a price in USDC micro-units per million tokens: 500_000 is 0.50 USDC";

/// Validates a whole file, each part on its own.
pub fn config(text: &str, path: &Path, allow_insecure: bool) -> Result<PartialConfig, ConfigError> {
    let source = Source { text, path };
    let document = Document::parse(text).map_err(|e| source.syntax_fault(&e))?;
    let root = Section::root(source, document.as_table());
    let mut warnings = unknown_keys::warnings(&root);
    let key_path = root.section("identity").and_then(|section| key_path(&section));
    let observability = root.section("observability");
    Ok(PartialConfig {
        path: path.to_owned(),
        coordinator: root.section("coordinator").and_then(|section| coordinator(&section, allow_insecure)),
        backends: backends(&root),
        pricing: root.section("pricing").and_then(|section| pricing(&section)),
        limits: root.section("limits").and_then(|section| limits(&section, &mut warnings)),
        log_level: observability.clone().and_then(|section| log_level(&section, &mut warnings)),
        log_file: observability.and_then(|section| log_file(&section, key_path.as_deref().ok())),
        key_path,
        recorded_provider_id: recorded::provider_id(text),
        warnings,
    })
}

/// Validates `key_path` only.
pub fn key_path_in(text: &str, path: &Path) -> Result<PathBuf, ConfigError> {
    let source = Source { text, path };
    let document = Document::parse(text).map_err(|e| source.syntax_fault(&e))?;
    key_path(&Section::root(source, document.as_table()).section("identity")?)
}

fn coordinator(section: &Section<'_>, allow_insecure: bool) -> Result<CoordinatorConfig, ConfigError> {
    const FIX: &str = "write url = \"wss://api.usepod.ai/provider/connect\"";
    let url = section.string("url", FIX)?.ok_or_else(|| section.missing("url", FIX))?;
    let fault = |what: &str, fix: &str| url.error_at(what, fix);
    let uri: Uri = lower_case_scheme(url.value.trim()).parse().map_err(|_| fault("it is not a URL", FIX))?;
    let host = uri.host().unwrap_or_default();
    match uri.scheme_str() {
        Some("wss") => {}
        Some("ws") if allow_insecure || is_loopback(host) => {}
        Some("ws") => {
            return Err(fault(
                "ws:// is not encrypted",
                "use wss://, or start the agent with --allow-insecure if you trust the network",
            ));
        }
        _ => return Err(fault("it is not a WebSocket URL", "begin the URL with wss://")),
    }
    let authority = uri.authority().map_or("", |a| a.as_str());
    let behind_host = authority.rsplit('@').next().unwrap_or_default().strip_prefix(host).unwrap_or_default();
    if host.is_empty() || (!behind_host.is_empty() && uri.port_u16().is_none()) {
        return Err(fault("it has no valid host and port", FIX));
    }
    let code = section.string("enrollment_code", "write the code in quotes")?;
    let enrollment_code = code.map(|c| c.value.trim().to_owned()).filter(|c| !c.is_empty());
    Ok(CoordinatorConfig { url: uri, enrollment_code, roots: extra_roots(section)? })
}

/// Other crates compare the schemes of WebSockets case-sensitively.
fn lower_case_scheme(url: &str) -> String {
    let (scheme, rest) = url.split_at(url.find("://").unwrap_or(0));
    scheme.to_ascii_lowercase() + rest
}

fn extra_roots(section: &Section<'_>) -> Result<ExtraRoots, ConfigError> {
    const FIX: &str = "name a PEM file with the certificate of your authority, or remove the key";
    let Some(file) = section.string("ca_file", FIX)? else { return Ok(ExtraRoots::default()) };
    let path = expand_home(file.value).ok_or_else(|| file.error_at("the home directory is unknown", FIX))?;
    ExtraRoots::from_file(&path).map_err(|what| file.error_at(&what, FIX))
}

fn key_path(section: &Section<'_>) -> Result<PathBuf, ConfigError> {
    const FIX: &str = "write an absolute path in quotes";
    match section.string("key_path", FIX)? {
        Some(path) if path.value.trim().is_empty() => {
            Err(path.error_at("it is empty", &format!("remove the key for the default, {KEY_PATH_DEFAULT}")))
        }
        Some(path) => expand_home(path.value).ok_or_else(|| path.error_at("the home directory is unknown", FIX)),
        None => expand_home(KEY_PATH_DEFAULT).ok_or_else(|| section.missing("key_path", FIX)),
    }
}

fn backends(root: &Section<'_>) -> Vec<Result<BackendConfig, ConfigError>> {
    let mut seen = Vec::new();
    match root.sections("backends") {
        Ok(sections) => sections.iter().map(|section| distinct_backend(section, &mut seen)).collect(),
        Err(e) => vec![Err(e)],
    }
}

/// Validates an entry, and that it is not one of those `seen` before.
fn distinct_backend(section: &Section<'_>, seen: &mut Vec<(Kind, String)>) -> Result<BackendConfig, ConfigError> {
    let entry = backend(section)?;
    // Hosted entries without a url are distinguished by their API key.
    let address = match &entry.url {
        Some(url) if !entry.kind.is_hosted() => url.root().to_owned(),
        Some(url) => url.to_string(),
        None => entry.api_key_env.clone().unwrap_or_default(),
    };
    let address = (entry.kind, address);
    if seen.contains(&address) {
        let key = if entry.url.is_some() { "url" } else { "kind" };
        let what = format!("this {} backend is listed twice", entry.kind);
        return Err(section.fault(key, &what, "remove one of the two entries"));
    }
    seen.push(address);
    Ok(entry)
}

fn backend(section: &Section<'_>) -> Result<BackendConfig, ConfigError> {
    // Files for 0.3.5 may contain `markup`, which has no effect there either.
    section.refuse_unknown(&["kind", "url", "api_key_env", "models", "max_concurrent", "markup"])?;
    let names: Vec<&str> = Kind::ALL.iter().map(|k| k.name()).collect();
    let one_of = format!("write one of: {}", names.join(", "));
    let name = section.string("kind", &one_of)?.ok_or_else(|| section.missing("kind", &one_of))?;
    let kind = Kind::from_name(name.value).ok_or_else(|| name.error_at("unknown kind of backend", &one_of))?;
    Ok(BackendConfig {
        kind,
        url: backend_url(section, kind)?,
        api_key_env: api_key_env(section, kind)?,
        models: section.strings("models", "write a list of model names in quotes")?,
        max_concurrent: within(section, "max_concurrent", MAX_CONCURRENT_RANGE)?,
    })
}

fn backend_url(section: &Section<'_>, kind: Kind) -> Result<Option<BaseUrl>, ConfigError> {
    let example = kind.default_urls().first().unwrap_or(&"http://localhost:8000");
    let fix = format!("write an address such as url = \"{example}\"");
    match section.string("url", &fix)? {
        Some(url) => match BaseUrl::parse(url.value) {
            Ok(base) if kind.is_hosted() && !base.is_private() => {
                let what = "http:// is not encrypted, so others could read the API key and the prompts";
                Err(url.error_at(what, "begin the URL with https://"))
            }
            Ok(base) => Ok(Some(base)),
            Err(e) => Err(url.error_at(&e.to_string(), &fix)),
        },
        None if kind.is_hosted() => Ok(None),
        None => Err(section.missing("url", &format!("a {kind} backend needs one: {fix}"))),
    }
}

fn api_key_env(section: &Section<'_>, kind: Kind) -> Result<Option<String>, ConfigError> {
    let example = kind.name().to_ascii_uppercase();
    let fix = format!("put the key in an environment variable, and its name here: api_key_env = \"{example}_API_KEY\"");
    match section.string("api_key_env", &fix)? {
        Some(name) if is_variable_name(name.value) => Ok(Some(name.value.to_owned())),
        Some(other) => Err(other.error_at("it is not the name of an environment variable", &fix)),
        None if kind.is_hosted() => Err(section.missing("api_key_env", &fix)),
        None => Ok(None),
    }
}

fn is_variable_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn pricing(section: &Section<'_>) -> Result<Pricing, ConfigError> {
    let default_price = |key| match price(section, key)? {
        None => Err(section.missing(key, PRICE_FIX)),
        Some(0) => Err(section.fault(key, "with a default price of 0, nothing is offered", PRICE_FIX)),
        Some(price) => Ok(price),
    };
    let default = Price {
        input_per_1m: default_price("default_input_per_1m")?,
        output_per_1m: default_price("default_output_per_1m")?,
    };
    let mut models = HashMap::new();
    let of_models = section.section("models")?;
    for model_id in of_models.keys() {
        let own = of_models.section(model_id)?;
        let price = Price {
            input_per_1m: price(&own, "input_per_1m")?.unwrap_or(default.input_per_1m),
            output_per_1m: price(&own, "output_per_1m")?.unwrap_or(default.output_per_1m),
        };
        models.insert(model_id.to_owned(), price);
    }
    Ok(Pricing { default, models })
}

fn price(section: &Section<'_>, key: &'static str) -> Result<Option<u64>, ConfigError> {
    let Some(found) = section.integer(key, PRICE_FIX)? else { return Ok(None) };
    u64::try_from(found.value).map(Some).map_err(|_| found.error_at("a price cannot be negative", PRICE_FIX))
}

fn limits(section: &Section<'_>, warnings: &mut Vec<ConfigError>) -> Result<Limits, ConfigError> {
    let drain_seconds = within(section, "drain_seconds", DRAIN_SECONDS_RANGE)?.unwrap_or(DRAIN_SECONDS_DEFAULT);
    const TOKENS_FIX: &str = "write a whole number, or remove the key for no limit";
    let tokens = section.integer("max_tokens_per_minute", TOKENS_FIX)?;
    if let Some(none) = tokens.as_ref().filter(|found| found.value == 0) {
        warnings.push(none.error_at("every job will be rejected", TOKENS_FIX));
    }
    let non_negative = |field: Field<'_, i64>| {
        u64::try_from(field.value).map_err(|_| field.error_at("it cannot be negative", TOKENS_FIX))
    };
    Ok(Limits {
        max_concurrent: within(section, "max_concurrent", MAX_CONCURRENT_RANGE)?.unwrap_or(MAX_CONCURRENT_DEFAULT),
        max_tokens_per_minute: tokens.map(non_negative).transpose()?,
        drain: Duration::from_secs(u64::from(drain_seconds)),
    })
}

fn within(section: &Section<'_>, key: &'static str, range: RangeInclusive<u32>) -> Result<Option<u32>, ConfigError> {
    let fix = format!("write a number from {} to {}", range.start(), range.end());
    let Some(found) = section.integer(key, &fix)? else { return Ok(None) };
    let number = u32::try_from(found.value).ok().filter(|n| range.contains(n));
    number.map(Some).ok_or_else(|| found.error_at("out of range", &fix))
}

fn log_file(section: &Section<'_>, key_path: Option<&Path>) -> Result<Option<PathBuf>, ConfigError> {
    const FIX: &str =
        "name a file, such as log_file = \"~/.usepod-agent/agent.log\", or remove the key to log to stderr";
    let Some(file) = section.string("log_file", FIX)? else { return Ok(None) };
    if file.value.trim().is_empty() {
        return Err(file.error_at("it is empty", FIX));
    }
    let path = expand_home(file.value).ok_or_else(|| file.error_at("the home directory is unknown", FIX))?;
    if file.value.ends_with('/') || path.is_dir() {
        return Err(file.error_at("it is a directory", FIX));
    }
    if Some(&*path) == key_path {
        return Err(file.error_at("it is the identity file", FIX));
    }
    Ok(Some(path))
}

/// 0.3.5 accepts any text here, including filters such as `info,hyper=warn`, so an unknown level is a warning only.
fn log_level(section: &Section<'_>, warnings: &mut Vec<ConfigError>) -> Result<Option<LevelFilter>, ConfigError> {
    const FIX: &str = "use one of: off, error, warn, info, debug, trace";
    let Some(level) = section.string("log_level", FIX)? else { return Ok(None) };
    let known = level.value.split(',').find_map(parse_level);
    if known.is_none() {
        warnings.push(level.error_at("unknown level; using `info`", FIX));
    }
    Ok(known)
}
