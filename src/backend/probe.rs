//! The requests of one probe. They share one time limit.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ureq::http::Response;

use super::http::{AgentLease, Client, RequestBody, connect_error, read_bounded};
use super::probe_json::Body;
use super::{BackendError, BackendResult, Kind};

/// Time limit of one probe, all its requests together.
pub const PROBE_TIME: Duration = Duration::from_secs(3);

/// Time limit of each readiness query to a gateway; leaves time for the rest of the probe.
const READINESS_TIME: Duration = Duration::from_millis(500);

/// The response of servers that are built with FastAPI to a path that they do not have.
const FASTAPI_NOT_FOUND: &[u8] = br#"{"detail":"Not Found"}"#;

/// Maximum number of bytes of a response that a probe reads. The listing of OpenRouter's 500 models is about as large.
const RESPONSE_BYTES_MAX: usize = 1 << 20;

/// One probe of a server.
pub struct Probe<'a> {
    kind: Kind,
    /// The root of the server's own routes.
    root: &'a str,
    /// The root of the OpenAI routes.
    api: &'a str,
    client: &'a Client,
    until: Instant,
    /// The response to the health check, once it has succeeded.
    health: OnceLock<Body>,
}

impl<'a> Probe<'a> {
    /// Starts a probe and its time limit.
    pub fn start(kind: Kind, root: &'a str, api: &'a str, client: &'a Client) -> Probe<'a> {
        Probe { kind, root, api, client, until: Instant::now() + PROBE_TIME, health: OnceLock::new() }
    }

    /// Checks the health. Succeeds if the kind has no health check or the server lacks it: the listing then is the check.
    pub fn health(&self) -> BackendResult<()> {
        let Some(path) = self.kind.health_path() else { return Ok(()) };
        let url = format!("{}{path}", self.root);
        match self.exchange(|lease, time| lease.get(&url, time)) {
            Ok((404, _)) => Ok(()),
            result => {
                let body = self.successful(result)?;
                let _ = self.health.set(body);
                Ok(())
            }
        }
    }

    /// The response to a successful health check.
    pub fn health_response(&self) -> Option<&Body> {
        self.health.get()
    }

    /// Asks a gateway whether it is ready. Only a 5xx means no: a server that lacks the path or does not respond in time does not say.
    pub fn readiness(&self) -> BackendResult<()> {
        if !self.kind.may_be_gateway() {
            return Ok(());
        }
        let Some(response) = self.ask_readiness("/readiness")? else { return Ok(()) };
        // LiteLLM, which is built with FastAPI, answers `/health` by requesting a paid completion of each model. It has this path instead.
        if response == FASTAPI_NOT_FOUND && self.ask_readiness("/health/readiness")?.is_none() {
            return Ok(());
        }
        self.ask_readiness("/health").map(drop)
    }

    /// Queries one path. Returns `None` if the server is ready, and the response if it does not say.
    fn ask_readiness(&self, path: &str) -> BackendResult<Option<Vec<u8>>> {
        let url = format!("{}{path}", self.root);
        match self.exchange(|lease, time| lease.get(&url, time.min(READINESS_TIME))) {
            Ok((200..300, _)) => Ok(None),
            Ok((status @ 500.., _)) => Err(BackendError::NotReady(status)),
            Ok((_, body)) => Ok(Some(body.bytes)),
            Err(_) => Ok(Some(Vec::new())),
        }
    }

    /// `GET` of the model listing.
    pub fn listing(&self) -> BackendResult<Body> {
        let url = format!("{}/models", self.api);
        self.successful(self.exchange(|lease, time| lease.get(&url, time)))
    }

    /// `GET` of one of the server's own routes. Empty if the server does not have it, and `None` if the server does not answer.
    pub fn ask(&self, path: &str) -> Option<Body> {
        let url = format!("{}{path}", self.root);
        answer(self.exchange(|lease, time| lease.get(&url, time)))
    }

    /// Whether the server rejects the API key, or the lack of one, for one of its own routes.
    pub fn is_rejected(&self, path: &str) -> bool {
        let url = format!("{}{path}", self.root);
        matches!(self.exchange(|lease, time| lease.get(&url, time)), Ok((401 | 403, _)))
    }

    /// As [`Probe::ask`], for a `POST` of JSON.
    pub fn ask_with(&self, path: &str, body: &RequestBody) -> Option<Body> {
        let url = format!("{}{path}", self.root);
        answer(self.exchange(|lease, time| lease.post(&url, body, time)))
    }

    fn successful(&self, result: BackendResult<(u16, Body)>) -> BackendResult<Body> {
        match result? {
            (200..300, body) => Ok(body),
            (status, body) => Err(self.client.status_error(status, &body.bytes)),
        }
    }

    fn exchange(
        &self,
        send: impl Fn(&AgentLease<'_>, Duration) -> Result<Response<ureq::Body>, ureq::Error>,
    ) -> BackendResult<(u16, Body)> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(BackendError::ProbeTimeout(PROBE_TIME.as_secs()));
        }
        let lease = self.client.lease();
        // Connect timeouts are whole milliseconds.
        let response = send(&lease, left.max(Duration::from_millis(1))).map_err(probe_error)?;
        let status = response.status().as_u16();
        let (bytes, end) = read_bounded(response.into_body(), RESPONSE_BYTES_MAX);
        if (200..300).contains(&status) {
            end.map_err(|e| probe_error(e.into()))?;
        }
        let is_cut = bytes.len() == RESPONSE_BYTES_MAX;
        // A connection can be used again only after its response was read to the end.
        if (200..300).contains(&status) && !is_cut {
            lease.give_back();
        }
        Ok((status, Body { bytes, is_cut }))
    }
}

/// The answer in a response: empty if the server lacks the route or the model, `None` if it is too busy to answer.
fn answer(result: BackendResult<(u16, Body)>) -> Option<Body> {
    match result.ok()? {
        (200..300, body) => Some(body),
        (408 | 425 | 429, _) => None,
        (400..=499 | 501, _) => Some(Body::default()),
        _ => None,
    }
}

/// A probe has no job deadline: a timeout means that the backend does not respond.
fn probe_error(e: ureq::Error) -> BackendError {
    match connect_error(e) {
        BackendError::DeadlinePassed => BackendError::ProbeTimeout(PROBE_TIME.as_secs()),
        e => e,
    }
}
