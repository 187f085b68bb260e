//! The two requests of a pairing and their responses. Responses are bounded, and their text is sanitized before it is printed.

use std::time::Duration;

use serde_json::{Value, json};
use ureq::http::{Response, header};
use ureq::{Body, Error};

use super::{Advertised, CoordinatorUrls, Issued, ModelTerms, Paired};
use crate::backend::{Client, RequestBody, read_bounded};
use crate::link::protocol::AGENT_VERSION;
use crate::link::response::FROM_BETWEEN;
use crate::logging::sanitize_for_log;
use crate::net::tls::ExtraRoots;
use crate::sys::datetime;

/// The lifetime of a code if the server does not state it.
pub const LIFETIME: Duration = Duration::from_secs(600);
/// The timeout of one request and its response.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum size of a response, in bytes: the terms of several thousand models.
const RESPONSE_BYTES_MAX: usize = 1 << 20;
/// The largest Unix time that is in seconds; larger ones are in milliseconds.
const SECONDS_MAX: i64 = 100_000_000_000;

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PairingError {
    /// A retry would fail as well.
    Permanent(String),
    /// A retry may succeed.
    Transient(String),
}

impl PairingError {
    /// Removes this secret from the error, because the server may have quoted it.
    pub fn without(self, secret: &str) -> PairingError {
        match self {
            PairingError::Permanent(why) => PairingError::Permanent(why.replace(secret, "…")),
            PairingError::Transient(why) => PairingError::Transient(why.replace(secret, "…")),
        }
    }
}

/// The state of a code.
pub enum PollStatus {
    /// The code has not been entered yet.
    Pending,
    /// The code has expired.
    Expired,
    /// The code was entered.
    Active(Paired),
}

/// A client of one coordinator's pairing API.
pub struct PairingClient {
    urls: CoordinatorUrls,
    client: Client,
}

impl PairingClient {
    /// Creates a client that also trusts `roots` and uses the proxy from the environment, like the agent's connection.
    pub fn new(urls: CoordinatorUrls, roots: &ExtraRoots) -> PairingClient {
        let client = Client::trusting(urls.base(), roots);
        PairingClient { urls, client }
    }

    /// Requests a code.
    ///
    /// # Errors
    /// The server issued no code.
    pub fn issue(&self, public_key_base64: &str) -> Result<Issued, PairingError> {
        let request = json!({"agent_pubkey": public_key_base64});
        let (answer, date) = self.post(&self.urls.issue(), &request)?;
        let text = |key: &str| answer[key].as_str().filter(|text| !text.trim().is_empty()).map(str::to_owned);
        let missing =
            |key: &str| PairingError::Transient(format!("the response of {} has no `{key}`", self.urls.issue()));
        Ok(Issued {
            code: text("pair_code").ok_or_else(|| missing("pair_code"))?,
            poll_token: text("poll_token").ok_or_else(|| missing("poll_token"))?,
            lifetime: lifetime(&answer["expires_at"], date.unwrap_or_else(datetime::now)),
        })
    }

    /// Requests the state of a code.
    ///
    /// # Errors
    /// The server did not return the state.
    pub fn poll(&self, poll_token: &str, backends: &[Advertised]) -> Result<PollStatus, PairingError> {
        let url = self.urls.poll();
        let (answer, _) = self.post(&url, &poll_request(poll_token, backends))?;
        match answer["status"].as_str() {
            Some("pending") => Ok(PollStatus::Pending),
            Some("expired") => Ok(PollStatus::Expired),
            Some("active") => Ok(PollStatus::Active(paired(&answer))),
            Some(other) => Err(PairingError::Transient(format!(
                "{url} answers with the unknown status `{}`",
                sanitize_for_log(other)
            ))),
            None => Err(PairingError::Transient(format!("the response of {url} has no `status`"))),
        }
    }

