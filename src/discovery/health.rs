//! The health of a backend and of its models, as the outcomes of jobs and trials show it. Knows no clock and no I/O: callers pass the
//! time.
//!
//! - Connection errors and 502 to 504 count against the backend, and against the model in case the others serve. Any other 5xx counts
//!   against the model only, because the request may have caused it.
//! - A model whose jobs keep failing is *suspect*. On a local backend, it is tried with a completion of one token, and is withdrawn only
//!   if that fails. A model that runs elsewhere may cost money, so it is withdrawn for a limited time instead.
//!
//! Invariants: the pause between two trials of a model doubles with each trial, so that customers whose requests fail cannot keep the
//! backend busy with trials. A withdrawal that no trial has confirmed ends by itself.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Instant;

use super::model_health::{FAILURES_MAX, Failures, ModelHealth, QUARANTINE, doubled};
use super::trial::TrialOutcome;
use crate::backend::{BackendResult, Fault, JobResult};

/// Minimum number of connection errors and 502 to 504 among the failures that withdraw a backend.
const BACKEND_FAILURES_MIN: u32 = 2;
const _: () = assert!(BACKEND_FAILURES_MIN <= FAILURES_MAX);

/// What the outcome of a job has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing that concerns the offer.
    Unchanged,
    /// The backend must be withdrawn.
    BackendFails,
    /// The model must be tried, or was withdrawn.
    ModelFails,
}

/// The health of one backend.
pub struct Health {
    /// Whether a model may be tried; false for hosted backends, which charge for it.
    may_try: bool,
    /// The models that run elsewhere, on the operator's account, and are not tried.
    remote: HashSet<String>,
    failures: Failures,
    /// The number of consecutive failures that were the backend's.
    backend_failures: u32,
    failing_since: Option<Instant>,
    /// Withdrawals since the last successful job, except the current one.
    relapses: u32,
    /// The model of the last successful job.
    last_served: Option<String>,
    /// The models with failed jobs; at most those of the listing.
    models: HashMap<String, ModelHealth>,
}

impl Health {
    /// The health of a backend without failures.
    pub fn new(may_try: bool) -> Health {
        Health {
            may_try,
            remote: HashSet::new(),
            failures: Failures::default(),
            backend_failures: 0,
            failing_since: None,
            relapses: 0,
            last_served: None,
            models: HashMap::new(),
        }
    }

    /// Whether the model may be tried.
    pub fn may_try(&self, model_id: &str) -> bool {
        self.may_try && !self.remote.contains(model_id)
    }

    /// When the last failure was counted.
    pub fn last_failure(&self) -> Option<Instant> {
        self.failures.last_counted
    }

    /// Records the outcome of a job that began at `began`. Failures caused by the request, the deadline or this machine neither count
    /// nor reset the counts.
    pub fn record(
        &mut self,
        model_id: &str,
        began: Instant,
        outcome: &BackendResult<JobResult>,
        now: Instant,
    ) -> Verdict {
        let fault = match outcome {
            Ok(_) => {
                self.succeeded(model_id);
                return Verdict::Unchanged;
            }
            Err(e) => e.fault(),
        };
        if fault == Fault::Neither {
            return Verdict::Unchanged;
        }
        if self.failures.count(began, now) {
            self.backend_failures += u32::from(fault == Fault::Backend);
        }
        if self.failing_since.is_none()
            && self.failures.count >= FAILURES_MAX
            && self.backend_failures >= BACKEND_FAILURES_MIN
        {
            self.failing_since = Some(now);
            // The failures are the backend's, not the models'.
            self.models.values_mut().filter(|model| model.withdrawn().is_none()).for_each(ModelHealth::restore);
            return Verdict::BackendFails;
        }
        // While the backend is withdrawn, its failures say nothing about the model.
        let may_be_the_models = fault == Fault::Model || self.failing_since.is_none();
        if may_be_the_models && self.model(model_id, now).count(began, now) {
            self.suspect(model_id, now);
            return Verdict::ModelFails;
        }
        Verdict::Unchanged
    }

