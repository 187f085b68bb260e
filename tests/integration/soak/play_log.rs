//! Records what each backend did with each job, and whether it is still working on it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::link_faults::{LinkFaults, Moment};
use super::script::Refusal;
use crate::support::secs;

/// How soon after the end of a job its backends must have stopped working on it.
const GRACE: Duration = secs(2);

pub struct PlayLog {
    link_faults: Arc<LinkFaults>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    jobs: HashMap<u64, Seen>,
    working: usize,
    working_most: usize,
    /// From the cancel to the closed connection, in microseconds.
    cancel_times: Vec<u32>,
    orphans: u64,
    faults: Vec<String>,
}

#[derive(Default)]
struct Seen {
    plays: Vec<Play>,
    working: usize,
    cancelled: Option<Moment>,
    over: Option<Instant>,
}

/// One request of a job, at one backend.
#[derive(Clone, Copy)]
pub struct Play {
    pub backend: usize,
    pub began: Instant,
    pub ended: Option<Instant>,
    /// The agent closed the connection before the backend had finished.
    pub hung_up: bool,
    /// How it was refused; `None` when its script was played.
    pub refusal: Option<&'static Refusal>,
}

impl Play {
    /// For how long the backend has worked on it.
    pub fn time(&self) -> Duration {
        self.ended.unwrap_or_else(Instant::now) - self.began
    }
}

/// The figures for the report.
pub struct Summary {
    pub cancel_times: Vec<u32>,
    pub orphans: u64,
    pub working_most: usize,
}

impl PlayLog {
    pub fn new(link_faults: Arc<LinkFaults>) -> Self {
        Self { link_faults, state: Mutex::default() }
    }

    /// The coordinator is about to send this job.
    pub fn expect(&self, seed: u64) {
        self.with(|state| {
            state.jobs.entry(seed).or_default();
        });
    }

    /// A backend has read the request; returns the number of the play.
    pub fn begin(&self, seed: u64, backend: usize, refusal: Option<&'static Refusal>) -> usize {
        self.with(|state| {
            state.working += 1;
            state.working_most = state.working_most.max(state.working);
            let Some(seen) = state.jobs.get_mut(&seed) else {
                state.faults.push(format!("backend {backend} is asked for job {seed}, which is over since {GRACE:?}"));
                return 0;
            };
            seen.working += 1;
            seen.plays.push(Play { backend, began: Instant::now(), ended: None, hung_up: false, refusal });
            seen.plays.len() - 1
        })
    }

    /// A backend has finished with the request, or the agent `hung_up`.
    pub fn end(&self, seed: u64, play: usize, hung_up: bool) {
        self.with(|state| {
            state.working -= 1;
            let Some(seen) = state.jobs.get_mut(&seed) else { return };
            seen.working -= 1;
            (seen.plays[play].ended, seen.plays[play].hung_up) = (Some(Instant::now()), hung_up);
            if let Some(cancelled) = seen.cancelled.filter(|_| hung_up)
                && cancelled.disturbance(&self.link_faults).is_zero()
            {
                state.cancel_times.push(cancelled.at.elapsed().as_micros() as u32);
            }
        });
    }

    /// What the backends did with a job, in order.
    pub fn plays(&self, seed: u64) -> Vec<Play> {
        self.with(|state| state.jobs.get(&seed).map(|seen| seen.plays.clone()).unwrap_or_default())
    }

    /// The coordinator is about to cancel it.
    pub fn cancelled(&self, seed: u64) {
        let now = Moment::now(&self.link_faults);
        self.with(|state| {
            if let Some(seen) = state.jobs.get_mut(&seed) {
                seen.cancelled = Some(now);
            }
        });
    }

    /// The job has ended, and the agent knows.
    pub fn over(&self, seed: u64) {
        self.with(|state| {
            if let Some(seen) = state.jobs.get_mut(&seed) {
                seen.over = Some(Instant::now());
            }
        });
    }

    /// Removes the jobs whose grace period has passed; returns the faults found.
    pub fn sweep(&self) -> Vec<String> {
        self.with(|state| {
            let mut faults = std::mem::take(&mut state.faults);
            let is_past = |seen: &Seen| seen.over.is_some_and(|over| over.elapsed() > GRACE);
            for (seed, seen) in state.jobs.iter().filter(|(_, seen)| is_past(seen) && seen.working > 0) {
                state.orphans += 1;
                let backends: Vec<_> = seen.plays.iter().map(|play| play.backend).collect();
                faults.push(format!(
                    "an orphan: job {seed} is over since {GRACE:?}, backends {backends:?} still serve it"
                ));
            }
            state.jobs.retain(|_, seen| !is_past(seen));
            faults
        })
    }

    pub fn summary(&self) -> Summary {
        self.with(|state| {
            let mut cancel_times = state.cancel_times.clone();
            cancel_times.sort_unstable();
            Summary { cancel_times, orphans: state.orphans, working_most: state.working_most }
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().expect("play_log"))
    }
}