    /// Returns the JSON object of the response, and the server's time.
    fn post(&self, url: &str, body: &Value) -> Result<(Value, Option<i64>), PairingError> {
        let (status, location, date, body) = exchange(&self.client, url, &body.to_string().into())
            .map_err(|error| PairingError::Transient(format!("no answer from {url}: {error}")))?;
        let place = || format!("{url} answers HTTP {status}");
        match status {
            200..=299 if body.len() > RESPONSE_BYTES_MAX => {
                Err(PairingError::Transient(format!("the response of {url} is longer than {RESPONSE_BYTES_MAX} bytes")))
            }
            200..=299 => match serde_json::from_slice(&body) {
                Ok(document @ Value::Object(_)) => Ok((document, date)),
                _ => {
                    Err(PairingError::Transient(format!("the response of {url} is not a JSON object; {FROM_BETWEEN}")))
                }
            },
            300..=399 => {
                let target = location.map_or_else(String::new, |to| format!(" to `{}`", sanitize_for_log(&to)));
                let what = format!("{}, a redirect{target}; redirects are not followed; {FROM_BETWEEN}", place());
                Err(PairingError::Permanent(what))
            }
            511 => Err(PairingError::Transient(format!("{}; {FROM_BETWEEN}{}", place(), message_in(&body)))),
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

fn exchange(client: &Client, url: &str, body: &RequestBody) -> Result<Answer, Error> {
    let lease = client.lease();
    let response = lease.post(url, body, EXCHANGE_TIMEOUT)?;
    let (status, location) = (response.status().as_u16(), text_of(&response, header::LOCATION));
    let date = text_of(&response, header::DATE).and_then(|date| datetime::parse_http(&date));
    let (body, end) = read_bounded(response.into_body(), RESPONSE_BYTES_MAX + 1);
    if body.len() <= RESPONSE_BYTES_MAX {
        end?;
        lease.give_back();
    }
    Ok((status, location, date, body))
}

fn text_of(response: &Response<Body>, name: header::HeaderName) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.to_owned())
}

/// The message of an error response, in any of the usual formats.
fn message_in(body: &[u8]) -> String {
    let document: Value = serde_json::from_slice(body).unwrap_or_default();
    let places = [&document["error"]["message"], &document["error"], &document["message"], &document["detail"]];
    let message = places.into_iter().find_map(Value::as_str);
    let message = message.map_or_else(|| String::from_utf8_lossy(body), Into::into);
    let message = message.trim();
    if message.is_empty() { String::new() } else { format!(": {}", sanitize_for_log(message)) }
}

/// The lifetime of a code that expires at `expires_at`, as of `now`, Unix seconds of the server's clock if known. [`LIFETIME`], as
/// in the protocol, if the result is implausible, for example because a clock is wrong.
fn lifetime(expires_at: &Value, now: i64) -> Duration {
    let at = match expires_at {
        Value::String(text) => datetime::parse_rfc3339(text).or_else(|| text.trim().parse().ok()),
        // Fractions of a second are dropped.
        number => number.to_string().split('.').next().and_then(|seconds| seconds.parse().ok()),
    };
    let at = at.map(|at| if at > SECONDS_MAX { at / 1000 } else { at });
    let left = at.and_then(|at| u64::try_from(at.checked_sub(now)?).ok()).map(Duration::from_secs);
    left.filter(|left| !left.is_zero() && *left <= LIFETIME).unwrap_or(LIFETIME)
}

fn paired(answer: &Value) -> Paired {
    let text = |key: &str| answer[key].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    // TOML integers end at `i64::MAX`. Some servers write an integer as a float or a string.
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
            None => crate::log_repeatable!(
                log::Level::Warn,
                "the coordinator's `model_config` has an entry without a `model_id`"
            ),
        }
    }
    Paired { host_token: text("host_token"), provider_id: text("provider_id"), models }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Kind;

    #[test]
    fn poll_request_is_json_whatever_it_contains() {
        let models = vec!["a\"b".to_owned(), "\u{1}\u{e9}".to_owned()];
        let backend = Advertised { kind: Kind::Vllm, url: "http://h:1".to_owned(), models: models.clone() };
        let expected = json!({"poll_token": "t\\", "capabilities": {
            "backends": [{"kind": "vllm", "url": "http://h:1", "models": models}], "agent_version": AGENT_VERSION}});
        assert_eq!(poll_request("t\\", &[backend]), expected);
    }

    #[test]
    fn lifetime_accepts_every_form_of_expires_at_and_counts_from_the_servers_clock() {
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
    fn paired_reads_integers_in_every_form_and_nothing_else() {
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
    fn message_in_finds_the_message_in_every_usual_form() {
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
