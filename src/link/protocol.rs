//! The frames of both directions. Uses no I/O, no clock and no state.
//!
//! [`JobChunks`] builds its frames directly as text, because the agent may send ten thousand of them per minute. Frames from the
//! coordinator are parsed leniently, because the coordinator may be newer than the agent.

use std::borrow::Cow;
use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::{self, STANDARD as BASE64};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use uuid::Uuid;

pub use crate::backend::ErrorCode;
use crate::backend::{JobResult, RawJob, RequestText, WireFormat};
use crate::discovery::ResolvedModel;

/// The agent's version on the wire.
pub const AGENT_VERSION: &str = env!("CARGO_PKG_VERSION");

/// The deadline of a job without a valid `deadline_ms`, in milliseconds.
pub const DEADLINE_DEFAULT_MS: u32 = 60_000;

/// Maximum length of an unknown type that is kept for the log.
const TYPE_CHARS_MAX: usize = 100;

/// A frame from the coordinator.
#[derive(Debug)]
pub enum Inbound {
    /// The nonce to sign, decoded.
    AuthChallenge(Vec<u8>),
    /// The agent is admitted, with a provider id if the frame has one.
    AuthOk(Option<String>),
    /// The agent is rejected, for this reason.
    AuthFailed(String),
    /// A job to run.
    Job(Box<RawJob>),
    /// The id of a job that cannot be read, and the reason.
    UnreadableJob(Uuid, &'static str),
    /// The id of a job to cancel.
    JobCancel(Uuid),
    /// A frame of an unknown type, such as a newer coordinator may send, with the beginning of the type.
    Other(String),
}

/// Why a frame cannot be read. Does not quote the frame, which may contain a prompt.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The frame is not a JSON object with a `type`.
    #[error("it is not a JSON object with a `type` (line {line}, column {column})")]
    Json {
        /// The line of the error, from 1.
        line: usize,
        /// The column of the error, from 1.
        column: usize,
    },
    /// A field is missing or has the wrong type.
    #[error("it is a `{frame}` without a valid `{fields}`")]
    Field {
        /// The frame's type.
        frame: &'static str,
        /// The field that is missing or invalid, or the candidates.
        fields: &'static str,
    },
}

/// Parses one text message. A frame of an unknown type takes little memory, whatever its size.
pub fn parse(text: &str) -> Result<Inbound, FrameError> {
    #[derive(Deserialize)]
    struct Head<'a> {
        #[serde(borrow)]
        r#type: Cow<'a, str>,
    }
    // serde would accept a JSON array for a struct.
    if !text.trim_start().starts_with('{') {
        return Err(FrameError::Json { line: 1, column: 1 });
    }
    let head: Head<'_> =
        serde_json::from_str(text).map_err(|e| FrameError::Json { line: e.line(), column: e.column() })?;
    match &*head.r#type {
        "job" => parse_job(text),
        "job_cancel" => {
            job_id(text).map(Inbound::JobCancel).ok_or(FrameError::Field { frame: "job_cancel", fields: "job_id" })
        }
        "auth_challenge" => {
            let nonce = parse_small(text)["nonce"].as_str().and_then(|n| BASE64.decode(n).ok());
            nonce.map(Inbound::AuthChallenge).ok_or(FrameError::Field { frame: "auth_challenge", fields: "nonce" })
        }
        "auth_ok" => {
            let provider_id = parse_small(text)["provider_id"].as_str().filter(|id| !id.is_empty()).map(str::to_owned);
            Ok(Inbound::AuthOk(provider_id))
        }
        "auth_failed" => {
            Ok(Inbound::AuthFailed(parse_small(text)["reason"].as_str().unwrap_or("no reason given").to_owned()))
        }
        kind => Ok(Inbound::Other(kind.chars().take(TYPE_CHARS_MAX).collect())),
    }
}

/// Parses a frame of a type that is never large. A large one yields null.
fn parse_small(text: &str) -> Value {
    const BYTES_MAX: usize = 64 << 10;
    if text.len() > BYTES_MAX { Value::Null } else { serde_json::from_str(text).unwrap_or_default() }
}

