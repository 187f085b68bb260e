//! The events of a job, in a queue that is bounded in bytes instead of events.
//!
//! Threads: the connection's thread sends without waiting; the thread that submitted the job receives.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::agent_protocol::JobEnd;

/// Limit of queued bytes per job. A job that exceeds it is cancelled, so that it does not block others.
const UNREAD_BYTES_MAX: usize = 64 * 1024 * 1024;

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
}

/// The receiving end.
pub(super) struct Receiver(Arc<Shared>);

/// The sending end. Dropping it ends the queue after its last event.
pub(super) struct Sender(Arc<Shared>);

/// The result of a wait.
pub(super) enum Received {
    /// With the time at which the connection's thread received it.
    Event(Instant, JobEvent),
    Timeout,
    Disconnected,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<(Instant, JobEvent)>,
    unread_bytes: usize,
    ended: bool,
}

pub(super) fn channel() -> (Sender, Receiver) {
    let shared = Arc::new(Shared::default());
    (Sender(shared.clone()), Receiver(shared))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sender {
    /// Adds an event. Returns `false` if it exceeds the limit.
    pub(super) fn send(&self, event: JobEvent) -> bool {
        let mut queue = self.0.lock();
        let unread_bytes = queue.unread_bytes + bytes_in(&event);
        if unread_bytes > UNREAD_BYTES_MAX {
            return false;
        }
        queue.unread_bytes = unread_bytes;
        queue.events.push_back((Instant::now(), event));
        self.0.changed.notify_one();
        true
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_one();
    }
}

impl Receiver {
    /// Waits for the next event, until `until`.
    pub(super) fn receive(&self, until: Instant) -> Received {
        let mut queue = self.0.lock();
        loop {
            if let Some((at, event)) = queue.events.pop_front() {
                queue.unread_bytes -= bytes_in(&event);
                return Received::Event(at, event);
            }
            let left = until.saturating_duration_since(Instant::now());
            if queue.ended {
                return Received::Disconnected;
            } else if left.is_zero() {
                return Received::Timeout;
            }
            queue = self.0.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
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
        assert!(matches!(receiver.receive(now), Received::Event(_, JobEvent::Chunk(_))));
        assert!(sender.send(JobEvent::Chunk(vec![0])));
        assert!(matches!(receiver.receive(now), Received::Event(_, JobEvent::Done(_))));
        assert!(matches!(receiver.receive(now), Received::Event(_, JobEvent::Chunk(_))));
        assert!(matches!(receiver.receive(now), Received::Timeout));
        drop(sender);
        assert!(matches!(receiver.receive(now), Received::Disconnected));
    }
}
