//! The two requests of a pairing, and what the answers to them mean. Nothing that the server says is trusted with memory, or
//! shown as it is.

use std::time::Duration;

use serde_json::{Value, json};
use ureq::http::{Response, header};
use ureq::{Body, Error};

use super::{Advertised, CoordinatorUrls, Issued, ModelTerms, Paired};
use crate::backend::{Client, read_bounded};
use crate::link::protocol::AGENT_VERSION;
use crate::logging::sanitize_for_log;
use crate::net::tls::ExtraRoots;
use crate::sys::datetime;

/// How long a code is good when the server does not say.
pub const LIFETIME: Duration = Duration::from_secs(600);
/// For one request and its answer.
const EXCHANGE_TIME: Duration = Duration::from_secs(10);
/// The longest answer that is read, in bytes: the terms of several thousand models.
const ANSWER_MAX: usize = 1 << 20;
/// Times beyond this are in milliseconds.
const SECONDS_MAX: i64 = 100_000_000_000;

/// Why a request got nothing to go on with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PairingError {
    /// The server will not, however often it is asked.
    Permanent(String),
    /// It may the next time.
    Transient(String),
}

impl PairingError {
    /// The same, for a server that quotes this secret in it.
    pub fn without(self, secret: &str) -> PairingError {
        match self {
            PairingError::Permanent(why) => PairingError::Permanent(why.replace(secret, "…")),
            PairingError::Transient(why) => PairingError::Transient(why.replace(secret, "…")),
        }
    }
}

/// What has become of a code.
pub enum PollStatus {
    /// Nobody has entered it yet.
    Pending,
    /// It is no good any more.
    Expired,
    /// It was entered.
    Active(Paired),
}

/// The way to one coordinator's pairing.
pub struct PairingClient {
    site: CoordinatorUrls,
    client: Client,
}

impl PairingClient {
    /// Also trusts `roots`, and heeds the proxy of the environment, as the agent's connection does.
    pub fn new(site: CoordinatorUrls, roots: &ExtraRoots) -> PairingClient {
        PairingClient { site, client: Client::trusting(roots) }
    }

    /// Asks for a code.
    ///
    /// # Errors
    /// There is none.
    pub fn issue(&self, public_key_base64: &str) -> Result<Issued, PairingError> {
        let request = json!({"agent_pubkey": public_key_base64});
        let (answer, date) = self.post(&self.site.issue(), &request)?;
        let text = |key: &str| answer[key].as_str().filter(|text| !text.trim().is_empty()).map(str::to_owned);
        let missing =
            |key: &str| PairingError::Transient(format!("the answer of {} has no `{key}`", self.site.issue()));
        Ok(Issued {
            code: text("pair_code").ok_or_else(|| missing("pair_code"))?,
            poll_token: text("poll_token").ok_or_else(|| missing("poll_token"))?,
            lifetime: lifetime(&answer["expires_at"], date.unwrap_or_else(datetime::now)),
        })
    }

    /// Asks what has become of a code.
    ///
    /// # Errors
    /// It is not known.
    pub fn poll(&self, poll_token: &str, backends: &[Advertised]) -> Result<PollStatus, PairingError> {
        let url = self.site.poll();
        let (answer, _) = self.post(&url, &poll_request(poll_token, backends))?;
        match answer["status"].as_str() {
            Some("pending") => Ok(PollStatus::Pending),
            Some("expired") => Ok(PollStatus::Expired),
            Some("active") => Ok(PollStatus::Active(paired(&answer))),
            Some(other) => Err(PairingError::Transient(format!(
                "{url} answers with the unknown status `{}`",
                sanitize_for_log(other)
            ))),
            None => Err(PairingError::Transient(format!("the answer of {url} has no `status`"))),
        }
    }

    /// The document that was answered, and when by the server's clock.
    fn post(&self, url: &str, body: &Value) -> Result<(Value, Option<i64>), PairingError> {
        let (status, location, date, body) = exchange(&self.client, url, body.to_string().as_bytes())
            .map_err(|error| PairingError::Transient(format!("no answer from {url}: {error}")))?;
        let place = || format!("{url} answers HTTP {status}");
        match status {
            200..=299 if body.len() > ANSWER_MAX => {
                Err(PairingError::Transient(format!("the answer of {url} is longer than {ANSWER_MAX} bytes")))
            }
            200..=299 => match serde_json::from_slice(&body) {
                Ok(document @ Value::Object(_)) => Ok((document, date)),
                _ => Err(PairingError::Transient(format!("the answer of {url} is not a JSON object"))),
            },
            300..=399 => {
                let target = location.map_or_else(String::new, |to| format!(" to `{}`", sanitize_for_log(&to)));
                Err(PairingError::Permanent(format!("{}, a redirect{target}; redirects are not followed", place())))
            }
            408 | 429 | 500.. => Err(PairingError::Transient(format!("{}{}", place(), message_in(&body)))),
            _ => Err(PairingError::Permanent(format!("{}{}", place(), message_in(&body)))),
        }
    }
}

fn poll_request(poll_token: &str, backends: &[Advertised]) -> Value {
    let advertised =
        |Advertised { kind, url, models }: &Advertised| json!({"kind": kind.name(), "url": url, "models": models});
    let backends: Vec<Value> = backends.iter().map(advertised).collect();
    json!({"poll_token": poll_token, "capabilities": {"backends": backends, "agent_version": AGENT_VERSION}})
}

type Answer = (u16, Option<String>, Option<i64>, Vec<u8>);

