//! The one backend implementation: an HTTP server of some [`Kind`].

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ureq::Body;
use ureq::http::Response;

use super::api_key::ApiKey;
use super::context_window;
use super::error::{BackendError, BackendResult};
use super::http::{AgentLease, Client, read_bounded};
use super::kind::{BaseUrl, Kind};
use super::listing;
use super::relay::{connect_error, relay};
use super::request::body_of;
use super::{Backend, BackendHealth, BackendModel, Job, JobResult, JobSink, WireFormat};

/// Time for one probe, all its questions together.
pub const PROBE_TIME: Duration = Duration::from_secs(3);

/// The largest answer that a probe reads, in bytes; OpenRouter's listing is about 1 MB.
const ANSWER_MAX: usize = 16 << 20;

/// An HTTP server of a known kind.
pub struct HttpBackend {
    kind: Kind,
    id: String,
    /// Where the server's own routes start.
    root: String,
    /// Where the OpenAI routes start.
    api: String,
    client: Client,
    /// The windows that the last probe found.
    windows: Mutex<HashMap<String, u32>>,
}

impl HttpBackend {
    /// `url` may be left out for hosted kinds; `api_key_env` names the environment variable with the key.
    pub fn new(kind: Kind, url: Option<BaseUrl>, api_key_env: Option<&str>) -> HttpBackend {
        let (root, api) = match (&url, kind.hosted_url()) {
            (None, hosted) => (hosted.unwrap_or_default().to_owned(), hosted.unwrap_or_default().to_owned()),
            (Some(url), Some(_)) => (url.as_str().to_owned(), url.as_str().to_owned()),
            (Some(url), None) => (url.root().to_owned(), format!("{}/v1", url.root())),
        };
        let client = Client::new(&root, kind.is_hosted(), ApiKey::from_env(api_key_env));
        HttpBackend { kind, id: format!("{kind} at {root}"), root, api, client, windows: Mutex::default() }
    }

    /// Gives a model whose window could not be asked for this time the one that it had the last time, so that a slow
    /// answer does not change the offer.
    fn remember_windows(&self, mut models: Vec<BackendModel>, some_failed: bool) -> Vec<BackendModel> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if some_failed {
            for model in &mut models {
                model.context_window = model.context_window.or_else(|| windows.get(&model.model_id).copied());
            }
        }
        *windows = models.iter().filter_map(|m| Some((m.model_id.clone(), m.context_window?))).collect();
        models
    }

    fn run(
        &self,
        format: WireFormat,
        body: Vec<u8>,
        deadline_ms: u32,
        sink: &mut dyn JobSink,
    ) -> BackendResult<JobResult> {
        self.client.ready()?;
        let route = match format {
            WireFormat::Openai => "chat/completions",
            WireFormat::Anthropic => "messages",
        };
        let url = format!("{}/{route}", self.api);
        relay(&self.client, &url, body, Duration::from_millis(u64::from(deadline_ms)), sink)
    }

    /// The kind.
    pub(super) fn server_kind(&self) -> Kind {
        self.kind
    }

    /// Questions that share so much time.
    pub(super) fn probe_for(&self, time: Duration) -> Probe<'_> {
        Probe { backend: self, until: Instant::now() + time, failed: Cell::new(false) }
    }
}

/// The questions of one probe, which share its time.
pub struct Probe<'a> {
    backend: &'a HttpBackend,
    until: Instant,
    /// Whether a question got no answer.
    failed: Cell<bool>,
}

