//! [`RawJob`]: a job whose request is still text. The agent itself never parses a request into a tree, which may take 70 times the
//! memory of the text.

use std::fmt;
use std::sync::Arc;

use memchr::memchr2;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{BackendError, BackendResult, Job, WireFormat};

/// Maximum number of JSON values in one request. A backend that parses its requests takes about 100 bytes for each, so 100 MB in total,
/// although the text of a value may be a single byte.
const VALUES_MAX: usize = 1 << 20;

/// Maximum depth of arrays and objects: the limit of `serde_json`; other parsers have similar ones.
const DEPTH_MAX: usize = 127;

/// A [`Job`] with its request as text.
#[derive(Debug, Clone)]
pub struct RawJob {
    /// The coordinator's id of the job.
    pub job_id: Uuid,
    /// The requested model.
    pub model_id: String,
    /// The request body, byte for byte.
    pub request: RequestText,
    /// The API of the body.
    pub format: WireFormat,
    /// Time limit for the whole job, in milliseconds.
    pub deadline_ms: u32,
}

impl RawJob {
    /// The job with its request as a value.
    ///
    /// # Errors
    /// The request holds a key that `serde_json` reserves, such as `$serde_json::private::Number`.
    pub fn parse(self) -> BackendResult<Job> {
        let RawJob { job_id, model_id, request, format, deadline_ms } = self;
        let request = serde_json::from_str(&request.0).map_err(|e| BackendError::UnreadableRequest(e.to_string()))?;
        Ok(Job { job_id, model_id, request, format, deadline_ms })
    }
}

impl From<&Job> for RawJob {
    fn from(job: &Job) -> RawJob {
        RawJob {
            job_id: job.job_id,
            model_id: job.model_id.clone(),
            request: RequestText(job.request.to_string().into()),
            format: job.format,
            deadline_ms: job.deadline_ms,
        }
    }
}

/// The text of a request: one JSON value without white space around it. Clones share the text.
#[derive(Clone)]
pub struct RequestText(Arc<str>);

impl RequestText {
    /// Copies a request out of the frame that contains it.
    ///
    /// # Errors
    /// Why a backend could not parse the request.
    pub fn new(request: &RawValue) -> Result<RequestText, &'static str> {
        check(request.get())?;
        Ok(RequestText(request.get().into()))
    }

    /// The text.
    pub fn shared(&self) -> Arc<str> {
        self.0.clone()
    }

    /// The length, in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a JSON value is never empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// Omits the text, which is a prompt.
impl fmt::Debug for RequestText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RequestText({} bytes)", self.len())
    }
}

/// Checks what the syntax of JSON does not restrict: the depth, the number of values, and escapes of half a surrogate pair.
fn check(json: &str) -> Result<(), &'static str> {
    let bytes = json.as_bytes();
    let (mut at, mut values, mut depth) = (0, 0, 0_usize);
    while let Some(byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'"' => at = end_of_string(json, at).ok_or("the request holds half of a surrogate pair")?,
            b',' => values += 1,
            b'[' | b'{' => (values, depth) = (values + 1, depth + 1),
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if values > VALUES_MAX {
            return Err("the request holds more than a million JSON values");
        }
        if depth > DEPTH_MAX {
            return Err("the request nests arrays and objects more than 127 deep");
        }
    }
    Ok(())
}

/// The position after the string whose content begins at `at`; `None` if half of a surrogate pair is escaped in it.
fn end_of_string(json: &str, mut at: usize) -> Option<usize> {
    loop {
        at += memchr2(b'"', b'\\', &json.as_bytes()[at..])?;
        match (escaped_unit(json, at), escaped_unit(json, at + ESCAPED_UNIT_BYTES)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => at += 2 * ESCAPED_UNIT_BYTES,
            (Some(0xd800..=0xdfff), _) => return None,
            (Some(_), _) => at += ESCAPED_UNIT_BYTES,
            (None, _) if json.as_bytes()[at] == b'"' => return Some(at + 1),
            // The backslash and the character that it escapes, which may be another backslash.
            (None, _) => at += 2,
        }
    }
}

