//! The events of a stream: SSE of one length, each with the time at which it was sent; and what the end that receives them
//! counts.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Length of one event.
pub const EVENT_BYTES: usize = 180;

const HEAD: &[u8] = b"data: {\"id\":\"cmpl-7\",\"object\":\"chat.completion.chunk\",\"created\":1770000000,\
    \"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"";
const FOOT: &[u8] = b"\"},\"finish_reason\":null}]}\n\n";
/// Digits of the send time in nanoseconds.
const STAMP_BYTES: usize = EVENT_BYTES - HEAD.len() - FOOT.len();
const _: () = assert!(STAMP_BYTES >= 20, "room for any u64");

/// What follows the last event.
pub const TAIL: &[u8] = b"data: {\"id\":\"cmpl-7\",\"object\":\"chat.completion.chunk\",\"created\":1770000000,\
    \"model\":\"m\",\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":13,\"total_tokens\":20}}\n\ndata: [DONE]\n\n";

/// Appends one event.
pub fn push_event(out: &mut Vec<u8>, sent_ns: u64) {
    out.extend_from_slice(HEAD);
    let stamp = out.len();
    out.resize(stamp + STAMP_BYTES, b'0');
    let mut rest = sent_ns;
    for digit in out[stamp..].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    out.extend_from_slice(FOOT);
}

/// When this event was sent; nothing if it is none.
fn sent_ns(event: &[u8]) -> Option<u64> {
    let stamp = event.strip_prefix(HEAD)?.strip_suffix(FOOT)?;
    Some(stamp.iter().fold(0, |ns: u64, digit| ns.wrapping_mul(10).wrapping_add(u64::from(digit.wrapping_sub(b'0')))))
}

/// Counts of all streams together.
#[derive(Default)]
pub struct Tally {
    pub events: AtomicU64,
    pub bytes: AtomicU64,
    is_recording: AtomicBool,
    latencies_us: Mutex<Vec<f64>>,
}

impl Tally {
    /// From now on latencies are kept; those from before are not.
    pub fn record(&self) {
        self.latencies().clear();
        self.is_recording.store(true, Relaxed);
    }

    /// Stops recording; the latencies in microseconds, in no order.
    pub fn take_latencies_us(&self) -> Vec<f64> {
        self.is_recording.store(false, Relaxed);
        std::mem::take(&mut *self.latencies())
    }

    fn latencies(&self) -> MutexGuard<'_, Vec<f64>> {
        self.latencies_us.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What has come of one stream.
#[derive(Default)]
pub struct Receipt {
    pub bytes: u64,
    /// The begin of an event that has not come whole.
    partial: Vec<u8>,
}

impl Receipt {
    /// Counts bytes without looking at them.
    pub fn count(&mut self, bytes: usize, tally: &Tally) {
        self.bytes += bytes as u64;
        tally.bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// Takes a piece of the body that came at `at_ns`, and counts the events in it.
    pub fn take(&mut self, piece: &[u8], at_ns: u64, tally: &Tally) {
        self.count(piece.len(), tally);
        self.partial.extend_from_slice(piece);
        let (events, _) = self.partial.as_chunks::<EVENT_BYTES>();
        let mut latencies = tally.is_recording.load(Relaxed).then(|| tally.latencies());
        for sent_ns in events.iter().filter_map(|event| sent_ns(event)) {
            tally.events.fetch_add(1, Relaxed);
            if let Some(latencies) = &mut latencies {
                latencies.push(at_ns.saturating_sub(sent_ns) as f64 / 1e3);
            }
        }
        let whole = events.len() * EVENT_BYTES;
        self.partial.drain(..whole);
    }
}
