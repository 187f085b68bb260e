//! `agent.toml`: from text to a [`Config`] in which nothing can be wrong any more.
//!
//! Every error names the file, the line, the key, the value and the fix; the values of keys that may hold a secret are
//! not shown. Unknown keys are refused in `[[backends]]` and accepted elsewhere, as 0.3.5 does.

mod check;
mod error;
mod section;

use std::collections::HashMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;
use tungstenite::http::Uri;

pub use error::ConfigError;

use crate::backend::{BaseUrl, Kind};
use crate::net::tls::ExtraRoots;
use crate::sys::files;

/// Jobs at a time.
pub const MAX_CONCURRENT_RANGE: RangeInclusive<u32> = 1..=256;
/// Jobs at a time, when the file does not say.
pub const MAX_CONCURRENT_DEFAULT: u32 = 8;
/// For jobs in flight when the agent stops, when the file does not say.
pub const DRAIN_SECONDS_DEFAULT: u32 = 30;
/// The longest drain: an hour.
pub const DRAIN_SECONDS_RANGE: RangeInclusive<u32> = 0..=3600;
/// Where the identity is, when the file does not say.
pub const KEY_PATH_DEFAULT: &str = "~/.usepod-agent/identity.key";
/// A file larger than this is no `agent.toml`, in bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file that it was read from.
    pub path: PathBuf,
    /// Where the agent dials.
    pub coordinator: CoordinatorConfig,
    /// The identity file.
    pub key_path: PathBuf,
    /// In the order of the file.
    pub backends: Vec<BackendConfig>,
    /// What tokens cost.
    pub pricing: Pricing,
    /// How much at a time.
    pub limits: Limits,
    /// `[observability] log_level`.
    pub log_level: Option<LevelFilter>,
    /// `[observability] log_file`.
    pub log_file: Option<PathBuf>,
    /// What is odd but no error, for the log.
    pub warnings: Vec<ConfigError>,
}

/// `[coordinator]`.
#[derive(Clone)]
pub struct CoordinatorConfig {
    /// `ws` or `wss`, with a host.
    pub url: Uri,
    /// Sent while the identity has no provider id; a secret.
    pub enrollment_code: Option<String>,
    /// `ca_file`: certificates that the coordinator's may be signed by, beside those of the web.
    pub roots: ExtraRoots,
}

impl CoordinatorConfig {
    /// The URL, without what may be a password or a token.
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
    /// `url`; `None` for a hosted kind at its own address.
    pub url: Option<BaseUrl>,
    /// `api_key_env`: the name of the environment variable with the key.
    pub api_key_env: Option<String>,
    /// `models`: only these are offered.
    pub models: Option<Vec<String>>,
    /// `max_concurrent`: jobs of this one at a time, within [`MAX_CONCURRENT_RANGE`].
    pub max_concurrent: Option<u32>,
}

impl BackendConfig {
    /// A server that needs no key and offers all that it lists.
    pub fn at(kind: Kind, url: BaseUrl) -> BackendConfig {
        BackendConfig { kind, url: Some(url), api_key_env: None, models: None, max_concurrent: None }
    }
}

/// USDC micro-units per million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price {
    /// For a million input tokens.
    pub input_per_1m: u64,
    /// For a million output tokens.
    pub output_per_1m: u64,
}

/// `[pricing]`.
#[derive(Debug, Clone)]
pub struct Pricing {
    /// For models without a price of their own; never 0.
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
    /// Within [`MAX_CONCURRENT_RANGE`].
    pub max_concurrent: u32,
    /// Over a sliding minute, prompts and answers together.
    pub max_tokens_per_minute: Option<u64>,
    /// `drain_seconds`.
    pub drain: Duration,
}

impl Config {
    /// Reads and checks a file. `ws://` is refused unless `allow_insecure`.
    ///
    /// # Errors
    /// The first fault.
    pub fn load(path: &Path, allow_insecure: bool) -> Result<Config, ConfigError> {
        Config::parse(&Config::read(path)?, path, allow_insecure)
    }

