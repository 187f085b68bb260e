//! [`HttpBackend`] implements [`Backend`] for an HTTP server of any [`Kind`].

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::context_window;
use super::error::BackendResult;
use super::http::{ApiKey, Client};
use super::kind::{BaseUrl, Kind};
use super::listing;
use super::probe::Probe;
use super::request::body_of;
use super::server_support::ServerSupport;
use super::stream::relay;
use super::{Backend, BackendHealth, BackendModel, Job, JobResult, JobSink, WireFormat};

/// An HTTP server of a known kind.
pub struct HttpBackend {
    kind: Kind,
    id: String,
    /// Root of the server's own routes.
    root: String,
    /// Root of the OpenAI and Anthropic routes.
    api: String,
    client: Client,
    support: ServerSupport,
    /// Context windows by model, from the last probe.
    windows: Mutex<HashMap<String, u32>>,
}

impl HttpBackend {
    /// `url` is optional for hosted kinds; `api_key_env` names the environment variable with the API key.
    pub fn new(kind: Kind, url: Option<BaseUrl>, api_key_env: Option<&str>) -> HttpBackend {
        let (root, api) = match (&url, kind.hosted_url()) {
            (None, hosted) => (hosted.unwrap_or_default().to_owned(), hosted.unwrap_or_default().to_owned()),
            (Some(url), Some(_)) => (url.as_str().to_owned(), url.as_str().to_owned()),
            (Some(url), None) => (url.root().to_owned(), format!("{}/v1", url.root())),
        };
        let client = Client::new(&root, kind.is_hosted(), ApiKey::from_env(api_key_env));
        HttpBackend {
            kind,
            id: format!("{kind} at {root}"),
            root,
            api,
            client,
            support: ServerSupport::default(),
            windows: Mutex::default(),
        }
    }

    /// Fills in context windows from the previous probe if a request of this probe failed, so that a slow response does not
    /// change the offer.
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
        self.support.check(format)?;
        let route = match format {
            WireFormat::Openai => "chat/completions",
            WireFormat::Anthropic => "messages",
        };
        let url = format!("{}/{route}", self.api);
        let outcome = relay(&self.client, &url, body, Duration::from_millis(u64::from(deadline_ms)), sink);
        self.support.learn(format, outcome, &self.id)
    }

    /// The kind.
    pub(super) fn server_kind(&self) -> Kind {
        self.kind
    }

    /// Starts a probe.
    pub(super) fn start_probe(&self) -> Probe<'_> {
        Probe::start(self.kind, &self.root, &self.api, &self.client)
    }

    /// The listed models, with their context windows.
    pub(super) fn models(&self, probe: &Probe<'_>) -> BackendResult<Vec<BackendModel>> {
        let listed = listing::parse(self.kind, &probe.listing()?)?;
        let models = context_window::fill_in(self.kind, listed, probe);
        Ok(self.remember_windows(models, probe.has_failed()))
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
        self.models(&self.start_probe())
    }

    fn health(&self) -> BackendResult<BackendHealth> {
        let started = Instant::now();
        let probe = self.start_probe();
        let result = match self.kind.health_path() {
            Some(_) => probe.health(),
            None => probe.listing().map(drop),
        };
        Ok(match result {
            Ok(()) => {
                let latency_ms = u32::try_from(started.elapsed().as_millis()).ok();
                BackendHealth { reachable: true, latency_ms, last_error: None }
            }
            Err(e) => BackendHealth { reachable: false, latency_ms: None, last_error: Some(e.to_string()) },
        })
    }

    fn probe(&self) -> BackendResult<Vec<BackendModel>> {
        let probe = self.start_probe();
        let listed = probe.health().and_then(|()| self.models(&probe));
        listed.inspect_err(|e| self.support.learn_from_probe(e))
    }

    fn ready(&self) -> BackendResult<()> {
        self.client.ready()
    }

    fn serves(&self, format: WireFormat) -> bool {
        self.support.check(format).is_ok()
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
