//! Parses `agent.toml` into a fully validated [`Config`].
//!
//! Every error shows the file, the line, the key, the value and the fix, but not the value of a key that may contain a secret.
//! Unknown keys are rejected in `[[backends]]` and accepted with a warning elsewhere, as 0.3.5 accepts them.

mod check;
mod error;
pub mod recorded;
mod section;
mod unknown_keys;

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, Metadata};
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;
use nix::unistd::Uid;
use tungstenite::http::Uri;

pub use error::ConfigError;

use crate::backend::{BaseUrl, Kind};
use crate::net::tls::ExtraRoots;
use crate::sys::{files, user};

/// Allowed values of `max_concurrent`.
pub const MAX_CONCURRENT_RANGE: RangeInclusive<u32> = 1..=256;
/// Default of `[limits] max_concurrent`.
pub const MAX_CONCURRENT_DEFAULT: u32 = 8;
/// Default of `drain_seconds`.
pub const DRAIN_SECONDS_DEFAULT: u32 = 30;
/// Allowed values of `drain_seconds`.
pub const DRAIN_SECONDS_RANGE: RangeInclusive<u32> = 0..=3600;
/// Default of `key_path`.
pub const KEY_PATH_DEFAULT: &str = "~/.usepod-agent/identity.key";
/// Size limit of `agent.toml`, in bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// A validated configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file that was read.
    pub path: PathBuf,
    /// `[coordinator]`.
    pub coordinator: CoordinatorConfig,
    /// The identity file.
    pub key_path: PathBuf,
    /// `[[backends]]`, in the order of the file.
    pub backends: Vec<BackendConfig>,
    /// `[pricing]`.
    pub pricing: Pricing,
    /// `[limits]`.
    pub limits: Limits,
    /// `[observability] log_level`.
    pub log_level: Option<LevelFilter>,
    /// `[observability] log_file`.
    pub log_file: Option<PathBuf>,
    /// The provider id that `setup` recorded in a comment.
    pub recorded_provider_id: Option<String>,
    /// Warnings, to be logged.
    pub warnings: Vec<ConfigError>,
}

/// `[coordinator]`.
#[derive(Clone)]
pub struct CoordinatorConfig {
    /// `ws` or `wss`, with a host.
    pub url: Uri,
    /// Sent until the identity has a provider id. A secret.
    pub enrollment_code: Option<String>,
    /// `ca_file`: certificate authorities to trust in addition to the public web roots.
    pub roots: ExtraRoots,
}

impl CoordinatorConfig {
    /// The URL without credentials or query, which may contain secrets.
    pub fn address(&self) -> String {
        let authority = self.url.authority().map_or("", |authority| authority.as_str());
        let host = authority.rsplit('@').next().unwrap_or_default();
        format!("{}://{host}{}", self.url.scheme_str().unwrap_or_default(), self.url.path())
    }
}

impl fmt::Debug for CoordinatorConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CoordinatorConfig({})", self.url.host().unwrap_or_default())
    }
}

/// One entry of `[[backends]]`.
#[derive(Debug, Clone)]
pub struct BackendConfig {
    /// `kind`.
    pub kind: Kind,
    /// `url`; `None` for a hosted kind at its default address.
    pub url: Option<BaseUrl>,
    /// `api_key_env`: the name of the environment variable with the key.
    pub api_key_env: Option<String>,
    /// `models`: the models to offer; `None` for all.
    pub models: Option<Vec<String>>,
    /// `max_concurrent`: limit of concurrent jobs of this backend, within [`MAX_CONCURRENT_RANGE`].
    pub max_concurrent: Option<u32>,
}

impl BackendConfig {
    /// The entry of a server that needs no API key, with all its models offered.
    pub fn at(kind: Kind, url: BaseUrl) -> BackendConfig {
        BackendConfig { kind, url: Some(url), api_key_env: None, models: None, max_concurrent: None }
    }
}

/// A price in USDC micro-units per million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price {
    /// Per million input tokens.
    pub input_per_1m: u64,
    /// Per million output tokens.
    pub output_per_1m: u64,
}

/// `[pricing]`.
#[derive(Debug, Clone)]
pub struct Pricing {
    /// The price of models without a price of their own; never 0.
    pub default: Price,
    /// `[pricing.models]`.
    pub models: HashMap<String, Price>,
}

impl Pricing {
    /// The price of a model.
    pub fn of(&self, model_id: &str) -> Price {
        self.models.get(model_id).copied().unwrap_or(self.default)
    }
}

/// `[limits]`.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Limit of concurrent jobs, within [`MAX_CONCURRENT_RANGE`].
    pub max_concurrent: u32,
    /// Limit over a sliding minute, input and output tokens together.
    pub max_tokens_per_minute: Option<u64>,
    /// `drain_seconds`.
    pub drain: Duration,
}

impl Config {
    /// Reads and validates a file. `ws://` beyond loopback is rejected unless `allow_insecure` is set.
    ///
    /// # Errors
    /// The first error found.
    pub fn load(path: &Path, allow_insecure: bool) -> Result<Config, ConfigError> {
        Config::parse(&Config::read(path)?, path, allow_insecure)
    }

