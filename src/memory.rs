//! What the allocator keeps of freed memory, and giving it back.
//!
//! glibc keeps what threads free for the next allocation: after 256 streams at a time, some 20 MB for as long as the process
//! lives. An agent lives for months and is idle for most of them. Whoever freed much says so; who has time gives it back.

use std::sync::atomic::{AtomicBool, Ordering};

static MUCH_WAS_FREED: AtomicBool = AtomicBool::new(false);

/// Much was freed, or soon will be.
pub fn note_freed() {
    MUCH_WAS_FREED.store(true, Ordering::Relaxed);
}

/// Gives back what was freed since the last time, if it was much: a millisecond's work.
pub fn give_back() {
    if MUCH_WAS_FREED.swap(false, Ordering::Relaxed) {
        trim();
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn trim() {
    #[expect(unsafe_code, reason = "the standard library has no name for it")]
    // SAFETY: the declaration is glibc's own, and the function may be called by any thread at any time.
    unsafe extern "C" {
        safe fn malloc_trim(pad: usize) -> std::ffi::c_int;
    }
    malloc_trim(0);
}

/// Other allocators do it by themselves, or not at all.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn trim() {}
