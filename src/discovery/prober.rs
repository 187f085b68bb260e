//! Probe rounds: in each, all backends are probed side by side, and a new [`Catalog`] is published as the results arrive.
//!
//! [`ProbeRounds`] is a state machine that the housekeeping thread drives; [`Prober`] is the handle by which other threads request
//! rounds.
//!
//! Invariants: nothing here blocks. Each backend is probed in a thread of its own, so a hung backend delays nothing but itself.
//! Requests that arrive before the next round share it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::backend_status::ProbeResult;
use super::{BackendOffer, BackendStatus, Catalog, OfferFeed, OfferTerms};
use crate::backend::{Backend, BackendError};
use crate::sys::{jitter, threads};

/// The catalog is refreshed this often, give or take a fifth.
const REFRESH: Duration = Duration::from_secs(30);
/// A backend that may serve at any moment (loading its model, full, or too slow to answer) is asked this often.
const REFRESH_SOON: Duration = Duration::from_secs(5);
/// The first offer waits for all probes; from here on only until one has found something.
const FIRST_OFFER_GRACE: Duration = Duration::from_secs(1);
/// Rounds that failing jobs ask for are at least so far apart.
const REFRESH_SPACING: Duration = Duration::from_secs(1);

const _: () = assert!(REFRESH_SOON.as_secs() <= REFRESH.as_secs());

/// Requests probe rounds. Once the last clone is dropped, [`ProbeRounds::poll`] returns `None`.
#[derive(Clone)]
pub struct Prober(Arc<Handle>);

struct Handle {
    inbox: Arc<Inbox>,
}

