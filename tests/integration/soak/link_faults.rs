//! The faults of the link, and for how long it has been disturbed altogether: the agent's waits are measured without that time.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::rng::Rng;
use crate::support::*;

/// How often the link stalls for long enough to end the session.
const LONG_STALL_EVERY: Duration = secs(600);
const LONG_STALL: std::ops::Range<u64> = 48_000..56_000;

#[derive(Default)]
pub struct LinkFaults {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    paused: bool,
    stopped: bool,
    disturbances: u32,
    disturbed_since: Option<Instant>,
    disturbed: Duration,
    last_cut: Option<Instant>,
    last_long_stall: Option<Instant>,
    trickles_until: Option<Instant>,
}

/// The link counts as disturbed while this lives.
pub struct Disturbance(Arc<LinkFaults>);

impl LinkFaults {
    /// Suspends all faults, or resumes them.
    pub fn set_paused(&self, paused: bool) {
        self.update(|state| state.paused = paused);
    }

    pub fn is_paused(&self) -> bool {
        self.state.lock().expect("link_faults").paused
    }

    pub fn stop(&self) {
        self.update(|state| state.stopped = true);
    }

    pub fn is_stopped(&self) -> bool {
        self.state.lock().expect("link_faults").stopped
    }

    /// Waits for this time, or until faults are paused or stopped.
    pub fn wait_while_active(&self, time: Duration) {
        let state = self.state.lock().expect("link_faults");
        drop(
            self.changed.wait_timeout_while(state, time, |state| !state.paused && !state.stopped).expect("link_faults"),
        );
    }

    /// Waits while faults are paused; false once they are stopped.
    pub fn wait_until_active(&self) -> bool {
        let state = self.state.lock().expect("link_faults");
        !self.changed.wait_while(state, |state| state.paused && !state.stopped).expect("link_faults").stopped
    }

    pub fn disturbance(self: &Arc<Self>) -> Disturbance {
        self.update(|state| {
            state.disturbances += 1;
            state.disturbed_since.get_or_insert_with(Instant::now);
        });
        Disturbance(Arc::clone(self))
    }

    /// For how long the link has been disturbed since the start.
    pub fn disturbed(&self) -> Duration {
        let state = self.state.lock().expect("link_faults");
        state.disturbed + state.disturbed_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub fn last_cut(&self) -> Option<Instant> {
        self.state.lock().expect("link_faults").last_cut
    }

    pub fn last_long_stall(&self) -> Option<Instant> {
        self.state.lock().expect("link_faults").last_long_stall
    }

    /// Whether bytes have trickled since then.
    pub fn has_trickled(&self, since: Instant) -> bool {
        self.state.lock().expect("link_faults").trickles_until.is_some_and(|until| until >= since)
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().expect("link_faults"));
        self.changed.notify_all();
    }
}

impl Drop for Disturbance {
    fn drop(&mut self) {
        self.0.update(|state| {
            state.disturbances -= 1;
            if state.disturbances == 0 {
                state.disturbed += state.disturbed_since.take().map_or(Duration::ZERO, |since| since.elapsed());
            }
        });
    }
}

/// An instant, and for how long the link had been disturbed before it.
#[derive(Clone, Copy)]
pub struct Moment {
    pub at: Instant,
    disturbed: Duration,
}

impl Moment {
    pub fn now(link_faults: &LinkFaults) -> Self {
        Self { at: Instant::now(), disturbed: link_faults.disturbed() }
    }

    /// The time since then in which the link was undisturbed.
    pub fn fair_time(&self, link_faults: &LinkFaults) -> Duration {
        self.at.elapsed().saturating_sub(self.disturbance(link_faults))
    }

    pub fn disturbance(&self, link_faults: &LinkFaults) -> Duration {
        link_faults.disturbed().saturating_sub(self.disturbed)
    }
}

/// Disturbs the link until the faults are stopped.
pub fn disturb(link: &FaultProxy, link_faults: &Arc<LinkFaults>, mut rng: Rng) {
    let mut long_stall_due = Instant::now() + LONG_STALL_EVERY / 2;
    while link_faults.wait_until_active() {
        link_faults.wait_while_active(rng.time(500..6000));
        if link_faults.is_paused() || link_faults.is_stopped() {
            continue;
        }
        if Instant::now() >= long_stall_due {
            hold(link, link_faults, Mode::Stall, rng.time(LONG_STALL));
            // Recorded before the end of the session can be seen. A stall that a pause cut short is repeated.
            if !link_faults.is_paused() {
                long_stall_due = Instant::now() + LONG_STALL_EVERY;
                link_faults.update(|state| state.last_long_stall = Some(Instant::now()));
            }
            link.set(Mode::Pass);
            continue;
        }
        match rng.within(0..100) {
            0..40 => {
                let time = rng.time(200..2500);
                link_faults.update(|state| state.trickles_until = Some(Instant::now() + time));
                hold(link, link_faults, Mode::Trickle, time);
            }
            40..75 => hold(link, link_faults, Mode::Stall, rng.time(200..3000)),
            75..82 => hold(link, link_faults, Mode::Stall, rng.time(5000..12_000)),
            _ => cut(link, link_faults),
        }
        link.set(Mode::Pass);
    }
}

fn hold(link: &FaultProxy, link_faults: &Arc<LinkFaults>, mode: Mode, time: Duration) {
    let _trouble = link_faults.disturbance();
    link.set(mode);
    link_faults.wait_while_active(time);
}

fn cut(link: &FaultProxy, link_faults: &Arc<LinkFaults>) {
    // Recorded before and after: the end of a session is seen after the first, a connection just being made before the second.
    link_faults.update(|state| state.last_cut = Some(Instant::now()));
    link.cut();
    link_faults.update(|state| state.last_cut = Some(Instant::now()));
}