    /// The recorded provider id of an agent that must not become another one. An enrollment code asks for a new identity.
    pub fn paired_provider_id(&self) -> Option<&str> {
        self.recorded_provider_id.as_deref().filter(|_| self.coordinator.enrollment_code.is_none())
    }

    /// Reads `key_path` from a file, without validating anything else.
    ///
    /// # Errors
    /// The file is not valid TOML, or `key_path` is invalid.
    pub fn key_path_in(path: &Path) -> Result<PathBuf, ConfigError> {
        check::key_path_in(without_bom(&Config::read(path)?), path)
    }

    /// Reads the provider id that `setup` recorded in a file, without validating anything.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn recorded_provider_id_in(path: &Path) -> Result<Option<String>, ConfigError> {
        Ok(recorded::provider_id(&Config::read(path)?))
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// The file cannot be read, or is not UTF-8.
    pub fn read(path: &Path) -> Result<String, ConfigError> {
        let bytes = files::read_bounded_or_pipe(path, FILE_BYTES_MAX).map_err(|e| {
            ConfigError::in_file(path, &format!("failed to read it: {e}"), "check the path and the permissions")
        })?;
        String::from_utf8(bytes).map_err(|_| ConfigError::in_file(path, "it is not UTF-8 text", "save it as UTF-8"))
    }

    /// Validates the text of a file; `path` is for error messages.
    ///
    /// # Errors
    /// The first error found.
    pub fn parse(text: &str, path: &Path, allow_insecure: bool) -> Result<Config, ConfigError> {
        check::config(without_bom(text), path, allow_insecure)?.complete()
    }

    /// Finds the file to read: the named one, else the first that exists in the default locations.
    ///
    /// # Errors
    /// None exists.
    pub fn find(named: Option<&Path>) -> Result<PathBuf, ConfigError> {
        if let Some(named) = named {
            return Ok(Config::named(named));
        }
        let own = Config::default_path();
        if let Some(own) = own.as_ref().filter(|own| own.exists()) {
            return Ok(own.clone());
        }
        let here = PathBuf::from("./agent.toml");
        let is_of_stranger = here.exists() && !is_ours(&here);
        if here.exists() && !is_of_stranger {
            return Ok(here);
        }
        Err(ConfigError::not_found(&own.into_iter().chain([here]).collect::<Vec<_>>(), is_of_stranger))
    }

    /// The path given with `--config`, with `~` expanded.
    pub fn named(named: &Path) -> PathBuf {
        expand_home(&named.to_string_lossy()).unwrap_or_else(|| named.to_owned())
    }

    /// The default path of this user's file; `None` without a home directory.
    pub fn default_path() -> Option<PathBuf> {
        user_config_dir().map(|folder| folder.join("usepod-agent/agent.toml"))
    }

    /// The default path of the identity; `None` without a home directory.
    pub fn default_key_path() -> Option<PathBuf> {
        expand_home(KEY_PATH_DEFAULT)
    }
}

/// A file whose parts were validated each on its own, so that one invalid part does not hide the others.
#[derive(Debug)]
pub struct PartialConfig {
    /// The file that was read.
    pub path: PathBuf,
    /// `[coordinator]`.
    pub coordinator: Result<CoordinatorConfig, ConfigError>,
    /// The identity file.
    pub key_path: Result<PathBuf, ConfigError>,
    /// `[[backends]]`, in the order of the file.
    pub backends: Vec<Result<BackendConfig, ConfigError>>,
    /// `[pricing]`.
    pub pricing: Result<Pricing, ConfigError>,
    /// `[limits]`.
    pub limits: Result<Limits, ConfigError>,
    /// `[observability] log_level`.
    pub log_level: Result<Option<LevelFilter>, ConfigError>,
    /// `[observability] log_file`.
    pub log_file: Result<Option<PathBuf>, ConfigError>,
    /// The provider id that `setup` recorded in a comment.
    pub recorded_provider_id: Option<String>,
    /// Warnings, to be logged.
    pub warnings: Vec<ConfigError>,
}

impl PartialConfig {
    /// Reads a file, and validates its parts. `ws://` beyond loopback is rejected unless `allow_insecure` is set.
    ///
    /// # Errors
    /// The file cannot be read, or is not TOML.
    pub fn load(path: &Path, allow_insecure: bool) -> Result<PartialConfig, ConfigError> {
        check::config(without_bom(&Config::read(path)?), path, allow_insecure)
    }

    /// The configuration, if all parts are valid.
    ///
    /// # Errors
    /// The first error.
    pub fn complete(self) -> Result<Config, ConfigError> {
        Ok(Config {
            path: self.path,
            coordinator: self.coordinator?,
            key_path: self.key_path?,
            backends: self.backends.into_iter().collect::<Result<_, _>>()?,
            pricing: self.pricing?,
            limits: self.limits?,
            log_level: self.log_level?,
            log_file: self.log_file?,
            recorded_provider_id: self.recorded_provider_id,
            warnings: self.warnings,
        })
    }

