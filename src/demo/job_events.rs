//! The events of one job on their way to whoever waits for them: a queue that is bounded in bytes, not in events.
//!
//! Who runs here: the connection's thread sends and never waits; the job's taker receives. The lock is held for the queue
//! alone.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::agent_protocol::JobEnd;

/// Bytes that may wait for a slow taker of one job; a job beyond it is given up, so that the others go on.
const UNREAD_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What the agent says about a job.
#[derive(Debug, Clone, PartialEq)]
pub enum JobEvent {
    /// Bytes of the backend's answer.
    Chunk(Vec<u8>),
    /// The job is complete.
    Done(JobEnd),
    /// The job has failed, with a code of the protocol.
    Failed {
        /// The protocol's error code.
        code: String,
        /// What the agent says about it.
        message: String,
    },
}

impl JobEvent {
    pub(super) fn failed(code: &str, message: &str) -> Self {
        Self::Failed { code: code.to_owned(), message: message.to_owned() }
    }
}

/// The receiving end.
pub(super) struct Inbox(Arc<Shared>);

/// The connection's end. Dropped, it ends the queue after what is in it.
pub(super) struct Sender(Arc<Shared>);

/// What came of a wait.
pub(super) enum Received {
    /// With the moment at which the connection's thread had it.
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

pub(super) fn channel() -> (Sender, Inbox) {
    let shared = Arc::new(Shared::default());
    (Sender(shared.clone()), Inbox(shared))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sender {
    /// Adds an event; `false` when there is no room for its bytes.
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

impl Inbox {
    /// Takes the next event, waiting for it until `until`.
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
    fn the_bytes_are_bounded_and_the_end_comes_last() {
        let (sender, inbox) = channel();
        assert!(sender.send(JobEvent::Chunk(vec![0; UNREAD_BYTES_MAX])));
        assert!(!sender.send(JobEvent::Chunk(vec![0])));
        assert!(sender.send(JobEvent::Done(Default::default())));
        let now = Instant::now();
        assert!(matches!(inbox.receive(now), Received::Event(_, JobEvent::Chunk(_))));
        assert!(sender.send(JobEvent::Chunk(vec![0])));
        assert!(matches!(inbox.receive(now), Received::Event(_, JobEvent::Done(_))));
        assert!(matches!(inbox.receive(now), Received::Event(_, JobEvent::Chunk(_))));
        assert!(matches!(inbox.receive(now), Received::Timeout));
        drop(sender);
        assert!(matches!(inbox.receive(now), Received::Disconnected));
    }
}
