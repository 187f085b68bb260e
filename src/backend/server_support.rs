//! What a server supports, learned from its responses to jobs.
//!
//! Invariants: a format that was served is not lost by one response, which a request may have provoked. What the server lacks is
//! forgotten after [`FORGET_AFTER`], and when the server was unreachable: it may be another version when it is back.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::HttpStatus;
use super::{BackendError, BackendResult, JobResult, WireFormat};

/// Time after which a job tries again what the server lacked. Costs one fast response, and finds a server that was replaced
/// without being missed.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// What is known about one server.
#[derive(Debug, Default)]
pub struct ServerSupport(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    openai: Format,
    anthropic: Format,
}

#[derive(Debug, Default)]
enum Format {
    #[default]
    Unknown,
    Served,
    /// The route is missing, as this response has shown.
    Missing(HttpStatus, Instant),
}

impl ServerSupport {
    /// Checks that the route of this format is not known to be missing.
    ///
    /// # Errors
    /// The format is not served.
    pub fn check(&self, format: WireFormat) -> BackendResult<()> {
        match self.known().format(format) {
            Format::Missing(response, since) if since.elapsed() < FORGET_AFTER => {
                Err(BackendError::FormatNotServed(format, response.clone()))
            }
            _ => Ok(()),
        }
    }

    /// Learns from the outcome of a job in this format. Returns the outcome, in which a missing route is a format that is not
    /// served. `id` names the server in the log.
    pub fn learn(&self, format: WireFormat, outcome: BackendResult<JobResult>, id: &str) -> BackendResult<JobResult> {
        let mut known = self.known();
        match outcome {
            Ok(result) => {
                *known.format(format) = Format::Served;
                Ok(result)
            }
            Err(BackendError::RouteNotFound(response)) if matches!(known.format(format), Format::Served) => {
                Err(BackendError::ModelNotFound(response))
            }
            Err(BackendError::RouteNotFound(response)) => {
                *known.format(format) = Format::Missing(response.clone(), Instant::now());
                let e = BackendError::FormatNotServed(format, response);
                log::warn!("{id}: not asked again for {} min: {}", FORGET_AFTER.as_secs() / 60, e.for_log());
                Err(e)
            }
            Err(e) => {
                known.forget_if_unreachable(&e);
                Err(e)
            }
        }
    }

    /// Learns from the error of a probe.
    pub fn learn_from_probe(&self, error: &BackendError) {
        self.known().forget_if_unreachable(error);
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn format(&mut self, format: WireFormat) -> &mut Format {
        match format {
            WireFormat::Openai => &mut self.openai,
            WireFormat::Anthropic => &mut self.anthropic,
        }
    }

    fn forget_if_unreachable(&mut self, error: &BackendError) {
        if matches!(error, BackendError::Unreachable(_)) {
            *self = Known::default();
        }
    }
}
