//! The requests of one probe. They share one time limit.

use std::cell::Cell;
use std::time::{Duration, Instant};

use ureq::Body;
use ureq::http::Response;

use super::http::{AgentLease, Client, connect_error, read_bounded};
use super::{BackendError, BackendResult, Kind};

/// Time limit of one probe, all its requests together.
pub const PROBE_TIME: Duration = Duration::from_secs(3);

/// Largest response that a probe reads, in bytes; OpenRouter's listing is about 1 MB.
const RESPONSE_BYTES_MAX: usize = 16 << 20;

/// One probe of a server.
pub struct Probe<'a> {
    kind: Kind,
    /// The root of the server's own routes.
    root: &'a str,
    /// The root of the OpenAI routes.
    api: &'a str,
    client: &'a Client,
    until: Instant,
    failed: Cell<bool>,
}

impl<'a> Probe<'a> {
    /// Starts a probe and its time limit.
    pub fn start(kind: Kind, root: &'a str, api: &'a str, client: &'a Client) -> Probe<'a> {
        Probe { kind, root, api, client, until: Instant::now() + PROBE_TIME, failed: Cell::new(false) }
    }

    /// Whether any request has failed.
    pub fn has_failed(&self) -> bool {
        self.failed.get()
    }

    /// Checks the health. Succeeds if the kind has no health check or the server lacks it: the listing then is the check.
    pub fn health(&self) -> BackendResult<()> {
        let Some(path) = self.kind.health_path() else { return Ok(()) };
        match self.get_below_root(path) {
            Ok(_) => Ok(()),
            Err(BackendError::ModelNotFound(response) | BackendError::RouteNotFound(response))
                if response.status == 404 =>
            {
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// `GET` of the model listing.
    pub fn listing(&self) -> BackendResult<Vec<u8>> {
        let url = format!("{}/models", self.api);
        self.request(|lease, time| lease.get(&url, time))
    }

    /// `GET` of one of the server's own routes.
    pub fn get_below_root(&self, path: &str) -> BackendResult<Vec<u8>> {
        let url = format!("{}{path}", self.root);
        self.request(|lease, time| lease.get(&url, time))
    }

    /// `POST` of JSON to one of the server's own routes.
    pub fn post_below_root(&self, path: &str, body: &[u8]) -> BackendResult<Vec<u8>> {
        let url = format!("{}{path}", self.root);
        self.request(|lease, time| lease.post(&url, body, time))
    }

    fn request(
        &self,
        send: impl Fn(&AgentLease<'_>, Duration) -> Result<Response<Body>, ureq::Error>,
    ) -> BackendResult<Vec<u8>> {
        self.exchange(send).inspect_err(|_| self.failed.set(true))
    }

    fn exchange(
        &self,
        send: impl Fn(&AgentLease<'_>, Duration) -> Result<Response<Body>, ureq::Error>,
    ) -> BackendResult<Vec<u8>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(BackendError::ProbeTimeout(PROBE_TIME.as_secs()));
        }
        let lease = self.client.lease();
        // Connect timeouts are whole milliseconds.
        let response = send(&lease, left.max(Duration::from_millis(1))).map_err(probe_error)?;
        let status = response.status().as_u16();
        let (body, end) = read_bounded(response.into_body(), RESPONSE_BYTES_MAX);
        if !(200..300).contains(&status) {
            return Err(self.client.status_error(status, &body));
        }
        end.map_err(|e| probe_error(e.into()))?;
        lease.give_back();
        Ok(body)
    }
}

/// A probe has no job deadline: a timeout means that the backend does not respond.
fn probe_error(e: ureq::Error) -> BackendError {
    match connect_error(e) {
        BackendError::DeadlinePassed => BackendError::ProbeTimeout(PROBE_TIME.as_secs()),
        e => e,
    }
}
