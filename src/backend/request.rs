//! The request body that a backend receives: the coordinator's, in which the agent sets or removes keys at the top level.
//!
//! Invariant: everything else is sent byte for byte.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::Deserializer;
use serde::de::{MapAccess, Visitor};
use serde_json::value::RawValue;

use super::http::{BodyBuilder, RequestBody};
use super::{RawJob, WireFormat};

/// Makes a server report the usage at the end of its stream.
const STREAM_OPTIONS: &str = r#""stream_options":{"include_usage":true}"#;

/// Keys that name models to try if that of the job fails: two of OpenRouter, one of LiteLLM. They are left out.
const FURTHER_MODELS: [&str; 3] = ["models", "route", "fallbacks"];

/// Length of the longest key that matters, `stream_options`, with each character escaped.
const KEY_BYTES_MAX: usize = 2 + 14 * r"\u0000".len();

/// The body for the request of `job`. A request that is not an object is sent unchanged. `asks_for_usage`: whether to add
/// `stream_options` to an OpenAI request that has none.
pub fn body_of(job: &RawJob, asks_for_usage: bool) -> RequestBody {
    let text = job.request.shared();
    let mut body = BodyBuilder::new(text.clone());
    if !text.starts_with('{') {
        body.keep(0..text.len());
        return body.build();
    }
    body.keep(0..1);
    let mut splicer = Splicer {
        body,
        end: 1,
        is_empty: true,
        stream: Some(r#""stream":true"#.to_owned()),
        // Always that of the job, so that no other model can be reached.
        model: Some(format!(r#""model":{}"#, serde_json::Value::from(job.model_id.as_str()))),
        stream_options: (asks_for_usage && job.format == WireFormat::Openai).then(|| STREAM_OPTIONS.to_owned()),
    };
    // The text is an object, so this cannot fail.
    let _ = serde_json::Deserializer::from_str(&text).deserialize_map(Entries { text: &text, splicer: &mut splicer });
    splicer.finish(text.len())
}

/// Splices the entries of an object, one after another.
struct Splicer {
    body: BodyBuilder,
    /// The end of the last entry, or of the opening brace.
    end: usize,
    /// Whether the body has no entry yet.
    is_empty: bool,
    /// The entries that the agent sets. `None` once they are in the body, or if the request has its own.
    stream: Option<String>,
    model: Option<String>,
    stream_options: Option<String>,
}

impl Splicer {
    /// The next entry of the request. An entry that the agent sets is set once, whatever the case of its key: it must not matter which
    /// of several a server reads, and servers in Go also read `Model`.
    fn splice(&mut self, key: &str, entry: Range<usize>) {
        let separator = self.end..entry.start;
        self.end = entry.end;
        let is = |name: &str| key.eq_ignore_ascii_case(name);
        let set = if is("stream") {
            self.stream.take()
        } else if is("model") {
            self.model.take()
        } else if FURTHER_MODELS.into_iter().any(is) {
            None
        } else {
            if key == "stream_options" {
                self.stream_options = None;
            }
            self.separate(separator);
            return self.body.keep(entry);
        };
        if let Some(set) = set {
            self.separate(separator);
            self.body.add(&set);
        }
    }

    /// Separates the next entry from the previous one. Omits a comma after an entry that was left out.
    fn separate(&mut self, separator: Range<usize>) {
        let has_no_comma = separator.start == 1;
        if !std::mem::take(&mut self.is_empty) || has_no_comma {
            self.body.keep(separator);
        }
    }

    /// Adds the entries that the request does not have.
    fn finish(mut self, text_len: usize) -> RequestBody {
        for entry in [self.stream, self.stream_options, self.model].into_iter().flatten() {
            if !std::mem::take(&mut self.is_empty) {
                self.body.add(",");
            }
            self.body.add(&entry);
        }
        self.body.keep(self.end..text_len);
        self.body.build()
    }
}

/// Visits the entries of an object without parsing their values.
struct Entries<'a> {
    text: &'a str,
    splicer: &'a mut Splicer,
}

impl<'a> Visitor<'a> for Entries<'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut entries: M) -> Result<(), M::Error> {
        while let Some((key, value)) = entries.next_entry::<&RawValue, &RawValue>()? {
            let start_of = |raw: &RawValue| raw.get().as_ptr().addr() - self.text.as_ptr().addr();
            self.splicer.splice(&name_of(key), start_of(key)..start_of(value) + value.get().len());
        }
        Ok(())
    }
}

