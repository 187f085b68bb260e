//! Channels into a thread that sleeps while all of them are empty.
//!
//! `crossbeam_channel::select!` can wait for several channels, but its sender wakes the receiver while holding a lock that
//! the receiver needs first. On one core, that costs two wake-ups and four context switches per message. Here, a sender
//! queues its message and then unparks the receiver, which checks its channels before it parks: one wake-up and 2.5 context
//! switches.
//!
//! Invariant: after every unpark the receiver checks its channels again. [`Thread::unpark`] on a running thread makes its
//! next park return at once, so no wake-up is lost.

use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::Instant;

use crossbeam_channel::{SendError, Sender};

/// Parks the receiving thread, and wakes it.
#[derive(Clone, Default)]
pub struct Parker(Arc<OnceLock<Thread>>);

impl Parker {
    /// Sets the thread to wake, and wakes it once for messages that are already queued. Called once, by the thread that
    /// queued those messages.
    pub fn attach(&self, receiver: &Thread) {
        let _ = self.0.set(receiver.clone());
        self.unpark();
    }

    /// Wakes the receiver, or makes its next park return at once.
    fn unpark(&self) {
        if let Some(receiver) = self.0.get() {
            receiver.unpark();
        }
    }

    /// Parks until a sender unparks the thread, or until `until`. For the attached thread only; may return spuriously.
    pub fn park_until(until: Instant) {
        thread::park_timeout(until.saturating_duration_since(Instant::now()));
    }
}

/// A sender that unparks the receiver after each message, and when it is dropped.
pub struct WakingSender<T> {
    // Dropped before the parker, so that a receiver woken by the last drop finds the channel disconnected.
    channel: Sender<T>,
    parker: WakeOnDrop,
}

impl<T> WakingSender<T> {
    /// Wraps the sender of a channel whose receiving thread parks on `parker`.
    pub fn new(channel: Sender<T>, parker: &Parker) -> WakingSender<T> {
        WakingSender { channel, parker: WakeOnDrop(parker.clone()) }
    }

    /// Queues the message; blocks while the channel is full.
    ///
    /// # Errors
    /// The receiver was dropped.
    pub fn send(&self, message: T) -> Result<(), SendError<T>> {
        self.send_with(|channel| channel.send(message))
    }

    /// Queues a message by calling `send`, which may also wait for other events.
    ///
    /// # Errors
    /// The errors of `send`.
    pub fn send_with<E>(&self, send: impl FnOnce(&Sender<T>) -> Result<(), E>) -> Result<(), E> {
        send(&self.channel)?;
        self.parker.0.unpark();
        Ok(())
    }

    /// Number of messages in the channel.
    pub(super) fn len(&self) -> usize {
        self.channel.len()
    }
}

impl<T> Clone for WakingSender<T> {
    fn clone(&self) -> Self {
        WakingSender { channel: self.channel.clone(), parker: WakeOnDrop(self.parker.0.clone()) }
    }
}

struct WakeOnDrop(Parker);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        self.0.unpark();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crossbeam_channel::{TryRecvError, bounded, select};

    use super::*;

    /// After a lost wake-up the receiver would sleep for an hour.
    #[test]
    fn waking_sender_loses_no_wake_up_while_the_channel_is_full() {
        const SENDERS: u32 = 6;
        const MESSAGES: u32 = 5000;
        let parker = Parker::default();
        let (sender, receiver) = bounded(2);
        let sender = WakingSender::new(sender, &parker);
        let receiving = thread::spawn(move || {
            let mut received = 0;
            loop {
                match receiver.try_recv() {
                    Ok(()) => received += 1,
                    Err(TryRecvError::Empty) => Parker::park_until(Instant::now() + Duration::from_secs(3600)),
                    Err(TryRecvError::Disconnected) => return received,
                }
            }
        });
        parker.attach(receiving.thread());
        let send = move || {
            for _ in 0..MESSAGES {
                let send = |channel: &Sender<()>| {
                    select! {
                        send(channel, ()) -> sent => sent,
                    }
                };
                sender.send_with(send).expect("a receiver");
            }
        };
        let senders: Vec<_> = (0..SENDERS).map(|_| thread::spawn(send.clone())).collect();
        senders.into_iter().for_each(|sender| sender.join().expect("a sender"));
        drop(send);
        assert_eq!(receiving.join().expect("the receiving thread"), SENDERS * MESSAGES);
    }
}
