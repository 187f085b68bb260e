//! The state file: its schema, shared by the writer and the readers, and the writer.
//!
//! [`State`] is the whole schema. A key that is missing or has another type, as in the file of another version, reads as its
//! default; unknown keys are ignored. Timestamps are RFC 3339.
//!
//! Invariant: the state file contains no data that must not be logged.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::condition::{self, Condition};
use super::{Connection, LiveState};
use crate::backend::ExcludedModel;
use crate::discovery::{BackendStatus, OfferFeed, ResolvedModel};
use crate::instance::identity::Identity;
use crate::instance::{AgentPaths, LockOwner};
use crate::job_executor::stats::{self, JobStats, Totals};
use crate::job_executor::token_limit::TokenLimit;
use crate::link::protocol::{AGENT_VERSION, ErrorCode};
use crate::sys::files;
use crate::sys::moment::{self, Moment};

/// Maximum size of a state file that is read, in bytes; each model takes about 200.
const STATE_BYTES_MAX: u64 = 16 << 20;

/// The state of an agent, as it is written to the file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// When the agent started.
    pub started_at: String,
    /// The public key of the agent's identity, in base64.
    pub public_key: String,
    /// The coordinator's URL, without credentials.
    pub coordinator: String,
    /// The version of the agent.
    pub agent_version: String,
    /// The pid of the agent.
    pub pid: u32,
    /// The number of times this process has written the file, by which a reader recognizes a newer state.
    pub written: u64,
    /// When the file was written.
    pub written_at: String,
    /// Whether the agent serves, and if not, why: a name from `condition`.
    pub state: String,
    /// When the agent entered this state.
    pub since: Option<String>,
    /// The reason why the agent does not serve, for the operator.
    pub reason: Option<String>,
    /// Whether the agent serves.
    pub serving: bool,
    /// Whether the operator has paused the agent.
    pub paused: bool,
    /// Whether the agent is connected to the coordinator.
    pub connected: bool,
    /// When the agent connected or disconnected.
    pub connection_since: Option<String>,
    /// The id that the coordinator gave the agent.
    pub provider_id: Option<String>,
    /// The configured backends.
    pub backends: Vec<Backend>,
    /// The models that are offered.
    pub models: Vec<Model>,
    /// Median latency of the jobs in the last 5 minutes.
    pub p50_latency_ms: u32,
    /// 95th percentile of the same latency.
    pub p95_latency_ms: u32,
    /// Median speed of the jobs in the last 5 minutes.
    pub tokens_per_sec_p50: f64,
    /// Jobs since the start.
    pub jobs: Jobs,
    /// Tokens since the start.
    pub tokens: Tokens,
    /// The last job that was answered.
    pub last_job: Option<LastJob>,
    /// The last job that failed.
    pub last_error: Option<LastError>,
    /// Identifies the boot during which the file was written.
    pub boot_id: String,
    /// When the file was written, in milliseconds since that boot. The dates above are by the wall clock of that moment: durations
    /// are the difference to `written_at`, and the age of the file is counted from here.
    pub written_uptime_ms: u64,
}

/// A configured backend.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Backend {
    /// The backend's name for the operator.
    pub id: String,
    /// The backend's kind, as in the configuration.
    pub kind: String,
    /// Whether the models of the backend are offered.
    pub offered: bool,
    /// When `offered` last changed.
    pub since: Option<String>,
    /// The number of listed models; `None` before the first listing.
    pub models: Option<usize>,
    /// Why the models are not offered.
    pub error: Option<String>,
    /// Why the models were last not offered.
    pub last_error: Option<BackendError>,
    /// The listed models that are not offered although the backend is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_offered: Vec<NotOffered>,
    /// The limit that the listing exceeds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listing_limit: Option<String>,
}

/// A listed model that is not offered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NotOffered {
    /// The id of the model.
    pub model_id: String,
    /// Why it is not offered.
    pub reason: String,
}

/// Why the models of a backend were not offered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BackendError {
    /// When the reason was found.
    pub at: String,
    /// The reason.
    pub message: String,
}