impl Probe<'_> {
    /// Passes where the kind has no health check of its own, or this server lacks it: then the listing is the check.
    pub(super) fn health(&self) -> BackendResult<()> {
        let Some(path) = self.backend.kind.health_path() else { return Ok(()) };
        match self.get_below_root(path) {
            Ok(_) => Ok(()),
            Err(BackendError::ModelNotFound(answer)) if answer.status == 404 => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// The listing, with its windows.
    pub(super) fn models(&self) -> BackendResult<Vec<BackendModel>> {
        let listed = listing::parse(self.backend.kind, &self.listing()?)?;
        let models = context_window::fill_in(self.backend.kind, listed, self);
        Ok(self.backend.remember_windows(models, self.failed.get()))
    }

    fn listing(&self) -> BackendResult<Vec<u8>> {
        let url = format!("{}/models", self.backend.api);
        self.ask(|lease, time| lease.get(&url, time))
    }

    /// `GET` of one of the server's own routes.
    pub fn get_below_root(&self, path: &str) -> BackendResult<Vec<u8>> {
        let url = format!("{}{path}", self.backend.root);
        self.ask(|lease, time| lease.get(&url, time))
    }

    /// `POST` of JSON to one of the server's own routes.
    pub fn post_below_root(&self, path: &str, body: &[u8]) -> BackendResult<Vec<u8>> {
        let url = format!("{}{path}", self.backend.root);
        self.ask(|lease, time| lease.post(&url, body, time))
    }

    fn ask(
        &self,
        put: impl Fn(&AgentLease<'_>, Duration) -> Result<Response<Body>, ureq::Error>,
    ) -> BackendResult<Vec<u8>> {
        let answer = self.answer(put);
        if answer.is_err() {
            self.failed.set(true);
        }
        answer
    }

    fn answer(
        &self,
        put: impl Fn(&AgentLease<'_>, Duration) -> Result<Response<Body>, ureq::Error>,
    ) -> BackendResult<Vec<u8>> {
        if Instant::now() >= self.until {
            return Err(BackendError::ProbeTimeout(PROBE_TIME.as_secs()));
        }
        let time = self.until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let client = &self.backend.client;
        let lease = client.lease();
        let response = put(&lease, time).map_err(probe_error)?;
        let status = response.status().as_u16();
        let (body, end) = read_bounded(response.into_body(), ANSWER_MAX);
        if !(200..300).contains(&status) {
            return Err(client.status_error(status, &body));
        }
        end.map_err(|e| probe_error(e.into()))?;
        lease.give_back();
        Ok(body)
    }
}

/// A probe has no deadline of a job's: its time being over means that the backend does not answer.
fn probe_error(e: ureq::Error) -> BackendError {
    match connect_error(e) {
        BackendError::DeadlinePassed => BackendError::ProbeTimeout(PROBE_TIME.as_secs()),
        e => e,
    }
}

impl Backend for HttpBackend {
    fn kind(&self) -> &'static str {
        self.kind.name()
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn list_models(&self) -> BackendResult<Vec<BackendModel>> {
        self.probe_for(PROBE_TIME).models()
    }

    fn health(&self) -> BackendResult<BackendHealth> {
        let asked = Instant::now();
        let probe = self.probe_for(PROBE_TIME);
        let checked = match self.kind.health_path() {
            Some(_) => probe.health(),
            None => probe.listing().map(drop),
        };
        Ok(match checked {
            Ok(()) => {
                let latency_ms = u32::try_from(asked.elapsed().as_millis()).ok();
                BackendHealth { reachable: true, latency_ms, last_error: None }
            }
            Err(e) => BackendHealth { reachable: false, latency_ms: None, last_error: Some(e.to_string()) },
        })
    }

    fn probe(&self) -> BackendResult<Vec<BackendModel>> {
        let probe = self.probe_for(PROBE_TIME);
        probe.health()?;
        probe.models()
    }

    fn ready(&self) -> BackendResult<()> {
        self.client.ready()
    }

    fn execute(&self, job: &Job, sink: &mut dyn JobSink) -> BackendResult<JobResult> {
        self.run(job.format, body_of(job), job.deadline_ms, sink)
    }

    fn execute_last(&self, job: Job, sink: &mut dyn JobSink) -> BackendResult<JobResult> {
        let (format, body, deadline_ms) = (job.format, body_of(&job), job.deadline_ms);
        drop(job);
        self.run(format, body, deadline_ms, sink)
    }
}
