//! What is wrong with a configuration, where, and what to do about it.

use std::ops::Range;
use std::path::{Path, PathBuf};

/// The longest value that an error quotes, in characters.
const QUOTED_MAX: usize = 80;

/// One fault: the file and the line, the key and its value, what is wrong with it, and the fix.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct ConfigError {
    text: String,
    /// Where the fault ends in it.
    fault_end: usize,
    /// Whether there is no file at all.
    is_not_found: bool,
}

/// Between a fault and its fix.
const SEPARATOR: &str = "; ";

impl ConfigError {
    fn new(mut fault: String, fix: &str) -> ConfigError {
        let fault_end = fault.len();
        fault.push_str(SEPARATOR);
        fault.push_str(fix);
        ConfigError { text: fault, fault_end, is_not_found: false }
    }

    /// The fault, with its place.
    pub fn fault(&self) -> &str {
        &self.text[..self.fault_end]
    }

    /// What to do about it.
    pub fn fix(&self) -> &str {
        &self.text[self.fault_end + SEPARATOR.len()..]
    }

    /// A fault of the file as a whole.
    pub(super) fn in_file(file: &Path, what: &str, fix: &str) -> ConfigError {
        ConfigError::new(format!("{}: {what}", file.display()), fix)
    }

    /// There is no file.
    pub(super) fn not_found(looked_at: &[PathBuf]) -> ConfigError {
        let places: Vec<String> = looked_at.iter().map(|p| format!("`{}`", p.display())).collect();
        let fault = format!("no agent.toml found; looked at {}", places.join(" and "));
        let fix = "usepod-agent setup; or name another file with --config FILE";
        ConfigError { is_not_found: true, ..ConfigError::new(fault, fix) }
    }

    /// Whether no file was named and none was found.
    pub fn is_not_found(&self) -> bool {
        self.is_not_found
    }
}

/// The text that the faults are in.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub text: &'a str,
    pub path: &'a Path,
}

impl Source<'_> {
    /// A fault of the value at `span`.
    pub fn fault(&self, key: &str, span: Range<usize>, what: &str, fix: &str) -> ConfigError {
        let value = quoted(key, self.text.get(span.clone()).unwrap_or_default());
        self.at(Some(span.start), &format!("`{key}` = {value}: {what}"), fix)
    }

    /// A fault whose value may be anything, and is not shown.
    pub fn hidden_fault(&self, key: &str, span: Range<usize>, what: &str, fix: &str) -> ConfigError {
        self.at(Some(span.start), &format!("`{key}`: {what}"), fix)
    }

    /// A key that should be there; `at` is where it would be, if that is known.
    pub fn missing(&self, key: &str, at: Option<usize>, fix: &str) -> ConfigError {
        self.at(at, &format!("`{key}`: it is missing"), fix)
    }

    /// What the TOML parser found. Its own rendering would quote the line, secrets and all.
    pub fn syntax_fault(&self, e: &toml::de::Error) -> ConfigError {
        let at = e.span().map_or(0, |s| s.start);
        let line = self.text.lines().nth(self.line_of(at) - 1).unwrap_or_default();
        let is_plain = |key: &str| key.chars().all(|c| c.is_ascii_alphanumeric() || "-_.\"".contains(c));
        let place = match line.split_once('=') {
            Some((key, value)) if is_plain(key.trim()) => {
                format!("`{}` = {}: ", value_text(key.trim()), quoted(line, value.trim()))
            }
            _ => String::new(),
        };
        let message = e.message().replace('\n', ", ");
        self.at(Some(at), &format!("{place}this is not TOML ({message})"), "write key = value, and texts in quotes")
    }

    fn at(&self, at: Option<usize>, what: &str, fix: &str) -> ConfigError {
        let line = at.map(|at| format!(":{}", self.line_of(at))).unwrap_or_default();
        ConfigError::new(format!("{}{line}: {what}", self.path.display()), fix)
    }

    fn line_of(&self, at: usize) -> usize {
        1 + self.text.as_bytes().iter().take(at).filter(|b| **b == b'\n').count()
    }
}

/// Keys whose values may be secrets, also because somebody put one where its name belongs.
fn may_be_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase().replace("key_path", "");
    ["code", "key", "secret", "token", "passw"].iter().any(|word| key.contains(word)) && !key.contains("max_tokens")
}

fn quoted(key: &str, value: &str) -> String {
    let password = value.contains("://") && value.contains('@');
    // A table or a list may hold any key, and so may a text whose end was forgotten.
    let several = value.starts_with(['{', '[']) || value.contains('\n');
    if may_be_secret(key) || password || (several && may_be_secret(value)) {
        return "(not shown)".into();
    }
    value_text(value)
}

/// On one line, and not a page of it.
pub fn value_text(text: &str) -> String {
    let shown: String = text.chars().take(QUOTED_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().count() > QUOTED_MAX { format!("{shown}…") } else { shown }
}
