//! What is wrong with a configuration, where, and what to do about it.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The longest value that an error quotes, in characters.
const QUOTED_MAX: usize = 80;

/// One fault.
#[derive(Debug)]
pub struct ConfigError {
    file: Option<PathBuf>,
    line: Option<usize>,
    key: String,
    value: Option<String>,
    what: String,
    fix: String,
}

impl ConfigError {
    /// A fault of the file as a whole.
    pub(super) fn in_file(file: &Path, what: String, fix: &str) -> ConfigError {
        ConfigError { file: Some(file.to_owned()), line: None, key: String::new(), value: None, what, fix: fix.into() }
    }

    /// There is no file.
    pub(super) fn not_found(looked_at: &[PathBuf]) -> ConfigError {
        let places: Vec<String> = looked_at.iter().map(|p| format!("`{}`", p.display())).collect();
        ConfigError {
            file: None,
            line: None,
            key: String::new(),
            value: None,
            what: format!("no agent.toml found; looked at {}", places.join(" and ")),
            fix:
                "write one there, or name one with --config FILE; to see the agent work without one: usepod-agent demo"
                    .into(),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}:", file.display())?;
            if let Some(line) = self.line {
                write!(f, "{line}:")?;
            }
            f.write_str(" ")?;
        }
        if !self.key.is_empty() {
            write!(f, "`{}`", self.key)?;
            if let Some(value) = &self.value {
                write!(f, " = {value}")?;
            }
            f.write_str(": ")?;
        }
        write!(f, "{}; {}", self.what, self.fix)
    }
}

impl std::error::Error for ConfigError {}

/// The text that the faults are in.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub text: &'a str,
    pub path: &'a Path,
}

impl Source<'_> {
    /// A fault of the value at `span`.
    pub fn fault(&self, key: &str, span: Range<usize>, what: impl Into<String>, fix: impl Into<String>) -> ConfigError {
        let shown = self.text.get(span.clone()).unwrap_or_default();
        ConfigError {
            file: Some(self.path.to_owned()),
            line: Some(self.line_of(span.start)),
            key: key.to_owned(),
            value: Some(quoted(key, shown)),
            what: what.into(),
            fix: fix.into(),
        }
    }

    /// A key that should be there; `at` is where it would be, if that is known.
    pub fn missing(&self, key: &str, at: Option<usize>, fix: impl Into<String>) -> ConfigError {
        ConfigError {
            file: Some(self.path.to_owned()),
            line: at.map(|at| self.line_of(at)),
            key: key.to_owned(),
            value: None,
            what: "it is missing".into(),
            fix: fix.into(),
        }
    }

    /// A fault whose value may be anything, and is not shown.
    pub fn hidden_fault(&self, key: &str, span: Range<usize>, what: &str, fix: String) -> ConfigError {
        ConfigError { value: None, ..self.fault(key, span, what, fix) }
    }

    /// What the TOML parser found. Its own rendering would quote the line, secrets and all.
    pub fn syntax_fault(&self, e: &toml::de::Error) -> ConfigError {
        let at = e.span().map_or(0, |s| s.start);
        let line = self.line_text(at);
        let key = line.split_once('=').map(|(key, _)| key.trim()).unwrap_or_default();
        let is_plain = key.chars().all(|c| c.is_ascii_alphanumeric() || "-_.\"".contains(c));
        let value = line.split_once('=').map(|(_, value)| quoted(line, value.trim()));
        ConfigError {
            file: Some(self.path.to_owned()),
            line: Some(self.line_of(at)),
            key: if is_plain { key.to_owned() } else { String::new() },
            value: value.filter(|_| is_plain),
            what: format!("this is not TOML ({})", e.message().replace('\n', ", ")),
            fix: "write key = value, and texts in quotes".into(),
        }
    }

    fn line_of(&self, at: usize) -> usize {
        1 + self.text.as_bytes().iter().take(at).filter(|b| **b == b'\n').count()
    }

    fn line_text(&self, at: usize) -> &str {
        self.text.lines().nth(self.line_of(at) - 1).unwrap_or_default()
    }
}

/// Keys whose values may be secrets, also because somebody put one where its name belongs.
fn may_be_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    key != "key_path" && ["code", "key", "secret", "token", "passw"].iter().any(|word| key.contains(word))
}

fn quoted(key: &str, value: &str) -> String {
    let password = value.contains("://") && value.contains('@');
    if may_be_secret(key) || password {
        return "(not shown)".into();
    }
    let shown: String = value.chars().take(QUOTED_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if value.chars().count() > QUOTED_MAX { format!("{shown}…") } else { shown }
}
