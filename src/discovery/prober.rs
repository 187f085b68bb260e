//! The thread that keeps the catalog true.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};

use super::member::FAILURES_MAX;
use super::{Catalog, Listing, Member, OfferedBackend, Offers, ResolvedModel, Terms};
use crate::backend::{Backend, BackendError, BackendModel, BackendResult};
use crate::{memory, threads};

/// The catalog is refreshed this often, give or take a fifth.
const REFRESH: Duration = Duration::from_secs(30);
/// A backend that may serve at any moment (loading its model, full, or too slow to answer) is asked this often.
const REFRESH_SOON: Duration = Duration::from_secs(5);
/// A backend that served is offered on when so many probes in a row get no answer: it may be busy serving.
const UNANSWERED_MAX: u32 = 1;
/// The first offer waits for all probes; from here on only until one has found something.
const SETTLE: Duration = Duration::from_secs(1);
/// Rounds that failing jobs ask for are at least so far apart.
const NUDGE_SPACING: Duration = Duration::from_secs(1);
/// Requests for a round that may wait: one more would ask for what the next round does anyway.
const REQUESTS_MAX: usize = 4;

const _: () = assert!(REFRESH_SOON.as_secs() <= REFRESH.as_secs());

/// What the thread is asked for.
enum Request {
    /// A round; the sender is dropped when an offer can be made.
    Settle(Sender<()>),
    /// A round, soon: the offer may be out of date.
    Nudge,
    /// An offer without the members whose jobs fail, at once.
    Withdraw,
}

/// The handle. The thread leaves when the last clone is dropped.
#[derive(Clone)]
pub struct Prober {
    requests: Sender<Request>,
}

impl Prober {
    /// Starts the thread; its first round begins with the first request.
    ///
    /// # Errors
    /// The system refused a thread.
    pub fn spawn(backends: Vec<OfferedBackend>, terms: Terms, offers: Arc<Offers>) -> std::io::Result<Prober> {
        let (requests, inbox) = bounded(REQUESTS_MAX);
        let backends = backends.into_iter().map(|offered| Probed::new(offered, &terms)).collect();
        let actor = Actor { backends, terms, offers };
        threads::spawn("prober", move || actor.run(&inbox))?;
        Ok(Prober { requests })
    }

    /// Asks for a round. The receiver disconnects when every backend has been heard, or enough of them to begin with.
    pub fn refresh(&self) -> Receiver<()> {
        let (settled, receiver) = bounded(0);
        match self.requests.try_send(Request::Settle(settled)) {
            // Full: dropped here, and the caller goes on with what is known.
            Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => receiver,
        }
    }

    /// A job found its backend gone: asks for a round, waits for nothing.
    pub fn nudge(&self) {
        let _ = self.requests.try_send(Request::Nudge);
    }

    /// The jobs of a member fail: has it withdrawn from the offer until a probe succeeds. Where the queue is full, what is in
    /// it does so too.
    pub fn withdraw_failing(&self) {
        let _ = self.requests.try_send(Request::Withdraw);
    }
}

struct Actor {
    backends: Vec<Probed>,
    terms: Terms,
    offers: Arc<Offers>,
}

/// A backend and what its last probes said.
struct Probed {
    offered: OfferedBackend,
    member: Arc<Member>,
    /// The last listing; kept while the backend is away.
    known: Option<Vec<ResolvedModel>>,
    /// Why it is not offered; `None` while it is.
    away: Option<BackendError>,
    heard_of: bool,
    /// Probes in a row without an answer.
    unanswered: u32,
}

