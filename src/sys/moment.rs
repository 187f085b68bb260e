//! Moments on the clock that counts from boot, including the time that the machine was suspended.
//!
//! On a machine without a battery-backed clock, the wall clock starts in 1970 and steps to the present once there is a network.
//! Durations are therefore measured between moments, and a moment is converted to a date only for display.

use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};

use super::datetime;

/// A moment since boot. The same for all processes until the next boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Duration);

impl Moment {
    /// The present.
    pub fn now() -> Moment {
        Moment(clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default())
    }

    /// The moment this many milliseconds after boot.
    pub fn after_boot(milliseconds: u64) -> Moment {
        Moment(Duration::from_millis(milliseconds))
    }

    /// Milliseconds since boot.
    pub fn since_boot(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// Time since this moment.
    pub fn elapsed(self) -> Duration {
        Moment::now().0.saturating_sub(self.0)
    }

    /// The date in RFC 3339, by what the wall clock shows now.
    pub fn rfc3339(self) -> String {
        let now = SystemTime::now();
        datetime::rfc3339(now.checked_sub(self.elapsed()).unwrap_or(now))
    }
}

/// Identifies the current boot; empty if the system does not say.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moment_has_an_age_and_a_date() {
        let hour_ago = Moment(Moment::now().0.saturating_sub(Duration::from_secs(3600)));
        let age = hour_ago.elapsed();
        assert!(age >= Duration::from_secs(3600).min(age) && hour_ago <= Moment::now());
        let date = datetime::parse_rfc3339(&hour_ago.rfc3339()).expect("a date");
        assert!((datetime::now() - date - i64::try_from(age.as_secs()).expect("seconds")).abs() <= 2);
        assert_eq!(Moment::after_boot(hour_ago.since_boot()).since_boot(), hour_ago.since_boot());
        assert!(!boot_id().contains('\n'));
    }
}
