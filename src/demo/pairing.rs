//! The coordinator's side of pairing: it issues codes, serves the page where a person enters one, and returns the terms of the agent.
//!
//! The module shares no code with the agent's side, so that the demo detects mistakes there.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};

use super::DEMO_PRICE_PER_1M;
use super::agent_protocol::provider_id;
use crate::http_server::connection::{Exchange, error_document, percent_decoded};
use crate::sys::datetime::rfc3339;

/// Lifetime of a code.
const LIFETIME: Duration = Duration::from_secs(600);

/// Limit of pending pairings.
const OPEN_MAX: usize = 64;

/// Symbols of a code: 32 that are not easily confused.
const ALPHABET: &[u8; 32] = b"ABCDEFGHJKLMNPQRSTUVWXYZ23456789";

/// Concurrent jobs per model in the terms of a paired agent.
const MAX_CONCURRENT: u32 = 4;

/// The pending pairings.
#[derive(Default)]
pub(super) struct Pairings(Mutex<Vec<Pairing>>);

struct Pairing {
    code: String,
    poll_token: String,
    key: Vec<u8>,
    issued_at: Instant,
    /// Set once the code is entered. Every poll returns the same token, because a response may be lost.
    host_token: Option<String>,
}

/// Status and body of a response.
type Response = (u16, Value);

impl Pairings {
    /// Responds to one request.
    pub(super) fn handle(&self, exchange: &mut Exchange<'_>) {
        match (exchange.method(), exchange.path()) {
            ("POST", "/v1/host/pair/issue") => respond(exchange, |body| self.issue(body)),
            ("POST", "/v1/host/pair/poll") => respond(exchange, |body| self.poll(body)),
            ("GET", "/host/pair") => page(exchange, 200, "Enter the code that <code>usepod-agent setup</code> shows."),
            ("POST", "/host/pair") => match exchange.read_body() {
                Ok(form) if self.approve(&code_in(&form)) => {
                    page(exchange, 200, "Paired. <code>usepod-agent setup</code> continues in its terminal.");
                }
                Ok(_) => page(exchange, 404, "The code is unknown or has expired. Check the terminal."),
                Err(bad) => page(exchange, bad.status, "The form could not be read."),
            },
            (_, "/v1/host/pair/issue" | "/v1/host/pair/poll" | "/host/pair") => {
                exchange.respond_json(405, &error_document("this route does not take this method"));
            }
            _ => exchange.respond_json(404, &error_document("there is no such route")),
        }
    }

    fn issue(&self, body: &Value) -> Response {
        let key = body["agent_pubkey"].as_str().and_then(|key| STANDARD.decode(key).ok());
        let Some(key) = key.filter(|key| key.len() == 32) else {
            return (400, error_document("`agent_pubkey` is not 32 bytes in base64"));
        };
        let (Some(letters), Some(token)) = (random::<8>(), random::<24>()) else {
            return (500, error_document("the system has no random numbers"));
        };
        let letters = letters.map(|byte| char::from(ALPHABET[usize::from(byte % 32)]));
        let code = letters[..4].iter().chain(&['-']).chain(&letters[4..]).collect();
        let poll_token = URL_SAFE_NO_PAD.encode(token);
        let mut open = self.open();
        if open.len() >= OPEN_MAX {
            return (429, error_document("too many pairings are open; try again in a few minutes"));
        }
        let expires_at = rfc3339(SystemTime::now() + LIFETIME);
        let given = json!({"pair_code": code, "poll_token": poll_token, "expires_at": expires_at});
        open.push(Pairing { code, poll_token, key, issued_at: Instant::now(), host_token: None });
        (200, given)
    }

    fn poll(&self, body: &Value) -> Response {
        let Some(token) = body["poll_token"].as_str() else { return (400, error_document("`poll_token` is missing")) };
        let open = self.open();
        let Some(pairing) = open.iter().find(|pairing| pairing.poll_token == token) else {
            return status("expired");
        };
        let Some(host_token) = &pairing.host_token else { return status("pending") };
        let backends = body["capabilities"]["backends"].as_array().into_iter().flatten();
        let mut models: Vec<&Value> = Vec::new();
        for model in backends.flat_map(|backend| backend["models"].as_array().into_iter().flatten()) {
            if model.is_string() && !models.contains(&model) {
                models.push(model);
            }
        }
        let terms = |model_id: &&Value| {
            let price = DEMO_PRICE_PER_1M;
            json!({
                "model_id": model_id, "input_per_1m": price, "output_per_1m": price, "max_concurrent": MAX_CONCURRENT,
            })
        };
        let terms: Vec<Value> = models.iter().map(terms).collect();
        let id = provider_id(&pairing.key);
        (200, json!({"status": "active", "host_token": host_token, "provider_id": id, "model_config": terms}))
    }