fn parse_job(text: &str) -> Result<Inbound, FrameError> {
    #[derive(Deserialize)]
    struct Frame<'a> {
        job_id: String,
        model_id: String,
        #[serde(borrow)]
        request: &'a RawValue,
        // Invalid values of these two fields do not invalidate the job.
        format: Option<&'a RawValue>,
        deadline_ms: Option<&'a RawValue>,
    }
    /// The fields without which a job is malformed.
    #[derive(Deserialize)]
    struct Shape {
        #[serde(rename = "model_id")]
        _model_id: String,
        #[serde(rename = "request")]
        _request: IgnoredAny,
    }
    const MALFORMED: FrameError = FrameError::Field { frame: "job", fields: "job_id`, `model_id` or `request" };
    let unreadable = |why| job_id(text).map(|id| Inbound::UnreadableJob(id, why)).ok_or(MALFORMED);
    let frame: Frame<'_> = match serde_json::from_str(text) {
        Ok(frame) => frame,
        Err(e) if e.is_data() && serde_json::from_str::<Shape>(text).is_err() => return Err(MALFORMED),
        Err(_) => return unreadable("a field of the job is repeated or holds half of a surrogate pair"),
    };
    let request = match RequestText::new(frame.request) {
        Ok(request) => request,
        Err(why) => return unreadable(why),
    };
    let is_anthropic = frame.format.is_some_and(|format| is_string(format, "anthropic"));
    Ok(Inbound::Job(Box::new(RawJob {
        job_id: Uuid::parse_str(&frame.job_id).map_err(|_| MALFORMED)?,
        model_id: frame.model_id,
        request,
        format: if is_anthropic { WireFormat::Anthropic } else { WireFormat::Openai },
        deadline_ms: frame.deadline_ms.and_then(milliseconds).unwrap_or(DEADLINE_DEFAULT_MS),
    })))
}

/// Whether a value is this string, in any spelling.
fn is_string(value: &RawValue, text: &str) -> bool {
    value.get().len() <= 2 + text.len() * r"\u0000".len()
        && serde_json::from_str::<String>(value.get()).is_ok_and(|value| value == text)
}

fn job_id(text: &str) -> Option<Uuid> {
    #[derive(Deserialize)]
    struct Head {
        job_id: String,
    }
    let head: Head = serde_json::from_str(text).ok()?;
    Uuid::parse_str(&head.job_id).ok()
}

/// A whole, non-negative number. Numbers above the range of `u32` (49 days) saturate.
fn milliseconds(value: &RawValue) -> Option<u32> {
    let digits = value.get();
    let whole = digits.bytes().all(|b| b.is_ascii_digit());
    whole.then(|| digits.parse().unwrap_or(u32::MAX))
}

/// The response to a challenge.
pub fn auth_response(public_key: &[u8], signature: &[u8], enrollment_code: Option<&str>) -> String {
    let mut frame = json!({
        "type": "auth_response",
        "pubkey": BASE64.encode(public_key),
        "signature": BASE64.encode(signature),
        "agent_version": AGENT_VERSION,
    });
    if let Some(code) = enrollment_code {
        frame["enrollment_code"] = code.into();
    }
    frame.to_string()
}

/// The limits that `capabilities` announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct OfferLimits {
    /// Jobs in flight, over all models.
    pub max_concurrent_total: u32,
    /// Tokens per minute; `None` if there is no limit.
    pub max_tokens_per_minute: Option<u64>,
}

/// The offer: models, prices and limits.
pub fn capabilities(models: &[ResolvedModel], limits: OfferLimits) -> String {
    json!({
        "type": "capabilities",
        "models": models,
        "limits": limits,
        "metadata": {"agent_version": AGENT_VERSION},
    })
    .to_string()
}

/// The figures of one heartbeat.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename = "heartbeat")]
pub struct Heartbeat {
    /// Jobs in flight.
    pub queue_depth: u32,
    /// Median of each job's output tokens per second.
    pub tokens_per_sec_p50: f64,
    /// Median of job durations, in milliseconds.
    pub p50_latency_ms: u32,
    /// 95th percentile of job durations, in milliseconds.
    pub p95_latency_ms: u32,
    /// Failed jobs over ended jobs, 0 if none ended.
    pub error_rate_60s: f64,
    /// The time of the last error, RFC 3339 in UTC.
    pub last_error_at: Option<String>,
    /// The code of the last error.
    pub last_error_code: Option<&'static str>,
}

impl Heartbeat {
    /// The frame.
    pub fn to_frame(&self) -> String {
        json!(self).to_string()
    }
}

/// Builds the `job_chunk` frames of one job, all of which have the same head.
#[derive(Debug)]
pub struct JobChunks {
    head: String,
}

