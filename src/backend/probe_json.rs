//! Reads the JSON of responses to probes.
//!
//! Invariant: a response is never parsed as a whole, because a parsed value can take 70 times the memory of its text. Only requested
//! fields are parsed, of one object at a time, and at most [`FIELDS_BYTES_MAX`] of their text.

use std::fmt;
use std::ops::ControlFlow;

use serde::de::{DeserializeSeed, Deserializer as _, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Deserializer, Map, Value};

/// Limit of the text that is parsed for one object, in bytes. The largest objects, OpenRouter's models, take about 5 KB.
const FIELDS_BYTES_MAX: usize = 64 << 10;

/// The body of a response to a probe.
#[derive(Debug, Default)]
pub struct Body {
    /// The body, or its beginning.
    pub bytes: Vec<u8>,
    /// Whether the body is longer than a probe reads.
    pub is_cut: bool,
}

impl Body {
    /// These fields of the response; those before the first error if it is not valid JSON.
    pub fn fields(&self, wanted: &[&str]) -> Value {
        parsed(raw_fields(&self.bytes, wanted))
    }

    /// Which of these keys the object in the field `name` has.
    pub fn keys_of<'k>(&self, name: &str, wanted: &[&'k str]) -> Vec<&'k str> {
        let object = raw_fields(&self.bytes, &[name]).pop();
        let keys = object.map(|(_, object)| raw_fields(object.get().as_bytes(), wanted)).unwrap_or_default();
        keys.into_iter().map(|(key, _)| key).collect()
    }

    /// Visits these fields of each entry of the list in the field `name`, until `visit` breaks. Instead of an object with that field,
    /// the response may be the list itself or its only entry; null is an empty list. Of a body that is cut, the whole entries are
    /// visited.
    ///
    /// # Errors
    /// The response contains no such list, or is not valid JSON.
    pub fn for_each_entry(
        &self,
        name: &str,
        wanted: &[&str],
        mut visit: impl FnMut(Value) -> ControlFlow<()>,
    ) -> Result<(), String> {
        let mut walk = Walk { name, wanted, visit: &mut visit, is_list: false, is_over: false };
        match Deserializer::from_slice(&self.bytes).deserialize_any(Response(&mut walk)) {
            _ if walk.is_over || (self.is_cut && walk.is_list) => Ok(()),
            Err(e) => Err(format!("is not JSON ({e})")),
            Ok(()) if walk.is_list => Ok(()),
            Ok(()) => self.only_entry(name, wanted, visit),
        }
    }

    /// Visits a response without a list.
    fn only_entry(
        &self,
        name: &str,
        wanted: &[&str],
        mut visit: impl FnMut(Value) -> ControlFlow<()>,
    ) -> Result<(), String> {
        let response = self.fields(&["id", "object"]);
        // Older llama.cpp builds return a bare object; servers in Go omit an empty list.
        if response["id"].is_string() {
            let _ = visit(self.fields(wanted));
        } else if response["object"] != "list" {
            return Err(format!("has no `{name}`"));
        }
        Ok(())
    }
}

/// The text of these fields of an object, up to the first error.
fn raw_fields<'de, 'k>(object: &'de [u8], wanted: &[&'k str]) -> Vec<(&'k str, &'de RawValue)> {
    let mut fields = Vec::new();
    let _ = Deserializer::from_slice(object).deserialize_any(Fields { wanted, fields: &mut fields });
    fields
}

/// Parses the first fields whose text fits into [`FIELDS_BYTES_MAX`].
fn parsed(fields: Vec<(&str, &RawValue)>) -> Value {
    let mut left = FIELDS_BYTES_MAX;
    let mut object = Map::new();
    for (key, raw) in fields {
        if let Some(rest) = left.checked_sub(raw.get().len()) {
            left = rest;
            object.insert(key.to_owned(), serde_json::from_str(raw.get()).unwrap_or_default());
        }
    }
    Value::Object(object)
}

/// Collects the wanted fields of an object. Of a repeated key, the first counts, so that the number of fields is bounded.
struct Fields<'a, 'de, 'k> {
    wanted: &'a [&'k str],
    fields: &'a mut Vec<(&'k str, &'de RawValue)>,
}