/// Length of `\uXXXX`.
const ESCAPED_UNIT_BYTES: usize = 6;

/// The UTF-16 code unit of the `\uXXXX` at `at`.
fn escaped_unit(json: &str, at: usize) -> Option<u16> {
    let digits = json.get(at..at + ESCAPED_UNIT_BYTES)?.strip_prefix(r"\u")?;
    u16::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(json: &str) -> Result<RequestText, &'static str> {
        RequestText::new(serde_json::from_str(json).expect("JSON"))
    }

    fn parsed(json: &str) -> BackendResult<Job> {
        let request = text(json).expect("within the limits");
        RawJob { job_id: Uuid::nil(), model_id: "m".into(), request, format: WireFormat::Openai, deadline_ms: 1 }
            .parse()
    }

    fn nested(depth: usize) -> String {
        format!("{}{}", "[".repeat(depth), "]".repeat(depth))
    }

    #[test]
    fn request_text_is_parsed_by_a_backend_unless_it_is_refused() {
        assert!(parsed(&nested(DEPTH_MAX)).is_ok());
        assert!(parsed(&format!("[{}0]", "0,".repeat(VALUES_MAX - 1))).is_ok());
        for refused in [
            nested(DEPTH_MAX + 1),
            format!("[{}0]", "0,".repeat(VALUES_MAX)),
            "{}".replace('}', &format!("\"a\":[{}]}}", "{},".repeat(VALUES_MAX / 2) + "{}")),
            r#""half an emoji: \ud83d""#.into(),
            r#"{"\ud83dx\ude00":1}"#.into(),
            r#"["\ude00\ud83d"]"#.into(),
            r#""\ud83d\\ude00""#.into(),
            r#""\ud83d\ud83d\ude00""#.into(),
        ] {
            assert!(text(&refused).is_err(), "{}", &refused[..refused.len().min(40)]);
        }
        for accepted in [
            r#"{"text":"[[[,,,"}"#,
            r#""\\ud83d""#,
            r#""\\\ud83d\uDE00\\""#,
            r#""\"\ud83d\ude00 é\u00e9 \"""#,
            r#"["a\\",[[],{}],"\\\\"]"#,
            "-0.0",
        ] {
            assert!(parsed(accepted).is_ok(), "{accepted}");
        }
    }

    #[test]
    fn parsed_request_keeps_its_numbers_and_the_order_of_its_keys() {
        let given = r#"{"z":1.0,"a":123456789012345678901234567890,"n":0.1000000000000000055511151231257827}"#;
        assert_eq!(parsed(given).map(|job| job.request.to_string()).as_deref(), Ok(given));
    }

    #[test]
    fn request_that_cannot_be_parsed_is_an_error_without_its_text() {
        for key in ["Number", "RawValue"] {
            let error =
                parsed(&format!(r#"{{"$serde_json::private::{key}":"my prompt"}}"#)).expect_err("no such value");
            assert!(matches!(&error, BackendError::UnreadableRequest(why) if !why.contains("prompt")), "{error}");
        }
    }

    #[test]
    fn job_made_of_a_value_keeps_it() {
        arbtest::arbtest(|u| {
            let number = f64::from_bits(u.arbitrary()?);
            let request =
                serde_json::json!({"n": number, "i": u.arbitrary::<i64>()?, "text": u.arbitrary::<String>()?});
            let job = Job {
                job_id: Uuid::nil(),
                model_id: "m".into(),
                request: request.clone(),
                format: WireFormat::Anthropic,
                deadline_ms: 1,
            };
            assert_eq!(RawJob::from(&job).parse().map(|job| job.request), Ok(request));
            Ok(())
        })
        .budget_ms(100);
    }

    #[test]
    fn debug_output_omits_the_prompt() {
        assert!(!format!("{:?}", text(r#""my prompt""#)).contains("prompt"));
    }
}