impl JobChunks {
    /// Creates the builder for the job with this id.
    pub fn of(job_id: Uuid) -> JobChunks {
        JobChunks { head: format!(r#"{{"type":"job_chunk","job_id":"{job_id}","data":""#) }
    }

    /// A frame with these bytes, base64-encoded.
    pub fn frame(&self, bytes: &[u8]) -> String {
        const TAIL: &str = r#""}"#;
        let encoded_len = bytes.len().div_ceil(3) * 4;
        let mut text = String::with_capacity(self.head.len() + encoded_len + TAIL.len());
        text.push_str(&self.head);
        ENCODER.encode_string(bytes, &mut text);
        text.push_str(TAIL);
        text
    }
}

/// The base64 engine: SIMD where the target has it. The portable engine takes a third of the CPU time of a stream that is relayed at
/// full speed.
static ENCODER: LazyLock<Encoder> = LazyLock::new(|| {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    return Encoder::standard(general_purpose::GeneralPurposeConfig::new());
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    BASE64
});

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
type Encoder = base64::engine::Simd;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
type Encoder = general_purpose::GeneralPurpose;

/// The terminal frame of a job that was answered in full.
pub fn job_done(job_id: Uuid, result: &JobResult) -> String {
    let input = result.input_tokens.unwrap_or(0);
    let output = result.output_tokens.unwrap_or(0);
    json!({
        "type": "job_done",
        "job_id": job_id.to_string(),
        "tokens": {"input": input, "output": output, "input_tokens": input, "output_tokens": output},
        "duration_ms": result.duration_ms,
    })
    .to_string()
}

/// The terminal frame of a job that failed or was rejected.
pub fn job_error(job_id: Uuid, code: ErrorCode, message: &str, tokens_emitted: u32) -> String {
    json!({
        "type": "job_error",
        "job_id": job_id.to_string(),
        "error_code": code.as_str(),
        "message": message,
        "tokens_emitted": tokens_emitted,
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deadline_of(text: &str) -> u32 {
        let frame = format!(
            r#"{{"type":"job","job_id":"A0000000-0000-4000-8000-00000000000A","model_id":"m","request":{{}}{text}}}"#
        );
        match parse(&frame) {
            Ok(Inbound::Job(job)) => job.deadline_ms,
            other => panic!("not a job: {other:?}"),
        }
    }

    #[test]
    fn deadline_ms_is_a_whole_number_or_the_default() {
        assert_eq!(deadline_of(""), 60_000);
        assert_eq!(deadline_of(r#","deadline_ms":1"#), 1);
        assert_eq!(deadline_of(r#","deadline_ms":4294967300"#), u32::MAX);
        assert_eq!(deadline_of(r#","deadline_ms":1000000000000000000000000000000"#), u32::MAX);
        for wrong in ["-1", "1.0", "1e3", "\"1\"", "null", "[]"] {
            assert_eq!(deadline_of(&format!(r#","deadline_ms":{wrong}"#)), 60_000, "{wrong}");
        }
    }

    #[test]
    fn parse_returns_the_id_of_an_unreadable_job() {
        let id = "a0000000-0000-4000-8000-00000000000a";
        let job =
            |request: &str| parse(&format!(r#"{{"type":"job","job_id":"{id}","model_id":"m","request":{request}}}"#));
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        let many = format!("[{}0]", "0,".repeat(1 << 20));
        for request in [r#""half an emoji: \ud83d""#, &deep, &many, r#"{},"format":1,"format":1"#] {
            let parsed = job(request);
            assert!(matches!(parsed, Ok(Inbound::UnreadableJob(..))), "{parsed:?}");
        }
        for request in
            [r#"{"$serde_json::private::Number":"x"}"#, "1E400", r#"{},"x":"\ud83d""#, &format!("{{}},\"x\":{many}")]
        {
            assert!(matches!(job(request), Ok(Inbound::Job(_))), "{}", &request[..request.len().min(40)]);
        }
        let other = format!(r#"{{"type":"news","x":{many}}}"#);
        assert!(matches!(parse(&other), Ok(Inbound::Other(kind)) if kind == "news"));
    }

    #[test]
    fn parse_accepts_objects_only() {
        for text in [r#"["auth_ok"]"#, r#" ["news"]"#, r#""news""#, "[]", ""] {
            assert!(matches!(parse(text), Err(FrameError::Json { .. })), "{text}");
        }
        assert!(matches!(parse(" \r\n{\"type\":\"auth_ok\"} "), Ok(Inbound::AuthOk(None))));
    }

    #[test]
    fn job_id_is_accepted_in_any_spelling_and_echoed_in_one() {
        for spelling in [
            "A0000000-0000-4000-8000-00000000000A",
            "a000000000004000800000000000000a",
            "{A0000000-0000-4000-8000-00000000000A}",
            "urn:uuid:A0000000-0000-4000-8000-00000000000A",
        ] {
            let frame = format!(r#"{{"type":"job_cancel","job_id":"{spelling}"}}"#);
            let Ok(Inbound::JobCancel(id)) = parse(&frame) else { panic!("{spelling}") };
            assert!(JobChunks::of(id).frame(b"x").contains(r#""a0000000-0000-4000-8000-00000000000a""#));
        }
    }

    #[test]
    fn job_chunks_are_json_with_base64_data() {
        let id = Uuid::nil();
        for len in 0..200 {
            let bytes: Vec<u8> = (0..len).collect();
            let text = JobChunks::of(id).frame(&bytes);
            assert_eq!(text.capacity(), text.len(), "one allocation");
            let frame: Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(BASE64.decode(frame["data"].as_str().expect("data")).expect("base64"), bytes);
        }
    }

    /// Valid frames of every type with a few mutations, so that most are still JSON and many are still valid.
    #[test]
    fn parse_never_panics_misreads_or_quotes_a_request() {
        const FRAMES: &[&str] = &[
            r#"{"type":"auth_challenge","nonce":"AAECAwQFBgc="}"#,
            r#"{"type":"auth_ok","provider_id":"prov_1"}"#,
            r#"{"type":"auth_failed","reason":"no"}"#,
            r#"{"type":"job","job_id":"a0000000-0000-4000-8000-00000000000a","model_id":"m","request":{"messages":[{"role":"user","content":"QQQQQQQQ"}],"seed":12345678901234567890,"temperature":0.10},"format":"anthropic","deadline_ms":5000}"#,
            r#"{"request":["QQQQ",{"QQQQ":1e5}],"model_id":"m","job_id":"a000000000004000800000000000000a","type":"job"}"#,
            r#"{"type":"job_cancel","job_id":"a0000000-0000-4000-8000-00000000000a"}"#,
            r#"{"type":"config_update","x":[1,2,{"y":null}]}"#,
        ];
        const TOKENS: &[&str] =
            &["null", "-1", "1e999", "{}", "[]", "\"\"", "\\ud83d", "\\u0051", "\"type\":", ",", "\"", "}"];
        arbtest::arbtest(|u| {
            let mut bytes = u.choose(FRAMES)?.as_bytes().to_vec();
            for _ in 0..u.int_in_range(0..=3)? {
                let at = u.choose_index(bytes.len())?;
                match u.int_in_range(0..=4)? {
                    0 => bytes[at] = u.arbitrary()?,
                    1 => bytes.insert(at, u.arbitrary()?),
                    2 => bytes.truncate(at.max(1)),
                    3 => drop(bytes.drain(at..bytes.len().min(at + 1 + u.int_in_range(0..=8)?))),
                    _ => drop(bytes.splice(at..at, u.choose(TOKENS)?.bytes())),
                }
                if bytes.is_empty() {
                    bytes.push(b'{');
                }
            }
            let text = String::from_utf8_lossy(&bytes);
            let parsed = parse(&text);
            // An independent parser, for comparison. Null if the text cannot be represented as a value.
            let value: Value = serde_json::from_str(&text).unwrap_or_default();
            let is_id = |id: &Uuid| value["job_id"].as_str().and_then(|text| Uuid::parse_str(text).ok()) == Some(*id);
            match parsed {
                Err(e) => assert!(!e.to_string().contains("QQ"), "{e}"),
                Ok(Inbound::UnreadableJob(_, why)) => assert!(!why.contains("QQ"), "{why}"),
                Ok(_) if value.is_null() => {}
                Ok(Inbound::Job(job)) => {
                    assert!(
                        value["type"] == "job" && is_id(&job.job_id) && value["model_id"] == job.model_id,
                        "{text}"
                    );
                    let request: Value = serde_json::from_str(&job.request.shared()).expect("JSON");
                    assert_eq!(request, value["request"], "{text}");
                    assert!(text.contains(&*job.request.shared()), "{text}");
                    assert_eq!(job.format == WireFormat::Anthropic, value["format"] == "anthropic", "{text}");
                }
                Ok(Inbound::JobCancel(id)) => assert!(value["type"] == "job_cancel" && is_id(&id), "{text}"),
                Ok(Inbound::Other(kind)) => assert_eq!(value["type"], kind, "{text}"),
                Ok(Inbound::AuthChallenge(nonce)) => {
                    assert_eq!(BASE64.decode(value["nonce"].as_str().expect("a nonce")).as_ref(), Ok(&nonce), "{text}");
                }
                Ok(Inbound::AuthOk(id)) => {
                    assert_eq!(id.as_deref(), value["provider_id"].as_str().filter(|id| !id.is_empty()), "{text}");
                }
                Ok(Inbound::AuthFailed(_)) => assert_eq!(value["type"], "auth_failed", "{text}"),
            }
            Ok(())
        })
        .budget_ms(700);
    }
}
