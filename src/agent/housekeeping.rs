//! The housekeeping thread: sleeps on the wake socket, runs probe rounds, records liveness in the lock file and for
//! systemd's watchdog, applies the operator's pause, writes the state file, and returns freed memory to the system.
//!
//! Invariants: the thread blocks only on the wake socket and on writing its files; no thread that serves jobs waits for it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};

use crate::discovery::{BackendStatus, OfferFeed, ProbeRounds};
use crate::instance::wake_socket::{WakeSocket, Wakeup};
use crate::instance::{AgentPaths, InstanceLock};
use crate::observe::{LiveState, StateFileWriter};
use crate::sys::{malloc, sd_notify, threads};

/// Minimum time between two returns of freed memory.
const TRIM_INTERVAL: Duration = Duration::from_secs(15);

/// The files through which other processes observe and control the agent.
pub struct InstanceFiles {
    /// The paths of the files.
    pub paths: AgentPaths,
    /// Records the agent's liveness.
    pub lock: Arc<InstanceLock>,
    /// Writes the state file.
    pub state_file: StateFileWriter,
    /// The state of the agent, which records its changes.
    pub live: Arc<LiveState>,
    /// The offer; empty while the agent is paused.
    pub offers: Arc<OfferFeed>,
}

/// Starts the thread. The thread ends when the last [`Prober`](crate::discovery::Prober) is dropped, after it has written the state
/// file for the last time; the returned channel then disconnects.
///
/// # Errors
/// The system refused a thread.
pub fn spawn(wake_socket: WakeSocket, rounds: ProbeRounds, files: Option<InstanceFiles>) -> io::Result<Receiver<()>> {
    let housekeeping = Housekeeping { wake_socket, rounds, files, last_trim: Instant::now() };
    let (ended_sender, ended) = bounded(0);
    threads::spawn("housekeeping", move || {
        housekeeping.run();
        drop(ended_sender);
    })?;
    Ok(ended)
}

struct Housekeeping {
    /// Dropped before the lock in `files`, so that it does not remove the socket of the next agent.
    wake_socket: WakeSocket,
    rounds: ProbeRounds,
    files: Option<InstanceFiles>,
    last_trim: Instant,
}

impl Housekeeping {
    fn run(mut self) {
        loop {
            let answer = || self.files.as_ref().map_or_else(String::new, |files| files.lock.answer());
            let wakeup = self.wake_socket.wait(self.rounds.next_wakeup(), answer);
            let Some(has_changed) = self.rounds.poll() else { break };
            if let Some(files) = &mut self.files {
                files.update(has_changed || wakeup == Wakeup::External, self.rounds.backends());
            }
            if self.last_trim.elapsed() >= TRIM_INTERVAL {
                self.last_trim = Instant::now();
                malloc::trim_if_requested();
            }
        }
        // The last jobs have ended since the last heartbeat.
        if let Some(files) = &mut self.files {
            files.state_file.write(self.rounds.backends());
        }
    }
}

impl InstanceFiles {
    /// Updates the files. Writes the state file if the state has changed or `must_write` is set.
    fn update(&mut self, must_write: bool, backends: &[BackendStatus]) {
        let pause_changed = self.apply_pause_marker();
        let (has_changed, is_alive) = self.live.take_changes();
        if is_alive {
            // First, because the disk may hang.
            sd_notify::notify(sd_notify::WATCHDOG);
            self.lock.record_liveness();
        }
        if must_write || has_changed || pause_changed {
            self.state_file.write(backends);
        }
    }

    /// Empties or restores the offer, depending on the operator's pause marker. Returns whether the offer has changed. If the marker
    /// cannot be checked, nothing changes.
    pub fn apply_pause_marker(&self) -> bool {
        let Ok(paused) = self.paths.paused().try_exists() else { return false };
        let is_change = self.offers.set_paused(paused);
        if is_change {
            log::info!("{}", if paused { "paused by the operator" } else { "no longer paused" });
        }
        is_change
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Price, Pricing};
    use crate::discovery::{OfferTerms, Prober};
    use crate::instance::identity::Identity;
    use crate::observe::Sources;

    #[test]
    fn wake_socket_is_removed_before_the_lock_is_released() {
        let folder = std::env::temp_dir().join(format!("usepod-housekeeping-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let paths = AgentPaths::beside(&folder.join("identity.key"));
        let identity = Identity::ephemeral().expect("randomness");
        let offers = Arc::new(OfferFeed::default());
        let price = Price { input_per_1m: 1, output_per_1m: 1 };
        let terms = OfferTerms { pricing: Pricing { default: price, models: Default::default() }, max_concurrent: 1 };
        for _ in 0..20 {
            let wake_socket = WakeSocket::at(&paths.wake()).expect("a socket");
            let lock = Arc::new(InstanceLock::acquire(&paths).expect("the lock"));
            let live = Arc::new(LiveState::new(None, wake_socket.waker()));
            let sources = Sources {
                live: live.clone(),
                offers: offers.clone(),
                stats: Arc::default(),
                token_limit: Arc::default(),
            };
            let state_file = StateFileWriter::new(paths.state(), &identity, String::new(), sources);
            let files = InstanceFiles { paths: paths.clone(), lock, state_file, live, offers: offers.clone() };
            let waker = wake_socket.waker();
            let (prober, rounds) = Prober::new(Vec::new(), terms.clone(), offers.clone(), move || waker.wake());
            spawn(wake_socket, rounds, Some(files)).expect("a thread");
            assert!(InstanceLock::acquire(&paths).is_err());
            drop(prober);
            let deadline = Instant::now() + Duration::from_secs(10);
            while InstanceLock::acquire(&paths).is_err() {
                assert!(Instant::now() < deadline, "the thread has not ended");
            }
            assert!(!paths.wake().exists());
        }
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}
