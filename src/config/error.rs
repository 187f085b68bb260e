//! Errors in `agent.toml`: what is wrong, where, and how to fix it.

use std::ops::Range;
use std::path::{Path, PathBuf};

/// Longest value that an error shows, in characters.
const SHOWN_CHARS_MAX: usize = 80;

/// An error: file and line, key and value, what is wrong, and the fix.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{fault}; {fix}")]
pub struct ConfigError {
    fault: String,
    fix: String,
    /// Whether there is no file at all.
    is_not_found: bool,
}

impl ConfigError {
    fn new(fault: String, fix: &str) -> ConfigError {
        ConfigError { fault, fix: fix.to_owned(), is_not_found: false }
    }

    /// What is wrong, and where.
    pub fn fault(&self) -> &str {
        &self.fault
    }

    /// How to fix it.
    pub fn fix(&self) -> &str {
        &self.fix
    }

    /// An error about the file as a whole.
    pub(super) fn in_file(file: &Path, what: &str, fix: &str) -> ConfigError {
        ConfigError::new(format!("{}: {what}", file.display()), fix)
    }

    /// No file was found, or the last one is ignored because it, or its folder, belongs to another user.
    pub(super) fn not_found(looked_at: &[PathBuf], is_of_stranger: bool) -> ConfigError {
        let places: Vec<String> = looked_at.iter().map(|p| format!("`{}`", p.display())).collect();
        let why =
            if is_of_stranger { ", which is ignored because it or its folder belongs to another user" } else { "" };
        let fault = format!("no agent.toml found; looked at {}{why}", places.join(" and "));
        let fix = "usepod-agent setup; or name another file with --config FILE";
        ConfigError { is_not_found: true, ..ConfigError::new(fault, fix) }
    }

    /// Whether no file was named and none was found.
    pub fn is_not_found(&self) -> bool {
        self.is_not_found
    }
}

/// The file and its text, to which errors refer.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub text: &'a str,
    pub path: &'a Path,
}

impl Source<'_> {
    /// An error about the value at `span`.
    pub fn fault(&self, key: &str, span: Range<usize>, what: &str, fix: &str) -> ConfigError {
        let value = redacted(key, self.text.get(span.clone()).unwrap_or_default());
        self.at(Some(span.start), &format!("`{key}` = {value}: {what}"), fix)
    }

    /// An error that does not show the value.
    pub fn hidden_fault(&self, key: &str, span: Range<usize>, what: &str, fix: &str) -> ConfigError {
        self.at(Some(span.start), &format!("`{key}`: {what}"), fix)
    }

    /// An error about a missing key; `at` is the position of its table, if that exists.
    pub fn missing(&self, key: &str, at: Option<usize>, fix: &str) -> ConfigError {
        self.at(at, &format!("`{key}`: it is missing"), fix)
    }

    /// A syntax error. The parser's own message is not used as it is, because it shows the line, which may contain a secret.
    pub fn syntax_fault(&self, e: &toml_edit::TomlError) -> ConfigError {
        let at = e.span().map_or(0, |s| s.start);
        let line = self.text.lines().nth(self.line_of(at) - 1).unwrap_or_default();
        let is_plain = |key: &str| key.chars().all(|c| c.is_ascii_alphanumeric() || "-_.\"".contains(c));
        let place = match line.split_once('=') {
            Some((key, value)) if is_plain(key.trim()) => {
                format!("`{}` = {}: ", value_text(key.trim()), redacted(line, value.trim()))
            }
            _ => String::new(),
        };
        let message = e.message().replace('\n', ", ");
        self.at(Some(at), &format!("{place}invalid TOML ({message})"), "write key = value, and strings in quotes")
    }

    fn at(&self, at: Option<usize>, what: &str, fix: &str) -> ConfigError {
        let line = at.map(|at| format!(":{}", self.line_of(at))).unwrap_or_default();
        ConfigError::new(format!("{}{line}: {what}", self.path.display()), fix)
    }

    fn line_of(&self, at: usize) -> usize {
        1 + self.text.as_bytes().iter().take(at).filter(|b| **b == b'\n').count()
    }
}

/// Whether the value of this key may be a secret. Includes keys that name a secret, where an operator may have entered the secret
/// itself.
fn may_be_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase().replace("key_path", "");
    ["code", "key", "secret", "token", "passw"].iter().any(|word| key.contains(word)) && !key.contains("max_tokens")
}

/// The value, as shown in an error.
fn redacted(key: &str, value: &str) -> String {
    let password = value.contains("://") && value.contains('@');
    // A table or a list may contain any key, and so may a string with a missing closing quote.
    let is_compound = value.starts_with(['{', '[']) || value.contains('\n');
    if may_be_secret(key) || password || (is_compound && may_be_secret(value)) {
        return "(not shown)".into();
    }
    value_text(value)
}

/// The text on one line, shortened.
pub fn value_text(text: &str) -> String {
    let shown: String = text.chars().take(SHOWN_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().count() > SHOWN_CHARS_MAX { format!("{shown}…") } else { shown }
}
