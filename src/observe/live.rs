//! The live state of the agent, updated by its threads and read by the housekeeping thread.
//!
//! Invariant: an update never waits for the disk; it wakes the housekeeping thread, which writes the state file.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::instance::wake_socket::Waker;
use crate::sys::moment::Moment;

/// The live state.
pub struct LiveState {
    inner: Mutex<Inner>,
    waker: Waker,
}

/// The connection to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// Being established; the last error, if any.
    Connecting(Option<String>),
    /// Refused by the coordinator, for this reason.
    Rejected(String),
    /// Established.
    Connected,
}

/// Returns the jobs in flight of the current session.
type InFlight = Box<dyn Fn() -> u32 + Send>;

struct Inner {
    connection: Connection,
    connection_since: Moment,
    provider_id: Option<String>,
    in_flight: InFlight,
    is_draining: bool,
    is_throttled: bool,
    /// Since the last [`LiveState::take_changes`].
    has_changed: bool,
    /// Since the last [`LiveState::take_changes`].
    is_alive: bool,
}

/// The live state at one moment.
pub struct Snapshot {
    /// The connection.
    pub connection: Connection,
    /// When the agent connected or disconnected.
    pub connection_since: Moment,
    /// The id that the coordinator gave the agent.
    pub provider_id: Option<String>,
    /// The jobs in flight.
    pub in_flight: u32,
    /// The agent is stopping.
    pub is_draining: bool,
}

impl LiveState {
    /// The state of an agent that has just started; `waker` wakes the housekeeping thread.
    pub fn new(provider_id: Option<&str>, waker: Waker) -> LiveState {
        let inner = Inner {
            connection: Connection::Connecting(None),
            connection_since: Moment::now(),
            provider_id: provider_id.map(str::to_owned),
            in_flight: Box::new(|| 0),
            is_draining: false,
            is_throttled: false,
            has_changed: true,
            is_alive: true,
        };
        LiveState { inner: Mutex::new(inner), waker }
    }

    /// Records the end of a connection attempt or a session, as described by `connection`. Counts as a sign of life.
    pub fn not_connected(&self, connection: Connection) {
        let change = |inner: &mut Inner| {
            if inner.connection == Connection::Connected {
                inner.connection_since = Moment::now();
                inner.in_flight = Box::new(|| 0);
            }
            inner.connection = connection;
            inner.is_alive = true;
        };
        let mut inner = self.lock();
        if inner.is_draining {
            // The agent ends with the session, and the state file is then written for the last time.
            change(&mut inner);
        } else {
            drop(inner);
            self.update(change);
        }
    }

    /// Records that the coordinator has admitted the agent.
    pub fn connected(&self, provider_id: Option<&str>) {
        self.update(|inner| {
            inner.connection = Connection::Connected;
            inner.connection_since = Moment::now();
            inner.provider_id = provider_id.map(str::to_owned);
        });
    }

    /// Sets the function that returns the jobs in flight.
    pub fn set_in_flight_source(&self, in_flight: impl Fn() -> u32 + Send + 'static) {
        self.lock().in_flight = Box::new(in_flight);
    }

    /// Records that the agent is stopping.
    pub fn draining(&self) {
        self.update(|inner| inner.is_draining = true);
    }

    /// Records a sign of life: data has arrived from the coordinator, or the agent tries to connect.
    pub fn mark_alive(&self) {
        self.update(|inner| inner.is_alive = true);
    }

    /// Records that the token limit rejects jobs. Only the first call after [`LiveState::not_throttled`] counts as a change.
    pub fn throttled(&self) {
        if !std::mem::replace(&mut self.lock().is_throttled, true) {
            self.update(|_| ());
        }
    }

    /// Records that the token limit no longer rejects jobs.
    pub fn not_throttled(&self) {
        self.lock().is_throttled = false;
    }

    /// Requests that the state file be written again.
    pub fn mark_changed(&self) {
        self.update(|_| ());
    }

    /// Returns whether the state has changed since the last call, and whether there was a sign of life.
    pub fn take_changes(&self) -> (bool, bool) {
        let inner = &mut *self.lock();
        (std::mem::take(&mut inner.has_changed), std::mem::take(&mut inner.is_alive))
    }

    /// The current state.
    pub fn snapshot(&self) -> Snapshot {
        let inner = self.lock();
        Snapshot {
            connection: inner.connection.clone(),
            connection_since: inner.connection_since,
            provider_id: inner.provider_id.clone(),
            in_flight: (inner.in_flight)(),
            is_draining: inner.is_draining,
        }
    }

    fn update(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = self.lock();
        change(&mut inner);
        inner.has_changed = true;
        drop(inner);
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

    /// The longest delay between two attempts may follow an attempt that took half a minute.
    #[test]
    fn failed_attempt_is_a_sign_of_life() {
        let live = LiveState::new(None, WakeSocket::private().expect("sockets").waker());
        assert_eq!(live.take_changes(), (true, true));
        live.mark_changed();
        assert_eq!(live.take_changes(), (true, false));
        live.not_connected(Connection::Connecting(None));
        assert_eq!(live.take_changes(), (true, true));
    }
}
