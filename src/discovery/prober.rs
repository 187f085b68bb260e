//! Probe rounds: each probes all backends side by side, and publishes a new [`Catalog`] as the results arrive. Between rounds, trials
//! of models whose jobs fail.
//!
//! [`ProbeRounds`] is a state machine that the housekeeping thread drives. [`Prober`] is the handle that other threads use to
//! request rounds.
//!
//! Invariants: nothing here blocks. Each backend is probed on a thread of its own, by one probe at a time, so a hung backend delays
//! only itself. A round ends after [`ROUND_TIME_MAX`]. All requests that arrive before a round starts share that round. Each backend
//! runs at most one trial at a time; none is started while the agent is paused.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::backend_status::ProbeResult;
use super::probe_threads::{ROUND_TIME_MAX, start_probes, unanswered};
use super::trial::{self, Trial, TrialOutcome};
use super::{BackendOffer, BackendStatus, Catalog, OfferFeed, OfferTerms};
use crate::sys::{jitter, threads};

/// Interval between rounds, varied by up to a fifth.
const REFRESH: Duration = Duration::from_secs(30);
/// Interval between rounds while a backend may become available soon: it is loading its model, at capacity, or too slow to
/// respond.
const REFRESH_SOON: Duration = Duration::from_secs(5);
/// Time for which the first offer waits for all probes. After that, one available backend is enough.
const FIRST_OFFER_GRACE: Duration = Duration::from_secs(1);
/// Time until a trial that could not be started when it was due is considered again.
const TRIAL_RETRY: Duration = Duration::from_secs(1);
/// Minimum time between rounds that failing jobs request.
const REFRESH_SPACING: Duration = Duration::from_secs(1);

const _: () = assert!(REFRESH_SOON.as_secs() <= REFRESH.as_secs());

/// Requests probe rounds. Once the last clone is dropped, [`ProbeRounds::poll`] returns `None`.
#[derive(Clone)]
pub struct Prober(Arc<Handle>);

struct Handle {
    inbox: Arc<Inbox>,
}

/// Input of the next [`ProbeRounds::poll`].
struct Inbox {
    pending: Mutex<PendingInput>,
    wake: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct PendingInput {
    requests: Requests,
    results: Vec<Arrival>,
    /// The outcomes of trials.
    trials: Vec<(usize, Trial, TrialOutcome)>,
    /// Set when the last handle was dropped.
    is_over: bool,
}

/// The end of a probe.
struct Arrival {
    /// The index of the backend.
    index: usize,
    /// When the round of the probe started.
    round: Instant,
    result: ProbeResult,
}

/// Requests for a round.
#[derive(Default)]
struct Requests {
    /// Waiters for an offer: each sender is dropped once an offer can be made.
    waiters: Vec<Sender<()>>,
    /// The offer may be out of date: start a round soon.
    refresh: bool,
    /// The jobs of a backend fail: withdraw the backend at once, and start a round when it may have recovered.
    withdraw: bool,
}

impl Inbox {
    fn add(&self, change: impl FnOnce(&mut PendingInput)) {
        change(&mut self.pending());
        (self.wake)();
    }

