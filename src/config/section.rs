//! Typed access to the keys of a table. Every value has its position in the file, for errors.

use std::ops::Range;

use toml_edit::{Item, TableLike, Value};

use super::error::{ConfigError, Source, value_text};

/// A table. A missing table is an empty section.
#[derive(Clone)]
pub struct Section<'a> {
    source: Source<'a>,
    /// The name in error messages, such as `[limits]`.
    name: String,
    table: Option<&'a dyn TableLike>,
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
    pub fn root(source: Source<'a>, table: &'a dyn TableLike) -> Section<'a> {
        Section { source, name: String::new(), table: Some(table), at: None }
    }

    /// The table `[key]`; empty if missing.
    pub fn section(&self, key: &str) -> Result<Section<'a>, ConfigError> {
        let name = self.nested_name(key);
        let Some(item) = self.get(key) else {
            return Ok(Section { source: self.source, name, table: None, at: None });
        };
        match item.as_table_like() {
            Some(table) => {
                Ok(Section { source: self.source, name, table: Some(table), at: item.span().map(|s| s.start) })
            }
            None => Err(self.wrong_type(key, span(item), item.type_name(), "a table")),
        }
    }

    /// The array of tables `[[key]]`.
    pub fn sections(&self, key: &str) -> Result<Vec<Section<'a>>, ConfigError> {
        let section = |table: &'a dyn TableLike, span: Option<Range<usize>>| Section {
            source: self.source,
            name: format!("[[{key}]]"),
            table: Some(table),
            at: span.map(|span| span.start),
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Item::ArrayOfTables(tables)) => Ok(tables.iter().map(|table| section(table, table.span())).collect()),
            Some(Item::Value(Value::Array(entries))) => {
                let inline = |entry: &'a Value| match entry.as_inline_table() {
                    Some(table) => Ok(section(table, table.span())),
                    None => Err(self.wrong_type(key, entry.span().unwrap_or_default(), entry.type_name(), "a table")),
                };
                entries.iter().map(inline).collect()
            }
            Some(other) => Err(self.wrong_type(key, span(other), other.type_name(), "a list of tables")),
        }
    }

    /// The names of all keys.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.table.into_iter().flat_map(|table| table.iter().map(|(key, _)| key))
    }

    /// Reads a string.
    pub fn string(&self, key: &str, fix: &str) -> Result<Option<Field<'a, &'a str>>, ConfigError> {
        self.typed(key, fix, "a string", |value| value.as_str())
    }

    /// Reads an integer.
    pub fn integer(&self, key: &str, fix: &str) -> Result<Option<Field<'a, i64>>, ConfigError> {
        self.typed(key, fix, "a whole number", |value| value.as_integer())
    }

    /// Reads a list of strings.
    pub fn strings(&self, key: &str, fix: &str) -> Result<Option<Vec<String>>, ConfigError> {
        let found = self.typed(key, fix, "a list of strings", |value| {
            let strings = value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned));
            strings.collect::<Option<Vec<String>>>()
        })?;
        Ok(found.map(|f| f.value))
    }

    /// Fails on the first key that is not in `known`.
    pub fn refuse_unknown(&self, known: &[&str]) -> Result<(), ConfigError> {
        let unknown = self.table.and_then(|t| t.iter().find(|(key, _)| !known.contains(key)));
        let Some((key, _)) = unknown else { return Ok(()) };
        Err(self.hidden_fault(key, "unknown key", &format!("remove it; known keys are: {}", known.join(", "))))
    }

    /// An error about `key` that does not show its value, which may be a secret.
    pub fn hidden_fault(&self, key: &str, what: &str, fix: &str) -> ConfigError {
        let at = self.get(key).map(span).unwrap_or_default();
        self.source.hidden_fault(&self.full_name(&value_text(key)), at, what, fix)
    }

    /// An error about the missing `key`.
    pub fn missing(&self, key: &str, fix: &str) -> ConfigError {
        self.source.missing(&self.full_name(key), self.at, fix)
    }

    /// An error about the value of `key`, or about its absence.
    pub fn fault(&self, key: &str, what: &str, fix: &str) -> ConfigError {
        match self.get(key) {
            Some(item) => self.source.fault(&self.full_name(key), span(item), what, fix),
            None => self.source.missing(&self.full_name(key), self.at, fix),
        }
    }

    fn typed<T>(
        &self,
        key: &str,
        fix: &str,
        wanted: &str,
        read: impl Fn(&'a Item) -> Option<T>,
    ) -> Result<Option<Field<'a, T>>, ConfigError> {
        let Some(item) = self.get(key) else { return Ok(None) };
        match read(item) {
            Some(value) => Ok(Some(Field { value, source: self.source, key: self.full_name(key), span: span(item) })),
            None => {
                let what = format!("it is not {wanted}");
                Err(self.source.fault(&self.full_name(key), span(item), &what, fix))
            }
        }
    }

    fn wrong_type(&self, key: &str, at: Range<usize>, is: &str, wanted: &str) -> ConfigError {
        let what = format!("it is of type {is}, not {wanted}");
        self.source.fault(&self.full_name(key), at, &what, "see `Configure` in the README")
    }

    fn get(&self, key: &str) -> Option<&'a Item> {
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

/// The position of a value; the start of the file for a table that exists only through its subtables.
fn span(item: &Item) -> Range<usize> {
    item.span().unwrap_or_default()
}