/// A model that is offered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Model {
    /// The id of the model.
    pub model_id: String,
    /// USDC micro-units per million input tokens.
    pub input_per_1m: u64,
    /// USDC micro-units per million output tokens.
    pub output_per_1m: u64,
    /// The limit of concurrent jobs.
    pub max_concurrent: u32,
    /// The kind of the model's backend.
    pub backend: String,
    /// The context window in tokens, if known.
    pub context_window: Option<u32>,
}

/// Jobs since the start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Jobs {
    /// In flight now.
    pub in_flight: u32,
    /// Answered in full.
    pub done: u64,
    /// Answered with an error.
    pub failed: u64,
    /// Cancelled by the coordinator.
    pub cancelled: u64,
    /// Lost with their session.
    pub lost: u64,
    /// Not admitted.
    pub refused: u64,
    /// Not admitted, by the name of the reason.
    pub refused_by_cause: BTreeMap<String, u64>,
}

/// Tokens since the start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tokens {
    /// Tokens of the prompts.
    pub input: u64,
    /// Tokens of the answers.
    pub output: u64,
}

/// The last job that was answered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LastJob {
    /// When it ended.
    pub at: String,
    /// The job's model.
    pub model_id: Option<String>,
    /// `done`, or the error code.
    pub outcome: String,
    /// Time from the job's arrival to its end.
    pub duration_ms: u64,
}

/// The last job that failed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LastError {
    /// When it ended.
    pub at: String,
    /// The error code.
    pub code: String,
    /// The reason of the failure, for the operator.
    pub message: String,
}

impl State {
    /// Reads the state file.
    ///
    /// # Errors
    /// The file does not exist, or is not a state file.
    pub fn read(paths: &AgentPaths) -> io::Result<State> {
        Ok(State::parse(&files::read_bounded(&paths.state(), STATE_BYTES_MAX)?)?)
    }

    /// Parses a state. A value of another type, as in the file of a newer version, reads as the key's default.
    fn parse(content: &[u8]) -> serde_json::Result<State> {
        let mut keys: Map<String, Value> = serde_json::from_slice(content)?;
        keys.retain(|key, value| State::deserialize(json!({ key: value })).is_ok());
        State::deserialize(Value::Object(keys))
    }

    /// Time since the file was written; `None` if that was before the last boot.
    pub fn age(&self) -> Option<Duration> {
        let is_of_this_boot = !self.boot_id.is_empty() && self.boot_id == moment::boot_id();
        is_of_this_boot.then(|| Moment::after_boot(self.written_uptime_ms).elapsed())
    }

    /// Reads the state file that `owner` has written; `None` if `owner` has not written one yet.
    pub fn read_own(paths: &AgentPaths, owner: &LockOwner) -> Option<State> {
        State::read(paths).ok().filter(|state| state.pid == owner.pid)
    }
}

/// The sources of the state.
#[derive(Clone)]
pub struct Sources {
    /// The connection and the jobs in flight.
    pub live: Arc<LiveState>,
    /// The offered models.
    pub offers: Arc<OfferFeed>,
    /// The job statistics.
    pub stats: Arc<JobStats>,
    /// The token limit, which may keep the agent from serving.
    pub token_limit: Arc<TokenLimit>,
}

/// Writes the state file of this process.
pub struct StateFileWriter {
    path: PathBuf,
    sources: Sources,
    /// When the agent started.
    started: Moment,
    /// When the agent entered its state.
    since: Moment,
    /// The state as last written.
    state: State,
    /// Why the last write failed.
    failure: Option<String>,
}

impl StateFileWriter {
    /// Creates a writer for an agent that starts now.
    pub fn new(path: PathBuf, identity: &Identity, coordinator: String, sources: Sources) -> StateFileWriter {
        let state = State {
            public_key: identity.public_key_base64(),
            coordinator,
            agent_version: AGENT_VERSION.to_owned(),
            pid: std::process::id(),
            boot_id: moment::boot_id(),
            ..State::default()
        };
        let now = Moment::now();
        StateFileWriter { path, sources, started: now, since: now, state, failure: None }
    }

