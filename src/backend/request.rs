//! The request body that a backend receives: the coordinator's, plus the keys that streaming needs.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::{Map, Value, json};

use super::{Job, WireFormat};

/// Serializes the request of `job`.
///
/// The order of keys and every digit of numbers are kept. A request that is not an object is sent unchanged.
pub fn body_of(job: &Job) -> Vec<u8> {
    let serialized = match &job.request {
        Value::Object(fields) => serde_json::to_vec(&Streamed { fields, job }),
        other => serde_json::to_vec(other),
    };
    // A value parsed from JSON can always be serialized.
    serialized.unwrap_or_default()
}

/// The request with `stream` set and the missing keys added. Serialized without a copy: it may contain 60 MB of images.
struct Streamed<'a> {
    fields: &'a Map<String, Value>,
    job: &'a Job,
}

impl Serialize for Streamed<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (key, value) in self.fields {
            match key.as_str() {
                "stream" => map.serialize_entry(key, &true)?,
                _ => map.serialize_entry(key, value)?,
            }
        }
        if !self.fields.contains_key("stream") {
            map.serialize_entry("stream", &true)?;
        }
        if self.job.format == WireFormat::Openai && !self.fields.contains_key("stream_options") {
            map.serialize_entry("stream_options", &json!({"include_usage": true}))?;
        }
        if !self.fields.contains_key("model") {
            map.serialize_entry("model", &self.job.model_id)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(request: &str, format: WireFormat) -> String {
        let job = Job {
            job_id: uuid::Uuid::nil(),
            model_id: "m".into(),
            request: serde_json::from_str(request).expect("JSON"),
            format,
            deadline_ms: 1,
        };
        String::from_utf8(body_of(&job)).expect("UTF-8")
    }

    #[test]
    fn body_gets_the_missing_keys_only_and_stream_is_always_true() {
        let table = [
            ("{}", r#"{"stream":true,"stream_options":{"include_usage":true},"model":"m"}"#),
            (
                r#"{"z":1,"stream":false,"a":2,"model":"own","stream_options":null}"#,
                r#"{"z":1,"stream":true,"a":2,"model":"own","stream_options":null}"#,
            ),
            ("[1,2]", "[1,2]"),
            ("null", "null"),
            (r#""text""#, r#""text""#),
        ];
        for (given, want) in table {
            assert_eq!(sent(given, WireFormat::Openai), want);
        }
        assert_eq!(sent("{}", WireFormat::Anthropic), r#"{"stream":true,"model":"m"}"#);
    }

    #[test]
    fn body_keeps_numbers_and_the_order_of_keys() {
        let given = concat!(
            r#"{"n":123456789012345678901234567890,"d":0.1000000000000000055511151231257827,"one":1.0,"e":1E400,"#,
            r#""b":{"z":1,"a":2},"stream":true,"stream_options":{},"model":"m"}"#
        );
        let sent = sent(given, WireFormat::Openai);
        assert_eq!(sent.replace("1e+400", "1E400").replace("1e400", "1E400"), given);
    }
}