impl<'de> Visitor<'de> for Fields<'_, 'de, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match self.wanted.iter().find(|wanted| **wanted == key) {
                Some(key) if self.fields.iter().all(|(seen, _)| seen != key) => {
                    self.fields.push((key, map.next_value()?))
                }
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        Ok(())
    }
}

/// A walk through the entries of a list.
struct Walk<'a> {
    name: &'a str,
    wanted: &'a [&'a str],
    visit: &'a mut dyn FnMut(Value) -> ControlFlow<()>,
    /// Whether the list was found.
    is_list: bool,
    /// Whether `visit` has ended the walk.
    is_over: bool,
}

/// The response: an object that contains the list, or the list.
struct Response<'w, 'a>(&'w mut Walk<'a>);

impl<'de> Visitor<'de> for Response<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or a list")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == self.0.name && !self.0.is_list {
                map.next_value_seed(List(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<(), A::Error> {
        List(self.0).visit_seq(seq)
    }
}

/// The list, its only entry, or null.
struct List<'w, 'a>(&'w mut Walk<'a>);

impl<'de> DeserializeSeed<'de> for List<'_, '_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for List<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list in `{}`", self.0.name)
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.0.is_list = true;
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        self.0.is_list = true;
        while let Some(entry) = seq.next_element::<&RawValue>()? {
            let fields = raw_fields(entry.get().as_bytes(), self.0.wanted);
            if (self.0.visit)(parsed(fields)).is_break() {
                self.0.is_over = true;
                // A visitor cannot leave the rest of a list unread.
                return Err(A::Error::custom("the rest is not needed"));
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        self.0.is_list = true;
        let mut fields = Vec::new();
        Fields { wanted: self.0.wanted, fields: &mut fields }.visit_map(map)?;
        let _ = (self.0.visit)(parsed(fields));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(text: impl Into<Vec<u8>>) -> Body {
        Body { bytes: text.into(), is_cut: false }
    }

    fn entries(body: &Body) -> Result<Vec<Value>, String> {
        let mut entries = Vec::new();
        body.for_each_entry("data", &["id", "x"], |entry| {
            entries.push(entry);
            ControlFlow::Continue(())
        })?;
        Ok(entries)
    }

    #[test]
    fn fields_are_read_up_to_the_first_error_and_within_the_limit() {
        let long = format!("\"{}\"", "x".repeat(FIELDS_BYTES_MAX));
        let text = format!(r#"{{"a":{long},"b":[1,{{"c":2}}],"b":3,"z":0,"d":{{"#);
        assert_eq!(body(text).fields(&["a", "b", "d"]), serde_json::json!({"b": [1, {"c": 2}]}));
        for text in ["", "<html>", "[1]", "7", "\u{0}"] {
            assert_eq!(body(text).fields(&["a"]), serde_json::json!({}), "{text}");
        }
        assert_eq!(body(r#"{"paths":{"/a":{},"/b":[],"/c":1}}"#).keys_of("paths", &["/b", "/c", "/d"]), ["/b", "/c"]);
        assert!(body(r#"{"paths":7}"#).keys_of("paths", &["/b"]).is_empty());
    }

    #[test]
    fn whole_entries_of_a_cut_list_are_visited() {
        let whole = r#"{"object":"list","data":[{"id":"a"},7,{"id":"b","x":[1]},{"id":"c"}]}"#;
        assert_eq!(entries(&body(whole)).expect("a list").len(), 4);
        for length in 0..whole.len() {
            let cut = Body { bytes: whole.as_bytes()[..length].to_vec(), is_cut: true };
            assert_eq!(entries(&cut).is_ok(), length > whole.find('[').expect("a list"), "{length} bytes");
            assert!(entries(&body(&whole[..length])).is_err(), "a body that ends early is not a listing");
        }
        let cut = Body { bytes: whole.as_bytes()[..50].to_vec(), is_cut: true };
        assert_eq!(entries(&cut).expect("a list").len(), 2);
    }

    #[test]
    fn walk_ends_when_the_visit_breaks() {
        let mut visited = 0;
        let walked = body(r#"{"data":[{},{},{}]}"#).for_each_entry("data", &[], |_| {
            visited += 1;
            if visited == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!((walked, visited), (Ok(()), 2));
    }
}