    fn pending(&self) -> MutexGuard<'_, PendingInput> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Prober {
    /// Returns a prober and its rounds. The first round starts with the first request. `wake` is called whenever
    /// [`ProbeRounds::poll`] has something to do; it must not block.
    pub fn new(
        backends: Vec<BackendOffer>,
        terms: OfferTerms,
        offers: Arc<OfferFeed>,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> (Prober, ProbeRounds) {
        let inbox = Arc::new(Inbox { pending: Mutex::default(), wake: Box::new(wake) });
        let rounds = ProbeRounds {
            probing: vec![None; backends.len()],
            round_time_max: ROUND_TIME_MAX,
            backends: backends.into_iter().map(|offer| BackendStatus::new(offer, &terms)).collect(),
            terms,
            offers,
            inbox: inbox.clone(),
            round: None,
            requests: Requests::default(),
            due: None,
            last_round: Instant::now(),
            trying: BTreeSet::new(),
        };
        (Prober(Arc::new(Handle { inbox })), rounds)
    }

    /// Requests a round. The receiver disconnects once all results are in, or enough of them for a first offer.
    pub fn refresh(&self) -> Receiver<()> {
        let (waiter, receiver) = bounded(0);
        self.0.inbox.add(|pending| pending.requests.waiters.push(waiter));
        receiver
    }

    /// Requests a round, because the backend of a job was missing. Does not block.
    pub fn request_refresh(&self) {
        self.0.inbox.add(|pending| pending.requests.refresh = true);
    }

    /// Requests the trial of models whose jobs fail. Does not block.
    pub fn try_suspects(&self) {
        self.0.inbox.add(|_| ());
    }

    /// Withdraws backends whose jobs fail from the offer, until a probe succeeds.
    pub fn withdraw_failing(&self) {
        self.0.inbox.add(|pending| pending.requests.withdraw = true);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inbox.add(|pending| pending.is_over = true);
    }
}

/// The backends, and the state of their probe rounds.
pub struct ProbeRounds {
    backends: Vec<BackendStatus>,
    /// When the round of the probe started that is running, by backend.
    probing: Vec<Option<Instant>>,
    round_time_max: Duration,
    terms: OfferTerms,
    offers: Arc<OfferFeed>,
    inbox: Arc<Inbox>,
    /// The round in progress.
    round: Option<Round>,
    /// Requests for the next round.
    requests: Requests,
    /// When the next round starts; `None` before the first request.
    due: Option<Instant>,
    last_round: Instant,
    /// The backends with a running trial; one at a time each, so that they take little from the jobs.
    trying: BTreeSet<usize>,
}

/// A round in progress.
struct Round {
    started: Instant,
    /// The backends whose results are still to come.
    pending: BTreeSet<usize>,
    /// Whether any backend is available.
    has_offer: bool,
    /// Dropped once an offer can be made.
    waiters: Vec<Sender<()>>,
}

impl ProbeRounds {
    /// The backends, in the order of the configuration.
    pub fn backends(&self) -> &[BackendStatus] {
        &self.backends
    }

    /// When to call [`ProbeRounds::poll`] next, unless woken before.
    pub fn next_wakeup(&self) -> Option<Instant> {
        let round = match &self.round {
            Some(round) if round.has_offer && !round.waiters.is_empty() => Some(round.started + FIRST_OFFER_GRACE),
            Some(round) => Some(round.started + self.round_time_max),
            None => self.due,
        };
        round.into_iter().chain(self.health_due()).min()
    }

    /// When the next trial or release of a model is due. A trial that is overdue waits for a slot.
    fn health_due(&self) -> Option<Instant> {
        if self.offers.is_paused() {
            return None;
        }
        let idle = self.backends.iter().enumerate().filter(|(index, _)| !self.trying.contains(index));
        let due = idle.filter_map(|(_, backend)| backend.health_due()).min()?;
        Some(due.max(Instant::now() + TRIAL_RETRY))
    }

    /// Applies probe results, and starts the next round when it is due. Returns whether the offer or the state of a backend has
    /// changed; `None` once the last [`Prober`] was dropped.
    pub fn poll(&mut self) -> Option<bool> {
        let PendingInput { requests, results, trials, is_over } = std::mem::take(&mut *self.inbox.pending());
        if is_over {
            return None;
        }
        let results = self.current_results(results);
        let mut is_change = false;
        for (index, trial, outcome) in trials {
            self.trying.remove(&index);
            let backend = &mut self.backends[index];
            is_change |= backend.apply_trial(&trial, &outcome);
            self.requests.withdraw |= backend.may_serve_soon();
        }
        for backend in &mut self.backends {
            is_change |= backend.apply_health();
        }
        if is_change || !results.is_empty() {
            is_change |= self.apply_probes(results);
            is_change |= self.publish();
        }
        self.release_waiters();
        self.requests.waiters.extend(requests.waiters);
        self.requests.refresh |= requests.refresh;
        self.requests.withdraw |= requests.withdraw;
        if self.round.is_none() {
            self.schedule_next();
            if self.due.is_some_and(|due| due <= Instant::now()) {
                self.start_round();
                self.release_waiters();
            }
        }
        self.start_trials();
        Some(is_change)
    }

