//! Scripted peers of the agent, over real loopback sockets, with a limit for every wait. The integration tests use all of it, the
//! bench a part.
//!
//! Most tests use a [`Rig`]: one coordinator, one agent, and one session after its handshake.

mod acceptor;
mod agent;
mod backend;
pub mod connection;
mod coordinator;
mod descriptors;
mod endless;
mod fault;
pub mod http;
pub mod procfs;
mod ran;
mod resource_usage;
mod rig;
mod scratch;
mod session;
mod shim;
mod tls;
pub mod websocket;

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use agent::{Agent, Setup, binary, cli, cli_within};
pub use backend::{Answer, Backend, Held};
pub use coordinator::{Coordinator, Dialled};
pub use descriptors::reserve_descriptors;
pub use endless::EndlessLine;
pub use fault::{FaultProxy, Mode};
pub use http::{Request, response, sse};
pub use ran::Ran;
pub use resource_usage::{MeasuredAgent, ResourceUsage};
pub use rig::Rig;
pub use scratch::Scratch;
pub use session::{Event, Outcome, Session, Take, is_offer, job, job_within, verify_auth};
pub use shim::Shim;
pub use tls::{Authority, Flaw, TlsProxy};
pub use websocket::{BINARY, CLOSE, CONTINUATION, PING, TEXT, close_payload, encode, switching_protocols};

/// The time limit for events that should happen at once, on a loaded machine.
pub const SOON: Duration = Duration::from_secs(10);

/// How long a test waits for an event that must not happen.
pub const QUIET: Duration = Duration::from_millis(300);

/// The identity file, and the files that an agent keeps beside it.
pub const STATE_FILES: [&str; 4] = ["identity.key", "identity.key.lock", "identity.key.state", "identity.key.wake"];

/// The names in a folder, sorted.
pub fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("the folder");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

pub const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// An address where nothing listens. Each caller names its own loopback address, so that no other test uses the port.
pub fn nobody_at(loopback: &str) -> String {
    let listener = TcpListener::bind((loopback, 0)).expect("a loopback port");
    listener.local_addr().expect("a bound address").to_string()
}

/// Sets the permission bits of a file or folder.
pub fn set_mode(path: impl AsRef<Path>, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("the mode set");
}

/// The permission bits of a file or folder.
pub fn mode(path: impl AsRef<Path>) -> u32 {
    std::fs::metadata(path).expect("its metadata").permissions().mode() & 0o7777
}

/// Waits until `is_so` returns true.
#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < SOON, "within {SOON:?} it never came to this: {what}");
        std::thread::sleep(ms(5));
    }
}

/// Waits for the first line of a file that contains all of `words`.
pub fn wait_line_in(file: &Path, words: &[&str]) -> String {
    let began = Instant::now();
    loop {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if let Some(line) = text.lines().find(|line| words.iter().all(|word| line.contains(word))) {
            return line.to_owned();
        }
        assert!(began.elapsed() < SOON, "no line with {words:?} in {}; all there is:\n{text}", file.display());
        std::thread::sleep(ms(5));
    }
}

/// Reports that this test does not run here, and why. Bypasses the capture of output, as the test passes.
pub fn left_out(why: &str) {
    let thread = std::thread::current();
    let _ = writeln!(std::io::stderr(), "test {} was left out: {why}", thread.name().unwrap_or_default());
}

/// Reads from a socket. Repeats a read with a timeout that was interrupted because the process was stopped and continued.
fn read(mut stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.read(buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Joins a thread in a `drop`. A thread that does not end in time is reported and left running.
fn join_within(limit: Duration, thread: JoinHandle<()>, what: &str) {
    let began = Instant::now();
    while !thread.is_finished() {
        if began.elapsed() > limit {
            #[expect(clippy::print_stderr, reason = "the harness shows it with the failed test")]
            {
                eprintln!("{what} did not end within {limit:?}");
            }
            return;
        }
        std::thread::sleep(ms(1));
    }
    let _ = thread.join();
}

/// No line is wider than `width` characters, but for a word that is longer than half a line.
#[track_caller]
pub fn assert_fits(text: &str, width: usize) {
    for line in text.lines() {
        let has_long_word = line.split(' ').any(|word| word.chars().count() > width / 2);
        assert!(line.chars().count() <= width || has_long_word, "wider than {width}: `{line}` in:\n{text}");
    }
}

pub fn base64(bytes: impl AsRef<[u8]>) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

pub fn unbase64(text: &str) -> Vec<u8> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(text).unwrap_or_else(|e| panic!("not base64 ({e}): {text:?}"))
}

/// Pseudo-random numbers; the same for the same seed, which must not be 0.
pub fn xorshift(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

/// Runs the cases in parallel, each on its own thread; the first panic fails the test. For cases that mostly wait.
pub fn side_by_side<C: Send>(cases: impl IntoIterator<Item = C>, run: impl Fn(C) + Sync) {
    std::thread::scope(|scope| {
        let threads: Vec<_> = cases.into_iter().map(|case| scope.spawn(|| run(case))).collect();
        for thread in threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}