    fn succeeded(&mut self, model_id: &str) {
        self.failures.count = 0;
        self.backend_failures = 0;
        if self.failing_since.is_none() {
            self.relapses = 0;
        }
        if let Some(model) = self.models.get_mut(model_id) {
            model.restore();
        }
        if self.last_served.as_deref() != Some(model_id) {
            self.last_served = Some(model_id.to_owned());
        }
    }

    /// The model of the last successful job.
    pub fn last_served(&self) -> Option<&str> {
        self.last_served.as_deref()
    }

    /// Makes the model suspect, so that a trial becomes due; withdraws it if it may not be tried.
    pub fn suspect(&mut self, model_id: &str, now: Instant) {
        let may_try = self.may_try(model_id);
        self.model(model_id, now).suspect(may_try, now);
    }

    fn model(&mut self, model_id: &str, now: Instant) -> &mut ModelHealth {
        self.models.entry(model_id.to_owned()).or_insert_with(|| ModelHealth::new(now))
    }

    /// Whether the backend must be withdrawn because its jobs fail.
    pub fn is_failing(&self) -> bool {
        self.failing_since.is_some()
    }

    /// Records the success of a probe that began at `started`. Returns whether the backend may be offered.
    pub fn probe_succeeded(&mut self, started: Instant) -> bool {
        let Some(since) = self.failing_since else { return true };
        if started < since + doubled(QUARANTINE, self.relapses) {
            return false;
        }
        self.failing_since = None;
        self.failures.count = 0;
        self.backend_failures = 0;
        self.relapses = self.relapses.saturating_add(1);
        true
    }

    /// Sets the models that run elsewhere, on the operator's account.
    pub fn set_remote(&mut self, remote: HashSet<String>) {
        self.remote = remote;
    }

    /// Forgets the models that the backend no longer lists.
    pub fn retain_models(&mut self, is_listed: impl Fn(&str) -> bool) {
        self.models.retain(|model_id, _| is_listed(model_id));
    }

    /// The models that are not offered because their jobs fail, and the reasons.
    pub fn withdrawn(&self) -> BTreeMap<String, String> {
        let why = |model: &ModelHealth| model.withdrawn().map(str::to_owned);
        self.models.iter().filter_map(|(model_id, model)| Some((model_id.clone(), why(model)?))).collect()
    }

    /// Restores the models whose withdrawal ends by itself. Returns whether there were any.
    pub fn release(&mut self, now: Instant) -> bool {
        let due = self.models.values_mut().filter(|model| model.is_due(now) && !model.may_try());
        due.map(ModelHealth::restore).count() > 0
    }

    /// The model whose trial is due first.
    pub fn due_trial(&self, now: Instant) -> Option<&str> {
        let due = self.models.iter().filter(|(_, model)| model.is_due(now) && model.may_try());
        due.min_by_key(|(_, model)| model.due()).map(|(model_id, _)| model_id.as_str())
    }

    /// When the trial of this model is due.
    pub fn trial_due(&self, model_id: &str) -> Option<Instant> {
        self.models.get(model_id).filter(|model| model.may_try())?.due()
    }

    /// Makes the trial of this model due at once.
    pub fn hasten_trial(&mut self, model_id: &str, now: Instant) {
        if let Some(model) = self.models.get_mut(model_id) {
            model.hasten(now);
        }
    }

    /// When the next trial or release is due.
    pub fn next_due(&self) -> Option<Instant> {
        self.models.values().filter_map(ModelHealth::due).min()
    }

    /// Makes all trials due at once: the server was away, and may have been repaired.
    pub fn server_returned(&mut self, now: Instant) {
        self.models.values_mut().for_each(|model| model.hasten(now));
    }

