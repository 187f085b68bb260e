//! How the agent is told to stop, and who is woken by it.
//!
//! [`Stop::request`] may be called from any thread, a signal's among them, and never blocks: a first time to stop when
//! the jobs in flight are done, a second time to stop now.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::sys::threads;

/// The request to stop, shared by those who make it and those who heed it.
pub struct Stop {
    requests: AtomicU32,
    /// Disconnects at the first request.
    signal: Receiver<()>,
    state: Mutex<State>,
}

struct State {
    signal: Option<Sender<()>>,
    live: ActiveState,
}

/// What has to be woken.
pub enum ActiveState {
    /// Nothing, or only a wait that heeds the signal.
    Nothing,
    /// A handshake, blocked in this socket.
    Handshake(TcpStream),
    /// A session, which ends in order.
    Session(Arc<dyn GracefulStop>),
}

/// What can end in order.
pub trait GracefulStop: Send + Sync {
    /// Finishes what is in flight, then ends; at once when `urgent` says so. Blocks meanwhile.
    fn drain(&self, urgent: &dyn Fn() -> bool);

    /// Ends at once.
    fn abort(&self);
}

impl Default for Stop {
    fn default() -> Self {
        let (sender, signal) = bounded(0);
        let state = Mutex::new(State { signal: Some(sender), live: ActiveState::Nothing });
        Stop { requests: AtomicU32::new(0), signal, state }
    }
}

impl Stop {
    /// Stop, when the jobs in flight are done; the second time, now.
    pub fn request(self: &Arc<Self>) {
        // Counted under the lock, so that `set_live` and this wake a session once between them.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.requests.fetch_add(1, Ordering::SeqCst) == 0 {
            drop(state.signal.take());
            self.wake(&state.live);
        }
    }

    /// Whether there was a request.
    pub fn is_requested(&self) -> bool {
        self.requests.load(Ordering::SeqCst) > 0
    }

    /// Whether there was a second one.
    pub fn is_forced(&self) -> bool {
        self.requests.load(Ordering::SeqCst) > 1
    }

    /// Disconnects at the first request, for waits.
    pub fn signal(&self) -> &Receiver<()> {
        &self.signal
    }

    /// Says what has to be woken from here on; wakes it at once when the request came first.
    pub fn set_active(self: &Arc<Self>, live: ActiveState) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_requested() {
            self.wake(&live);
        }
        state.live = live;
    }

    fn wake(self: &Arc<Self>, live: &ActiveState) {
        match live {
            ActiveState::Nothing => {}
            ActiveState::Handshake(tcp) => {
                let _ = tcp.shutdown(Shutdown::Both);
            }
            ActiveState::Session(session) => {
                let (session, stop) = (session.clone(), self.clone());
                let for_thread = session.clone();
                if let Err(e) = threads::spawn("drain", move || for_thread.drain(&|| stop.is_forced())) {
                    log::error!("failed to start a thread, so jobs in flight are cut off: {e}");
                    session.abort();
                }
            }
        }
    }
}