    /// The results that count for the round in progress: those of its own probes; a timeout for each backend whose earlier probe is
    /// still running, and once the time is over, for each that is missing.
    fn current_results(&mut self, arrivals: Vec<Arrival>) -> Vec<(usize, ProbeResult)> {
        let mut results = Vec::new();
        for Arrival { index, round, result } in arrivals {
            self.probing[index] = None;
            let is_current = |current: &&mut Round| current.started == round;
            if self.round.as_mut().filter(is_current).is_some_and(|current| current.pending.remove(&index)) {
                results.push((index, result));
            }
        }
        if let Some(round) = &mut self.round {
            let is_over = round.started.elapsed() >= self.round_time_max;
            let probing = &self.probing;
            round.pending.retain(|index| {
                let is_awaited = !is_over && probing[*index] == Some(round.started);
                if !is_awaited {
                    results.push((*index, unanswered()));
                }
                is_awaited
            });
        }
        results
    }

    /// Starts the trials that are due. None is started while the agent is paused: the operator wants the machine idle.
    fn start_trials(&mut self) {
        if self.offers.is_paused() {
            return;
        }
        for (index, status) in self.backends.iter().enumerate() {
            let is_idle = |_: &Trial| !self.trying.contains(&index);
            let Some(trial) = status.due_trial().filter(is_idle) else { continue };
            let (backend, inbox) = (status.offer().backend.clone(), self.inbox.clone());
            let run = move || {
                let outcome = trial::run(&*backend, &trial);
                inbox.add(|pending| pending.trials.push((index, trial, outcome)));
            };
            // Without a thread, the trial stays due.
            if threads::spawn("trial", run).is_ok() {
                self.trying.insert(index);
            }
        }
    }

    fn apply_probes(&mut self, results: Vec<(usize, ProbeResult)>) -> bool {
        let Some(round) = &mut self.round else { return false };
        let mut is_change = false;
        for (index, result) in results {
            let backend = &mut self.backends[index];
            is_change |= backend.apply_probe(result, round.started, &self.terms);
            round.has_offer |= backend.is_offered();
        }
        is_change
    }

    /// Releases the waiters once an offer can be made, and ends the round once all results are in.
    fn release_waiters(&mut self) {
        let Some(round) = &mut self.round else { return };
        if !round.pending.is_empty() {
            if round.has_offer && round.started.elapsed() >= FIRST_OFFER_GRACE {
                round.waiters.clear();
            }
            return;
        }
        self.round = None;
        self.last_round = Instant::now();
        let interval = if self.backends.iter().any(BackendStatus::may_serve_soon) { REFRESH_SOON } else { REFRESH };
        self.due = Some(self.last_round + jitter::scale(interval, jitter::random()));
    }

    /// Schedules the next round as requested. Limits the rate of rounds for jobs that fail on a missing backend. After a withdrawal,
    /// delays the round: the backend is healthy and would pass its probe at once.
    fn schedule_next(&mut self) {
        let now = Instant::now();
        let requested = match &self.requests {
            Requests { waiters, .. } if !waiters.is_empty() => now,
            Requests { refresh: true, .. } => self.last_round + REFRESH_SPACING,
            Requests { withdraw: true, .. } => now + REFRESH_SOON,
            _ => return,
        };
        (self.requests.refresh, self.requests.withdraw) = (false, false);
        self.due = Some(self.due.map_or(requested, |due| due.min(requested)));
    }

