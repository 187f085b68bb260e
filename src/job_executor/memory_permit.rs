//! Limits the memory of the requests in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Limit for the text of all requests together, in bytes, including requests that workers of cancelled jobs still hold. The frame
/// that was read last is held beside them.
pub const REQUEST_BYTES_MAX: usize = 256 << 20;

/// Counts the bytes of the requests in flight.
#[derive(Default)]
pub struct RequestMemory {
    reserved: Arc<AtomicUsize>,
}

/// Memory for one request, until the permit is dropped.
pub struct MemoryPermit {
    bytes: usize,
    reserved: Arc<AtomicUsize>,
}

impl RequestMemory {
    /// Reserves memory for a request of `bytes`; `None` if that would exceed [`REQUEST_BYTES_MAX`].
    pub fn reserve(&self, bytes: usize) -> Option<MemoryPermit> {
        let add = |reserved: usize| reserved.checked_add(bytes).filter(|sum| *sum <= REQUEST_BYTES_MAX);
        self.reserved.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add).ok()?;
        Some(MemoryPermit { bytes, reserved: self.reserved.clone() })
    }
}

impl Drop for MemoryPermit {
    fn drop(&mut self) {
        self.reserved.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}
