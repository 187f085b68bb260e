//! Threads with a name, for logs and debuggers, and a small stack.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Stack size. An HTTPS request through ureq and rustls needs 64 KiB, or 256 KiB in debug builds; resolver modules may need more.
/// This is address space only: untouched pages cost nothing.
const STACK_BYTES: usize = if cfg!(debug_assertions) { 1 << 20 } else { 512 << 10 };

/// Starts a thread.
///
/// # Errors
/// The system refused a thread; the body is dropped.
pub fn spawn(name: impl Into<String>, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn(body)
}

/// Puts the calling thread under `SCHED_BATCH`, so that waking it does not preempt the thread that woke it. Meant for a thread to
/// which others hand work just before they sleep: on an idle machine, an event then takes a third less wall-clock and CPU time. On a
/// machine whose cores are all busy, an event waits 1 to 4 ms for the end of another thread's time slice, which inference gains. If
/// the system refuses, nothing changes.
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

    #[expect(unsafe_code, reason = "the standard library does not offer this call")]
    // SAFETY: the declaration matches glibc's; the function reads the parameters and does not keep the pointer.
    unsafe extern "C" {
        safe fn sched_setscheduler(pid: c_int, policy: c_int, parameters: &Parameters) -> c_int;
    }

    pub fn batch() {
        sched_setscheduler(CALLING_THREAD, SCHED_BATCH, &Parameters { priority: 0 });
    }
}

/// Other systems have no such scheduling policy.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
mod scheduler {
    pub fn batch() {}
}