/// The name that a key spells, with or without escapes; empty if it is longer than any that matters.
fn name_of(key: &RawValue) -> Cow<'_, str> {
    match key.get() {
        key if key.len() > KEY_BYTES_MAX => Cow::default(),
        key if key.contains('\\') => serde_json::from_str(key).unwrap_or_default(),
        key => key.trim_matches('"').into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::backend::RequestText;

    fn sent(model_id: &str, request: &str, format: WireFormat) -> String {
        let request = RequestText::new(serde_json::from_str(request).expect("JSON")).expect("within the limits");
        let job = RawJob { job_id: uuid::Uuid::nil(), model_id: model_id.into(), request, format, deadline_ms: 1 };
        let (body, mut text) = (body_of(&job, true), String::new());
        body.reader().read_to_string(&mut text).expect("UTF-8");
        assert_eq!(text.len(), body.content_length());
        text
    }

    #[test]
    fn body_gets_the_missing_keys_only_and_stream_and_model_are_forced() {
        let table = [
            ("{}", r#"{"stream":true,"stream_options":{"include_usage":true},"model":"m"}"#),
            (
                r#"{"z":1,"stream":false,"a":2,"model":"own","stream_options":null}"#,
                r#"{"z":1,"stream":true,"a":2,"model":"m","stream_options":null}"#,
            ),
            ("[1,2]", "[1,2]"),
            ("null", "null"),
            (r#""text""#, r#""text""#),
        ];
        for (given, want) in table {
            assert_eq!(sent("m", given, WireFormat::Openai), want);
        }
        assert_eq!(sent("m", "{}", WireFormat::Anthropic), r#"{"stream":true,"model":"m"}"#);
        let quoted = sent("a\"b\\c", "{}", WireFormat::Anthropic);
        assert_eq!(quoted, r#"{"stream":true,"model":"a\"b\\c"}"#);
    }

    /// Objects with any of the keys that matter, in any order, number and spelling, and others.
    #[test]
    fn body_differs_from_the_request_in_the_keys_of_the_agent_only() {
        const ENTRIES: [(&str, &str); 15] = [
            ("model", r#""model":"own""#),
            ("model", r#""mod\u0065l":{"model":[]}"#),
            ("stream", r#""stream":false"#),
            ("stream", r#""\u0073\u0074\u0072\u0065\u0061\u006d":{}"#),
            ("models", r#""models":["x","y"]"#),
            ("models", r#""model\u0073":"x""#),
            ("route", r#""route":null"#),
            ("stream_options", r#""stream_options":null"#),
            ("stream_options", r#""stream\u005foptions":{"a":1.50}"#),
            ("", r#""":{"model":"own","stream":false}"#),
            ("", r#""\"model":"\",\"model\":""#),
            ("model", r#""Mod\u0045l":[{},"stream",1E400]"#),
            ("models", r#""fallbacks":["x"]"#),
            ("", r#""Models ":[{},"stream",1E400]"#),
            ("", r#""messages":[ {"content" : "\u00e9 {"} ]"#),
        ];
        arbtest::arbtest(|u| {
            let entries: Vec<_> = (0..u.int_in_range(0..=9)?).map(|_| u.choose(&ENTRIES)).collect::<Result<_, _>>()?;
            let request = entries.iter().map(|(_, entry)| *entry).collect::<Vec<_>>().join(",");
            for format in [WireFormat::Openai, WireFormat::Anthropic] {
                let mut to_set = vec![
                    ("stream", r#""stream":true"#),
                    ("stream_options", STREAM_OPTIONS),
                    ("model", r#""model":"m""#),
                ];
                if format == WireFormat::Anthropic {
                    to_set.remove(1);
                }
                let mut expected = Vec::new();
                for (name, entry) in &entries {
                    let set = to_set.iter().position(|(key, _)| key == name).map(|at| to_set.remove(at).1);
                    match (*name, set) {
                        ("stream" | "model", Some(set)) => expected.push(set),
                        ("stream" | "model" | "models" | "route", None) => {}
                        _ => expected.push(entry),
                    }
                }
                expected.extend(to_set.iter().map(|(_, entry)| entry));
                assert_eq!(sent("m", &format!("{{{request}}}"), format), format!("{{{}}}", expected.join(",")));
            }
            Ok(())
        })
        .budget_ms(200);
    }
}
