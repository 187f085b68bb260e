//! What is wrong with the link at the moment, and how long it has been wrong altogether: waits are measured in the time
//! that was left to the agent.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::rng::Rng;
use crate::support::*;

/// A stall that is to end the session, every so often.
const LONG_STALL_EVERY: Duration = secs(600);
const LONG_STALL: std::ops::Range<u64> = 48_000..56_000;

#[derive(Default)]
pub struct Weather {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    calm: bool,
    over: bool,
    troubles: u32,
    troubled_since: Option<Instant>,
    troubled: Duration,
    last_cut: Option<Instant>,
    last_long_stall: Option<Instant>,
    trickles_until: Option<Instant>,
}

/// Counts as trouble for as long as it lives.
pub struct Trouble(Arc<Weather>);

impl Weather {
    /// From here on nothing goes wrong, or everything may again.
    pub fn set_calm(&self, calm: bool) {
        self.update(|state| state.calm = calm);
    }

    pub fn is_calm(&self) -> bool {
        self.state.lock().expect("weather").calm
    }

    pub fn end(&self) {
        self.update(|state| state.over = true);
    }

    pub fn is_over(&self) -> bool {
        self.state.lock().expect("weather").over
    }

    /// Waits, unless it is calm or over before or in between.
    pub fn wait_in_storm(&self, time: Duration) {
        let state = self.state.lock().expect("weather");
        drop(self.changed.wait_timeout_while(state, time, |state| !state.calm && !state.over).expect("weather"));
    }

    /// Waits while it is calm; false when it is over.
    pub fn wait_for_storm(&self) -> bool {
        let state = self.state.lock().expect("weather");
        !self.changed.wait_while(state, |state| state.calm && !state.over).expect("weather").over
    }

    pub fn trouble(self: &Arc<Self>) -> Trouble {
        self.update(|state| {
            state.troubles += 1;
            state.troubled_since.get_or_insert_with(Instant::now);
        });
        Trouble(Arc::clone(self))
    }

    /// How long there has been trouble, since the beginning.
    pub fn troubled(&self) -> Duration {
        let state = self.state.lock().expect("weather");
        state.troubled + state.troubled_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub fn last_cut(&self) -> Option<Instant> {
        self.state.lock().expect("weather").last_cut
    }

    pub fn last_long_stall(&self) -> Option<Instant> {
        self.state.lock().expect("weather").last_long_stall
    }

    /// Whether bytes have trickled since.
    pub fn has_trickled(&self, since: Instant) -> bool {
        self.state.lock().expect("weather").trickles_until.is_some_and(|until| until >= since)
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().expect("weather"));
        self.changed.notify_all();
    }
}

impl Drop for Trouble {
    fn drop(&mut self) {
        self.0.update(|state| {
            state.troubles -= 1;
            if state.troubles == 0 {
                state.troubled += state.troubled_since.take().map_or(Duration::ZERO, |since| since.elapsed());
            }
        });
    }
}

/// An instant, and the trouble there had been before it.
#[derive(Clone, Copy)]
pub struct Moment {
    pub at: Instant,
    troubled: Duration,
}

impl Moment {
    pub fn now(weather: &Weather) -> Self {
        Self { at: Instant::now(), troubled: weather.troubled() }
    }

    /// The time since then in which the link was well.
    pub fn fair_time(&self, weather: &Weather) -> Duration {
        self.at.elapsed().saturating_sub(self.trouble(weather))
    }

    pub fn trouble(&self, weather: &Weather) -> Duration {
        weather.troubled().saturating_sub(self.troubled)
    }
}

/// Has the link go wrong until it is over.
pub fn disturb(link: &FaultProxy, weather: &Arc<Weather>, mut rng: Rng) {
    let mut long_stall_due = Instant::now() + LONG_STALL_EVERY / 2;
    while weather.wait_for_storm() {
        weather.wait_in_storm(rng.time(500..6000));
        if weather.is_calm() || weather.is_over() {
            continue;
        }
        if Instant::now() >= long_stall_due {
            hold(link, weather, Mode::Stall, rng.time(LONG_STALL));
            // Noted before anybody can see that the session has ended. One that a calm cut short comes again.
            if !weather.is_calm() {
                long_stall_due = Instant::now() + LONG_STALL_EVERY;
                weather.update(|state| state.last_long_stall = Some(Instant::now()));
            }
            link.set(Mode::Pass);
            continue;
        }
        match rng.within(0..100) {
            0..40 => {
                let time = rng.time(200..2500);
                weather.update(|state| state.trickles_until = Some(Instant::now() + time));
                hold(link, weather, Mode::Trickle, time);
            }
            40..75 => hold(link, weather, Mode::Stall, rng.time(200..3000)),
            75..82 => hold(link, weather, Mode::Stall, rng.time(5000..12_000)),
            _ => cut(link, weather),
        }
        link.set(Mode::Pass);
    }
}

fn hold(link: &FaultProxy, weather: &Arc<Weather>, mode: Mode, time: Duration) {
    let _trouble = weather.trouble();
    link.set(mode);
    weather.wait_in_storm(time);
}

fn cut(link: &FaultProxy, weather: &Arc<Weather>) {
    // Noted on both sides of it: an end is seen after the first, and a connection that was just coming in before the
    // second.
    weather.update(|state| state.last_cut = Some(Instant::now()));
    link.cut();
    weather.update(|state| state.last_cut = Some(Instant::now()));
}
