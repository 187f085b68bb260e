//! What a server supports, learned from its responses to jobs.
//!
//! Invariants: what was served, a format or a model, is not lost by one response, which a request may have provoked. What the
//! server lacks is forgotten after [`FORGET_AFTER`], and when the server was unreachable or failed a probe: it may be another
//! version when it is back. The OpenAI format is never known to be missing: every kind of server has it, and a gateway whose
//! server restarts may respond as if it did not.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::HttpStatus;
use super::{BackendError, BackendResult, JobResult, WireFormat};

/// Time after which a job tries again what the server lacked. This costs one fast response, and finds a server that was replaced
/// between two probes.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// What is known about one server.
#[derive(Debug, Default)]
pub struct ServerSupport(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    anthropic: Support,
    /// Whether the models can chat.
    models: HashMap<String, Support>,
    /// When the server last rejected `stream_options`.
    no_usage: Option<Instant>,
}

#[derive(Debug, Default)]
enum Support {
    #[default]
    Unknown,
    Served,
    /// Missing, as this response showed at this time.
    Missing(HttpStatus, Instant),
}

impl ServerSupport {
    /// Checks that the route of this format is not known to be missing.
    ///
    /// # Errors
    /// The format is not served.
    pub fn check(&self, format: WireFormat) -> BackendResult<()> {
        match &self.known().anthropic {
            Support::Missing(response, since) if format == WireFormat::Anthropic && since.elapsed() < FORGET_AFTER => {
                Err(BackendError::FormatNotServed(format, response.clone()))
            }
            _ => Ok(()),
        }
    }

    /// How the server refused to let the model chat, if it did.
    pub fn refusal(&self, model_id: &str) -> Option<HttpStatus> {
        match self.known().models.get(model_id) {
            Some(Support::Missing(response, since)) if since.elapsed() < FORGET_AFTER => Some(response.clone()),
            _ => None,
        }
    }

    /// Forgets the models that `is_listed` does not name.
    pub fn retain_models(&self, is_listed: impl Fn(&str) -> bool) {
        self.known().models.retain(|model_id, _| is_listed(model_id));
    }

    /// Learns from the outcome of a job in this format. Returns the outcome, in which a missing route is a format that is not
    /// served. `id` names the server in the log.
    pub fn learn(
        &self,
        format: WireFormat,
        model_id: &str,
        outcome: BackendResult<JobResult>,
        id: &str,
    ) -> BackendResult<JobResult> {
        let mut known = self.known();
        match outcome {
            Ok(result) => {
                if !matches!(known.models.get(model_id), Some(Support::Served)) {
                    known.models.insert(model_id.to_owned(), Support::Served);
                }
                if format == WireFormat::Anthropic {
                    known.anthropic = Support::Served;
                }
                Ok(result)
            }
            Err(BackendError::CannotChat(response)) => {
                let support = known.models.entry(model_id.to_owned()).or_default();
                if !matches!(support, Support::Served) {
                    *support = Support::Missing(response.clone(), Instant::now());
                }
                Err(BackendError::CannotChat(response))
            }
            Err(BackendError::RouteNotFound(response)) => {
                let e = BackendError::FormatNotServed(format, response.clone());
                if format == WireFormat::Anthropic && !matches!(known.anthropic, Support::Served) {
                    known.anthropic = Support::Missing(response, Instant::now());
                    log::warn!(
                        "{id}: receives no Anthropic jobs for {} min: {}",
                        FORGET_AFTER.as_secs() / 60,
                        e.for_log()
                    );
                }
                Err(e)
            }
            Err(e) => {
                if matches!(e, BackendError::Unreachable(_)) {
                    *known = Known::default();
                }
                Err(e)
            }
        }
    }

    /// Whether the server may be asked to report the usage at the end of a stream, with `stream_options`.
    pub fn reports_usage(&self) -> bool {
        self.known().no_usage.is_none_or(|since| since.elapsed() >= FORGET_AFTER)
    }

    /// Learns that the server rejects `stream_options`, and serves the same request without. `id` names it in the log.
    pub fn learn_no_usage(&self, id: &str) {
        self.known().no_usage = Some(Instant::now());
        log::warn!("{id}: rejects stream_options, so it may not report the tokens of its jobs");
    }

    /// Learns from the error of a probe. A timeout, or a lack of local resources, says nothing about the server.
    pub fn learn_from_probe(&self, error: &BackendError) {
        if !matches!(error, BackendError::ProbeTimeout(_) | BackendError::Exhausted(_)) {
            *self.known() = Known::default();
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