    /// Starts a round for all requests so far. A backend whose earlier probe is still running is not probed again.
    fn start_round(&mut self) {
        let started = Instant::now();
        let round = Round {
            started,
            pending: (0..self.backends.len()).collect(),
            has_offer: false,
            waiters: std::mem::take(&mut self.requests.waiters),
        };
        self.round = Some(round);
        let inbox = self.inbox.clone();
        let report = move |index, result| {
            inbox.add(|pending| pending.results.push(Arrival { index, round: started, result }));
        };
        let mut idle = Vec::new();
        for (index, status) in self.backends.iter().enumerate() {
            if self.probing[index].is_none() {
                self.probing[index] = Some(started);
                idle.push((index, status.offer().backend.clone()));
            }
        }
        if idle.len() < self.backends.len() {
            self.inbox.add(|_| ());
        }
        start_probes(idle, &Arc::new(report));
    }

    fn publish(&self) -> bool {
        let listings = |offered: bool| self.backends.iter().filter_map(|b| b.listing(offered)).collect();
        self.offers.publish(Catalog::new(listings(true), listings(false)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, BackendError, BackendHealth, BackendModel, BackendResult, Job, JobResult, JobSink};
    use crate::config::{Price, Pricing};
    use crate::discovery::model_health::FAILURES_MAX;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A backend that signals each probe, and responds when the test allows it.
    struct Gated {
        models: &'static [&'static str],
        probed: Sender<()>,
        gate: Receiver<()>,
    }

    impl Backend for Gated {
        fn kind(&self) -> &'static str {
            "vllm"
        }

        fn id(&self) -> &str {
            "gated"
        }

        fn list_models(&self) -> BackendResult<Vec<BackendModel>> {
            let _ = self.probed.send(());
            let _ = self.gate.recv();
            let model = |id: &&str| BackendModel { model_id: (*id).to_owned(), context_window: None, native: true };
            Ok(self.models.iter().map(model).collect())
        }

        fn health(&self) -> BackendResult<BackendHealth> {
            Ok(BackendHealth { reachable: true, ..BackendHealth::default() })
        }

        fn execute(&self, _: &Job, _: &mut dyn JobSink) -> BackendResult<JobResult> {
            Ok(JobResult::default())
        }
    }

    fn terms() -> OfferTerms {
        let price = Price { input_per_1m: 1, output_per_1m: 1 };
        OfferTerms { pricing: Pricing { default: price, models: Default::default() }, max_concurrent: 8 }
    }

    /// A backend with this model, and what the test needs to watch and release its probes.
    fn gated(models: &'static [&'static str]) -> (BackendOffer, Receiver<()>, Sender<()>) {
        let (probed, probes) = crossbeam_channel::unbounded();
        let (release, gate) = bounded(0);
        let backend = Arc::new(Gated { models, probed, gate });
        (BackendOffer { backend, allowed_models: None, max_concurrent: None }, probes, release)
    }

