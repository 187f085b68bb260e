//! Log lines: to stderr or to a file, dated, with the thread that wrote them.
//!
//! Invariant: logging never blocks who logs. Lines are queued, and a thread that exists only while there are some writes
//! them; when nobody reads stderr, or the disk hangs, the queue fills, and lines are dropped and counted. The reader of the
//! socket, the drain and the signal handler all log, and a full pipe must not be able to stop them.

mod file;

use std::collections::VecDeque;
use std::fmt::Arguments;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Record};
use simplelog::{ConfigBuilder, WriteLogger};

use file::LogFile;
pub use file::rotated_path;

use crate::sys::threads;

/// Lines that wait to be written.
const QUEUE_LINES_MAX: usize = 1024;
/// The longest line that is kept, in bytes: with the above, 4 MiB at the most.
const LINE_BYTES_MAX: usize = 4 << 10;
/// How long the writing thread waits for the next line before it leaves.
const IDLE_TIMEOUT: Duration = Duration::from_millis(200);
/// How long the end of the process waits for the last lines.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(300);
/// The most of a foreign text that a line shows, in characters.
const SHOWN_MAX: usize = 200;
/// The part of a secret that is shown at each end, in characters.
const VISIBLE_ENDS: usize = 4;

/// Crates whose lines would show what ours never do: headers, bodies, frames.
const QUIET: [&str; 3] = ["ureq", "rustls", "tungstenite"];

static QUEUE: Queue = Queue { state: Mutex::new(State::new()), changed: Condvar::new() };

/// Starts logging at `level`, to this file, which is made with the first line, or to stderr. Where lines cannot be written,
/// they are lost and nothing else.
pub fn start(level: LevelFilter, file: Option<PathBuf>) {
    QUEUE.lock().file = file.map(LogFile::new);
    let mut config = ConfigBuilder::new();
    config
        .set_time_format_rfc3339()
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .set_thread_level(LevelFilter::Error)
        .set_thread_mode(simplelog::ThreadLogMode::Names);
    for name in QUIET {
        config.add_filter_ignore_str(name);
    }
    // Fails only when a logger is there already, and then that one is as good.
    let _ = WriteLogger::init(level, config.build(), Lines::default());
    // The message of a panic may quote what it choked on; where it happened is enough to mend it.
    std::panic::set_hook(Box::new(|panic| match panic.location() {
        Some(location) => log::error!("this is a bug: panicked at {location}"),
        None => log::error!("this is a bug: panicked"),
    }));
}

/// Waits for the queued lines to be written, a moment at the most.
pub fn flush() {
    let until = Instant::now() + FLUSH_TIMEOUT;
    let mut state = QUEUE.lock();
    while !state.is_written() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        state = QUEUE.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// A text from outside, fit for one line: escaped, and cut where it is long.
pub fn sanitize_for_log(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN_MAX).is_some() {
        shown.push('…');
    }
    shown
}

/// A secret: enough to recognise it by, too little to use it.
pub fn redact(secret: &str) -> String {
    let chars: Vec<char> = secret.chars().collect();
    if chars.len() < 4 * VISIBLE_ENDS {
        return "…".to_owned();
    }
    let ends = |part: &[char]| sanitize_for_log(&part.iter().collect::<String>());
    format!("{}…{}", ends(&chars[..VISIBLE_ENDS]), ends(&chars[chars.len() - VISIBLE_ENDS..]))
}

/// The other half of [`crate::debug!`].
pub fn log_debug(args: Arguments<'_>) {
    log::logger().log(&Record::builder().level(Level::Debug).target("usepod").args(args).build());
}

/// Writes a debug line. Release builds compile `log::debug!` out, for the sake of other crates' lines (Cargo.toml).
#[macro_export]
macro_rules! debug {
    ($($arg:tt)+) => {
        if log::max_level() >= log::LevelFilter::Debug {
            $crate::logging::log_debug(format_args!($($arg)+));
        }
    };
}

/// Where the logger writes: pieces of lines, which become whole ones here.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            if self.0.len() < LINE_BYTES_MAX {
                self.0.extend_from_slice(&piece[..piece.len().min(LINE_BYTES_MAX - self.0.len())]);
            }
            if piece.ends_with(b"\n") {
                let mut line = std::mem::take(&mut self.0);
                if !line.ends_with(b"\n") {
                    line.push(b'\n');
                }
                QUEUE.push(line);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Queue {
    state: Mutex<State>,
    /// A line was pushed, or written.
    changed: Condvar,
}

struct State {
    lines: VecDeque<Vec<u8>>,
    /// In place of stderr. The thread has it while there is one, so that nobody waits for the disk.
    file: Option<LogFile>,
    dropped: u64,
    has_thread: bool,
    is_writing: bool,
}

impl State {
    const fn new() -> State {
        State { lines: VecDeque::new(), file: None, dropped: 0, has_thread: false, is_writing: false }
    }

    fn is_written(&self) -> bool {
        self.lines.is_empty() && !self.is_writing
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&'static self, line: Vec<u8>) {
        let mut state = self.lock();
        if state.lines.len() >= QUEUE_LINES_MAX {
            state.dropped += 1;
            return;
        }
        state.lines.push_back(line);
        if !state.has_thread {
            // Without a thread the lines wait for the next attempt to start one.
            state.has_thread = threads::spawn("log", || self.write_lines()).is_ok();
        }
        self.changed.notify_all();
    }

    /// In the `log` thread: everything that is queued, until nothing has come for a while.
    fn write_lines(&self) {
        let mut state = self.lock();
        let mut file = state.file.take();
        loop {
            if let Some(line) = state.lines.pop_front() {
                state.is_writing = true;
                let dropped = std::mem::take(&mut state.dropped);
                drop(state);
                write(file.as_mut(), &line);
                if dropped > 0 {
                    let what = format!("[{dropped} log lines were dropped: they could not be written in time]\n");
                    write(file.as_mut(), what.as_bytes());
                }
                state = self.lock();
                state.is_writing = false;
                self.changed.notify_all();
                continue;
            }
            let (guard, waited) =
                self.changed.wait_timeout(state, IDLE_TIMEOUT).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            if waited.timed_out() && state.lines.is_empty() {
                state.has_thread = false;
                state.file = file;
                return;
            }
        }
    }
}

fn write(file: Option<&mut LogFile>, line: &[u8]) {
    match file {
        Some(file) => file.write(line),
        None => {
            // Nobody is left to tell.
            let _ = io::stderr().write_all(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_shows_its_ends_alone() {
        assert_eq!(redact("POD-ENROLL-ABCD-1234"), "POD-…1234");
        assert_eq!(redact("POD-1234"), "…");
        assert_eq!(redact("a\nb\u{1b}-ENROLL-ABCD-1234"), "a\\nb\\u{1b}…1234");
    }

    #[test]
    fn a_foreign_text_is_one_line_and_short() {
        assert_eq!(sanitize_for_log("a\nb\u{1b}[2J"), "a\\nb\\u{1b}[2J");
        assert_eq!(sanitize_for_log(&"x".repeat(1000)).chars().count(), SHOWN_MAX + 1);
    }
}
