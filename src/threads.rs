//! Starting threads: each has a name, for logs and debuggers, and a small stack.

use std::io;
use std::thread::{Builder, JoinHandle};

/// An HTTPS exchange through ureq and rustls needs 64 KiB of stack, in debug builds 256 KiB; a resolver's modules may need
/// more. Address space alone: pages that are not touched cost nothing.
const STACK_BYTES: usize = if cfg!(debug_assertions) { 1 << 20 } else { 512 << 10 };

/// Starts a thread. The body is boxed, for what the standard library compiles around each kind of closure would come to
/// more machine code than the threads themselves.
///
/// # Errors
/// The system refused it; the body is dropped.
pub fn spawn(name: impl Into<String>, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    start(name.into(), Box::new(body))
}

fn start(name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name).stack_size(STACK_BYTES).spawn(body)
}
