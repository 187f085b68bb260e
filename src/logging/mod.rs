//! The log, on stderr or in a file. Each line has a date and the name of the thread that logged it.
//!
//! Invariant: logging never blocks the caller. Lines are queued, and written by a thread that exists only while lines are queued. If
//! nobody reads stderr, or the disk hangs, the queue fills, and further lines are dropped and counted. The reader of the socket, the
//! drain and the signal handler all log, and a full pipe must not stop them.

mod file;
mod repeats;

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
pub use repeats::Repeats;

use crate::sys::printable::{one_line, printable};
use crate::sys::threads;

/// Maximum number of queued lines.
const QUEUE_LINES_MAX: usize = 1024;
/// Maximum length of a line, in bytes; longer lines are truncated. The queue takes at most 4 MiB.
const LINE_BYTES_MAX: usize = 4 << 10;
/// How long the log thread waits for the next line before it ends.
const IDLE_TIMEOUT: Duration = Duration::from_millis(200);
/// How long the process waits for the last lines before it ends.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(300);
/// Maximum length of a sanitized text, in characters.
const SANITIZED_MAX: usize = 200;
/// Characters of a secret that are shown at each end.
const VISIBLE_ENDS: usize = 4;

/// Crates that are not logged, because they would log headers, bodies and frames.
const QUIET: [&str; 3] = ["ureq", "rustls", "tungstenite"];

static QUEUE: Queue = Queue { state: Mutex::new(State::new()), changed: Condvar::new() };

/// Starts logging at `level`, to `file` or to stderr. The file is created with the first line. Lines that cannot be written are
/// dropped.
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
    // Fails only if a logger is already installed, which is then kept.
    let _ = WriteLogger::init(level, config.build(), Lines::default());
    // A panic's message may quote the data that caused it, so only the location is logged.
    std::panic::set_hook(Box::new(|panic| match panic.location() {
        Some(location) => log::error!("this is a bug: panicked at {location}"),
        None => log::error!("this is a bug: panicked"),
    }));
}

/// Waits until the queued lines are written, for at most `FLUSH_TIMEOUT`.
pub fn flush() {
    let deadline = Instant::now() + FLUSH_TIMEOUT;
    repeats::log_counts(deadline + Duration::from_secs(3600));
    let mut state = QUEUE.lock();
    while !state.is_written() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        state = QUEUE.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Untrusted text as part of one line: escaped for display, and truncated to `SANITIZED_MAX` characters.
pub fn sanitize_for_log(text: &str) -> String {
    match text.char_indices().nth(SANITIZED_MAX) {
        Some((end, _)) => format!("{}…", one_line(&text[..end])),
        None => one_line(text).into_owned(),
    }
}

/// The first and last characters of a secret: enough to recognize it, too few to use it.
pub fn redact(secret: &str) -> String {
    let chars: Vec<char> = secret.chars().collect();
    if chars.len() < 4 * VISIBLE_ENDS {
        return "…".to_owned();
    }
    let ends = |part: &[char]| sanitize_for_log(&part.iter().collect::<String>());
    format!("{}…{}", ends(&chars[..VISIBLE_ENDS]), ends(&chars[chars.len() - VISIBLE_ENDS..]))
}

/// Implements [`crate::debug!`].
pub fn log_debug(args: Arguments<'_>) {
    log::logger().log(&Record::builder().level(Level::Debug).target("usepod").args(args).build());
}

/// Writes a debug line. Release builds omit `log::debug!`, so that the debug lines of other crates are not compiled (Cargo.toml).
#[macro_export]
macro_rules! debug {
    ($($arg:tt)+) => {
        if log::max_level() >= log::LevelFilter::Debug {
            $crate::logging::log_debug(format_args!($($arg)+));
        }
    };
}

/// Assembles whole lines from the pieces that the logger writes, and queues them.
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
                QUEUE.push(printable(&String::from_utf8_lossy(&line)).into_owned().into_bytes());
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
    /// A line was queued or written.
    changed: Condvar,
}

struct State {
    lines: VecDeque<Vec<u8>>,
    /// The file to write to instead of stderr. The log thread owns it while it runs, so that no caller waits for the disk.
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
        self.start_thread(&mut state);
        self.changed.notify_all();
    }

    /// Starts the log thread if there are counts for it to log.
    fn ensure_thread(&'static self) {
        self.start_thread(&mut self.lock());
        self.changed.notify_all();
    }

    fn start_thread(&'static self, state: &mut State) {
        if !state.has_thread {
            // If no thread can be started, the lines wait for the next attempt.
            state.has_thread = threads::spawn("log", || self.write_lines()).is_ok();
        }
    }

    /// Runs in the `log` thread: writes the queued lines until none has arrived for [`IDLE_TIMEOUT`] and nothing is counted.
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
            let now = Instant::now();
            let counts_at = repeats::next_at();
            if counts_at.is_some_and(|at| at <= now) {
                drop(state);
                repeats::log_counts(now);
                state = self.lock();
                continue;
            }
            let limit = counts_at.map_or(IDLE_TIMEOUT, |at| at - now);
            let (guard, waited) = self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            if waited.timed_out() && state.lines.is_empty() && repeats::next_at().is_none() {
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
            // A failure cannot be reported anywhere.
            let _ = io::stderr().write_all(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redact_shows_only_the_ends() {
        assert_eq!(redact("POD-ENROLL-ABCD-1234"), "POD-…1234");
        assert_eq!(redact("POD-1234"), "…");
        assert_eq!(redact("a\nb\u{1b}-ENROLL-ABCD-1234"), "a\\nb\\u{1b}…1234");
    }

    #[test]
    fn sanitize_for_log_makes_one_short_line() {
        assert_eq!(sanitize_for_log("a\nb\u{1b}[2J"), "a\\nb\\u{1b}[2J");
        assert_eq!(sanitize_for_log(&"x".repeat(1000)).chars().count(), SANITIZED_MAX + 1);
    }
}
