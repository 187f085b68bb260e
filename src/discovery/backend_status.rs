//! One backend, as the prober knows it: what its last probes said, and whether it is offered.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::backend_handle::FAILURES_MAX;
use super::{BackendHandle, BackendOffer, Listing, OfferTerms, ResolvedModel};
use crate::backend::{BackendError, BackendModel, BackendResult};
use crate::logging::sanitize_for_log;

/// What a backend lists, or why it does not.
pub type ProbeResult = BackendResult<Vec<BackendModel>>;

/// A backend that served is offered on when so many probes in a row get no answer: it may be busy serving.
const UNANSWERED_MAX: u32 = 1;

/// A backend and what its last probes said.
pub struct BackendStatus {
    offered: BackendOffer,
    handle: Arc<BackendHandle>,
    /// The last listing; kept while the backend is away.
    last_listing: Option<Vec<ResolvedModel>>,
    /// Why it is not offered; `None` while it is.
    unavailable: Option<BackendError>,
    /// When it was heard of first, or came or went last.
    since: Option<SystemTime>,
    last_error: Option<(SystemTime, String)>,
    /// Probes in a row without an answer.
    unanswered: u32,
}

impl BackendStatus {
    /// Nothing is known of it yet.
    pub fn new(offered: BackendOffer, terms: &OfferTerms) -> BackendStatus {
        let handle = BackendHandle::new(offered.backend.clone(), offered.slots_max(terms));
        BackendStatus {
            offered,
            handle,
            last_listing: None,
            unavailable: None,
            since: None,
            last_error: None,
            unanswered: 0,
        }
    }

    /// What is probed.
    pub fn offered(&self) -> &BackendOffer {
        &self.offered
    }

    /// Its name for the operator.
    pub fn id(&self) -> &str {
        self.offered.backend.id()
    }

    /// Whether it is part of the offer.
    pub fn is_offered(&self) -> bool {
        self.last_listing.is_some() && self.unavailable.is_none()
    }

    /// Why it is not offered, once it was asked.
    pub fn unavailable(&self) -> Option<String> {
        self.unavailable.as_ref().map(redacted_reason)
    }

    /// How many models it offers, or would; `None` before its first listing.
    pub fn models(&self) -> Option<usize> {
        self.last_listing.as_ref().map(Vec::len)
    }

    /// When it came or went last.
    pub fn since(&self) -> Option<SystemTime> {
        self.since
    }

    /// Why it was not offered the last time that it was not, and when that was found.
    pub fn last_error(&self) -> Option<&(SystemTime, String)> {
        self.last_error.as_ref()
    }

    /// What it lists, for the catalog.
    pub fn listing(&self) -> Option<Listing> {
        Some(Listing { member: self.handle.clone(), models: self.last_listing.clone()? })
    }

    /// Whether it is worth asking again soon.
    pub fn may_serve_soon(&self) -> bool {
        use BackendError::{Exhausted, FailingJobs, Loading, Overloaded, ProbeTimeout};
        let soon = |e: &_| matches!(e, Exhausted(_) | Loading(_) | Overloaded(_) | ProbeTimeout(_) | FailingJobs(_));
        self.unanswered > 0 || self.unavailable.as_ref().is_some_and(soon)
    }

    /// Takes it out of the offer when its jobs fail; true when that is news.
    pub fn withdraw_if_failing(&mut self) -> bool {
        self.unavailable.is_none()
            && self.handle.is_failing()
            && self.set_unavailable(Some(BackendError::FailingJobs(FAILURES_MAX)))
    }

    /// Takes the answer to a question of a round that began then; true when it is news whether the backend is offered.
    pub fn apply_probe(&mut self, answer: ProbeResult, began: Instant, terms: &OfferTerms) -> bool {
        self.unanswered = match answer {
            Err(BackendError::ProbeTimeout(_)) => self.unanswered + 1,
            _ => 0,
        };
        let id = self.id();
        let serves = self.since.is_some() && self.unavailable.is_none();
        if serves && (1..=UNANSWERED_MAX).contains(&self.unanswered) {
            log::info!("{id}: no answer to the probe; offered on until the next one");
            return false;
        }
        if let (true, Err(BackendError::Exhausted(why))) = (serves, &answer) {
            // Who could not even ask knows nothing about the backend.
            log::info!("{id}: not probed: {why}; offered on until the next one");
            return false;
        }
        let ready = self.offered.backend.ready();
        let (listed, away) = match answer {
            Ok(listed) => (Some(listed), ready.err()),
            // A key that is not set explains a refused listing better than the refusal.
            Err(e) => (None, Some(ready.err().unwrap_or(e))),
        };
        if let Some(listed) = listed {
            self.last_listing = Some(self.offered.price(listed, terms).models);
        }
        let fails_its_jobs =
            || (!self.handle.probe_succeeded(began)).then_some(BackendError::FailingJobs(FAILURES_MAX));
        let away = away.or_else(fails_its_jobs);
        self.set_unavailable(away)
    }

    /// Keeps whether the backend is away; logs it when that is news, and says so.
    fn set_unavailable(&mut self, away: Option<BackendError>) -> bool {
        let id = self.id();
        let reason = |away: &Option<BackendError>| away.as_ref().map(BackendError::for_log);
        let is_news = self.since.is_none() || reason(&self.unavailable) != reason(&away);
        if is_news {
            match &away {
                None => log::info!("{id}: serving {} model(s)", self.last_listing.as_ref().map_or(0, Vec::len)),
                Some(why) => log::warn!("{id}: not offered: {}", why.for_log()),
            }
        }
        let now = SystemTime::now();
        if self.since.is_none() || self.unavailable.is_none() != away.is_none() {
            self.since = Some(now);
        }
        if let Some(e) = &away {
            self.last_error = Some((now, redacted_reason(e)));
        }
        self.unavailable = away;
        is_news
    }
}

/// In words for the operator: what a backend says to a question of ours quotes no prompt, but of a key it may.
fn redacted_reason(e: &BackendError) -> String {
    match e {
        BackendError::AuthRejected(_) => format!("the backend rejected the API key: {}", e.for_log()),
        _ => sanitize_for_log(&e.to_string()),
    }
}