impl Actor {
    fn run(mut self, inbox: &Receiver<Request>) {
        // Nothing is due before somebody asks.
        let mut due: Option<Instant> = None;
        let mut last_round = Instant::now();
        loop {
            let first = match due {
                Some(due) => inbox.recv_deadline(due),
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            if matches!(first, Err(RecvTimeoutError::Disconnected)) {
                return;
            }
            // One round answers all who asked before it began.
            let (mut waiting, mut nudged) = (Vec::new(), false);
            for request in first.into_iter().chain(inbox.try_iter()) {
                match request {
                    Request::Settle(settled) => waiting.push(settled),
                    Request::Nudge => nudged = true,
                    Request::Withdraw => {}
                }
            }
            // Whatever the request was: one to withdraw may have found the queue full.
            self.withdraw_failing();
            let now = Instant::now();
            if waiting.is_empty() && due.is_some_and(|due| now < due) {
                // A backend in trouble is not asked for every job that it fails; one that fails its jobs while it is
                // healthy is asked soon, but not at once.
                let wait = match nudged {
                    true => (last_round + NUDGE_SPACING).saturating_duration_since(now),
                    false => REFRESH_SOON,
                };
                if !wait.is_zero() {
                    due = due.map(|due| due.min(now + wait));
                    continue;
                }
            }
            self.round(waiting);
            memory::give_back();
            last_round = Instant::now();
            let wait = if self.backends.iter().any(Probed::may_serve_soon) { REFRESH_SOON } else { REFRESH };
            due = Some(last_round + wait.mul_f64(0.8 + 0.4 * dice()));
        }
    }

    /// Asks every backend, and publishes as the answers come in.
    fn round(&mut self, waiting: Vec<Sender<()>>) {
        let began = Instant::now();
        let mut waiting = Some(waiting);
        let backends: Vec<_> = self.backends.iter().map(|b| b.offered.backend.clone()).collect();
        let answers = ask_all(&backends);
        let mut serving = 0;
        loop {
            // Once something can be offered, a slow backend holds nobody up.
            let patience =
                if waiting.is_some() && serving > 0 { SETTLE.saturating_sub(began.elapsed()) } else { Duration::MAX };
            match answers.recv_timeout(patience) {
                Ok((index, answer)) => {
                    serving += u32::from(self.backends[index].hear(answer, began, &self.terms));
                    if answers.is_empty() {
                        self.publish();
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.publish();
                    waiting = None;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.publish();
    }

    /// Takes those whose jobs fail out of the offer.
    fn withdraw_failing(&mut self) {
        let mut withdrawn = false;
        for probed in self.backends.iter_mut().filter(|b| b.away.is_none() && b.member.is_failing()) {
            probed.tell(Some(BackendError::FailsItsJobs(FAILURES_MAX)));
            withdrawn = true;
        }
        if withdrawn {
            self.publish();
        }
    }

    fn publish(&self) {
        let listings = |away: bool| {
            let backends = self.backends.iter().filter(move |b| b.away.is_some() == away);
            let listing = |b: &Probed| Some(Listing { member: b.member.clone(), models: b.known.clone()? });
            backends.filter_map(listing).collect()
        };
        self.offers.publish(Catalog::new(listings(false), listings(true)));
    }
}

/// What a backend lists, or why it does not.
type Answer = BackendResult<Vec<BackendModel>>;

/// Probes all of them side by side; the answers are in their order.
pub fn probe_all(backends: &[Arc<dyn Backend>]) -> Vec<Answer> {
    let mut answers: Vec<Option<Answer>> = backends.iter().map(|_| None).collect();
    for (index, answer) in ask_all(backends) {
        answers[index] = Some(answer);
    }
    answers.into_iter().flatten().collect()
}

/// One answer for each backend, in the order in which they come; disconnects after the last.
fn ask_all(backends: &[Arc<dyn Backend>]) -> Receiver<(usize, Answer)> {
    let (answers, receiver) = bounded(backends.len());
    for (index, backend) in backends.iter().enumerate() {
        let ask = {
            let (backend, answers) = (backend.clone(), answers.clone());
            move || {
                // A backend's bug is to cost that backend, not the thread that watches over the others.
                let answer = catch_unwind(AssertUnwindSafe(|| backend.probe()));
                drop(answers.send((index, answer.unwrap_or(Err(BackendError::Panicked)))));
            }
        };
        // A single one delays nobody else, so it needs no thread of its own.
        if backends.len() == 1 {
            ask();
            break;
        }
        let in_thread = ask.clone();
        if threads::spawn(format!("probe-{index}"), in_thread).is_err() {
            ask();
        }
    }
    receiver
}

impl Probed {
    fn new(offered: OfferedBackend, terms: &Terms) -> Probed {
        let member = Member::new(offered.backend.clone(), offered.slots_max(terms));
        Probed { offered, member, known: None, away: None, heard_of: false, unanswered: 0 }
    }

    fn may_serve_soon(&self) -> bool {
        use BackendError::{Exhausted, FailsItsJobs, Loading, Overloaded, Unanswered};
        let soon = |e: &_| matches!(e, Exhausted(_) | Loading(_) | Overloaded(_) | Unanswered(_) | FailsItsJobs(_));
        self.unanswered > 0 || self.away.as_ref().is_some_and(soon)
    }

    /// Takes the answer to a question of a round that began then; true when the backend can be offered.
    fn hear(&mut self, answer: Answer, began: Instant, terms: &Terms) -> bool {
        let id = self.offered.backend.id();
        self.unanswered = match answer {
            Err(BackendError::Unanswered(_)) => self.unanswered + 1,
            _ => 0,
        };
        let serves = self.heard_of && self.away.is_none();
        if serves && (1..=UNANSWERED_MAX).contains(&self.unanswered) {
            log::info!("{id}: no answer to the probe; offered on until the next one");
            return true;
        }
        if let (true, Err(BackendError::Exhausted(why))) = (serves, &answer) {
            // Who could not even ask knows nothing about the backend.
            log::info!("{id}: not probed: {why}; offered on until the next one");
            return true;
        }
        let ready = self.offered.backend.ready();
        let (listed, away) = match answer {
            Ok(listed) => (Some(listed), ready.err()),
            // A key that is not set explains a refused listing better than the refusal.
            Err(e) => (None, Some(ready.err().unwrap_or(e))),
        };
        if let Some(listed) = listed {
            self.known = Some(self.offered.resolve(listed, terms).models);
        }
        let fails_its_jobs =
            || (!self.member.probe_succeeded(began)).then_some(BackendError::FailsItsJobs(FAILURES_MAX));
        let away = away.or_else(fails_its_jobs);
        self.tell(away);
        self.away.is_none()
    }

    /// Keeps whether the backend is away, and logs it when that is news.
    fn tell(&mut self, away: Option<BackendError>) {
        let id = self.offered.backend.id();
        let reason = |away: &Option<BackendError>| away.as_ref().map(BackendError::for_log);
        if !self.heard_of || reason(&self.away) != reason(&away) {
            match &away {
                None => log::info!("{id}: serving {} model(s)", self.known.as_ref().map_or(0, Vec::len)),
                Some(why) => log::warn!("{id}: not offered: {}", why.for_log()),
            }
        }
        self.heard_of = true;
        self.away = away;
    }
}

/// Uniform in `0.0..1.0`. The standard library's hasher keys are random; jitter needs no better.
pub fn dice() -> f64 {
    let random = RandomState::new().build_hasher().finish();
    (random >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{BackendHealth, Job, JobResult, JobSink};
    use crate::config::{Price, Pricing};
    use crate::discovery::member::QUARANTINE;

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

    #[test]
    fn a_withdrawal_that_finds_the_queue_full_is_not_lost() {
        let offered = |models, asked: &Sender<()>, gate: &Receiver<()>| {
            let backend = Arc::new(Gated { models, asked: asked.clone(), gate: gate.clone() });
            OfferedBackend { backend, allowed_models: None, max_concurrent: None }
        };
        let (asked, questions) = bounded(1);
        let (release, gate) = bounded(0);
        let open = bounded(0).1;
        let backends = vec![offered(&["m"], &bounded(0).0, &open), offered(&[], &asked, &gate)];
        let price = Price { input_per_1m: 1, output_per_1m: 1 };
        let terms = Terms { pricing: Pricing { default: price, models: Default::default() }, max_concurrent: 8 };
        let offers = Arc::new(Offers::default());
        let (sizes_tx, sizes) = crossbeam_channel::unbounded();
        offers.listen(move |catalog| sizes_tx.send(catalog.offer.len()).expect("the test listens"));
        let assert_offered = |models| assert_eq!(sizes.recv_timeout(PATIENCE), Ok(models));
        assert_offered(0);
        let prober = Prober::spawn(backends, terms, offers.clone()).expect("a thread");
        let next_round = || questions.recv_timeout(PATIENCE).expect("a round");
        prober.nudge();
        next_round();
        release.send(()).expect("answered");
        assert_offered(1);
        // The prober waits for the second backend; that the first is well it has heard.
        prober.nudge();
        next_round();
        std::thread::sleep(Duration::from_millis(100));
        (0..=REQUESTS_MAX).for_each(|_| prober.nudge());
        let member = offers.snapshot().route_of("m").remove(0);
        for _ in 0..FAILURES_MAX {
            member.job_ended(&Err(BackendError::Unreachable("refused".into())));
        }
        prober.withdraw_failing();
        // The probe of the next round may bring it back.
        std::thread::sleep(QUARANTINE);
        release.send(()).expect("answered");
        assert_offered(0);
    }
}
