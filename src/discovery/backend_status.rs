//! The state of one backend: the results of its last probes, and whether it is offered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::health::Health;
use super::model_health::FAILURES_MAX;
use super::trial::{Purpose, Trial, TrialOutcome};
use super::{BackendHandle, BackendOffer, Listing, OfferTerms, ResolvedModel};
use crate::backend::{BackendError, BackendResult, Kind, ProbedModels};
use crate::logging::sanitize_for_log;
use crate::sys::moment::Moment;

/// The listed models, or why there are none.
pub type ProbeResult = BackendResult<ProbedModels>;

/// Maximum number of consecutive probe timeouts for which a serving backend stays in the offer: it may be busy serving.
const TIMEOUTS_MAX: u32 = 1;

/// Time after an answer during which a 5xx to a probe does not end the offer: two probe rounds. A gateway with several servers may
/// answer 5xx because one of them is down, while the others serve.
const ANSWER_COUNTS_FOR: Duration = Duration::from_secs(60);

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
    /// A 5xx to the last probe, while the trial of this model decides whether the backend serves nevertheless.
    doubt: Option<(BackendError, String)>,
    /// The listed models that are not offered because their jobs fail, and the reasons.
    withdrawn: BTreeMap<String, String>,
    /// When the backend was first probed, or last became available or unavailable.
    since: Option<Moment>,
    last_error: Option<(Moment, String)>,
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
            doubt: None,
            withdrawn: BTreeMap::new(),
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

    /// Whether models of the backend are part of the offer.
    pub fn is_offered(&self) -> bool {
        self.is_available() && !self.all_withdrawn()
    }

    /// Whether the backend can serve, if any of its models can.
    fn is_available(&self) -> bool {
        self.last_listing.is_some() && self.unavailable.is_none()
    }

    fn all_withdrawn(&self) -> bool {
        !self.withdrawn.is_empty() && self.models().is_some_and(|listed| listed <= self.withdrawn.len())
    }

    /// Why the backend is not offered; `None` if it is, and before the first probe.
    pub fn unavailable(&self) -> Option<String> {
        let withdrawn = || self.withdrawn.iter().next().filter(|_| self.all_withdrawn()).map(of_model);
        self.unavailable.as_ref().map(redacted_reason).or_else(withdrawn)
    }

    /// Number of models in the last listing; `None` before the first.
    pub fn models(&self) -> Option<usize> {
        self.last_listing.as_ref().map(Vec::len)
    }

    /// The models of the last listing that are not offered, and the limit that it exceeds; `models` is empty.
    pub fn not_offered(&self) -> &ProbedModels {
        &self.not_offered
    }

    /// The models of the last listing that are not offered because their jobs fail, and the reasons.
    pub fn withdrawn(&self) -> &BTreeMap<String, String> {
        &self.withdrawn
    }

    /// When the backend last became available or unavailable.
    pub fn since(&self) -> Option<Moment> {
        self.since
    }

    /// The last reason for not offering the backend, and when the reason was found.
    pub fn last_error(&self) -> Option<&(Moment, String)> {
        self.last_error.as_ref()
    }

    /// The listed models for the catalog: those to offer, or if not `offered`, the others.
    pub fn listing(&self, offered: bool) -> Option<Listing> {
        let is_offered = |model: &ResolvedModel| self.is_available() && !self.withdrawn.contains_key(&model.model_id);
        let listed = self.last_listing.as_ref()?.iter();
        let models = listed.filter(|model| is_offered(model) == offered).cloned().collect();
        Some(Listing { backend: self.handle.clone(), models })
    }

    /// Whether the backend should be probed again soon.
    pub fn may_serve_soon(&self) -> bool {
        use BackendError::{Exhausted, FailingJobs, Loading, NotReady, Overloaded, ProbeTimeout};
        let soon = |e: &_| {
            matches!(e, Exhausted(_) | Loading(_) | NotReady(_) | Overloaded(_) | ProbeTimeout(_) | FailingJobs(_))
        };
        self.timeouts > 0 || self.unavailable.as_ref().is_some_and(soon)
    }

    /// Withdraws the backend, or models of it, if the jobs fail, and restores the models that were withdrawn for a limited time. Returns
    /// whether the availability has changed.
    pub fn apply_health(&mut self) -> bool {
        let withdraw = self.unavailable.is_none() && self.handle.health().is_failing();
        let is_change = withdraw && self.set_unavailable(Some(BackendError::FailingJobs(FAILURES_MAX)));
        self.handle.health().release(Instant::now());
        is_change | self.update_withdrawn()
    }

    /// Updates the withdrawn models. Logs each change, and returns whether there was one.
    fn update_withdrawn(&mut self) -> bool {
        let withdrawn = self.handle.health().withdrawn();
        if withdrawn == self.withdrawn {
            return false;
        }
        let was_offered = self.is_offered();
        let before = std::mem::replace(&mut self.withdrawn, withdrawn);
        for model in self.withdrawn.iter().filter(|(model_id, _)| !before.contains_key(*model_id)) {
            log::warn!("{}: not offered: {}", self.id(), of_model(model));
        }
        let is_listed = |id: &str| self.last_listing.iter().flatten().any(|model| model.model_id == id);
        for model_id in before.keys().filter(|id| !self.withdrawn.contains_key(*id) && is_listed(id)) {
            log::info!("{}: offered again: {}", self.id(), sanitize_for_log(model_id));
        }
        if was_offered != self.is_offered() {
            self.since = Some(Moment::now());
            if let Some(why) = self.unavailable() {
                self.last_error = Some((Moment::now(), why));
            }
        }
        true
    }

    /// When [`BackendStatus::apply_health`] or [`BackendStatus::due_trial`] will have something to do.
    pub fn health_due(&self) -> Option<Instant> {
        let health = self.handle.health();
        match (&self.unavailable, &self.doubt) {
            (None, _) => health.next_due(),
            (Some(_), Some((_, model_id))) => health.trial_due(model_id),
            (Some(_), None) => None,
        }
    }

    /// The trial to run now. None is run while all slots are taken, as a job would have to wait for it.
    pub fn due_trial(&self) -> Option<Trial> {
        if self.handle.slots_free() == 0 || self.health_due().is_none() {
            return None;
        }
        let (health, now) = (self.handle.health(), Instant::now());
        match &self.doubt {
            // Only this model: another may be known to fail while the backend serves.
            Some((_, model_id)) if health.trial_due(model_id).is_some_and(|due| due <= now) => {
                Some(Trial { model_id: model_id.clone(), purpose: Purpose::Backend })
            }
            _ if self.unavailable.is_some() => None,
            _ => {
                let model_id = health.due_trial(now)?.to_owned();
                let is_withdrawn = self.withdrawn.contains_key(&model_id);
                Some(Trial { model_id, purpose: if is_withdrawn { Purpose::Withdrawn } else { Purpose::Model } })
            }
        }
    }

    /// Applies the outcome of a trial. Returns whether the availability has changed.
    pub fn apply_trial(&mut self, trial: &Trial, outcome: &TrialOutcome) -> bool {
        let has_passed = *outcome == TrialOutcome::Passed;
        if has_passed {
            self.handle.mark_answering();
        }
        let (now, model_id) = (Instant::now(), &trial.model_id);
        log::info!("{}: {}: a trial {outcome}", self.id(), sanitize_for_log(model_id));
        if trial.purpose != Purpose::Backend {
            self.handle.health().record_trial(model_id, outcome, now);
            return self.update_withdrawn();
        }
        // The trial shows whether the backend serves, but nothing about this model in particular.
        self.handle.health().record_trial(model_id, &TrialOutcome::Passed, now);
        match self.doubt.take() {
            Some(_) if has_passed && self.handle.health().is_failing() => false,
            Some((doubt, _)) => self.set_unavailable(Some(doubt).filter(|_| !has_passed)) | self.update_withdrawn(),
            // A probe has succeeded meanwhile.
            None => self.update_withdrawn(),
        }
    }

    /// Applies the result of a probe. Returns whether the availability has changed.
    pub fn apply_probe(&mut self, result: ProbeResult, started: Instant, terms: &OfferTerms) -> bool {
        let is_serving = self.since.is_some() && self.unavailable.is_none();
        self.doubt = None;
        match &result {
            Ok(_) => self.timeouts = 0,
            Err(e) if self.is_outweighed(e, started, is_serving) => return false,
            Err(_) => {}
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
            let remote = models.iter().filter(|model| !model.native).map(|model| model.model_id.clone()).collect();
            self.handle.health().set_remote(remote);
            self.set_listing(self.offer.price(models, terms).models, is_serving);
            self.set_not_offered(selected);
        }
        let failing_jobs =
            || (!self.handle.health().probe_succeeded(started)).then_some(BackendError::FailingJobs(FAILURES_MAX));
        let unavailable = error.or_else(failing_jobs);
        self.set_unavailable(unavailable) | self.update_withdrawn()
    }

    /// Whether the backend stays in the offer although its probe failed: the failure is local, or the backend was seen to serve, or
    /// a trial will decide.
    fn is_outweighed(&mut self, e: &BackendError, started: Instant, is_serving: bool) -> bool {
        let id = self.offer.backend.id();
        self.timeouts = match e {
            // Bytes of answers are a sign of life: the server is too busy to answer probes.
            BackendError::ProbeTimeout(_) if self.handle.is_answering(started) => 1,
            BackendError::ProbeTimeout(_) => self.timeouts + 1,
            _ => 0,
        };
        match e {
            BackendError::ProbeTimeout(_) if is_serving && self.timeouts <= TIMEOUTS_MAX => {
                log::info!("{id}: probe timed out; still offered until the next probe");
                true
            }
            // The failure is local and says nothing about the backend.
            BackendError::Exhausted(why) if is_serving => {
                log::info!("{id}: not probed: {why}; still offered until the next probe");
                true
            }
            e if e.is_server_error() && is_serving && self.handle.serves_jobs(ANSWER_COUNTS_FOR) => {
                log::info!("{id}: the probe failed ({}); still offered, as it answers jobs", e.for_log());
                true
            }
            e if e.is_server_error() => {
                self.doubt = self.suspect_some_model(is_serving).map(|model_id| (e.clone(), model_id));
                self.doubt.is_some() && is_serving
            }
            _ => false,
        }
    }

    /// Requests the trial of a model, because a probe got a 5xx; at once if the backend stays offered meanwhile. Returns the model;
    /// `None` if a trial would show no more than the probe.
    fn suspect_some_model(&self, is_serving: bool) -> Option<String> {
        let may_serve = self.unavailable.as_ref().is_none_or(BackendError::is_server_error);
        let (mut health, now) = (self.handle.health(), Instant::now());
        let model_id = self.model_to_try(&health).filter(|_| may_serve)?;
        health.suspect(&model_id, now);
        if is_serving {
            health.hasten_trial(&model_id, now);
        }
        Some(model_id)
    }

    /// The offered model that served last, else the first, unless the trial might load it and unload another.
    fn model_to_try(&self, health: &Health) -> Option<String> {
        let listed = self.last_listing.iter().flatten().map(|model| &model.model_id);
        let mut offered = listed.filter(|model_id| !self.withdrawn.contains_key(*model_id) && health.may_try(model_id));
        let loads_on_demand = Kind::from_name(self.offer.backend.kind()).is_some_and(Kind::loads_on_demand);
        let served = offered.clone().find(|model_id| health.last_served() == Some(model_id));
        served.or_else(|| offered.next().filter(|_| !loads_on_demand)).cloned()
    }

    /// Sets the listing, and forgets the health of models that are not in it.
    fn set_listing(&mut self, listing: Vec<ResolvedModel>, was_serving: bool) {
        let mut health = self.handle.health();
        health.retain_models(|model_id| listing.iter().any(|model| model.model_id == model_id));
        if !was_serving {
            health.server_returned(Instant::now());
        }
        drop(health);
        self.last_listing = Some(listing);
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
        let now = Moment::now();
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

/// A withdrawn model and the reason, as shown to the operator.
fn of_model((model_id, why): (&String, &String)) -> String {
    format!("{}: {why}", sanitize_for_log(model_id))
}

/// The reason as shown to the operator. A response to a probe contains no prompt, but may contain an API key.
fn redacted_reason(e: &BackendError) -> String {
    match e {
        BackendError::AuthRejected(_) => format!("the backend rejected the API key: {}", e.for_log()),
        _ => e.for_operator(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{BackendModel, HttpBackend, HttpStatus};
    use crate::config::{Price, Pricing};

    #[test]
    fn no_trial_is_due_while_all_slots_are_taken_or_the_backend_is_unavailable() {
        let backend = Arc::new(HttpBackend::new(Kind::Vllm, None, None));
        let price = Price { input_per_1m: 1, output_per_1m: 1 };
        let terms = OfferTerms { pricing: Pricing { default: price, models: Default::default() }, max_concurrent: 1 };
        let mut status =
            BackendStatus::new(BackendOffer { backend, allowed_models: None, max_concurrent: None }, &terms);
        for _ in 0..FAILURES_MAX {
            let response = HttpStatus { status: 500, body: String::new() };
            status.handle.record_outcome("m", Instant::now(), &Err(BackendError::Status(response)));
        }
        let trial = Trial { model_id: "m".into(), purpose: Purpose::Model };
        assert_eq!(status.due_trial(), Some(trial.clone()));
        let slot = status.handle.try_acquire_slot();
        assert_eq!(status.due_trial(), None);
        drop(slot);
        status.unavailable = Some(BackendError::Unreachable("refused".into()));
        assert_eq!(status.due_trial(), None);
        status.unavailable = None;
        assert!(!status.apply_trial(&trial, &TrialOutcome::Passed), "it was not withdrawn");
        assert_eq!(status.due_trial(), None);
    }

    #[test]
    fn backend_in_doubt_is_judged_at_once_by_a_model_that_is_not_withdrawn() {
        let backend = Arc::new(HttpBackend::new(Kind::Vllm, None, None));
        let price = Price { input_per_1m: 1, output_per_1m: 1 };
        let terms = OfferTerms { pricing: Pricing { default: price, models: Default::default() }, max_concurrent: 1 };
        let offer = BackendOffer { backend, allowed_models: None, max_concurrent: None };
        let mut status = BackendStatus::new(offer, &terms);
        // Answers are recorded with a precision of 1 ms.
        std::thread::sleep(Duration::from_millis(1));
        let model = |id: &str| BackendModel { model_id: id.into(), context_window: None, native: true };
        let listed = || ProbedModels::from(vec![model("bad"), model("good")]);
        assert!(status.apply_probe(Ok(listed()), Instant::now(), &terms));
        let error = || BackendError::Status(HttpStatus { status: 500, body: String::new() });
        for _ in 0..FAILURES_MAX {
            status.handle.record_outcome("bad", Instant::now(), &Err(error()));
        }
        let trial = status.due_trial().expect("a trial");
        assert!(status.apply_trial(&trial, &TrialOutcome::Failed("HTTP 500".into())));
        status.handle.health().server_returned(Instant::now());
        assert_eq!(status.due_trial(), Some(Trial { model_id: "bad".into(), purpose: Purpose::Withdrawn }));
        // The second time, an earlier trial of the model has just ended.
        for _ in 0..2 {
            assert!(!status.apply_probe(Err(error()), Instant::now(), &terms));
            let trial = Trial { model_id: "good".into(), purpose: Purpose::Backend };
            assert_eq!(status.due_trial(), Some(trial.clone()));
            assert!(!status.apply_trial(&trial, &TrialOutcome::Passed));
            status.handle.record_outcome("good", Instant::now(), &Err(error()));
            assert!(status.is_offered() && status.withdrawn().contains_key("bad"));
        }
    }
}
