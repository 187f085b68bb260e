//! What the allocator keeps of freed memory, and giving it back.
//!
//! glibc keeps what threads free for the next allocation: after 256 streams at a time, some 20 MB for as long as the process
//! lives. An agent lives for months and is idle for most of them. Whoever freed much says so; who has time gives it back.

use std::sync::atomic::{AtomicBool, Ordering};

static MUCH_WAS_FREED: AtomicBool = AtomicBool::new(false);

/// Threads take turns at so many heaps. glibc's own choice is eight a core, each of which keeps its free end for itself:
/// trimming does not reach it, and after 256 streams that came to 10 MB.
const HEAPS_MAX: std::ffi::c_int = 2;

/// To be called before there are threads.
pub fn keep_few_heaps() {
    limit_heaps();
}

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

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn limit_heaps() {
    const M_ARENA_MAX: std::ffi::c_int = -8;
    #[expect(unsafe_code, reason = "the standard library has no name for it")]
    // SAFETY: the declaration is glibc's own, and the function may be called by any thread at any time.
    unsafe extern "C" {
        safe fn mallopt(parameter: std::ffi::c_int, value: std::ffi::c_int) -> std::ffi::c_int;
    }
    mallopt(M_ARENA_MAX, HEAPS_MAX);
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn limit_heaps() {}

/// Other allocators do it by themselves, or not at all.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn trim() {}
