//! The rules of `agent.toml`, each with its fix.

use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use log::LevelFilter;
use serde::Deserialize;
use toml::Spanned;
use tungstenite::http::Uri;

use super::error::{ConfigError, Source};
use super::{
    BackendConfig, Config, CoordinatorConfig, DRAIN_SECONDS_DEFAULT, DRAIN_SECONDS_RANGE, KEY_PATH_DEFAULT, Limits,
    MAX_CONCURRENT_DEFAULT, MAX_CONCURRENT_RANGE, Price, Pricing, expand_home, parse_level,
};
use crate::backend::{BaseUrl, Kind};

/// The file, as written. What must be there is optional here, for better words than the parser has.
#[derive(Deserialize)]
struct Raw {
    coordinator: Option<Spanned<RawCoordinator>>,
    #[serde(default)]
    identity: RawIdentity,
    #[serde(default)]
    backends: Vec<Spanned<RawBackend>>,
    pricing: Option<Spanned<RawPricing>>,
    #[serde(default)]
    limits: RawLimits,
    #[serde(default)]
    observability: RawObservability,
}

#[derive(Deserialize)]
struct RawCoordinator {
    url: Option<Spanned<String>>,
    enrollment_code: Option<String>,
}

#[derive(Deserialize, Default)]
struct RawIdentity {
    key_path: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBackend {
    kind: Option<Spanned<String>>,
    url: Option<Spanned<String>>,
    api_key_env: Option<Spanned<String>>,
    models: Option<Vec<String>>,
    /// Accepted for the files of 0.3.5, which does not use it either.
    #[serde(rename = "markup")]
    _markup: Option<f64>,
}

#[derive(Deserialize)]
struct RawPricing {
    default_input_per_1m: Option<Spanned<u64>>,
    default_output_per_1m: Option<Spanned<u64>>,
    #[serde(default)]
    models: HashMap<String, RawPrice>,
}

#[derive(Deserialize)]
struct RawPrice {
    input_per_1m: Option<u64>,
    output_per_1m: Option<u64>,
}

#[derive(Deserialize, Default)]
struct RawLimits {
    max_concurrent: Option<Spanned<i64>>,
    max_tokens_per_minute: Option<u64>,
    drain_seconds: Option<Spanned<i64>>,
}

#[derive(Deserialize, Default)]
struct RawObservability {
    log_level: Option<Spanned<String>>,
}

/// Checks a whole file.
pub fn config(text: &str, path: &Path, allow_insecure: bool) -> Result<Config, ConfigError> {
    let source = Source { text, path };
    let raw: Raw = toml::from_str(text).map_err(|e| source.toml_fault(&e))?;
    let Raw {
        coordinator: raw_coordinator,
        identity,
        backends: raw_backends,
        pricing: raw_pricing,
        limits: raw_limits,
        observability,
    } = raw;
    Ok(Config {
        coordinator: coordinator(source, raw_coordinator, allow_insecure)?,
        key_path: key_path(source, identity)?,
        backends: backends(source, raw_backends)?,
        pricing: pricing(source, raw_pricing)?,
        limits: limits(source, &raw_limits)?,
        log_level: log_level(source, observability)?,
    })
}

fn coordinator(
    source: Source<'_>,
    raw: Option<Spanned<RawCoordinator>>,
    allow_insecure: bool,
) -> Result<CoordinatorConfig, ConfigError> {
    const KEY: &str = "[coordinator] url";
    const FIX: &str = "write url = \"wss://api.usepod.ai/provider/connect\"";
    let at = raw.as_ref().map(|r| r.span().start);
    let (url, enrollment_code) = match raw.map(Spanned::into_inner) {
        Some(RawCoordinator { url: Some(url), enrollment_code }) => (url, enrollment_code),
        _ => return Err(source.missing(KEY, at, FIX)),
    };
    let fault = |what: &str, fix: &str| source.fault(KEY, url.span(), what, fix);
    let uri: Uri = url.get_ref().trim().parse().map_err(|_| fault("it is not a URL", FIX))?;
    match uri.scheme_str() {
        Some("wss") => {}
        Some("ws") if allow_insecure => {}
        Some("ws") => {
            return Err(fault(
                "ws:// is not encrypted",
                "use wss://, or start the agent with --allow-insecure if the coordinator is on this machine",
            ));
        }
        _ => return Err(fault("the coordinator speaks WebSocket", "begin the URL with wss://")),
    }
    let host = uri.host().unwrap_or_default();
    let authority = uri.authority().map_or("", |a| a.as_str());
    let behind_host = authority.rsplit('@').next().unwrap_or_default().strip_prefix(host).unwrap_or_default();
    if host.is_empty() || (!behind_host.is_empty() && uri.port_u16().is_none()) {
        return Err(fault("it has no valid host and port", FIX));
    }
    let enrollment_code = enrollment_code.map(|c| c.trim().to_owned()).filter(|c| !c.is_empty());
    Ok(CoordinatorConfig { url: uri, enrollment_code })
}

fn key_path(source: Source<'_>, raw: RawIdentity) -> Result<std::path::PathBuf, ConfigError> {
    const KEY: &str = "[identity] key_path";
    match raw.key_path {
        Some(path) if path.get_ref().trim().is_empty() => {
            Err(source.fault(KEY, path.span(), "it is empty", format!("leave it out for {KEY_PATH_DEFAULT}")))
        }
        Some(path) => expand_home(path.get_ref())
            .ok_or_else(|| source.fault(KEY, path.span(), "HOME is not set", "write an absolute path")),
        None => expand_home(KEY_PATH_DEFAULT)
            .ok_or_else(|| source.missing(KEY, None, "HOME is not set: write an absolute path")),
    }
}

fn backends(source: Source<'_>, raw: Vec<Spanned<RawBackend>>) -> Result<Vec<BackendConfig>, ConfigError> {
    let mut seen = HashSet::new();
    let mut checked = Vec::with_capacity(raw.len());
    for entry in raw {
        let span = entry.span();
        let kind_span = entry.get_ref().kind.as_ref().map(Spanned::span);
        let url_span = entry.get_ref().url.as_ref().map(Spanned::span);
        let entry = backend(source, entry)?;
        // Hosted entries without a url differ by their key.
        let place = match &entry.url {
            Some(url) => url.to_string(),
            None => entry.api_key_env.clone().unwrap_or_default(),
        };
        if !seen.insert((entry.kind, place)) {
            return Err(source.fault(
                "[[backends]] url",
                url_span.or(kind_span).unwrap_or(span),
                format!("this {} backend is listed twice", entry.kind),
                "remove one of the two entries",
            ));
        }
        checked.push(entry);
    }
    Ok(checked)
}

fn backend(source: Source<'_>, raw: Spanned<RawBackend>) -> Result<BackendConfig, ConfigError> {
    let at = raw.span().start;
    let RawBackend { kind, url, api_key_env, models, _markup } = raw.into_inner();
    let names: Vec<&str> = Kind::ALL.iter().map(|k| k.name()).collect();
    let names = names.join(", ");
    let Some(kind_name) = kind else {
        return Err(source.missing("[[backends]] kind", Some(at), format!("write one of: {names}")));
    };
    let Some(kind) = Kind::from_name(kind_name.get_ref()) else {
        return Err(source.fault(
            "[[backends]] kind",
            kind_name.span(),
            "unknown kind of backend",
            format!("use one of: {names}"),
        ));
    };
    let url = match url {
        Some(url) => {
            let fix =
                format!("write an address such as {}", kind.default_urls().first().unwrap_or(&"http://localhost:8000"));
            let parsed = BaseUrl::parse(url.get_ref());
            Some(parsed.map_err(|e| source.fault("[[backends]] url", url.span(), e.to_string(), fix))?)
        }
        None if kind.is_hosted() => None,
        None => {
            let example = kind.default_urls().first().unwrap_or(&"http://localhost:8000");
            return Err(source.missing(
                "[[backends]] url",
                Some(at),
                format!("a {kind} backend needs one, for example url = \"{example}\""),
            ));
        }
    };
    let api_key_env = match api_key_env {
        Some(variable) if is_variable_name(variable.get_ref()) => Some(variable.into_inner()),
        Some(other) => {
            return Err(source.fault(
                "[[backends]] api_key_env",
                other.span(),
                "it is not the name of an environment variable",
                "put the key into a variable, and the variable's name here",
            ));
        }
        None if kind.is_hosted() => {
            let fix = format!(
                "name the environment variable that holds the {kind} key, for example {}",
                example_variable(kind)
            );
            return Err(source.missing("[[backends]] api_key_env", Some(at), fix));
        }
        None => None,
    };
    Ok(BackendConfig { kind, url, api_key_env, models })
}

fn example_variable(kind: Kind) -> String {
    format!("api_key_env = \"{}_API_KEY\"", kind.name().to_ascii_uppercase())
}

fn is_variable_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn pricing(source: Source<'_>, raw: Option<Spanned<RawPricing>>) -> Result<Pricing, ConfigError> {
    const EXAMPLE: &str = "in USDC micro-units per million tokens: 500_000 is 0.50 USDC";
    let at = raw.as_ref().map(|r| r.span().start);
    let raw = raw.map(Spanned::into_inner);
    let (input, output, models) = match raw {
        Some(r) => (r.default_input_per_1m, r.default_output_per_1m, r.models),
        None => (None, None, HashMap::new()),
    };
    let price = |key: &str, value: Option<Spanned<u64>>| {
        let value = value.ok_or_else(|| source.missing(key, at, format!("write a price, {EXAMPLE}")))?;
        if *value.get_ref() == 0 {
            return Err(source.fault(
                key,
                value.span(),
                "a default price of 0 would offer nothing",
                format!("write a price, {EXAMPLE}"),
            ));
        }
        Ok(value.into_inner())
    };
    let default = Price {
        input_per_1m: price("[pricing] default_input_per_1m", input)?,
        output_per_1m: price("[pricing] default_output_per_1m", output)?,
    };
    let own = |raw: RawPrice| Price {
        input_per_1m: raw.input_per_1m.unwrap_or(default.input_per_1m),
        output_per_1m: raw.output_per_1m.unwrap_or(default.output_per_1m),
    };
    let models = models.into_iter().map(|(id, raw)| (id, own(raw))).collect();
    Ok(Pricing { default, models })
}

fn limits(source: Source<'_>, raw: &RawLimits) -> Result<Limits, ConfigError> {
    let within = |key: &str, value: &Option<Spanned<i64>>, default: u32, range: RangeInclusive<u32>| match value {
        None => Ok(default),
        Some(value) => {
            let number = u32::try_from(*value.get_ref()).ok().filter(|n| range.contains(n));
            number.ok_or_else(|| {
                let (from, to) = (range.start(), range.end());
                source.fault(key, value.span(), "out of range", format!("write a number from {from} to {to}"))
            })
        }
    };
    let drain = within("[limits] drain_seconds", &raw.drain_seconds, DRAIN_SECONDS_DEFAULT, DRAIN_SECONDS_RANGE)?;
    Ok(Limits {
        max_concurrent: within(
            "[limits] max_concurrent",
            &raw.max_concurrent,
            MAX_CONCURRENT_DEFAULT,
            MAX_CONCURRENT_RANGE,
        )?,
        max_tokens_per_minute: raw.max_tokens_per_minute,
        drain: Duration::from_secs(u64::from(drain)),
    })
}

fn log_level(source: Source<'_>, raw: RawObservability) -> Result<Option<LevelFilter>, ConfigError> {
    let Some(level) = raw.log_level else { return Ok(None) };
    // 0.3.5 takes filters such as `info,hyper=warn`; of those the bare level is what counts here.
    let is_filter = level.get_ref().contains(['=', ',']);
    match level.get_ref().split(',').find_map(parse_level) {
        Some(parsed) => Ok(Some(parsed)),
        None if is_filter => Ok(None),
        None => {
            let fix = "use one of: off, error, warn, info, debug, trace";
            Err(source.fault("[observability] log_level", level.span(), "unknown level", fix))
        }
    }
}
