//! Channels into a thread that sleeps while all of them are empty.
//!
//! crossbeam can wait for several channels by itself, but a sender then wakes the sleeper while it holds a lock that the sleeper
//! needs first of all: with one core for both, that is two wake-ups and four context switches for an event. Here a sender
//! queues, then rings; the sleeper looks, then sleeps: one and two and a half.
//!
//! Invariant: every ring is followed by a look. A ring while nobody sleeps is remembered for the next sleep, as
//! [`Thread::unpark`] does it.

use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::Instant;

use crossbeam_channel::{SendError, Sender};

/// What a thread sleeps on.
#[derive(Clone, Default)]
pub struct Parker(Arc<OnceLock<Thread>>);

impl Parker {
    /// From here on rings wake `sleeper`, which also looks for what was queued before. Called once, by the thread that queued
    /// what was queued so far.
    pub fn attach(&self, sleeper: &Thread) {
        let _ = self.0.set(sleeper.clone());
        self.unpark();
    }

    /// Wakes the sleeper, or keeps it from its next sleep.
    fn unpark(&self) {
        if let Some(sleeper) = self.0.get() {
            sleeper.unpark();
        }
    }

    /// Sleeps until somebody rings, or has rung since the last time, or `until`. Only for the thread that answers; it may also
    /// return for no reason.
    pub fn park_until(until: Instant) {
        thread::park_timeout(until.saturating_duration_since(Instant::now()));
    }
}

/// A sender that rings. Dropping the last one of a channel rings too.
pub struct WakingSender<T> {
    // The order counts: a sleeper that is woken finds the channel disconnected.
    channel: Sender<T>,
    parker: WakeOnDrop,
}

impl<T> WakingSender<T> {
    /// Of a channel whose receiver's thread answers `bell`.
    pub fn new(channel: Sender<T>, parker: &Parker) -> WakingSender<T> {
        WakingSender { channel, parker: WakeOnDrop(parker.clone()) }
    }

    /// Queues, waiting for room.
    ///
    /// # Errors
    /// The receiver is gone.
    pub fn send(&self, message: T) -> Result<(), SendError<T>> {
        self.send_with(|channel| channel.send(message))
    }

    /// Queues by `send`, which may wait for more than room.
    ///
    /// # Errors
    /// Those of `send`.
    pub fn send_with<E>(&self, send: impl FnOnce(&Sender<T>) -> Result<(), E>) -> Result<(), E> {
        send(&self.channel)?;
        self.parker.0.unpark();
        Ok(())
    }

    /// Messages that wait.
    pub fn waiting(&self) -> usize {
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

    /// Were one lost, the sleeper would not wake before the hour is over.
    #[test]
    fn no_ring_is_lost_however_full_the_channel_is() {
        const SENDERS: u32 = 6;
        const MESSAGES: u32 = 5000;
        let parker = Parker::default();
        let (sender, inbox) = bounded(2);
        let inlet = WakingSender::new(sender, &parker);
        let sleeper = thread::spawn(move || {
            let mut received = 0;
            loop {
                match inbox.try_recv() {
                    Ok(()) => received += 1,
                    Err(TryRecvError::Empty) => Parker::park_until(Instant::now() + Duration::from_secs(3600)),
                    Err(TryRecvError::Disconnected) => return received,
                }
            }
        });
        parker.attach(sleeper.thread());
        let send = move || {
            for _ in 0..MESSAGES {
                let send = |channel: &Sender<()>| {
                    select! {
                        send(channel, ()) -> sent => sent,
                    }
                };
                inlet.send_with(send).expect("a receiver");
            }
        };
        let senders: Vec<_> = (0..SENDERS).map(|_| thread::spawn(send.clone())).collect();
        senders.into_iter().for_each(|sender| sender.join().expect("a sender"));
        drop(send);
        assert_eq!(sleeper.join().expect("the sleeper"), SENDERS * MESSAGES);
    }
}
