//! What the allocator keeps of freed memory, and giving it back.
//!
//! glibc keeps what threads free for the next allocation: after 256 streams at a time, some 20 MB for as long as the process
//! lives. An agent lives for months and is idle for most of them. Whoever freed much says so; who has time gives it back.

use std::sync::atomic::{AtomicBool, Ordering};

static TRIM_REQUESTED: AtomicBool = AtomicBool::new(false);

/// Has the allocator keep little, in two ways. The threads take turns at few heaps: of each but the first, trimming leaves the
/// free end as it is, which came to 10 MB after 256 streams. And large buffers go back at once: glibc's own limit for that
/// grows to the largest buffer ever freed. To be called before there are threads.
pub fn configure() {
    allocator::keep_little();
}

/// Much was freed, or soon will be.
pub fn request_trim() {
    TRIM_REQUESTED.store(true, Ordering::Relaxed);
}

/// Gives back what was freed since the last time, if it was much: a millisecond's work.
pub fn trim_if_requested() {
    if TRIM_REQUESTED.swap(false, Ordering::Relaxed) {
        allocator::trim();
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod allocator {
    use std::ffi::c_int;

    /// glibc's own choice is eight a core.
    const HEAPS_MAX: c_int = 2;

    /// From this size on a buffer is large, in bytes; what glibc begins with.
    const LARGE_BYTES: c_int = 128 << 10;

    // As in `malloc.h`.
    const M_MMAP_THRESHOLD: c_int = -3;
    const M_ARENA_MAX: c_int = -8;

    #[expect(unsafe_code, reason = "the standard library has no names for these two")]
    // SAFETY: the declarations are glibc's own, and both may be called by any thread at any time.
    unsafe extern "C" {
        safe fn mallopt(parameter: c_int, value: c_int) -> c_int;
        safe fn malloc_trim(pad: usize) -> c_int;
    }

    pub fn keep_little() {
        mallopt(M_ARENA_MAX, HEAPS_MAX);
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES);
    }

    pub fn trim() {
        malloc_trim(0);
    }
}

/// Other allocators give memory back by themselves, or not at all.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
mod allocator {
    pub fn keep_little() {}

    pub fn trim() {}
}
