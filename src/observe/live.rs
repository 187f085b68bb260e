//! What the agent's threads note about how the agent is, for whoever asks.
//!
//! Invariant: to note something never waits for a disk; the housekeeping thread is rung, and writes it down.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::instance::wake_socket::Waker;

/// The notes.
pub struct LiveState {
    inner: Mutex<Inner>,
    waker: Waker,
}

/// How the link to the coordinator is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// There is none, after this error, if there was one.
    Connecting(Option<String>),
    /// The coordinator does not want this agent, for this reason.
    Rejected(String),
    /// It is there.
    Connected,
}

/// Jobs in flight, as its session knows it.
type InFlight = Box<dyn Fn() -> u32 + Send>;

struct Inner {
    connection: Connection,
    connection_since: SystemTime,
    provider_id: Option<String>,
    in_flight: InFlight,
    is_draining: bool,
    is_throttled: bool,
    /// Since it was last asked.
    has_changed: bool,
    is_alive: bool,
}

/// The notes at one moment.
pub struct Snapshot {
    /// The link.
    pub connection: Connection,
    /// Since when there is a link, or none.
    pub connection_since: SystemTime,
    /// Who the coordinator says we are.
    pub provider_id: Option<String>,
    /// Jobs in flight.
    pub in_flight: u32,
    /// The agent was told to stop.
    pub is_draining: bool,
}

impl LiveState {
    /// Of an agent that has just started; `ringer` wakes who keeps the state file.
    pub fn new(provider_id: Option<&str>, waker: Waker) -> LiveState {
        let notes = Inner {
            connection: Connection::Connecting(None),
            connection_since: SystemTime::now(),
            provider_id: provider_id.map(str::to_owned),
            in_flight: Box::new(|| 0),
            is_draining: false,
            is_throttled: false,
            has_changed: true,
            is_alive: true,
        };
        LiveState { inner: Mutex::new(notes), waker }
    }

    /// There is no connection, or none any more, for this reason. To be called for each attempt that fails.
    pub fn not_connected(&self, why: Connection) {
        self.update(|notes| {
            if notes.connection == Connection::Connected {
                notes.connection_since = SystemTime::now();
                notes.in_flight = Box::new(|| 0);
            }
            notes.connection = why;
            notes.is_alive = true;
        });
    }

    /// The coordinator has let us in.
    pub fn connected(&self, provider_id: Option<&str>) {
        self.update(|notes| {
            notes.connection = Connection::Connected;
            notes.connection_since = SystemTime::now();
            notes.provider_id = provider_id.map(str::to_owned);
        });
    }

    /// Who knows the jobs in flight from here on.
    pub fn set_in_flight_source(&self, in_flight: impl Fn() -> u32 + Send + 'static) {
        self.lock().in_flight = Box::new(in_flight);
    }

    /// The agent was told to stop.
    pub fn draining(&self) {
        self.update(|notes| notes.is_draining = true);
    }

    /// The agent does its work: it has heard from the coordinator, or tries to reach it. So it does when it fails to.
    pub fn mark_alive(&self) {
        self.update(|notes| notes.is_alive = true);
    }

    /// The token limit refuses jobs. Told as often as it does, it is news once.
    pub fn throttled(&self) {
        if !std::mem::replace(&mut self.lock().is_throttled, true) {
            self.update(|_| ());
        }
    }

    /// The token limit was seen to refuse nothing.
    pub fn not_throttled(&self) {
        self.lock().is_throttled = false;
    }

    /// It is time to write things down again.
    pub fn mark_changed(&self) {
        self.update(|_| ());
    }

    /// Whether there is anything new since this was asked last, and whether the agent has shown life since.
    pub fn take_changes(&self) -> (bool, bool) {
        let notes = &mut *self.lock();
        (std::mem::take(&mut notes.has_changed), std::mem::take(&mut notes.is_alive))
    }

    /// How it is now.
    pub fn snapshot(&self) -> Snapshot {
        let notes = self.lock();
        Snapshot {
            connection: notes.connection.clone(),
            connection_since: notes.connection_since,
            provider_id: notes.provider_id.clone(),
            in_flight: (notes.in_flight)(),
            is_draining: notes.is_draining,
        }
    }

    fn update(&self, change: impl FnOnce(&mut Inner)) {
        let mut notes = self.lock();
        change(&mut notes);
        notes.has_changed = true;
        drop(notes);
        self.waker.wake();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::wake_socket::WakeSocket;

    /// The longest delay between two attempts comes after one that may have taken half a minute.
    #[test]
    fn an_attempt_that_fails_is_a_sign_of_life() {
        let live = LiveState::new(None, WakeSocket::private().expect("sockets").waker());
        assert_eq!(live.take_changes(), (true, true));
        live.mark_changed();
        assert_eq!(live.take_changes(), (true, false));
        live.not_connected(Connection::Connecting(None));
        assert_eq!(live.take_changes(), (true, true));
    }
}