    #[test]
    fn round_ends_without_the_backend_that_does_not_answer() {
        let ((hung, hung_probes, release), (other, other_probes, answer)) = (gated(&["n"]), gated(&["m"]));
        let offers = Arc::new(OfferFeed::default());
        let (waker, wakeups) = crossbeam_channel::unbounded();
        let wake = move || _ = waker.send(());
        let (prober, mut rounds) = Prober::new(vec![hung, other], terms(), offers.clone(), wake);
        rounds.round_time_max = Duration::from_millis(50);
        // Of the other backend, each probe is answered at once.
        std::thread::spawn(move || while answer.send(()).is_ok() {});
        let (errors_tx, errors) = crossbeam_channel::unbounded();
        std::thread::spawn(move || {
            while rounds.poll().is_some() {
                let _ = errors_tx.send(rounds.backends()[0].unavailable());
                let due = rounds.next_wakeup().map_or(LIMIT, |at| at.saturating_duration_since(Instant::now()));
                let _ = wakeups.recv_timeout(due);
            }
        });
        let ended = |receiver: Receiver<()>| assert!(receiver.recv_timeout(LIMIT).is_err_and(|e| !e.is_timeout()));
        for round in 0..3 {
            ended(prober.refresh());
            other_probes.recv_timeout(LIMIT).expect("the other backend is probed");
            assert_eq!(hung_probes.len(), 1, "one probe at a time, round {round}");
        }
        while !errors.recv_timeout(LIMIT).expect("a state").is_some_and(|e| e.contains("no response within 6 s")) {}
        assert_eq!(offers.snapshot().offer.len(), 1);
        hung_probes.recv_timeout(LIMIT).expect("the first probe");
        release.send(()).expect("the hung probe");
        // The late result does not count, but the backend is probed again.
        std::thread::spawn(move || while release.send(()).is_ok() {});
        while hung_probes.is_empty() {
            ended(prober.refresh());
        }
        ended(prober.refresh());
        assert_eq!(offers.snapshot().offer.len(), 2);
    }

    #[test]
    fn failing_backend_is_withdrawn_at_once_even_while_another_hangs_in_its_probe() {
        let offered = |models, probed: &Sender<()>, gate: &Receiver<()>| {
            let backend = Arc::new(Gated { models, probed: probed.clone(), gate: gate.clone() });
            BackendOffer { backend, allowed_models: None, max_concurrent: None }
        };
        let (probed, probes) = bounded(1);
        let (release, gate) = bounded(0);
        let open = bounded(0).1;
        let backends = vec![offered(&["m"], &bounded(0).0, &open), offered(&["n"], &probed, &gate)];
        let offers = Arc::new(OfferFeed::default());
        let (sizes_tx, sizes) = crossbeam_channel::unbounded();
        offers.listen(move |offer| sizes_tx.send(offer.len()).expect("the test listens"));
        let assert_offered = |models| assert_eq!(sizes.recv_timeout(LIMIT), Ok(models));
        assert_offered(0);
        let (changes_tx, changes) = crossbeam_channel::unbounded();
        let (waker, wakeups) = crossbeam_channel::unbounded();
        let (prober, mut rounds) = Prober::new(backends, terms(), offers.clone(), move || _ = waker.send(()));
        let driver = std::thread::spawn(move || {
            while let Some(is_change) = rounds.poll() {
                let unavailable = rounds.backends().iter().filter(|backend| backend.unavailable().is_some()).count();
                let _ = changes_tx.send((is_change, unavailable));
                let due = rounds.next_wakeup().map_or(LIMIT, |at| at.saturating_duration_since(Instant::now()));
                let _ = wakeups.recv_timeout(due);
            }
        });
        let refreshed = prober.refresh();
        probes.recv_timeout(LIMIT).expect("the second is probed");
        assert_offered(1);
        let backend = offers.snapshot().candidates("m").remove(0);
        for _ in 0..FAILURES_MAX {
            backend.record_outcome("m", Instant::now(), &Err(BackendError::Unreachable("refused".into())));
        }
        prober.withdraw_failing();
        assert_offered(0);
        while changes.recv_timeout(LIMIT).expect("a change") != (true, 1) {}
        release.send(()).expect("a probe that waits");
        assert_offered(1);
        assert_eq!(refreshed.recv_timeout(LIMIT), Err(crossbeam_channel::RecvTimeoutError::Disconnected));
        assert!(!offers.set_paused(false) && offers.set_paused(true));
        assert_offered(0);
        drop(prober);
        while changes.recv_timeout(LIMIT).is_ok() {}
        assert_eq!(changes.try_recv(), Err(crossbeam_channel::TryRecvError::Disconnected), "poll has returned None");
        driver.join().expect("no panic");
    }
}
