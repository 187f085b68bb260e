//! The time that is left to enter a code: redrawn in place on a terminal, a line now and then elsewhere.
//!
//! Invariant: a terminal's line is left clean by [`Countdown::clear`]; what is no terminal gets no escape codes.

use std::io::{IsTerminal, stdout};
use std::time::{Duration, Instant};

use super::print;

const SECOND: Duration = Duration::from_secs(1);
/// Between two lines where there is no terminal.
const MINUTE: Duration = Duration::from_secs(60);
/// To the start of the line, and clears it.
const CLEAR: &str = "\r\x1b[K";

/// One code's time.
pub struct Countdown {
    until: Instant,
    is_live: bool,
    is_drawn: bool,
    /// How much was left when it was last shown, in steps.
    shown: Option<u64>,
}

impl Countdown {
    /// From now on.
    pub fn new(lifetime: Duration) -> Countdown {
        Countdown { until: Instant::now() + lifetime, is_live: stdout().is_terminal(), is_drawn: false, shown: None }
    }

    /// Shows it, if there is anything new to show; returns how long that will hold.
    pub fn show(&mut self) -> Duration {
        let left = self.until.saturating_duration_since(Instant::now());
        let step = if self.is_live { SECOND } else { MINUTE };
        // In milliseconds, rounded up, so that ten minutes begin with 10:00.
        let (left, step) = (left.as_millis() as u64, step.as_millis() as u64);
        let steps = left.div_ceil(step);
        if !self.is_drawn || self.shown != Some(steps) {
            let text = format!("  waiting for the code to be entered; it is good for {}", clock(left.div_ceil(1000)));
            print(&if self.is_live { format!("{CLEAR}{text}") } else { format!("{text}\n") });
            (self.is_drawn, self.shown) = (true, Some(steps));
        }
        // Just beyond the turn.
        let holds = match steps {
            0 => step,
            _ => left - (steps - 1) * step + 1,
        };
        Duration::from_millis(holds)
    }

    /// Takes it off the terminal, to be shown again below what is printed next.
    pub fn clear(&mut self) {
        if self.is_live && self.is_drawn {
            print(CLEAR);
            self.is_drawn = false;
        }
    }
}

/// Minutes and seconds.
fn clock(seconds: u64) -> String {
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_shown_as_a_clock_does() {
        for (seconds, shown) in [(600, "10:00"), (59, "0:59"), (61, "1:01"), (0, "0:00")] {
            assert_eq!(clock(seconds), shown);
        }
    }
}
