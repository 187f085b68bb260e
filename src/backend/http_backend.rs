//! [`HttpBackend`] implements [`Backend`] for an HTTP server of any [`Kind`].

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::BackendResult;
use super::exclusion::{ExcludedModel, Exclusion, ProbedModels};
use super::http::{ApiKey, Client};
use super::kind::{BaseUrl, Kind};
use super::listing::{self, Listed, Listing};
use super::model_details::{self, KnownModels};
use super::probe::Probe;
use super::request::body_of;
use super::server_support::ServerSupport;
use super::stream::{Exchange, post};
use super::{Backend, BackendError, BackendHealth, BackendModel, Job, JobResult, JobSink, RawJob, WireFormat};

/// An HTTP server of a known kind.
pub struct HttpBackend {
    kind: Kind,
    id: String,
    /// Root of the server's own routes.
    root: String,
    /// Root of the OpenAI and Anthropic routes.
    api: String,
    client: Client,
    /// Whether the models run on the operator's own hardware.
    is_own: bool,
    support: ServerSupport,
    /// What the last probe learned about the models.
    known: Mutex<KnownModels>,
}

impl HttpBackend {
    /// `url` is optional for hosted kinds; `api_key_env` names the environment variable with the API key.
    pub fn new(kind: Kind, url: Option<BaseUrl>, api_key_env: Option<&str>) -> HttpBackend {
        let (root, api) = match (&url, kind.hosted_url()) {
            (None, hosted) => (hosted.unwrap_or_default().to_owned(), hosted.unwrap_or_default().to_owned()),
            (Some(url), Some(_)) => (url.as_str().to_owned(), url.as_str().to_owned()),
            (Some(url), None) => (url.root().to_owned(), format!("{}/v1", url.root())),
        };
        // A key for a server on the internet may belong to a service that charges.
        let may_charge = api_key_env.is_some() && url.as_ref().is_none_or(|url| !url.is_in_local_network());
        let client = Client::new(&root, kind.is_hosted(), ApiKey::from_env(api_key_env));
        HttpBackend {
            kind,
            id: format!("{kind} at {root}"),
            root,
            api,
            client,
            is_own: !kind.is_hosted() && !may_charge,
            support: ServerSupport::default(),
            known: Mutex::default(),
        }
    }

    /// The kind.
    pub(super) fn server_kind(&self) -> Kind {
        self.kind
    }

    /// Whether the server rejects jobs without an API key, although it lists its models without one, as llama.cpp does.
    pub fn needs_key(&self) -> bool {
        self.kind == Kind::LlamaCpp && self.start_probe().is_rejected("/props")
    }

    /// Starts a probe.
    pub(super) fn start_probe(&self) -> Probe<'_> {
        Probe::start(self.kind, &self.root, &self.api, &self.client)
    }

    /// The listed models, with their context windows, and without those that cannot be offered.
    pub(super) fn models(&self, probe: &Probe<'_>) -> BackendResult<ProbedModels> {
        let Listing { mut models, limit } = listing::parse(self.kind, &probe.listing()?)?;
        // Cloned, because the lock must not be held during the queries.
        let known = self.known().clone();
        let known = model_details::fill_in(self.kind, &mut models, probe, &known);
        *self.known() = known;
        let ids: HashSet<&str> = models.iter().map(|listed| &*listed.model.model_id).collect();
        self.support.retain_models(|model_id| ids.contains(model_id));
        let refused = |model_id: &str| {
            let response = self.support.refusal(model_id)?;
            Some(Exclusion::NotChat(format!("the server said so with HTTP {}", response.status)))
        };
        let mut probed = ProbedModels { limit, ..ProbedModels::default() };
        for Listed { mut model, exclusion, .. } in models {
            model.native = self.is_own;
            match exclusion.or_else(|| refused(&model.model_id)) {
                None => probed.models.push(model),
                Some(reason) => {
                    model.native &= !matches!(reason, Exclusion::Remote(_));
                    probed.excluded.push(ExcludedModel { model, reason });
                }
            }
        }
        Ok(probed)
    }

    /// Posts the request of a job. If the server rejects the `stream_options` that the agent adds, posts it again without them. Frees
    /// the request, which may be 64 MB, once it is sent: the response may take minutes.
    fn post(&self, job: RawJob, started: Instant, sink: &mut dyn JobSink) -> BackendResult<Exchange<'_>> {
        let route = match job.format {
            WireFormat::Openai => "chat/completions",
            WireFormat::Anthropic => "messages",
        };
        let url = format!("{}/{route}", self.api);
        let deadline = Duration::from_millis(u64::from(job.deadline_ms));
        let body = body_of(&job, self.support.reports_usage());
        let e = match post(&self.client, &url, &body, deadline, sink) {
            Err(e) if e.names_stream_options() => e,
            done => return done,
        };
        let plain = body_of(&job, false);
        let time = deadline.saturating_sub(started.elapsed());
        // The request may have its own options.
        if plain.content_length() == body.content_length() || time.is_zero() {
            return Err(e);
        }
        let exchange = post(&self.client, &url, &plain, time, sink)?;
        // Not if the repetition fails too: the error may quote a request that is wrong in another way.
        self.support.learn_no_usage(&self.id);
        Ok(exchange)
    }

    fn known(&self) -> MutexGuard<'_, KnownModels> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.models(&self.start_probe()).map(|probed| probed.models)
    }

    fn health(&self) -> BackendResult<BackendHealth> {
        let started = Instant::now();
        let probe = self.start_probe();
        let result = match self.kind.health_path() {
            Some(_) => probe.health(),
            None => probe.listing().and_then(|_| probe.readiness()),
        };
        Ok(match result {
            Ok(()) => {
                let latency_ms = u32::try_from(started.elapsed().as_millis()).ok();
                BackendHealth { reachable: true, latency_ms, last_error: None }
            }
            Err(e) => BackendHealth { reachable: false, latency_ms: None, last_error: Some(e.to_string()) },
        })
    }

    fn probe(&self) -> BackendResult<ProbedModels> {
        let probe = self.start_probe();
        let probed = probe.health().and_then(|()| self.models(&probe)).and_then(|models| {
            probe.readiness()?;
            Ok(models)
        });
        probed.inspect_err(|e| {
            self.support.learn_from_probe(e);
            self.known().expire_undated();
        })
    }

    fn ready(&self) -> BackendResult<()> {
        self.client.ready()
    }

    fn serves(&self, format: WireFormat) -> bool {
        self.support.check(format).is_ok()
    }

    fn execute(&self, job: &Job, sink: &mut dyn JobSink) -> BackendResult<JobResult> {
        self.execute_raw(job.into(), sink)
    }

    fn execute_raw(&self, job: RawJob, sink: &mut dyn JobSink) -> BackendResult<JobResult> {
        let (started, model_id, format) = (Instant::now(), job.model_id.clone(), job.format);
        self.client.ready()?;
        self.support.check(format)?;
        let usage = self.post(job, started, sink).and_then(|exchange| exchange.relay(sink));
        let outcome = usage.map(|usage| JobResult {
            input_tokens: usage.input,
            output_tokens: usage.output,
            duration_ms: u32::try_from(started.elapsed().as_millis()).unwrap_or(u32::MAX),
        });
        let result = self.support.learn(format, &model_id, outcome, &self.id);
        if let Err(BackendError::ModelNotFound(_)) = result {
            self.known().expire(&model_id);
        }
        result
    }
}
