//! What the agent's threads note about how the agent is, for whoever asks.
//!
//! Invariant: to note something never waits for a disk; the housekeeping thread is rung, and writes it down.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::instance::wake_socket::Ringer;

/// The notes.
pub struct Board {
    notes: Mutex<Notes>,
    ringer: Ringer,
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

struct Notes {
    connection: Connection,
    connection_since: SystemTime,
    provider_id: Option<String>,
    in_flight: InFlight,
    is_draining: bool,
    is_throttled: bool,
    /// Since it was last asked.
    has_news: bool,
    shows_life: bool,
}

/// The notes at one moment.
pub struct Noted {
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

impl Board {
    /// Of an agent that has just started; `ringer` wakes who keeps the state file.
    pub fn new(provider_id: Option<&str>, ringer: Ringer) -> Board {
        let notes = Notes {
            connection: Connection::Connecting(None),
            connection_since: SystemTime::now(),
            provider_id: provider_id.map(str::to_owned),
            in_flight: Box::new(|| 0),
            is_draining: false,
            is_throttled: false,
            has_news: true,
            shows_life: true,
        };
        Board { notes: Mutex::new(notes), ringer }
    }

    /// There is no connection, or none any more, for this reason. To be called for each attempt that fails.
    pub fn not_connected(&self, why: Connection) {
        self.note(|notes| {
            if notes.connection == Connection::Connected {
                notes.connection_since = SystemTime::now();
                notes.in_flight = Box::new(|| 0);
            }
            notes.connection = why;
            notes.shows_life = true;
        });
    }

    /// The coordinator has let us in.
    pub fn connected(&self, provider_id: Option<&str>) {
        self.note(|notes| {
            notes.connection = Connection::Connected;
            notes.connection_since = SystemTime::now();
            notes.provider_id = provider_id.map(str::to_owned);
        });
    }

    /// Who knows the jobs in flight from here on.
    pub fn count_jobs_by(&self, in_flight: impl Fn() -> u32 + Send + 'static) {
        self.notes().in_flight = Box::new(in_flight);
    }

    /// The agent was told to stop.
    pub fn draining(&self) {
        self.note(|notes| notes.is_draining = true);
    }

    /// The agent does its work: it has heard from the coordinator, or tries to reach it. So it does when it fails to.
    pub fn shows_life(&self) {
        self.note(|notes| notes.shows_life = true);
    }

    /// The token limit refuses jobs. Told as often as it does, it is news once.
    pub fn throttled(&self) {
        if !std::mem::replace(&mut self.notes().is_throttled, true) {
            self.note(|_| ());
        }
    }

    /// The token limit was seen to refuse nothing.
    pub fn not_throttled(&self) {
        self.notes().is_throttled = false;
    }

    /// It is time to write things down again.
    pub fn remind(&self) {
        self.note(|_| ());
    }

    /// Whether there is anything new since this was asked last, and whether the agent has shown life since.
    pub fn take_news(&self) -> (bool, bool) {
        let notes = &mut *self.notes();
        (std::mem::take(&mut notes.has_news), std::mem::take(&mut notes.shows_life))
    }

    /// How it is now.
    pub fn noted(&self) -> Noted {
        let notes = self.notes();
        Noted {
            connection: notes.connection.clone(),
            connection_since: notes.connection_since,
            provider_id: notes.provider_id.clone(),
            in_flight: (notes.in_flight)(),
            is_draining: notes.is_draining,
        }
    }

    fn note(&self, change: impl FnOnce(&mut Notes)) {
        let mut notes = self.notes();
        change(&mut notes);
        notes.has_news = true;
        drop(notes);
        self.ringer.ring();
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::wake_socket::Bell;

    /// The longest delay between two attempts comes after one that may have taken half a minute.
    #[test]
    fn an_attempt_that_fails_is_a_sign_of_life() {
        let board = Board::new(None, Bell::private().expect("sockets").ringer());
        assert_eq!(board.take_news(), (true, true));
        board.remind();
        assert_eq!(board.take_news(), (true, false));
        board.not_connected(Connection::Connecting(None));
        assert_eq!(board.take_news(), (true, true));
    }
}
