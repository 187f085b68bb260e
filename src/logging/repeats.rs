//! Limits warnings that a peer can cause without limit: each call site logs at most one line per second; the others are counted.
//!
//! Invariants: the first warning is logged at once. The count of the others follows within a second, or at the end of the process. A
//! warning that is only counted is not even formatted, so that a flood of them costs little.

use std::fmt::Arguments;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::Level;

/// Minimum time between two lines of one call site.
const INTERVAL: Duration = Duration::from_secs(1);

/// The call sites with warnings that are counted but not logged yet.
static COUNTING: Mutex<Vec<&'static Repeats>> = Mutex::new(Vec::new());

/// A call site of [`log_repeatable!`](crate::log_repeatable).
pub struct Repeats(Mutex<State>);

struct State {
    level: Level,
    /// The last line.
    text: String,
    /// When the next line may be logged.
    next_at: Option<Instant>,
    /// The warnings since the last line.
    count: u64,
}

/// Like [`log::log!`], but logs at most one line per second and call site; further ones are counted.
#[macro_export]
macro_rules! log_repeatable {
    ($level:expr, $($arg:tt)+) => {{
        static REPEATS: $crate::logging::Repeats = $crate::logging::Repeats::new();
        REPEATS.log($level, format_args!($($arg)+));
    }};
}

impl Repeats {
    #[doc(hidden)]
    pub const fn new() -> Repeats {
        Repeats(Mutex::new(State { level: Level::Warn, text: String::new(), next_at: None, count: 0 }))
    }

    #[doc(hidden)]
    pub fn log(&'static self, level: Level, args: Arguments<'_>) {
        if level > log::max_level() {
            return;
        }
        let mut state = self.lock();
        let now = Instant::now();
        if state.next_at.is_some_and(|next_at| now < next_at) {
            state.count += 1;
            let is_first = state.count == 1;
            drop(state);
            if is_first {
                counting().push(self);
                super::QUEUE.ensure_thread();
            }
            return;
        }
        (state.level, state.text, state.next_at) = (level, args.to_string(), Some(now + INTERVAL));
        let text = state.text.clone();
        drop(state);
        log::log!(level, "{text}");
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn counting() -> MutexGuard<'static, Vec<&'static Repeats>> {
    COUNTING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// When the next count is to be logged; `None` if nothing is counted.
pub(super) fn next_at() -> Option<Instant> {
    counting().iter().filter_map(|repeats| repeats.lock().next_at).min()
}

/// Logs the counts that are due at `until`.
pub(super) fn log_counts(until: Instant) {
    let is_due = |repeats: &mut &Repeats| repeats.lock().next_at.is_none_or(|next_at| next_at <= until);
    let due: Vec<&Repeats> = counting().extract_if(.., is_due).collect();
    for repeats in due {
        let mut state = repeats.lock();
        let (level, count) = (state.level, std::mem::take(&mut state.count));
        state.next_at = Some(Instant::now() + INTERVAL);
        let text = format!("{} ({count} more like this)", state.text);
        drop(state);
        log::log!(level, "{text}");
    }
}
