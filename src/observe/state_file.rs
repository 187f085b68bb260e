//! Puts the state file together, and writes it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Map, Value};

use super::live::Snapshot;
use super::{Connection, LiveState, object};
use crate::discovery::{BackendStatus, Catalog, OfferFeed, ResolvedModel};
use crate::job_executor::stats::{JobStats, Totals};
use crate::job_executor::token_limit::TokenLimit;
use crate::link::protocol::{AGENT_VERSION, ErrorCode};
use crate::sys::datetime::rfc3339;
use crate::sys::files;

/// Writes the state file of one agent.
pub struct StateFileWriter {
    /// The file.
    pub path: PathBuf,
    /// What never changes: `coordinator`, `public_key`, …
    pub fixed: Map<String, Value>,
    /// What the threads noted.
    pub live: Arc<LiveState>,
    /// The offer, which a pause empties.
    pub offers: Arc<OfferFeed>,
    /// How jobs ended.
    pub stats: Arc<JobStats>,
    /// Which may be used up.
    pub token_limit: Arc<TokenLimit>,
    /// Nothing, to begin with.
    pub last_written: LastWritten,
}

/// What the file has said so far.
pub struct LastWritten {
    condition: &'static str,
    /// When that began.
    since: SystemTime,
    /// Why it could not be written the last time.
    failure: Option<String>,
    /// How often it was written, so that a reader knows a new one from the old.
    times: u64,
}

impl Default for LastWritten {
    fn default() -> Self {
        LastWritten { condition: "", since: SystemTime::now(), failure: None, times: 0 }
    }
}

/// Whether the agent serves, and if not, why.
struct Condition {
    name: &'static str,
    why: Option<String>,
}

impl StateFileWriter {
    /// Replaces the state file. A failure is logged, once for each reason.
    pub fn write(&mut self, backends: &[BackendStatus]) {
        let state = self.state(backends).to_string();
        let failure = files::replace_without_fsync(&self.path, state.as_bytes()).err().map(|e| e.to_string());
        if let Some(why) = failure.as_ref().filter(|_| failure != self.last_written.failure) {
            log::warn!(
                "`{}`: failed to write the state file: {why}; `status` will be out of date",
                self.path.display()
            );
        }
        self.last_written.failure = failure;
    }

    fn state(&mut self, backends: &[BackendStatus]) -> Value {
        let now = SystemTime::now();
        let noted = self.live.snapshot();
        let catalog = self.offers.snapshot();
        let condition = self.condition_of(&noted, &catalog, backends);
        if self.last_written.condition != condition.name {
            (self.last_written.condition, self.last_written.since) = (condition.name, now);
        }
        let figures = self.stats.heartbeat(noted.in_flight);
        self.last_written.times += 1;
        let date = |at| Value::from(rfc3339(at));
        let mut state = self.fixed.clone();
        let mut set = |key: &str, value: Value| {
            state.insert(key.to_owned(), value);
        };
        set("agent_version", AGENT_VERSION.into());
        set("pid", std::process::id().into());
        set("written", self.last_written.times.into());
        set("written_at", date(now));
        set("state", condition.name.into());
        set("since", date(self.last_written.since));
        set("reason", condition.why.into());
        set("serving", (condition.name == SERVING).into());
        set("paused", self.offers.is_paused().into());
        set("connected", (noted.connection == Connection::Connected).into());
        set("connection_since", date(noted.connection_since));
        set("provider_id", noted.provider_id.into());
        set("backends", backends.iter().map(backend_json).collect());
        set("models", self.offers.visible_offer(&catalog).iter().map(model_json).collect());
        set("p50_latency_ms", figures.p50_latency_ms.into());
        set("p95_latency_ms", figures.p95_latency_ms.into());
        set("tokens_per_sec_p50", figures.tokens_per_sec_p50.into());
        describe_jobs(&self.stats.totals(), noted.in_flight, &mut set);
        Value::Object(state)
    }

