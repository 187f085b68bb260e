//! What the receiving end of the streams counts.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::event::{EVENT_BYTES, sent_ns};

/// What was received of all streams together.
#[derive(Default)]
pub struct Received {
    events: AtomicU64,
    bytes: AtomicU64,
    is_recording: AtomicBool,
    latencies_us: Mutex<Vec<f64>>,
}

#[derive(Clone, Copy)]
pub struct Totals {
    pub events: u64,
    pub bytes: u64,
}

impl Received {
    pub fn totals(&self) -> Totals {
        Totals { events: self.events.load(Relaxed), bytes: self.bytes.load(Relaxed) }
    }

    /// Starts to record latencies, and discards earlier ones.
    pub fn start_recording(&self) {
        self.latencies().clear();
        self.is_recording.store(true, Relaxed);
    }

    /// Stops recording; the latencies are in microseconds, unsorted.
    pub fn take_latencies_us(&self) -> Vec<f64> {
        self.is_recording.store(false, Relaxed);
        std::mem::take(&mut *self.latencies())
    }

    fn latencies(&self) -> MutexGuard<'_, Vec<f64>> {
        self.latencies_us.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was received of one stream.
#[derive(Default)]
pub struct ReceivedStream {
    pub bytes: u64,
    /// The beginning of an event that is not complete.
    partial: Vec<u8>,
}

impl ReceivedStream {
    /// Counts `bytes` of the body without parsing them.
    pub fn count(&mut self, bytes: usize, all: &Received) {
        self.bytes += bytes as u64;
        all.bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// Counts a piece of the body, received at `at_ns`, and the events in it.
    pub fn parse(&mut self, piece: &[u8], at_ns: u64, all: &Received) {
        self.count(piece.len(), all);
        self.partial.extend_from_slice(piece);
        let (events, _) = self.partial.as_chunks::<EVENT_BYTES>();
        let mut latencies = all.is_recording.load(Relaxed).then(|| all.latencies());
        for sent_ns in events.iter().filter_map(|event| sent_ns(event)) {
            all.events.fetch_add(1, Relaxed);
            if let Some(latencies) = &mut latencies {
                latencies.push(at_ns.saturating_sub(sent_ns) as f64 / 1e3);
            }
        }
        let complete = events.len() * EVENT_BYTES;
        self.partial.drain(..complete);
    }
}
