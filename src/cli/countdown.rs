//! The time left to enter a code: redrawn in place on a terminal, otherwise printed as one line per minute.
//!
//! Invariant: [`Countdown::clear`] leaves a clean line on a terminal; other outputs get no escape codes.

use std::time::{Duration, Instant};

use super::{print, print_raw};
use crate::sys::terminal::{Terminal, wrap};

const SECOND: Duration = Duration::from_secs(1);
/// The time between two printed lines if stdout is not a terminal.
const MINUTE: Duration = Duration::from_secs(60);
/// Clears the line.
const CLEAR: &str = "\r\x1b[K";

/// The lifetime of one code.
pub struct Countdown {
    deadline: Instant,
    terminal: Terminal,
    is_drawn: bool,
    /// The steps that were left when the countdown was last shown.
    shown: Option<u64>,
}

impl Countdown {
    /// Starts a countdown now.
    pub fn new(lifetime: Duration, terminal: Terminal) -> Countdown {
        Countdown { deadline: Instant::now() + lifetime, terminal, is_drawn: false, shown: None }
    }

    /// Prints the time left if it has changed. Returns the time until it changes next.
    pub fn show(&mut self) -> Duration {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let step = if self.terminal.is_live { SECOND } else { MINUTE };
        // In milliseconds, rounded up, so that ten minutes begin with 10:00.
        let (left, step) = (left.as_millis() as u64, step.as_millis() as u64);
        let steps = left.div_ceil(step);
        if !self.is_drawn || self.shown != Some(steps) {
            let text = format!("waiting for the code to be entered; it expires in {}", clock(left.div_ceil(1000)));
            match self.terminal.is_live {
                true => print_raw(&format!("{CLEAR}  {text}")),
                false => print(&wrap("  ", &text, self.terminal.width)),
            }
            (self.is_drawn, self.shown) = (true, Some(steps));
        }
        // One millisecond later, the next step begins.
        let holds = match steps {
            0 => step,
            _ => left - (steps - 1) * step + 1,
        };
        Duration::from_millis(holds)
    }

    /// Removes the countdown from the terminal. It is shown again below the next output.
    pub fn clear(&mut self) {
        if self.terminal.is_live && self.is_drawn {
            print_raw(CLEAR);
            self.is_drawn = false;
        }
    }
}

/// `minutes:seconds`.
fn clock(seconds: u64) -> String {
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_shows_minutes_and_seconds() {
        for (seconds, shown) in [(600, "10:00"), (59, "0:59"), (61, "1:01"), (0, "0:00")] {
            assert_eq!(clock(seconds), shown);
        }
    }
}
