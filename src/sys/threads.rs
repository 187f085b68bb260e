//! Starting threads: each has a name, for logs and debuggers, and a small stack.

use std::io;
use std::thread::{Builder, JoinHandle};

/// An HTTPS exchange through ureq and rustls needs 64 KiB of stack, in debug builds 256 KiB; a resolver's modules may need
/// more. Address space alone: pages that are not touched cost nothing.
const STACK_BYTES: usize = if cfg!(debug_assertions) { 1 << 20 } else { 512 << 10 };

/// Starts a thread.
///
/// # Errors
/// The system refused it; the body is dropped.
pub fn spawn(name: impl Into<String>, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn(body)
}

/// Has the calling thread wait for the one that wakes it to be through, instead of taking its core at once. For a thread that
/// others hand their work to just before they sleep: on an idle box an event takes a third less time, of the clock and of the
/// processor, than with two cores at it. On a box whose cores are all busy, events wait for the end of somebody's turn: 1 to 4 ms,
/// which the inference is spared. Where the system refuses, nothing changes.
pub fn set_batch_scheduling() {
    scheduler::batch();
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod scheduler {
    use std::ffi::c_int;

    // As in `sched.h`.
    const SCHED_BATCH: c_int = 3;
    const CALLING_THREAD: c_int = 0;

    #[repr(C)]
    struct Parameters {
        priority: c_int,
    }

    #[expect(unsafe_code, reason = "the standard library has no name for it")]
    // SAFETY: the declaration is glibc's own; it reads the parameters and keeps nothing of them.
    unsafe extern "C" {
        safe fn sched_setscheduler(pid: c_int, policy: c_int, parameters: &Parameters) -> c_int;
    }

    pub fn batch() {
        sched_setscheduler(CALLING_THREAD, SCHED_BATCH, &Parameters { priority: 0 });
    }
}

/// Other systems have no such policy.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
mod scheduler {
    pub fn batch() {}
}
