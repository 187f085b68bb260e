//! Returns freed memory to the system.
//!
//! glibc keeps freed memory for later allocations: about 20 MB after 256 concurrent streams, for the lifetime of the process. An
//! agent runs for months and is mostly idle. A thread that frees much memory requests a trim, which the housekeeping thread performs.

use std::sync::atomic::{AtomicBool, Ordering};

static TRIM_REQUESTED: AtomicBool = AtomicBool::new(false);

/// Limits what glibc retains: two arenas (`malloc_trim` does not shrink the top of secondary arenas, which was 10 MB after 256
/// streams) and a fixed mmap threshold (glibc otherwise raises it to the largest buffer ever freed). Must be called before threads
/// are started.
pub fn configure() {
    allocator::configure();
}

/// Requests a trim, because much memory was freed or will soon be freed.
pub fn request_trim() {
    TRIM_REQUESTED.store(true, Ordering::Relaxed);
}

/// Trims the heap if a trim was requested since the last call. Takes about a millisecond.
pub fn trim_if_requested() {
    if TRIM_REQUESTED.swap(false, Ordering::Relaxed) {
        allocator::trim();
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "the standard library does not offer these calls")]
mod allocator {
    use libc::c_int;

    /// Number of arenas; glibc's default is eight per core.
    const ARENAS_MAX: c_int = 2;

    /// Minimum size of buffers that are mapped individually, in bytes; glibc's initial value.
    const MMAP_THRESHOLD_BYTES: c_int = 128 << 10;

    pub fn configure() {
        // SAFETY: any thread may call this at any time.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX);
            libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES);
        }
    }

    pub fn trim() {
        // SAFETY: any thread may call this at any time.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

/// Other allocators return memory automatically, or not at all.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
mod allocator {
    pub fn configure() {}

    pub fn trim() {}
}