    /// Approves the pairing with this code. Returns whether there is such a pairing.
    fn approve(&self, code: &str) -> bool {
        let mut open = self.open();
        let Some(pairing) = open.iter_mut().find(|pairing| plain(&pairing.code) == plain(code)) else { return false };
        if pairing.host_token.is_none() {
            pairing.host_token = random::<24>().map(|token| format!("host_{}", URL_SAFE_NO_PAD.encode(token)));
        }
        pairing.host_token.is_some()
    }

    /// Locks the pairings, and removes those that have expired.
    fn open(&self) -> MutexGuard<'_, Vec<Pairing>> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|pairing| pairing.issued_at.elapsed() < LIFETIME);
        open
    }
}

fn respond(exchange: &mut Exchange<'_>, of: impl FnOnce(&Value) -> Response) {
    let (status, document) = match exchange.read_json() {
        Ok(body) => of(&body),
        Err(bad) => (bad.status, error_document(&bad.message)),
    };
    exchange.respond_json(status, &document);
}

fn status(status: &str) -> Response {
    (200, json!({"status": status}))
}

/// Responds with the page; `says` is trusted HTML.
fn page(exchange: &mut Exchange<'_>, status: u16, says: &str) {
    let form =
        "<form method=\"post\"><input name=\"code\" autofocus autocomplete=\"off\"> <button>Pair</button></form>";
    let body =
        format!("<!doctype html>\n<title>Pair an agent</title>\n<h1>Pair an agent</h1>\n<p>{says}</p>\n{form}\n");
    exchange.respond(status, "text/html; charset=utf-8", &body);
}

/// The field `code` of a form.
fn code_in(form: &[u8]) -> String {
    let form = String::from_utf8_lossy(form);
    let fields = form.split('&').filter_map(|field| field.split_once('='));
    let mut codes =
        fields.filter(|(name, _)| *name == "code").map(|(_, value)| percent_decoded(&value.replace('+', " ")));
    codes.next().unwrap_or_default()
}

/// Normalizes a code as entered: any case, with or without the hyphen.
fn plain(code: &str) -> String {
    code.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_uppercase()).collect()
}

fn random<const N: usize>() -> Option<[u8; N]> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issued(pairings: &Pairings) -> Value {
        let (status, given) = pairings.issue(&json!({"agent_pubkey": STANDARD.encode([7_u8; 32])}));
        assert_eq!(status, 200);
        given
    }

    #[test]
    fn approve_accepts_a_code_in_any_spelling() {
        let pairings = Pairings::default();
        let (given, other) = (issued(&pairings), issued(&pairings));
        let code = given["pair_code"].as_str().unwrap();
        assert!(!pairings.approve("") && !pairings.approve("AAAA-AAA"));
        assert!(
            pairings.approve(&code_in(format!("x=1&code=+{}%20", code.replace('-', "").to_lowercase()).as_bytes()))
        );
        let poll = |of: &Value| {
            let capabilities = json!({"backends": [{"models": ["b", "a", "b"]}]});
            pairings.poll(&json!({"poll_token": of["poll_token"], "capabilities": capabilities})).1
        };
        assert_eq!(poll(&other)["status"], "pending");
        let active = poll(&given);
        assert_eq!((&active["status"], &active["model_config"][0]["model_id"]), (&json!("active"), &json!("b")));
        assert_eq!(active["model_config"].as_array().unwrap().len(), 2);
        assert_eq!(poll(&given), active, "a response may be lost");
        assert_eq!(poll(&json!({"poll_token": "x"}))["status"], "expired");
    }

    #[test]
    fn pending_pairings_are_bounded() {
        let pairings = Pairings::default();
        (0..OPEN_MAX).for_each(|_| drop(issued(&pairings)));
        assert_eq!(pairings.issue(&json!({"agent_pubkey": STANDARD.encode([7_u8; 32])})).0, 429);
        assert_eq!(pairings.issue(&json!({"agent_pubkey": "AAAA"})).0, 400);
    }
}