    /// The first thing that keeps it from serving.
    fn condition_of(&self, noted: &Snapshot, catalog: &Catalog, backends: &[BackendStatus]) -> Condition {
        let condition = |name, why| Condition { name, why };
        if noted.is_draining {
            return condition("draining", Some("the agent was told to stop; jobs in flight finish".to_owned()));
        }
        match &noted.connection {
            Connection::Connecting(why) => return condition("connecting", why.clone()),
            Connection::Rejected(reason) => return condition("rejected", Some(reason.clone())),
            Connection::Connected => {}
        }
        if self.offers.is_paused() {
            return condition("paused", Some("paused by the operator".to_owned()));
        }
        if catalog.offer.is_empty() {
            let away = |backend: &BackendStatus| Some(format!("{}: {}", backend.id(), backend.unavailable()?));
            let reasons: Vec<String> = backends.iter().filter_map(away).collect();
            return match (backends.is_empty(), reasons.is_empty()) {
                (true, _) => condition("no_healthy_backend", Some("no [[backends]] in the configuration".to_owned())),
                (false, false) => condition("no_healthy_backend", Some(reasons.join("; "))),
                (false, true) if backends.iter().any(|backend| backend.models().is_none()) => {
                    condition("no_healthy_backend", Some("the backends have not answered yet".to_owned()))
                }
                (false, true) => {
                    let why = "the backends list no model that `models` allows and that has a price above 0";
                    condition("no_models", Some(why.to_owned()))
                }
            };
        }
        if let Some(limit) = self.token_limit.used_up() {
            let why = format!("the {limit} tokens that max_tokens_per_minute allows are used up");
            return condition("throttled", Some(why));
        }
        self.live.not_throttled();
        condition(SERVING, None)
    }
}

/// The condition that all is well.
const SERVING: &str = "serving";

fn backend_json(backend: &BackendStatus) -> Value {
    let last_error =
        backend.last_error().map(|(at, why)| object([("at", rfc3339(*at).into()), ("message", why.as_str().into())]));
    object([
        ("id", backend.id().into()),
        ("kind", backend.offered().backend.kind().into()),
        ("offered", backend.is_offered().into()),
        ("since", backend.since().map(rfc3339).into()),
        ("models", backend.models().into()),
        ("error", backend.unavailable().into()),
        ("last_error", last_error.into()),
    ])
}

/// `jobs`, `tokens`, `last_job` and `last_error`.
fn describe_jobs(totals: &Totals, in_flight: u32, set: &mut dyn FnMut(&str, Value)) {
    let by_reason = totals.rejected.iter().map(|(reason, count)| (reason.name().to_owned(), Value::from(*count)));
    let jobs = object([
        ("in_flight", in_flight.into()),
        ("done", totals.done.into()),
        ("failed", totals.failed.into()),
        ("cancelled", totals.cancelled.into()),
        ("lost", totals.lost.into()),
        ("refused", totals.rejected.iter().map(|(_, count)| count).sum::<u64>().into()),
        ("refused_by_cause", Value::Object(by_reason.collect())),
    ]);
    set("jobs", jobs);
    set("tokens", object([("input", totals.input_tokens.into()), ("output", totals.output_tokens.into())]));
    let last_job = totals.last_job.as_ref().map(|job| {
        object([
            ("at", rfc3339(job.at).into()),
            ("model_id", job.model_id.as_str().into()),
            ("outcome", job.error.map_or("done", ErrorCode::as_str).into()),
            ("duration_ms", u64::try_from(job.latency.as_millis()).unwrap_or(u64::MAX).into()),
        ])
    });
    set("last_job", last_job.into());
    let last_error = totals.last_error.as_ref().map(|error| {
        object([
            ("at", rfc3339(error.at).into()),
            ("code", error.code.as_str().into()),
            ("message", error.reason.as_str().into()),
        ])
    });
    set("last_error", last_error.into());
}

fn model_json(model: &ResolvedModel) -> Value {
    object([
        ("model_id", model.model_id.as_str().into()),
        ("input_per_1m", model.input_per_1m.into()),
        ("output_per_1m", model.output_per_1m.into()),
        ("max_concurrent", model.max_concurrent.into()),
        ("backend", model.backend.as_str().into()),
        ("context_window", model.context_window.into()),
    ])
}
