//! The request to stop the agent, and the activity that the request interrupts.
//!
//! [`Stop::request`] may be called from any thread, including the signal handler's, and never blocks. The first request stops the
//! agent when the jobs in flight are done, the second immediately.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::sys::{sd_notify, threads};

/// The request to stop, shared by the threads that request it and the threads that act on it.
pub struct Stop {
    requests: AtomicU32,
    /// Disconnects at the first request.
    signal: Receiver<()>,
    state: Mutex<State>,
}

struct State {
    signal: Option<Sender<()>>,
    active: ActiveState,
}

/// The activity that a stop request must interrupt.
pub enum ActiveState {
    /// No activity, or a wait that ends with [`Stop::signal`].
    Nothing,
    /// A handshake that blocks on this socket.
    Handshake(TcpStream),
    /// A session, which is drained.
    Session(Arc<dyn GracefulStop>),
}

/// An activity that can end gracefully.
pub trait GracefulStop: Send + Sync {
    /// Waits for the work in flight, then ends; ends immediately once `is_forced` returns true. Blocks the caller.
    fn drain(&self, is_forced: &dyn Fn() -> bool);

    /// Ends immediately.
    fn abort(&self);
}

impl Default for Stop {
    fn default() -> Self {
        let (sender, signal) = bounded(0);
        let state = Mutex::new(State { signal: Some(sender), active: ActiveState::Nothing });
        Stop { requests: AtomicU32::new(0), signal, state }
    }
}

impl Stop {
    /// Requests a stop. The first request takes effect when the jobs in flight are done, the second immediately.
    pub fn request(self: &Arc<Self>) {
        // Counted under the lock, so that either this call or `set_active` interrupts a session, not both.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.requests.fetch_add(1, Ordering::SeqCst) == 0 {
            drop(state.signal.take());
            sd_notify::notify(sd_notify::STOPPING);
            self.interrupt(&state.active);
        }
    }

    /// Whether a stop was requested at least once.
    pub fn is_requested(&self) -> bool {
        self.requests.load(Ordering::SeqCst) > 0
    }

    /// Whether a stop was requested a second time.
    pub fn is_forced(&self) -> bool {
        self.requests.load(Ordering::SeqCst) > 1
    }

    /// Disconnects at the first request.
    pub fn signal(&self) -> &Receiver<()> {
        &self.signal
    }

    /// Sets the activity that a stop request must interrupt. If a stop was already requested, interrupts the activity at once.
    pub fn set_active(self: &Arc<Self>, active: ActiveState) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_requested() {
            self.interrupt(&active);
        }
        state.active = active;
    }

    fn interrupt(self: &Arc<Self>, active: &ActiveState) {
        match active {
            ActiveState::Nothing => {}
            ActiveState::Handshake(tcp) => {
                let _ = tcp.shutdown(Shutdown::Both);
            }
            ActiveState::Session(session) => {
                let (session, stop) = (session.clone(), self.clone());
                let for_thread = session.clone();
                if let Err(e) = threads::spawn("drain", move || for_thread.drain(&|| stop.is_forced())) {
                    log::error!("failed to start the drain thread: {e}; aborting the jobs in flight");
                    session.abort();
                }
            }
        }
    }
}
