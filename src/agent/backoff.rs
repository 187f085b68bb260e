//! The delay before the next connection attempt. A pure state machine: the caller provides the times and the randomness.
//!
//! Invariant: no delay is shorter than 0.8 s, so a coordinator that ends every session at once is dialed about once a second.

use std::time::Duration;

use crate::sys::jitter;

/// The first delay.
const DELAY_MIN: Duration = Duration::from_secs(1);
/// The longest delay. Each delay is twice the previous one, up to this limit.
const DELAY_MAX: Duration = Duration::from_secs(60);
/// A session that lasts this long counts as stable.
const STABLE_AFTER: Duration = Duration::from_secs(5);
/// The number of consecutive unstable sessions from which each counts as a failure.
const SHORT_LIVED_MAX: u32 = 3;

const _: () = assert!(DELAY_MIN.as_millis() < DELAY_MAX.as_millis());

/// How a connection attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptEnd {
    /// Before `auth_ok`.
    BeforeAuth,
    /// After `auth_ok`, as the coordinator announced.
    Planned,
    /// After `auth_ok`; how long the session lasted.
    After(Duration),
}

/// Computes the delays.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    short_lived: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { next: DELAY_MIN, short_lived: 0 }
    }
}

impl Backoff {
    /// The delay before the next attempt. `random` is uniform in `0.0..1.0`; it scales the delay by a factor of 0.8 to 1.2.
    pub fn delay_after(&mut self, ended: AttemptEnd, random: f64) -> Duration {
        let succeeded = match ended {
            AttemptEnd::BeforeAuth => false,
            AttemptEnd::Planned => {
                self.short_lived = 0;
                true
            }
            AttemptEnd::After(lasted) if lasted >= STABLE_AFTER => {
                self.short_lived = 0;
                true
            }
            AttemptEnd::After(_) => {
                self.short_lived = self.short_lived.saturating_add(1);
                self.short_lived < SHORT_LIVED_MAX
            }
        };
        if succeeded {
            self.next = DELAY_MIN;
        }
        let delay = self.next;
        self.next = (self.next * 2).min(DELAY_MAX);
        jitter::scale(delay, random)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIDDLE: f64 = 0.5;

    fn seconds(backoff: &mut Backoff, ended: AttemptEnd) -> u64 {
        backoff.delay_after(ended, MIDDLE).as_secs_f64().round() as u64
    }

    #[test]
    fn delay_doubles_up_to_a_minute_while_authentication_fails() {
        let mut b = Backoff::default();
        let delays: Vec<u64> = (0..9).map(|_| seconds(&mut b, AttemptEnd::BeforeAuth)).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    }

    #[test]
    fn delay_is_reset_by_a_session_but_not_by_the_third_short_one_in_a_row() {
        let mut b = Backoff::default();
        let short = AttemptEnd::After(Duration::from_millis(4_999));
        for _ in 0..4 {
            seconds(&mut b, AttemptEnd::BeforeAuth);
        }
        assert_eq!(seconds(&mut b, short), 1);
        assert_eq!(seconds(&mut b, short), 1);
        assert_eq!(seconds(&mut b, short), 2);
        assert_eq!(seconds(&mut b, short), 4);
        assert_eq!(seconds(&mut b, AttemptEnd::After(STABLE_AFTER)), 1);
        assert_eq!(seconds(&mut b, short), 1);
    }

    #[test]
    fn delay_after_a_planned_end_is_the_shortest() {
        let mut b = Backoff::default();
        for _ in 0..9 {
            seconds(&mut b, AttemptEnd::BeforeAuth);
        }
        for _ in 0..5 {
            assert_eq!(seconds(&mut b, AttemptEnd::Planned), 1);
        }
    }
}