    /// Where the identity is, for a file in which anything else may be wrong.
    ///
    /// # Errors
    /// The file is no TOML, or says of the identity what cannot be.
    pub fn key_path_in(path: &Path) -> Result<PathBuf, ConfigError> {
        check::key_path_in(without_mark(&Config::read(path)?), path)
    }

    /// The text of a file.
    ///
    /// # Errors
    /// It cannot be read, or is no text.
    pub fn read(path: &Path) -> Result<String, ConfigError> {
        let bytes = files::read_bounded(path, FILE_BYTES_MAX).map_err(|e| {
            ConfigError::in_file(path, &format!("failed to read it: {e}"), "check the path and the rights")
        })?;
        String::from_utf8(bytes).map_err(|_| ConfigError::in_file(path, "it is not UTF-8 text", "save it as UTF-8"))
    }

    /// Checks the text of a file; `path` is for the errors.
    ///
    /// # Errors
    /// The first fault.
    pub fn parse(text: &str, path: &Path, allow_insecure: bool) -> Result<Config, ConfigError> {
        check::config(without_mark(text), path, allow_insecure)
    }

    /// The file to read: the one that was named, else the first that exists where an `agent.toml` may be.
    ///
    /// # Errors
    /// None exists.
    pub fn find(named: Option<&Path>) -> Result<PathBuf, ConfigError> {
        if let Some(named) = named {
            return Ok(Config::named(named));
        }
        let candidates: Vec<PathBuf> = Config::usual_place().into_iter().chain(["./agent.toml".into()]).collect();
        match candidates.iter().find(|c| c.exists()) {
            Some(found) => Ok(found.clone()),
            None => Err(ConfigError::not_found(&candidates)),
        }
    }

    /// The file that `--config` names.
    pub fn named(named: &Path) -> PathBuf {
        expand_home(&named.to_string_lossy()).unwrap_or_else(|| named.to_owned())
    }

    /// Where the file of this user belongs; `None` without a home.
    pub fn usual_place() -> Option<PathBuf> {
        folder_of_user().map(|folder| folder.join("usepod-agent/agent.toml"))
    }

    /// Where the identity is when no file says otherwise; `None` without a home.
    pub fn usual_key_path() -> Option<PathBuf> {
        expand_home(KEY_PATH_DEFAULT)
    }
}

/// The text without the byte-order mark that some editors put first.
pub fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// Where this user's programs keep their configuration; `None` without a home.
pub fn folder_of_user() -> Option<PathBuf> {
    let configured = std::env::var_os("XDG_CONFIG_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    configured.or_else(|| home().map(|home| home.join(".config")))
}

fn home() -> Option<PathBuf> {
    std::env::var_os("HOME").filter(|h| !h.is_empty()).map(PathBuf::from)
}

/// `~` and `~/…`; `None` for another user's, and when there is no home.
fn expand_home(path: &str) -> Option<PathBuf> {
    match path.strip_prefix('~') {
        Some("") => home(),
        Some(rest) if rest.starts_with('/') => home().map(|h| h.join(rest.trim_start_matches('/'))),
        // Another user's home is not ours to find.
        Some(_) => None,
        None => Some(PathBuf::from(path)),
    }
}

/// A level by its name.
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
    fn no_text_makes_the_parser_panic_and_no_error_shows_a_code() {
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

    /// What the fuzzer found, or was shown.
    #[test]
    fn an_error_shows_no_code_that_hides_in_another_value_and_is_one_short_line() {
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
                let told = match Config::parse(&text, Path::new("x"), false) {
                    Ok(config) => config.warnings.iter().map(ConfigError::to_string).collect(),
                    Err(e) => vec![e.to_string()],
                };
                for told in told {
                    assert!(!told.contains("SECRET"), "{told}");
                    assert!(told.len() < 1000 && !told.contains(char::is_control), "{told:?}");
                }
            }
        }
    }
}