    /// The recorded provider id of an agent that must not become another one. An enrollment code asks for a new identity.
    pub fn paired_provider_id(&self) -> Option<&str> {
        let has_code = self.coordinator.as_ref().map_or(true, |coordinator| coordinator.enrollment_code.is_some());
        self.recorded_provider_id.as_deref().filter(|_| !has_code)
    }

    /// The errors of all parts.
    pub fn errors(&self) -> Vec<&ConfigError> {
        let mut errors: Vec<&ConfigError> = self.coordinator.as_ref().err().into_iter().collect();
        errors.extend(self.key_path.as_ref().err());
        errors.extend(self.backends.iter().filter_map(|backend| backend.as_ref().err()));
        errors.extend(self.pricing.as_ref().err());
        errors.extend(self.limits.as_ref().err());
        errors.extend(self.log_level.as_ref().err());
        errors.extend(self.log_file.as_ref().err());
        // Both parts of an invalid `[observability]` have the same error.
        errors.dedup_by_key(|e| e.fault());
        errors
    }
}

/// Removes the byte-order mark that some editors add.
pub fn without_bom(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// Whether a file in the working folder, the symlink if it is one, and the folder belong to this user or root. In a folder such as
/// `/tmp`, a stranger may have left one.
fn is_ours(file: &Path) -> bool {
    let trusted = [0, Uid::effective().as_raw()];
    let is_trusted = |found: io::Result<Metadata>| found.is_ok_and(|found| trusted.contains(&found.uid()));
    is_trusted(fs::metadata(".")) && is_trusted(fs::symlink_metadata(file)) && is_trusted(fs::metadata(file))
}

/// The directory for configuration files of this user; `None` without a home directory.
pub fn user_config_dir() -> Option<PathBuf> {
    let configured = std::env::var_os("XDG_CONFIG_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    configured.or_else(|| user::home().map(|home| home.join(".config")))
}

/// Expands `~` and `~/…`. `None` for the home of another user, or without a home directory.
fn expand_home(path: &str) -> Option<PathBuf> {
    match path.strip_prefix('~') {
        Some("") => user::home(),
        Some(rest) if rest.starts_with('/') => user::home().map(|h| h.join(rest.trim_start_matches('/'))),
        Some(_) => None,
        None => Some(PathBuf::from(path)),
    }
}

/// Parses the name of a log level.
pub fn parse_level(name: &str) -> Option<LevelFilter> {
    match name.trim().to_ascii_lowercase().as_str() {
        "warning" => Some(LevelFilter::Warn),
        name => name.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parser_neither_panics_nor_shows_an_enrollment_code() {
        const VALID: &str = "[coordinator]\nurl = \"wss://c/x\"\nenrollment_code = \"POD-ENROLL-SECRET\"\n\
            [[backends]]\nkind = \"vllm\"\nurl = \"http://h:1\"\n\
            [pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 2\n";
        assert!(Config::parse(VALID, Path::new("x"), false).is_ok());
        arbtest::arbtest(|u| {
            let mut text: Vec<char> = VALID.chars().collect();
            for _ in 0..u.int_in_range(1..=4)? {
                let at = u.choose_index(text.len())?;
                match u.int_in_range(0..=2)? {
                    0 => text[at] = u.arbitrary()?,
                    1 => text.truncate(at.max(1)),
                    _ => text.insert(at, *u.choose(&['"', '\n', '=', '[', ']', '#'])?),
                }
            }
            let text: String = text.into_iter().collect();
            if let Err(e) = Config::parse(&text, Path::new("x"), false) {
                assert!(!e.to_string().contains("SECRET"), "{e}");
            }
            Ok(())
        });
    }

    /// Found by fuzzing.
    #[test]
    fn errors_are_one_short_line_without_a_code_that_another_value_contains() {
        let long = format!("[pricing.models.{}]\ninput_per_1m = -1\n", "m".repeat(2000));
        let cases = [
            "coordinator = [{url = \"wss://c/x\", enrollment_code = \"SECRET\"}]\n",
            "observability = {log_level = {enrollment_code = \"SECRET\"}}\n[coordinator]\nurl = \"wss://c/x\"\n",
            "[limits]\nmax_concurrent = \"\"\"\n[coordinator]\nenrollment_code = \"SECRET\"\n\"\"\"\n",
            "[observability]\nlog_level = \"\"\"\nenrollment_code = \"SECRET\"\n\"\"\"\n",
            "[pricing.models.\"a\\n\\u001b[2Jb\"]\ninput_per_1m = -1\n",
            &long,
        ];
        const REST: &str =
            "[coordinator]\nurl = \"wss://c/x\"\n[pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 2\n";
        for case in cases {
            let whole = if case.contains("[coordinator]") { case.to_owned() } else { format!("{REST}{case}") };
            for text in [case.to_owned(), whole] {
                let messages = match Config::parse(&text, Path::new("x"), false) {
                    Ok(config) => config.warnings.iter().map(ConfigError::to_string).collect(),
                    Err(e) => vec![e.to_string()],
                };
                for message in messages {
                    assert!(!message.contains("SECRET"), "{message}");
                    assert!(message.len() < 1000 && !message.contains(char::is_control), "{message:?}");
                }
            }
        }
    }
}
