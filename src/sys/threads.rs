//! Starts threads with a name, for logs and debuggers, and a small stack.

use std::io;
use std::thread::{Builder, JoinHandle, Scope};

/// Stack size. An HTTPS request through ureq and rustls needs 64 KiB, or 256 KiB in debug builds; resolver modules may need more.
/// This is address space only: untouched pages cost nothing.
const STACK_BYTES: usize = if cfg!(debug_assertions) { 1 << 20 } else { 512 << 10 };

/// Starts a thread.
///
/// # Errors
/// The system refused a thread; the body is dropped.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn(body)
}

/// Starts a thread that ends within `scope`.
///
/// # Errors
/// The system refused a thread; the body is dropped.
pub fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<()> {
    Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn_scoped(scope, body).map(drop)
}

/// Puts the calling thread under `SCHED_BATCH`, so that waking it does not preempt the thread that woke it. Meant for a thread that
/// receives work from others just before they sleep: on an idle machine, an event then takes a third less wall-clock and CPU time.
/// If all cores are busy, an event waits 1 to 4 ms for the end of another thread's time slice, which benefits inference. If the
/// system refuses, nothing changes.
pub fn set_batch_scheduling() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[expect(unsafe_code, reason = "neither std nor nix offers this call")]
    // SAFETY: the call reads the parameters and keeps no pointer to them. 0 is the calling thread.
    unsafe {
        libc::sched_setscheduler(0, libc::SCHED_BATCH, &libc::sched_param { sched_priority: 0 });
    }
}
