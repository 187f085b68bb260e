//! The health of one model: counts its failed jobs, and keeps when it is tried, or offered again. Knows no clock and no I/O: callers
//! pass the time.
//!
//! Invariant: the pause between two trials, or two withdrawals without a trial, doubles each time, up to [`QUARANTINE_MAX`].

use std::time::{Duration, Instant};

use super::trial::TrialOutcome;

/// Consecutive failures after which a backend is withdrawn from the offer, or a model is suspect.
pub const FAILURES_MAX: u32 = 3;
/// Time after a withdrawal during which successful probes do not restore the offer: a backend can be healthy and still fail its
/// jobs. Doubles with each relapse. Also the pause between two trials of a model, which doubles with each trial.
pub const QUARANTINE: Duration = Duration::from_secs(4);
/// Maximum of [`QUARANTINE`] after doubling.
pub const QUARANTINE_MAX: Duration = Duration::from_secs(300);

const _: () = assert!(QUARANTINE.as_secs() <= QUARANTINE_MAX.as_secs());

/// Consecutive failures. Those of jobs that began before the last one was counted are one event, such as the death of a server that
/// ran them all.
#[derive(Default)]
pub struct Failures {
    /// How many there are.
    pub count: u32,
    /// When the last one was counted.
    pub last_counted: Option<Instant>,
}

/// The health of one model.
pub struct ModelHealth {
    failures: Failures,
    trust: Trust,
    /// Whether the model is tried; if not, its withdrawal ends by itself.
    may_try: bool,
    /// The time until the next trial, or until the withdrawal ends.
    pause: Duration,
    due: Instant,
}

#[derive(PartialEq)]
enum Trust {
    Trusted,
    Suspect,
    /// Not offered, for this reason.
    Withdrawn(String),
}

impl Failures {
    /// Counts the failure of a job that began at `began`. Returns whether it is a new event.
    pub fn count(&mut self, began: Instant, now: Instant) -> bool {
        let is_new = self.last_counted.is_none_or(|last| began > last);
        if is_new {
            self.count = self.count.saturating_add(1);
            self.last_counted = Some(now);
        }
        is_new
    }
}

impl ModelHealth {
    /// The health of a model without failures.
    pub fn new(now: Instant) -> ModelHealth {
        ModelHealth { failures: Failures::default(), trust: Trust::Trusted, may_try: true, pause: QUARANTINE, due: now }
    }

    /// Counts a failure. Returns whether the model has become suspect.
    pub fn count(&mut self, began: Instant, now: Instant) -> bool {
        self.failures.count(began, now) && self.trust == Trust::Trusted && self.failures.count >= FAILURES_MAX
    }

    /// Makes the model suspect, so that a trial becomes due; withdraws it if it may not be tried.
    pub fn suspect(&mut self, may_try: bool, now: Instant) {
        if now > self.due + QUARANTINE_MAX {
            self.pause = QUARANTINE;
        }
        self.may_try = may_try;
        if may_try {
            self.trust = Trust::Suspect;
            self.due = self.due.max(now);
        } else {
            self.trust = Trust::Withdrawn(format!("its last {FAILURES_MAX} jobs failed"));
            self.due = now + self.pause;
            self.pause = doubled(self.pause, 1);
        }
    }

    /// Whether a trial or the end of the withdrawal is due.
    pub fn is_due(&self, now: Instant) -> bool {
        self.trust != Trust::Trusted && self.due <= now
    }

    /// When the next trial, or the end of the withdrawal, is due; `None` for a trusted model.
    pub fn due(&self) -> Option<Instant> {
        (self.trust != Trust::Trusted).then_some(self.due)
    }

    /// Makes what is due later due at once.
    pub fn hasten(&mut self, now: Instant) {
        self.due = self.due.min(now);
    }

    /// Whether the model is tried; if not, its withdrawal ends by itself.
    pub fn may_try(&self) -> bool {
        self.may_try
    }

    /// Why the model is not offered.
    pub fn withdrawn(&self) -> Option<&str> {
        match &self.trust {
            Trust::Withdrawn(why) => Some(why),
            Trust::Trusted | Trust::Suspect => None,
        }
    }

    /// Records the outcome of a trial. Returns whether the offer has changed.
    pub fn record_trial(&mut self, outcome: &TrialOutcome, now: Instant) -> bool {
        self.due = now + self.pause;
        self.pause = doubled(self.pause, 1);
        let was_withdrawn = self.withdrawn().is_some();
        match outcome {
            TrialOutcome::Passed => self.restore(),
            TrialOutcome::Failed(why) => {
                self.trust = Trust::Withdrawn(format!("its last {FAILURES_MAX} jobs and a trial failed: {why}"));
            }
            TrialOutcome::Inconclusive(_) => {}
        }
        was_withdrawn != self.withdrawn().is_some()
    }

    /// Trusts the model again.
    pub fn restore(&mut self) {
        self.failures.count = 0;
        self.trust = Trust::Trusted;
    }
}

/// `time`, doubled this many times, up to the maximum.
pub fn doubled(time: Duration, times: u32) -> Duration {
    time.saturating_mul(2u32.saturating_pow(times)).min(QUARANTINE_MAX)
}