    /// Records the outcome of a trial. Returns whether the offer has changed.
    pub fn record_trial(&mut self, model_id: &str, outcome: &TrialOutcome, now: Instant) -> bool {
        self.models.get_mut(model_id).is_some_and(|model| model.record_trial(outcome, now))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::model_health::QUARANTINE_MAX;
    use super::*;
    use crate::backend::BackendError;

    const MS: Duration = Duration::from_millis(1);

    /// A backend's health, and a clock that each job advances.
    struct Bench {
        health: Health,
        now: Instant,
    }

    impl Bench {
        fn new(may_try: bool) -> Bench {
            Bench { health: Health::new(may_try), now: Instant::now() }
        }

        /// Runs a job after all earlier ones have ended.
        fn job(&mut self, model_id: &str, outcome: &BackendResult<JobResult>) -> Verdict {
            let began = self.now + MS;
            self.now += 2 * MS;
            self.health.record(model_id, began, outcome, self.now)
        }

        fn trial(&mut self, outcome: TrialOutcome) -> bool {
            let model_id = self.health.due_trial(self.now).expect("a trial is due").to_owned();
            self.health.record_trial(&model_id, &outcome, self.now)
        }

        fn withdrawn(&self) -> Vec<String> {
            self.health.withdrawn().into_keys().collect()
        }
    }

    fn ok() -> BackendResult<JobResult> {
        Ok(JobResult::default())
    }

    fn status(status: u16) -> BackendResult<JobResult> {
        Err(BackendError::from_status(status, b""))
    }

    fn refused() -> BackendResult<JobResult> {
        Err(BackendError::Unreachable("refused".into()))
    }

    fn failed() -> TrialOutcome {
        TrialOutcome::Failed("HTTP 500".into())
    }

    #[test]
    fn three_consecutive_failures_of_which_two_are_the_backends_mark_it_as_failing() {
        let neither = [
            status(400),
            status(413),
            status(422),
            status(429),
            status(404),
            Err(BackendError::Cancelled),
            Err(BackendError::DeadlinePassed),
        ];
        let mut bench = Bench::new(true);
        for outcome in [refused(), refused(), ok(), status(502), refused()] {
            assert_eq!(bench.job("m", &outcome), Verdict::Unchanged);
        }
        for outcome in &neither {
            assert_eq!(bench.job("m", outcome), Verdict::Unchanged, "{outcome:?}");
        }
        assert!(!bench.health.is_failing());
        assert_eq!(bench.job("m", &status(503)), Verdict::BackendFails);
        assert!(bench.health.is_failing());
        assert_eq!(bench.job("m", &refused()), Verdict::Unchanged, "reported once");
        for mixed in [[500, 502, 504], [502, 500, 503], [503, 504, 507]] {
            let mut bench = Bench::new(true);
            assert_eq!(mixed.map(|code| bench.job("m", &status(code)))[2], Verdict::BackendFails, "{mixed:?}");
        }
    }

    #[test]
    fn model_whose_gateway_cannot_reach_its_server_is_suspect_while_others_serve() {
        for outcome in [refused(), status(502), status(503), Err(BackendError::Broken("reset".into()))] {
            let mut bench = Bench::new(true);
            let verdicts = [0; 3].map(|_| {
                bench.job("good", &ok());
                bench.job("bad", &outcome)
            });
            assert_eq!(verdicts, [Verdict::Unchanged, Verdict::Unchanged, Verdict::ModelFails], "{outcome:?}");
            assert!(bench.trial(failed()) && bench.withdrawn() == ["bad"], "{outcome:?}");
        }
    }

    #[test]
    fn model_that_runs_elsewhere_is_never_tried_and_its_withdrawal_ends_by_itself() {
        let mut bench = Bench::new(true);
        bench.health.set_remote(["cloud".to_owned()].into());
        for model_id in ["cloud", "local"] {
            (0..FAILURES_MAX).for_each(|_| _ = bench.job(model_id, &status(500)));
        }
        assert_eq!(bench.withdrawn(), ["cloud"]);
        assert_eq!(bench.health.due_trial(bench.now), Some("local"));
        bench.now += QUARANTINE;
        assert!(bench.health.release(bench.now) && bench.withdrawn().is_empty());
        assert_eq!(bench.health.due_trial(bench.now), Some("local"));
    }

    #[test]
    fn failures_of_jobs_that_began_before_the_last_counted_one_count_once() {
        let mut bench = Bench::new(true);
        let began = bench.now;
        let broken = Err(BackendError::Broken("reset".into()));
        for _ in 0..8 {
            bench.now += MS;
            assert_eq!(bench.health.record("m", began, &broken, bench.now), Verdict::Unchanged);
        }
        assert_eq!(bench.job("m", &broken), Verdict::Unchanged);
        assert_eq!(bench.job("m", &broken), Verdict::BackendFails, "the third event");
    }

    #[test]
    fn quarantine_doubles_with_each_relapse_and_starts_over_after_a_success() {
        let mut bench = Bench::new(true);
        let mut quarantines = Vec::new();
        for round in 0..10 {
            if round == 9 {
                bench.job("m", &ok());
            }
            for _ in 0..FAILURES_MAX {
                bench.job("m", &refused());
            }
            assert!(bench.health.is_failing());
            let withdrawn = bench.now;
            while !bench.health.probe_succeeded(bench.now) {
                bench.now += Duration::from_secs(1);
            }
            quarantines.push((bench.now - withdrawn).as_secs());
        }
        assert_eq!(quarantines, [4, 8, 16, 32, 64, 128, 256, 300, 300, 4]);
    }

    #[test]
    fn model_whose_jobs_fail_is_withdrawn_only_if_a_trial_fails_and_until_one_succeeds() {
        let mut bench = Bench::new(true);
        for _ in 1..FAILURES_MAX {
            assert_eq!(bench.job("bad", &status(500)), Verdict::Unchanged);
            bench.job("good", &ok());
        }
        assert_eq!(bench.health.due_trial(bench.now), None);
        assert_eq!(bench.job("bad", &status(500)), Verdict::ModelFails);
        assert!(!bench.health.is_failing() && bench.withdrawn().is_empty());
        assert!(!bench.trial(TrialOutcome::Inconclusive("HTTP 429".into())));
        assert_eq!(bench.health.due_trial(bench.now), None, "the trials are limited in rate");
        bench.now += QUARANTINE;
        assert!(bench.trial(failed()));
        assert_eq!(bench.withdrawn(), ["bad"]);
        bench.now += 2 * QUARANTINE;
        assert!(bench.trial(TrialOutcome::Passed));
        assert!(bench.withdrawn().is_empty());
        assert_eq!(bench.health.next_due(), None);
    }

    #[test]
    fn trials_that_a_customer_provokes_become_rare() {
        let mut bench = Bench::new(true);
        let started = bench.now;
        let mut trials = Vec::new();
        while bench.now < started + Duration::from_secs(3600) {
            bench.job("m", &status(500));
            bench.now += Duration::from_secs(1);
            if bench.health.due_trial(bench.now).is_some() {
                trials.push((bench.now - started).as_secs());
                bench.trial(TrialOutcome::Passed);
            }
        }
        assert!(trials.len() < 20, "{trials:?}");
        for _ in 0..2 {
            bench.now += 2 * QUARANTINE_MAX;
            bench.job("m", &ok());
        }
        for _ in 0..FAILURES_MAX {
            bench.job("m", &status(500));
        }
        bench.trial(failed());
        assert_eq!(bench.health.next_due(), Some(bench.now + QUARANTINE), "starts over after a quiet time");
    }

    #[test]
    fn model_of_a_hosted_backend_is_withdrawn_for_a_limited_time_without_a_trial() {
        let mut bench = Bench::new(false);
        for times in [1, 2] {
            for _ in 0..FAILURES_MAX {
                bench.job("m", &status(500));
            }
            assert_eq!(bench.withdrawn(), ["m"]);
            bench.now += times * QUARANTINE - MS;
            assert!(!bench.health.release(bench.now) && bench.health.due_trial(bench.now).is_none());
            bench.now += MS;
            assert!(bench.health.release(bench.now));
            assert!(bench.withdrawn().is_empty() && !bench.health.release(bench.now));
        }
    }

    #[test]
    fn models_that_are_no_longer_listed_are_forgotten_and_a_server_that_returns_is_tried_at_once() {
        let mut bench = Bench::new(true);
        for _ in 0..FAILURES_MAX {
            bench.job("m", &status(500));
        }
        bench.trial(failed());
        assert_eq!(bench.health.due_trial(bench.now), None);
        bench.health.server_returned(bench.now);
        assert_eq!(bench.health.due_trial(bench.now), Some("m"));
        bench.health.retain_models(|_| false);
        assert!(bench.withdrawn().is_empty() && bench.health.due_trial(bench.now).is_none());
    }
}
