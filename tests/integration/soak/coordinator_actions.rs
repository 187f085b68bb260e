//! The random actions of the scripted coordinator within one session, and when each is due.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::MAX_CONCURRENT;
use super::job::{Job, LONG_DEADLINE};
use super::ledger::Ledger;
use super::link_faults::{Disturbance, LinkFaults, Moment};
use super::rng::Rng;
use super::script::Verdict;
use crate::support::*;

/// Jobs sent at a time, outside a burst.
const AT_A_TIME: usize = 3;
/// Large answers at a time: enough to fill all buffers up to the agent's own during a long pause.
const LARGE_AT_A_TIME: usize = 12;
const LONG_PAUSE: Duration = secs(5);
/// When a job is cancelled, in milliseconds after it was sent.
const CANCEL_WITHIN: std::ops::Range<u64> = 0..1500;
/// Time for the agent to answer a Close.
const CLOSE_MAX: Duration = secs(10);

const NONSENSE: [&str; 9] = [
    "",
    "not json",
    "[]",
    "{\"type\":7}",
    "{\"type\":\"from_the_future\",\"x\":[1,2,3]}",
    "{\"type\":\"auth_ok\",\"provider_id\":\"prov_late\"}",
    "{\"type\":\"job\",\"job_id\":\"x\",\"model_id\":\"shared\",\"request\":{}}",
    "{\"type\":\"job\",\"job_id\":\"00000000-0000-4000-8000-000000000001\",\"request\":{}}",
    "{\"type\":\"job_cancel\",\"job_id\":[]}",
];

pub enum Action {
    Job { job: Box<Job>, cancelled: bool },
    Cancel(String),
    Ping,
    Nonsense(String),
    Close,
}

pub struct Actions {
    /// The number of jobs to keep in flight.
    target: usize,
    target_due: Instant,
    cancels: Vec<(Instant, String)>,
    nonsense_due: Instant,
    ping_due: Instant,
    /// Until when the coordinator reads nothing.
    paused: Option<(Instant, Disturbance)>,
    pause_due: Instant,
    /// Large jobs still to be sent.
    large_due: usize,
    close_due: Instant,
    closed: Option<Moment>,
}

impl Actions {
    pub fn new(rng: &mut Rng) -> Self {
        let now = Instant::now();
        Self {
            target: 8,
            target_due: now + secs(2),
            cancels: Vec::new(),
            nonsense_due: now,
            ping_due: now,
            paused: None,
            pause_due: now + rng.time(2000..10_000),
            large_due: 0,
            close_due: now + rng.time(20_000..90_000),
            closed: None,
        }
    }

    pub fn has_closed(&self) -> bool {
        self.closed.is_some()
    }

    /// Whether the agent should have ended the session by now.
    pub fn is_overdue(&self, link_faults: &LinkFaults) -> bool {
        self.closed.is_some_and(|closed| closed.fair_time(link_faults) > CLOSE_MAX)
    }

    /// Resumes reading.
    pub fn resume(&mut self, session: &Session) {
        session.pause(false);
        self.paused = None;
    }

    /// The actions due now.
    pub fn next(
        &mut self,
        session: &Session,
        rng: &mut Rng,
        link_faults: &Arc<LinkFaults>,
        ledger: &Ledger,
    ) -> Vec<Action> {
        let now = Instant::now();
        self.pause(session, rng, link_faults, now);
        if self.has_closed() {
            return Vec::new();
        }
        if now >= self.close_due {
            self.closed = Some(Moment::now(link_faults));
            return vec![Action::Close];
        }
        let mut actions = Vec::new();
        if now >= self.ping_due {
            self.ping_due = now + secs(1);
            actions.push(Action::Ping);
        }
        if now >= self.nonsense_due {
            self.nonsense_due = now + rng.time(100..4000);
            actions.push(Action::Nonsense((*rng.pick(&NONSENSE)).to_owned()));
        }
        let due = self.cancels.extract_if(.., |(at, _)| *at <= now);
        actions.extend(due.map(|(_, id)| Action::Cancel(id)));
        self.jobs(rng, link_faults, ledger, now, &mut actions);
        actions
    }

    /// Starts and ends the pauses in which the coordinator does not read.
    fn pause(&mut self, session: &Session, rng: &mut Rng, link_faults: &Arc<LinkFaults>, now: Instant) {
        if self.paused.as_ref().is_some_and(|(until, _)| now >= *until) {
            self.resume(session);
        }
        if now >= self.pause_due {
            self.pause_due = now + rng.time(6000..18_000);
            let is_long = rng.per_mille(400);
            let time = if is_long { LONG_PAUSE } else { rng.time(200..3000) };
            self.large_due = if is_long { LARGE_AT_A_TIME } else { 0 };
            self.paused = Some((now + time, link_faults.disturbance()));
            session.pause(true);
        }
    }

    fn jobs(
        &mut self,
        rng: &mut Rng,
        link_faults: &LinkFaults,
        ledger: &Ledger,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        let in_flight = ledger.in_flight();
        let mut wanted = self.target.saturating_sub(in_flight).min(AT_A_TIME);
        if now >= self.target_due {
            self.target_due = now + rng.time(1000..6000);
            self.target = rng.within(4..MAX_CONCURRENT as u64 + 4) as usize;
            if rng.per_mille(150) {
                wanted = MAX_CONCURRENT + 16;
            }
        }
        for _ in 0..wanted {
            let mut job = Job::random(rng, link_faults, |model| ledger.offer.has(model));
            if job.script.time() > secs(1) && rng.per_mille(200) {
                job.copies = 2;
            }
            let mut to_cancel = rng.per_mille(200);
            if job.script.verdict == Verdict::Never && rng.per_mille(500) {
                // Only the cancel can end it early.
                (job.deadline, to_cancel) = (rng.time(LONG_DEADLINE), true);
            }
            if to_cancel {
                self.cancels.push((now + rng.time(CANCEL_WITHIN), job.id.clone()));
            }
            actions.push(Action::Job { job: Box::new(job), cancelled: rng.per_mille(40) });
        }
        for _ in 0..std::mem::take(&mut self.large_due) {
            let job = Job::large(rng, link_faults);
            // Cancelled while their answers wait in the agent.
            if let Some((until, _)) = self.paused.as_ref().filter(|_| rng.per_mille(700)) {
                self.cancels.push((*until - ms(200), job.id.clone()));
            }
            actions.push(Action::Job { job: Box::new(job), cancelled: false });
        }
    }
}