    /// Replaces the file. A failure is logged once per reason.
    pub fn write(&mut self, backends: &[BackendStatus]) {
        self.update(backends);
        let written = serde_json::to_vec(&self.state).map_err(io::Error::from);
        let failure =
            written.and_then(|text| files::replace_without_fsync(&self.path, &text)).err().map(|e| e.to_string());
        if let Some(why) = failure.as_ref().filter(|_| failure != self.failure) {
            log::warn!(
                "`{}`: failed to write the state file: {why}; `status` will be out of date",
                self.path.display()
            );
        }
        self.failure = failure;
    }

    fn update(&mut self, backends: &[BackendStatus]) {
        let Sources { live, offers, stats, token_limit } = &self.sources;
        let (snapshot, catalog) = (live.snapshot(), offers.snapshot());
        let state = &mut self.state;
        state.written += 1;
        let now = Moment::now();
        state.written_at = now.rfc3339();
        state.written_uptime_ms = now.since_boot();
        state.started_at = self.started.rfc3339();
        let Condition { name, reason } = condition::of(&snapshot, offers, &catalog, backends, token_limit);
        if state.state != name {
            state.state = name.to_owned();
            self.since = now;
        }
        state.since = Some(self.since.rfc3339());
        state.reason = reason;
        state.serving = name == condition::SERVING;
        if state.serving {
            live.not_throttled();
        }
        state.paused = offers.is_paused();
        state.connected = snapshot.connection == Connection::Connected;
        state.connection_since = Some(snapshot.connection_since.rfc3339());
        state.provider_id = snapshot.provider_id;
        state.backends = backends.iter().map(Backend::from).collect();
        state.models = offers.visible_offer(&catalog).iter().map(Model::from).collect();
        let window = stats.heartbeat(snapshot.in_flight);
        state.p50_latency_ms = window.p50_latency_ms;
        state.p95_latency_ms = window.p95_latency_ms;
        state.tokens_per_sec_p50 = window.tokens_per_sec_p50;
        let totals = stats.totals();
        state.jobs = Jobs::new(&totals, snapshot.in_flight);
        state.tokens = Tokens { input: totals.input_tokens, output: totals.output_tokens };
        state.last_job = totals.last_job.map(LastJob::from);
        state.last_error = totals.last_error.map(LastError::from);
    }
}

impl From<&BackendStatus> for Backend {
    fn from(status: &BackendStatus) -> Backend {
        let excluded = status.not_offered().excluded.iter().map(NotOffered::from);
        let withdrawn = status.withdrawn().iter().map(NotOffered::from);
        Backend {
            id: status.id().to_owned(),
            kind: status.offer().backend.kind().to_owned(),
            offered: status.is_offered(),
            since: status.since().map(Moment::rfc3339),
            models: status.models(),
            error: status.unavailable(),
            last_error: status
                .last_error()
                .map(|(at, message)| BackendError { at: at.rfc3339(), message: message.clone() }),
            not_offered: excluded.chain(withdrawn).collect(),
            listing_limit: status.not_offered().limit.map(|limit| limit.to_string()),
        }
    }
}

impl From<&ExcludedModel> for NotOffered {
    fn from(excluded: &ExcludedModel) -> NotOffered {
        NotOffered { model_id: excluded.model.model_id.clone(), reason: excluded.reason.to_string() }
    }
}

impl From<(&String, &String)> for NotOffered {
    fn from((model_id, reason): (&String, &String)) -> NotOffered {
        NotOffered { model_id: model_id.clone(), reason: reason.clone() }
    }
}

impl From<&ResolvedModel> for Model {
    fn from(model: &ResolvedModel) -> Model {
        Model {
            model_id: model.model_id.clone(),
            input_per_1m: model.input_per_1m,
            output_per_1m: model.output_per_1m,
            max_concurrent: model.max_concurrent,
            backend: model.backend.clone(),
            context_window: model.context_window,
        }
    }
}

