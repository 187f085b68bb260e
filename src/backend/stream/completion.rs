//! Decides when a response is complete although its body stays open. Some gateways keep the connection open after the last event,
//! silent or with comments, until a timeout of their own.

use std::time::{Duration, Instant};

use super::report::Progress;

/// Time for the body to end after the end marker. A body that ends leaves a connection that can be reused.
const DONE_GRACE: Duration = Duration::from_millis(500);
/// Time without an event after which no more is expected behind a `finish_reason` or an error: usage follows within
/// milliseconds.
const FINISHED_GRACE: Duration = Duration::from_secs(10);
/// Time limit of the last read, if the time is up already because the coordinator was slow: what has arrived meanwhile is read.
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
