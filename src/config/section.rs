//! Typed access to the keys of a table. Every value has its position in the file, for errors.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Source, value_text};

/// A table. A missing table is an empty section.
pub struct Section<'a> {
    source: Source<'a>,
    /// The name in error messages, such as `[limits]`.
    name: String,
    table: Option<&'a DeTable<'a>>,
    at: Option<usize>,
}

/// A value of the expected type.
pub struct Field<'a, T> {
    pub value: T,
    source: Source<'a>,
    key: String,
    span: Range<usize>,
}

impl<T> Field<'_, T> {
    /// An error about this value.
    pub fn error_at(&self, what: &str, fix: &str) -> ConfigError {
        self.source.fault(&self.key, self.span.clone(), what, fix)
    }
}

impl<'a> Section<'a> {
    /// The root table of the file.
    pub fn root(source: Source<'a>, table: &'a DeTable<'a>) -> Section<'a> {
        Section { source, name: String::new(), table: Some(table), at: None }
    }

    /// The table `[key]`; empty if missing.
    pub fn section(&self, key: &str) -> Result<Section<'a>, ConfigError> {
        let name = self.nested_name(key);
        let Some(value) = self.get(key) else {
            return Ok(Section { source: self.source, name, table: None, at: None });
        };
        match value.get_ref() {
            DeValue::Table(table) => {
                Ok(Section { source: self.source, name, table: Some(table), at: Some(value.span().start) })
            }
            other => Err(self.wrong_type(key, value, other, "a table")),
        }
    }

    /// The array of tables `[[key]]`.
    pub fn sections(&self, key: &str) -> Result<Vec<Section<'a>>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let DeValue::Array(entries) = value.get_ref() else {
            return Err(self.wrong_type(key, value, value.get_ref(), "a list of tables"));
        };
        let section = |entry: &'a Spanned<DeValue<'a>>| match entry.get_ref() {
            DeValue::Table(table) => {
                let name = format!("[[{key}]]");
                Ok(Section { source: self.source, name, table: Some(table), at: Some(entry.span().start) })
            }
            other => Err(self.wrong_type(key, entry, other, "a table")),
        };
        entries.iter().map(section).collect()
    }

    /// The names of all keys.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.table.into_iter().flat_map(|table| table.keys().map(|key| key.get_ref().as_ref()))
    }

    /// Reads a string.
    pub fn string(&self, key: &str, fix: &str) -> Result<Option<Field<'a, &'a str>>, ConfigError> {
        self.typed(key, fix, "a string", |value| value.as_str())
    }

    /// Reads an integer.
    pub fn integer(&self, key: &str, fix: &str) -> Result<Option<Field<'a, i64>>, ConfigError> {
        self.typed(key, fix, "a whole number", |value| {
            let number = value.as_integer()?;
            i64::from_str_radix(number.as_str(), number.radix()).ok()
        })
    }

    /// Reads a list of strings.
    pub fn strings(&self, key: &str, fix: &str) -> Result<Option<Vec<String>>, ConfigError> {
        let found = self.typed(key, fix, "a list of strings", |value| {
            let strings = value.as_array()?.iter().map(|item| item.get_ref().as_str().map(str::to_owned));
            strings.collect::<Option<Vec<String>>>()
        })?;
        Ok(found.map(|f| f.value))
    }

    /// Fails on the first key that is not in `known`.
    pub fn refuse_unknown(&self, known: &[&str]) -> Result<(), ConfigError> {
        let unknown = self.table.and_then(|t| t.iter().find(|(key, _)| !known.contains(&key.get_ref().as_ref())));
        let Some((key, value)) = unknown else { return Ok(()) };
        let key = format!("{} {}", self.name, value_text(key.get_ref()));
        let fix = format!("remove it; known keys are: {}", known.join(", "));
        // The value is not shown: it may be an API key.
        Err(self.source.hidden_fault(&key, value.span(), "unknown key", &fix))
    }

    /// An error about the missing `key`.
    pub fn missing(&self, key: &str, fix: &str) -> ConfigError {
        self.source.missing(&self.full_name(key), self.at, fix)
    }

    /// An error about the value of `key`, or about its absence.
    pub fn fault(&self, key: &str, what: &str, fix: &str) -> ConfigError {
        match self.get(key) {
            Some(value) => self.source.fault(&self.full_name(key), value.span(), what, fix),
            None => self.source.missing(&self.full_name(key), self.at, fix),
        }
    }

    fn typed<T>(
        &self,
        key: &str,
        fix: &str,
        wanted: &str,
        read: impl Fn(&'a DeValue<'a>) -> Option<T>,
    ) -> Result<Option<Field<'a, T>>, ConfigError> {
        let Some(spanned) = self.get(key) else { return Ok(None) };
        match read(spanned.get_ref()) {
            Some(value) => {
                Ok(Some(Field { value, source: self.source, key: self.full_name(key), span: spanned.span() }))
            }
            None => {
                let what = format!("it is not {wanted}");
                Err(self.source.fault(&self.full_name(key), spanned.span(), &what, fix))
            }
        }
    }

    fn wrong_type(&self, key: &str, at: &Spanned<DeValue<'_>>, is: &DeValue<'_>, wanted: &str) -> ConfigError {
        let what = format!("it is of type {}, not {wanted}", is.type_str());
        self.source.fault(&self.full_name(key), at.span(), &what, "see `Configure` in the README")
    }

    fn get(&self, key: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.table.and_then(|table| table.get(key))
    }

    fn full_name(&self, key: &str) -> String {
        format!("{} {key}", self.name).trim().to_owned()
    }

    fn nested_name(&self, key: &str) -> String {
        let key = value_text(key);
        match self.name.strip_suffix(']') {
            Some(outer) if !self.name.starts_with("[[") => format!("{outer}.{key}]"),
            _ => format!("[{key}]"),
        }
    }
}
