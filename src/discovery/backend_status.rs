//! The state of one backend: the results of its last probes, and whether it is offered.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::backend_handle::FAILURES_MAX;
use super::{BackendHandle, BackendOffer, Listing, OfferTerms, ResolvedModel};
use crate::backend::{BackendError, BackendResult, ProbedModels};

/// The listed models, or why there are none.
pub type ProbeResult = BackendResult<ProbedModels>;

/// Maximum number of consecutive probe timeouts for which a serving backend stays in the offer: it may be busy serving.
const TIMEOUTS_MAX: u32 = 1;

/// A backend and the results of its last probes.
pub struct BackendStatus {
    offer: BackendOffer,
    handle: Arc<BackendHandle>,
    /// The last listing; kept while the backend is unavailable.
    last_listing: Option<Vec<ResolvedModel>>,
    /// The models of the last listing that are not offered, and the limit that it exceeds.
    not_offered: ProbedModels,
    /// Why the backend is not offered; `None` while it is.
    unavailable: Option<BackendError>,
    /// When the backend was first probed, or last became available or unavailable.
    since: Option<SystemTime>,
    last_error: Option<(SystemTime, String)>,
    /// Consecutive probe timeouts.
    timeouts: u32,
}

impl BackendStatus {
    /// A backend that has not been probed.
    pub fn new(offer: BackendOffer, terms: &OfferTerms) -> BackendStatus {
        let handle = BackendHandle::new(offer.backend.clone(), offer.slots_max(terms));
        BackendStatus {
            offer,
            handle,
            last_listing: None,
            not_offered: ProbedModels::default(),
            unavailable: None,
            since: None,
            last_error: None,
            timeouts: 0,
        }
    }

    /// The configured backend.
    pub fn offer(&self) -> &BackendOffer {
        &self.offer
    }

    /// The backend's name for the operator.
    pub fn id(&self) -> &str {
        self.offer.backend.id()
    }

    /// Whether the backend is part of the offer.
    pub fn is_offered(&self) -> bool {
        self.last_listing.is_some() && self.unavailable.is_none()
    }

    /// Why the backend is not offered; `None` if it is, and before the first probe.
    pub fn unavailable(&self) -> Option<String> {
        self.unavailable.as_ref().map(redacted_reason)
    }

    /// Number of models in the last listing; `None` before the first.
    pub fn models(&self) -> Option<usize> {
        self.last_listing.as_ref().map(Vec::len)
    }

    /// The models of the last listing that are not offered, and the limit that it exceeds; `models` is empty.
    pub fn not_offered(&self) -> &ProbedModels {
        &self.not_offered
    }

    /// When the backend last became available or unavailable.
    pub fn since(&self) -> Option<SystemTime> {
        self.since
    }

    /// The last reason for not offering the backend, and when the reason was found.
    pub fn last_error(&self) -> Option<&(SystemTime, String)> {
        self.last_error.as_ref()
    }

    /// The last listing, for the catalog.
    pub fn listing(&self) -> Option<Listing> {
        Some(Listing { backend: self.handle.clone(), models: self.last_listing.clone()? })
    }

    /// Whether the backend should be probed again soon.
    pub fn may_serve_soon(&self) -> bool {
        use BackendError::{Exhausted, FailingJobs, Loading, Overloaded, ProbeTimeout};
        let soon = |e: &_| matches!(e, Exhausted(_) | Loading(_) | Overloaded(_) | ProbeTimeout(_) | FailingJobs(_));
        self.timeouts > 0 || self.unavailable.as_ref().is_some_and(soon)
    }

    /// Withdraws the backend from the offer if its jobs fail. Returns whether the availability has changed.
    pub fn withdraw_if_failing(&mut self) -> bool {
        self.unavailable.is_none()
            && self.handle.is_failing()
            && self.set_unavailable(Some(BackendError::FailingJobs(FAILURES_MAX)))
    }

    /// Applies the result of a probe. Returns whether the availability has changed.
    pub fn apply_probe(&mut self, result: ProbeResult, started: Instant, terms: &OfferTerms) -> bool {
        self.timeouts = match result {
            Err(BackendError::ProbeTimeout(_)) => self.timeouts + 1,
            _ => 0,
        };
        let id = self.id();
        let is_serving = self.since.is_some() && self.unavailable.is_none();
        if is_serving && (1..=TIMEOUTS_MAX).contains(&self.timeouts) {
            log::info!("{id}: probe timed out; still offered until the next probe");
            return false;
        }
        if let (true, Err(BackendError::Exhausted(why))) = (is_serving, &result) {
            // The failure is local and says nothing about the backend.
            log::info!("{id}: not probed: {why}; still offered until the next probe");
            return false;
        }
        let ready = self.offer.backend.ready();
        let (listed, error) = match result {
            Ok(listed) => (Some(listed), ready.err()),
            // A missing key explains the failure better than the server's response.
            Err(e) => (None, Some(ready.err().unwrap_or(e))),
        };
        if let Some(listed) = listed {
            let mut selected = self.offer.select(listed);
            let models = std::mem::take(&mut selected.models);
            self.last_listing = Some(self.offer.price(models, terms).models);
            self.set_not_offered(selected);
        }
        let failing_jobs =
            || (!self.handle.probe_succeeded(started)).then_some(BackendError::FailingJobs(FAILURES_MAX));
        self.set_unavailable(error.or_else(failing_jobs))
    }

    /// Sets the models that are not offered, and logs a change.
    fn set_not_offered(&mut self, not_offered: ProbedModels) {
        if let Some(exclusions) = not_offered.exclusions().filter(|_| not_offered != self.not_offered) {
            log::info!("{}: {exclusions}", self.id());
        }
        self.not_offered = not_offered;
    }

    /// Sets the reason why the backend is unavailable; `None` if it is available. Logs a change, and returns whether there was one.
    fn set_unavailable(&mut self, unavailable: Option<BackendError>) -> bool {
        let id = self.id();
        let reason = |error: &Option<BackendError>| error.as_ref().map(BackendError::for_log);
        let is_change = self.since.is_none() || reason(&self.unavailable) != reason(&unavailable);
        if is_change {
            match &unavailable {
                None => log::info!("{id}: serving {} model(s)", self.last_listing.as_ref().map_or(0, Vec::len)),
                Some(why) => log::warn!("{id}: not offered: {}", why.for_log()),
            }
        }
        let now = SystemTime::now();
        if self.since.is_none() || self.unavailable.is_none() != unavailable.is_none() {
            self.since = Some(now);
        }
        if let Some(e) = &unavailable {
            self.last_error = Some((now, redacted_reason(e)));
        }
        self.unavailable = unavailable;
        is_change
    }
}

/// The reason as shown to the operator. A response to a probe contains no prompt, but may contain an API key.
fn redacted_reason(e: &BackendError) -> String {
    match e {
        BackendError::AuthRejected(_) => format!("the backend rejected the API key: {}", e.for_log()),
        _ => e.for_operator(),
    }
}