/// What the next [`ProbeRounds::poll`] finds.
struct Inbox {
    notes: Mutex<Notes>,
    wake: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Notes {
    requests: Requests,
    answers: Vec<(usize, ProbeResult)>,
    /// Nobody holds a handle any more.
    is_over: bool,
}

/// Why a round is wanted.
#[derive(Default)]
struct Requests {
    /// Somebody waits for an offer: each sender is dropped when there can be one.
    waiters: Vec<Sender<()>>,
    /// The offer may be out of date: a round, soon.
    refresh: bool,
    /// The jobs of a backend fail: an offer without it, at once, and a round when it may have recovered.
    withdraw: bool,
}

impl Inbox {
    fn note(&self, change: impl FnOnce(&mut Notes)) {
        change(&mut self.notes());
        (self.wake)();
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Prober {
    /// A prober and its rounds, of which the first begins with the first request. `wake` is called whenever
    /// [`ProbeRounds::poll`] has something to do; it must not block.
    pub fn new(
        backends: Vec<BackendOffer>,
        terms: OfferTerms,
        offers: Arc<OfferFeed>,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> (Prober, ProbeRounds) {
        let inbox = Arc::new(Inbox { notes: Mutex::default(), wake: Box::new(wake) });
        let rounds = ProbeRounds {
            backends: backends.into_iter().map(|offered| BackendStatus::new(offered, &terms)).collect(),
            terms,
            offers,
            inbox: inbox.clone(),
            round: None,
            wanted: Requests::default(),
            due: None,
            last_round: Instant::now(),
        };
        (Prober(Arc::new(Handle { inbox })), rounds)
    }

    /// Asks for a round. The receiver disconnects when every backend has been heard, or enough of them to begin with.
    pub fn refresh(&self) -> Receiver<()> {
        let (settled, receiver) = bounded(0);
        self.0.inbox.note(|notes| notes.requests.waiters.push(settled));
        receiver
    }

    /// A job found its backend gone: asks for a round, waits for nothing.
    pub fn request_refresh(&self) {
        self.0.inbox.note(|notes| notes.requests.refresh = true);
    }

    /// The jobs of a member fail: has it withdrawn from the offer until a probe succeeds.
    pub fn withdraw_failing(&self) {
        self.0.inbox.note(|notes| notes.requests.withdraw = true);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inbox.note(|notes| notes.is_over = true);
    }
}

/// The backends and the rounds in which they are probed.
pub struct ProbeRounds {
    backends: Vec<BackendStatus>,
    terms: OfferTerms,
    offers: Arc<OfferFeed>,
    inbox: Arc<Inbox>,
    /// The round in progress.
    round: Option<Round>,
    /// What asks for the next round.
    wanted: Requests,
    /// When the next round begins; nothing is due before somebody asks.
    due: Option<Instant>,
    last_round: Instant,
}

/// All backends, asked side by side.
struct Round {
    began: Instant,
    pending: usize,
    /// There is something to offer: a slow backend holds nobody up.
    has_found: bool,
    /// Until an offer can be made.
    waiting: Vec<Sender<()>>,
}

impl ProbeRounds {
    /// The backends in the order of the configuration.
    pub fn backends(&self) -> &[BackendStatus] {
        &self.backends
    }

    /// When [`ProbeRounds::poll`] has something to do even if it is not woken.
    pub fn next_wakeup(&self) -> Option<Instant> {
        match &self.round {
            Some(round) if round.has_found && !round.waiting.is_empty() => Some(round.began + FIRST_OFFER_GRACE),
            // Every probe has a time of its own, and answers.
            Some(_) => None,
            None => self.due,
        }
    }

    /// Applies probe results and starts the next round when it is due. Returns whether the offer or the state of a backend has
    /// changed, and `None` once nobody holds a [`Prober`].
    pub fn poll(&mut self) -> Option<bool> {
        let Notes { requests: wanted, answers, is_over } = std::mem::take(&mut *self.inbox.notes());
        if is_over {
            return None;
        }
        let mut is_news = false;
        for backend in &mut self.backends {
            is_news |= backend.withdraw_if_failing();
        }
        if is_news || !answers.is_empty() {
            is_news |= self.apply_probes(answers);
            is_news |= self.publish();
        }
        self.release_waiters();
        self.wanted.waiters.extend(wanted.waiters);
        self.wanted.refresh |= wanted.refresh;
        self.wanted.withdraw |= wanted.withdraw;
        if self.round.is_none() {
            self.schedule_next();
            if self.due.is_some_and(|due| due <= Instant::now()) {
                self.begin_round();
                self.release_waiters();
            }
        }
        Some(is_news)
    }

    fn apply_probes(&mut self, answers: Vec<(usize, ProbeResult)>) -> bool {
        let Some(round) = &mut self.round else { return false };
        let mut is_news = false;
        for (index, answer) in answers {
            let backend = &mut self.backends[index];
            is_news |= backend.apply_probe(answer, round.began, &self.terms);
            round.has_found |= backend.is_offered();
            round.pending -= 1;
        }
        is_news
    }

    /// Ends the round when all have been heard, and lets those go who wait for an offer when there can be one.
    fn release_waiters(&mut self) {
        let Some(round) = &mut self.round else { return };
        if round.pending > 0 {
            if round.has_found && round.began.elapsed() >= FIRST_OFFER_GRACE {
                round.waiting.clear();
            }
            return;
        }
        self.round = None;
        self.last_round = Instant::now();
        let wait = if self.backends.iter().any(BackendStatus::may_serve_soon) { REFRESH_SOON } else { REFRESH };
        self.due = Some(self.last_round + jitter::scale(wait, jitter::random()));
    }

    /// Has the next round begin when it is wanted. A backend in trouble is not asked for every job that it fails; one that
    /// fails its jobs while it is healthy is asked soon, but not at once.
    fn schedule_next(&mut self) {
        let now = Instant::now();
        let wanted = match &self.wanted {
            Requests { waiters: settle, .. } if !settle.is_empty() => now,
            Requests { refresh: true, .. } => self.last_round + REFRESH_SPACING,
            Requests { withdraw: true, .. } => now + REFRESH_SOON,
            _ => return,
        };
        (self.wanted.refresh, self.wanted.withdraw) = (false, false);
        self.due = Some(self.due.map_or(wanted, |due| due.min(wanted)));
    }

    /// One round answers all who asked before it began.
    fn begin_round(&mut self) {
        let round = Round {
            began: Instant::now(),
            pending: self.backends.len(),
            has_found: false,
            waiting: std::mem::take(&mut self.wanted.waiters),
        };
        self.round = Some(round);
        let backends: Vec<_> = self.backends.iter().map(|probed| probed.offered().backend.clone()).collect();
        let inbox = self.inbox.clone();
        let tell = move |index, answer| inbox.note(|notes| notes.answers.push((index, answer)));
        ask_all(&backends, Arc::new(tell));
    }

    fn publish(&self) -> bool {
        let listings = |offered: bool| {
            self.backends.iter().filter(move |b| b.is_offered() == offered).filter_map(BackendStatus::listing).collect()
        };
        self.offers.publish(Catalog::new(listings(true), listings(false)))
    }
}

/// Probes all of them side by side; the answers are in their order.
pub fn probe_all(backends: &[Arc<dyn Backend>]) -> Vec<ProbeResult> {
    probe_within(backends, Duration::MAX).into_iter().flatten().collect()
}

/// Likewise, but nobody waits longer than `limit`: `None` for those that have not answered by then.
pub fn probe_within(backends: &[Arc<dyn Backend>], limit: Duration) -> Vec<Option<ProbeResult>> {
    let answers: Vec<Option<ProbeResult>> = backends.iter().map(|_| None).collect();
    let answers = Arc::new(Mutex::new(answers));
    // Gone with the last one who tells.
    let (asked, all_told) = bounded::<()>(0);
    let slots = answers.clone();
    let tell = move |index: usize, answer| {
        let _ = &asked;
        slots.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(answer);
    };
    ask_all(backends, Arc::new(tell));
    let _ = all_told.recv_timeout(limit);
    let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
    answers.iter_mut().map(Option::take).collect()
}

/// `tell` is given one answer for each backend, in the order in which they come.
fn ask_all(backends: &[Arc<dyn Backend>], tell: Arc<dyn Fn(usize, ProbeResult) + Send + Sync>) {
    for (index, backend) in backends.iter().enumerate() {
        let ask = {
            let (backend, tell) = (backend.clone(), tell.clone());
            move || {
                // A backend's bug is to cost that backend, not those who wait for the others.
                let answer = catch_unwind(AssertUnwindSafe(|| backend.probe()));
                tell(index, answer.unwrap_or(Err(BackendError::Panicked)));
            }
        };
        let in_thread = ask.clone();
        if threads::spawn(format!("probe-{index}"), in_thread).is_err() {
            ask();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{BackendHealth, BackendModel, BackendResult, Job, JobResult, JobSink};
    use crate::config::{Price, Pricing};
    use crate::discovery::backend_handle::FAILURES_MAX;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Says when it is asked, and answers when the test lets it.
    struct Gated {
        models: &'static [&'static str],
        asked: Sender<()>,
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
            let _ = self.asked.send(());
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

    #[test]
    fn who_fails_its_jobs_is_withdrawn_at_once_also_while_another_hangs_in_its_probe() {
        let offered = |models, asked: &Sender<()>, gate: &Receiver<()>| {
            let backend = Arc::new(Gated { models, asked: asked.clone(), gate: gate.clone() });
            BackendOffer { backend, allowed_models: None, max_concurrent: None }
        };
        let (asked, questions) = bounded(1);
        let (release, gate) = bounded(0);
        let open = bounded(0).1;
        let backends = vec![offered(&["m"], &bounded(0).0, &open), offered(&["n"], &asked, &gate)];
        let offers = Arc::new(OfferFeed::default());
        let (sizes_tx, sizes) = crossbeam_channel::unbounded();
        offers.listen(move |offer| sizes_tx.send(offer.len()).expect("the test listens"));
        let assert_offered = |models| assert_eq!(sizes.recv_timeout(PATIENCE), Ok(models));
        assert_offered(0);
        let (news_tx, news) = crossbeam_channel::unbounded();
        let (waker, wakeups) = crossbeam_channel::unbounded();
        let (prober, mut rounds) = Prober::new(backends, terms(), offers.clone(), move || _ = waker.send(()));
        let driver = std::thread::spawn(move || {
            while let Some(is_news) = rounds.poll() {
                let unavailable = rounds.backends().iter().filter(|backend| backend.unavailable().is_some()).count();
                let _ = news_tx.send((is_news, unavailable));
                let due = rounds.next_wakeup().map_or(PATIENCE, |at| at.saturating_duration_since(Instant::now()));
                let _ = wakeups.recv_timeout(due);
            }
        });
        let settled = prober.refresh();
        questions.recv_timeout(PATIENCE).expect("the second is asked");
        assert_offered(1);
        let member = offers.snapshot().candidates("m").remove(0);
        for _ in 0..FAILURES_MAX {
            member.record_outcome(&Err(BackendError::Unreachable("refused".into())));
        }
        prober.withdraw_failing();
        assert_offered(0);
        while news.recv_timeout(PATIENCE).expect("news") != (true, 1) {}
        release.send(()).expect("answered");
        assert_offered(1);
        assert_eq!(settled.recv_timeout(PATIENCE), Err(crossbeam_channel::RecvTimeoutError::Disconnected));
        assert!(!offers.set_paused(false) && offers.set_paused(true));
        assert_offered(0);
        drop(prober);
        while news.recv_timeout(PATIENCE).is_ok() {}
        assert_eq!(news.try_recv(), Err(crossbeam_channel::TryRecvError::Disconnected), "poll has returned None");
        driver.join().expect("no panic");
    }
}
