//! The events of a job, in a channel that is bounded by bytes instead of events.
//!
//! Threads: the connection's thread sends without blocking; the thread that submitted the job receives.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crossbeam_channel::RecvTimeoutError;

/// Limit of queued bytes per job. A job that exceeds it is cancelled, so that it does not block others.
const UNREAD_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The content of a `job_done` frame.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct JobEnd {
    /// Input tokens.
    pub input_tokens: Option<u64>,
    /// Output tokens.
    pub output_tokens: Option<u64>,
}

/// An event of a job.
#[derive(Debug, Clone, PartialEq)]
pub enum JobEvent {
    /// Bytes of the backend's response.
    Chunk(Vec<u8>),
    /// The job is complete.
    Done(JobEnd),
    /// The job has failed, with a code of the protocol.
    Failed {
        /// The protocol's error code.
        code: String,
        /// The agent's message.
        message: String,
    },
}

impl JobEvent {
    pub(super) fn failed(code: &str, message: &str) -> Self {
        Self::Failed { code: code.to_owned(), message: message.to_owned() }
    }

    /// Whether no event of the job follows.
    pub(super) fn is_end(&self) -> bool {
        !matches!(self, Self::Chunk(_))
    }
}

/// The receiving end.
pub(super) struct Receiver {
    events: crossbeam_channel::Receiver<(Instant, JobEvent)>,
    unread_bytes: Arc<AtomicUsize>,
}

/// The sending end. Dropping it ends the channel after its last event.
pub(super) struct Sender {
    events: crossbeam_channel::Sender<(Instant, JobEvent)>,
    unread_bytes: Arc<AtomicUsize>,
}

pub(super) fn channel() -> (Sender, Receiver) {
    let (sender, receiver) = crossbeam_channel::unbounded();
    let unread_bytes = Arc::new(AtomicUsize::new(0));
    (Sender { events: sender, unread_bytes: unread_bytes.clone() }, Receiver { events: receiver, unread_bytes })
}

impl Sender {
    /// Adds an event. Returns `false` if it exceeds the limit.
    pub(super) fn send(&self, event: JobEvent) -> bool {
        let bytes = bytes_in(&event);
        // Only this thread adds, so the sum cannot grow in between.
        if self.unread_bytes.load(Ordering::SeqCst) + bytes > UNREAD_BYTES_MAX {
            return false;
        }
        self.unread_bytes.fetch_add(bytes, Ordering::SeqCst);
        let _ = self.events.send((Instant::now(), event)); // fails if the job was dropped
        true
    }
}

impl Receiver {
    /// Waits for the next event, until `until`. Returns it with the time at which the connection's thread received it.
    pub(super) fn receive(&self, until: Instant) -> Result<(Instant, JobEvent), RecvTimeoutError> {
        let (at, event) = self.events.recv_deadline(until)?;
        self.unread_bytes.fetch_sub(bytes_in(&event), Ordering::SeqCst);
        Ok((at, event))
    }
}

fn bytes_in(event: &JobEvent) -> usize {
    match event {
        JobEvent::Chunk(bytes) => bytes.len(),
        JobEvent::Done(_) | JobEvent::Failed { .. } => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_is_bounded_in_bytes_and_ends_after_its_last_event() {
        let (sender, receiver) = channel();
        assert!(sender.send(JobEvent::Chunk(vec![0; UNREAD_BYTES_MAX])));
        assert!(!sender.send(JobEvent::Chunk(vec![0])));
        assert!(sender.send(JobEvent::Done(Default::default())));
        let now = Instant::now();
        assert!(matches!(receiver.receive(now), Ok((_, JobEvent::Chunk(_)))));
        assert!(sender.send(JobEvent::Chunk(vec![0])));
        assert!(matches!(receiver.receive(now), Ok((_, JobEvent::Done(_)))));
        assert!(matches!(receiver.receive(now), Ok((_, JobEvent::Chunk(_)))));
        assert!(matches!(receiver.receive(now), Err(RecvTimeoutError::Timeout)));
        drop(sender);
        assert!(matches!(receiver.receive(now), Err(RecvTimeoutError::Disconnected)));
    }
}