fn exchange(client: &Client, url: &str, body: &[u8]) -> Result<Answer, Error> {
    let lease = client.lease();
    let response = lease.post(url, body, EXCHANGE_TIME)?;
    let (status, location) = (response.status().as_u16(), text_of(&response, header::LOCATION));
    let date = text_of(&response, header::DATE).and_then(|date| datetime::parse_http(&date));
    let (body, end) = read_bounded(response.into_body(), ANSWER_MAX + 1);
    if body.len() <= ANSWER_MAX {
        end?;
        lease.give_back();
    }
    Ok((status, location, date, body))
}

fn text_of(response: &Response<Body>, name: header::HeaderName) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.to_owned())
}

/// What a refusal says, where servers say it.
fn message_in(body: &[u8]) -> String {
    let document: Value = serde_json::from_slice(body).unwrap_or_default();
    let places = [&document["error"]["message"], &document["error"], &document["message"], &document["detail"]];
    let message = places.into_iter().find_map(Value::as_str);
    let message = message.map_or_else(|| String::from_utf8_lossy(body), Into::into);
    let message = message.trim();
    if message.is_empty() { String::new() } else { format!(": {}", sanitize_for_log(message)) }
}

/// How long a code is good that expires then, as of `now`, Unix seconds of the server's clock if possible. Where that makes no
/// sense, be it for a clock that is wrong, it is the protocol's ten minutes.
fn lifetime(expires_at: &Value, now: i64) -> Duration {
    let at = match expires_at {
        Value::String(text) => datetime::parse_rfc3339(text).or_else(|| text.trim().parse().ok()),
        // Whatever is behind a point is less than a second.
        number => number.to_string().split('.').next().and_then(|seconds| seconds.parse().ok()),
    };
    let at = at.map(|at| if at > SECONDS_MAX { at / 1000 } else { at });
    let left = at.and_then(|at| u64::try_from(at.checked_sub(now)?).ok()).map(Duration::from_secs);
    left.filter(|left| !left.is_zero() && *left <= LIFETIME).unwrap_or(LIFETIME)
}

fn paired(answer: &Value) -> Paired {
    let text = |key: &str| answer[key].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    // TOML has no larger numbers. Some servers write a whole number as a float, or as a text.
    let number = |value: &Value| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let number = text.strip_suffix(".0").unwrap_or(&text).parse::<i64>();
        number.ok().and_then(|number| u64::try_from(number).ok())
    };
    let mut models: Vec<ModelTerms> = Vec::new();
    for entry in answer["model_config"].as_array().into_iter().flatten() {
        match entry["model_id"].as_str() {
            Some(id) if models.iter().all(|model| model.model_id != id) => models.push(ModelTerms {
                model_id: id.to_owned(),
                input_per_1m: number(&entry["input_per_1m"]),
                output_per_1m: number(&entry["output_per_1m"]),
                max_concurrent: number(&entry["max_concurrent"]),
            }),
            Some(_) => {}
            None => log::warn!("the coordinator's `model_config` has an entry without a `model_id`"),
        }
    }
    Paired { host_token: text("host_token"), provider_id: text("provider_id"), models }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Kind;

    #[test]
    fn a_question_is_json_whatever_is_in_it() {
        let models = vec!["a\"b".to_owned(), "\u{1}\u{e9}".to_owned()];
        let backend = Advertised { kind: Kind::Vllm, url: "http://h:1".to_owned(), models: models.clone() };
        let expected = json!({"poll_token": "t\\", "capabilities": {
            "backends": [{"kind": "vllm", "url": "http://h:1", "models": models}], "agent_version": AGENT_VERSION}});
        assert_eq!(poll_request("t\\", &[backend]), expected);
    }

    #[test]
    fn every_form_of_the_expiry_counts_from_the_servers_clock() {
        let now = 784_111_777;
        for (expires_at, seconds) in [
            (json!("1994-11-06T08:54:37Z"), 300),
            (json!("1994-11-06T09:54:37.25+01:00"), 300),
            (json!(now + 42), 42),
            (json!((now + 42) * 1000), 42),
            (json!((now + 42) as f64 + 0.5), 42),
            (json!("784111819"), 42),
            (json!(now - 5), 600),
            (json!(now + 100_000), 600),
            (json!("soon"), 600),
            (json!(i64::MIN), 600),
            (Value::Null, 600),
        ] {
            assert_eq!(lifetime(&expires_at, now), Duration::from_secs(seconds), "{expires_at}");
        }
    }

    #[test]
    fn a_number_is_read_however_it_is_written_and_nothing_else_is() {
        for (written, number) in [
            (json!(300_000), Some(300_000)),
            (json!(300_000.0), Some(300_000)),
            (json!("300000"), Some(300_000)),
            (json!(0), Some(0)),
            (json!(u64::MAX), None),
            (json!(-1), None),
            (json!(0.5), None),
            (json!("much"), None),
            (json!([1]), None),
            (Value::Null, None),
        ] {
            let answer = json!({"model_config": [{"model_id": "m", "input_per_1m": written}]});
            assert_eq!(paired(&answer).models[0].input_per_1m, number, "{written}");
        }
    }

    #[test]
    fn a_refusal_is_heard_wherever_it_stands() {
        for (body, message) in [
            (r#"{"error":{"message":"no\nmore"}}"#, ": no\\nmore"),
            (r#"{"error":"no more"}"#, ": no more"),
            (r#"{"detail":"no more"}"#, ": no more"),
            ("gateway\u{1b}[2J", ": gateway\\u{1b}[2J"),
            ("", ""),
        ] {
            assert_eq!(message_in(body.to_string().as_bytes()), message);
        }
    }
}
