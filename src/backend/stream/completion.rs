//! Decides when a response is complete although its body stays open. Some gateways keep the connection open after the last event,
//! silent or with comments, until a timeout of their own.

use std::time::{Duration, Instant};

use super::report::Progress;

/// Time for the body to end after the end marker. A body that ends leaves a connection that can be reused.
const DONE_GRACE: Duration = Duration::from_millis(500);
/// Time without an event after a `finish_reason` or an error until the response counts as complete. Usage follows within
/// milliseconds.
const FINISHED_GRACE: Duration = Duration::from_secs(10);
/// Time limit of the last read if the time is already up because the coordinator was slow: data that has arrived is still read.
const LAST_READ: Duration = Duration::from_millis(50);

/// The time limit for the rest of a response that is complete.
#[derive(Debug, Default)]
pub struct Completion {
    due: Option<Instant>,
}

impl Completion {
    /// Time limit for the next read; `None` if the response is not complete.
    pub fn read_timeout(&self) -> Option<Duration> {
        self.due.map(|due| due.saturating_duration_since(Instant::now()).max(LAST_READ))
    }

    /// Whether the time is up.
    pub fn is_due(&self) -> bool {
        self.due.is_some_and(|due| Instant::now() >= due)
    }

    /// Updates the limit after a read. `has_event`: the read completed an event, rather than only comments.
    pub fn update(&mut self, progress: Progress, has_event: bool) {
        let grace = match progress {
            Progress::Open => None,
            Progress::Finished => Some(FINISHED_GRACE),
            Progress::Done => Some(DONE_GRACE),
        };
        let new = grace.map(|grace| Instant::now() + grace);
        let is_extended = has_event && progress < Progress::Done;
        self.due = if is_extended { new } else { self.due.map_or(new, |due| new.map(|new| due.min(new))) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_events_extend_the_wait_and_only_before_the_end_marker() {
        let soon = |completion: &Completion| completion.read_timeout().is_some_and(|time| time <= DONE_GRACE);
        let mut completion = Completion::default();
        completion.update(Progress::Open, true);
        assert!(completion.read_timeout().is_none() && !completion.is_due());
        completion.update(Progress::Finished, true);
        assert!(completion.read_timeout().is_some_and(|time| DONE_GRACE < time && time <= FINISHED_GRACE));
        completion.due = Some(Instant::now());
        completion.update(Progress::Finished, false);
        assert!(completion.is_due() && completion.read_timeout() == Some(LAST_READ), "a comment extends nothing");
        completion.update(Progress::Finished, true);
        assert!(!completion.is_due() && !soon(&completion));
        completion.update(Progress::Done, true);
        assert!(!completion.is_due() && soon(&completion));
        completion.due = Some(Instant::now());
        completion.update(Progress::Done, true);
        assert!(completion.is_due(), "nothing is expected behind the end marker");
        completion.update(Progress::Open, false);
        assert!(completion.read_timeout().is_none(), "what looked like the end was not");
    }
}