impl From<stats::LastJob> for LastJob {
    fn from(job: stats::LastJob) -> LastJob {
        LastJob {
            at: job.at.rfc3339(),
            model_id: Some(job.model_id),
            outcome: job.error.map_or("done", ErrorCode::as_str).to_owned(),
            duration_ms: u64::try_from(job.latency.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

impl From<stats::LastError> for LastError {
    fn from(error: stats::LastError) -> LastError {
        LastError { at: error.at.rfc3339(), code: error.code.as_str().to_owned(), message: error.reason }
    }
}

impl Jobs {
    fn new(totals: &Totals, in_flight: u32) -> Jobs {
        Jobs {
            in_flight,
            done: totals.done,
            failed: totals.failed,
            cancelled: totals.cancelled,
            lost: totals.lost,
            refused: totals.rejected.iter().map(|(_, count)| count).sum(),
            refused_by_cause: totals
                .rejected
                .iter()
                .map(|(reason, count)| (reason.name().to_owned(), *count))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_of_an_older_or_newer_version_is_read() {
        let text = r#"{"from_the_future": {"a": [1]}, "state": "serving", "jobs": {"done": 7, "new": 1}, "backends": [{"id": "b"}]}"#;
        let state: State = serde_json::from_str(text).expect("a state");
        assert_eq!((state.state.as_str(), state.jobs.done, state.backends[0].id.as_str()), ("serving", 7, "b"));
        assert_eq!((state.pid, state.provider_id, state.last_job), (0, None, None));
    }

    #[test]
    fn state_with_a_value_of_another_type_is_read_without_it() {
        let text = r#"{"pid": 7, "state": "serving", "serving": true, "p50_latency_ms": null, "p95_latency_ms": 1.5,
            "models": [{"model_id": null}], "tokens_per_sec_p50": 2.5}"#;
        let state = State::parse(text.as_bytes()).expect("a state");
        assert_eq!((state.pid, state.state.as_str(), state.serving), (7, "serving", true));
        assert_eq!((state.p95_latency_ms, state.models.len(), state.tokens_per_sec_p50), (0, 0, 2.5));
        for other in ["[]", "null", "7", ""] {
            assert!(State::parse(other.as_bytes()).is_err(), "{other}");
        }
    }

    #[test]
    fn keys_and_their_order_are_what_other_programs_know() {
        let state = State {
            backends: vec![Backend { last_error: Some(BackendError::default()), ..Backend::default() }],
            models: vec![Model::default()],
            last_job: Some(LastJob::default()),
            last_error: Some(LastError::default()),
            ..State::default()
        };
        let expected = concat!(
            r#"{"started_at":"","public_key":"","coordinator":"","agent_version":"","pid":0,"written":0,"written_at":"","#,
            r#""state":"","since":null,"reason":null,"serving":false,"paused":false,"connected":false,"#,
            r#""connection_since":null,"provider_id":null,"backends":[{"id":"","kind":"","offered":false,"since":null,"#,
            r#""models":null,"error":null,"last_error":{"at":"","message":""}}],"models":[{"model_id":"","#,
            r#""input_per_1m":0,"output_per_1m":0,"max_concurrent":0,"backend":"","context_window":null}],"#,
            r#""p50_latency_ms":0,"p95_latency_ms":0,"tokens_per_sec_p50":0.0,"jobs":{"in_flight":0,"done":0,"failed":0,"#,
            r#""cancelled":0,"lost":0,"refused":0,"refused_by_cause":{}},"tokens":{"input":0,"output":0},"#,
            r#""last_job":{"at":"","model_id":null,"outcome":"","duration_ms":0},"#,
            r#""last_error":{"at":"","code":"","message":""},"boot_id":"","written_uptime_ms":0}"#,
        );
        let text = serde_json::to_string(&state).expect("JSON");
        assert_eq!(text, expected);
        assert_eq!(serde_json::from_str::<State>(&text).expect("a state"), state);
    }
}
