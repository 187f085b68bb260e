//! What the housekeeping thread sleeps on: a socket, because another process can ring that too, and no thread has to listen
//! for it.
//!
//! Invariants: ringing never waits; every ring is followed by a return from [`WakeSocket::wait`], though several may share one. A
//! ring says only that there is something to look at, never what, so whoever may ring cannot do harm by it.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sys::files;

/// What a ring from outside carries; one from within is empty.
const EXTERNAL_WAKE: &[u8] = b"!";

/// The end that sleeps.
pub struct WakeSocket {
    socket: UnixDatagram,
    waker: Waker,
    path: Option<PathBuf>,
}

/// Rings from within the process.
#[derive(Clone)]
pub struct Waker(Arc<UnixDatagram>);

/// Why a wait was over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wakeup {
    /// Somebody in this process rang.
    Internal,
    /// Another process did.
    External,
    /// The time had come, or there was no reason at all.
    Timeout,
}

impl WakeSocket {
    /// A bell that other processes of this user can ring, at a path that is this process's to use.
    ///
    /// # Errors
    /// There can be no socket: the path is too long (some 100 bytes), or its folder cannot be written.
    pub fn at(path: &Path) -> io::Result<WakeSocket> {
        // One that a killed agent left behind would be in the way.
        files::remove_marker(path)?;
        let socket = UnixDatagram::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        let waker = UnixDatagram::unbound()?;
        waker.connect(path)?;
        WakeSocket::new(socket, waker, Some(path.to_owned()))
    }

    /// A bell that only this process can ring.
    ///
    /// # Errors
    /// The system refused a socket.
    pub fn private() -> io::Result<WakeSocket> {
        let (socket, waker) = UnixDatagram::pair()?;
        WakeSocket::new(socket, waker, None)
    }

    fn new(socket: UnixDatagram, waker: UnixDatagram, path: Option<PathBuf>) -> io::Result<WakeSocket> {
        waker.set_nonblocking(true)?;
        Ok(WakeSocket { socket, waker: Waker(Arc::new(waker)), path })
    }

    /// Another handle to ring by.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Sleeps until somebody rings, or has rung since the last time, or `until`.
    pub fn wait(&self, until: Option<Instant>) -> Wakeup {
        // A timeout of nothing would be none at all.
        let left = until.map(|at| at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
        if self.socket.set_read_timeout(left).is_err() {
            return Wakeup::Timeout;
        }
        match self.socket.recv(&mut [0]) {
            Ok(0) => Wakeup::Internal,
            Ok(_) => Wakeup::External,
            Err(_) => Wakeup::Timeout,
        }
    }
}

impl Drop for WakeSocket {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Waker {
    /// Wakes the sleeper, or keeps it from its next sleep. When the socket is full, enough rings are on their way.
    pub fn wake(&self) {
        let _ = self.0.send(&[]);
    }
}

/// Rings the bell of another process; false when there is none.
pub fn wake_process(path: &Path) -> bool {
    let ring = || {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.send_to(EXTERNAL_WAKE, path)
    };
    match ring() {
        Ok(_) => true,
        Err(e) => e.kind() == io::ErrorKind::WouldBlock,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_heard_from_both_sides_and_a_full_bell_is_rung_all_the_same() {
        let path = std::env::temp_dir().join(format!("usepod-bell-{}", std::process::id()));
        assert!(!wake_process(&path));
        std::fs::write(&path, "left behind").expect("a file");
        let wake_socket = WakeSocket::at(&path).expect("a socket");
        assert!(wake_process(&path));
        assert_eq!(wake_socket.wait(None), Wakeup::External);
        wake_socket.waker().wake();
        assert_eq!(wake_socket.wait(None), Wakeup::Internal);
        assert_eq!(wake_socket.wait(Some(Instant::now())), Wakeup::Timeout);
        (0..5000).for_each(|_| wake_socket.waker().wake());
        assert!(wake_process(&path) && wake_socket.wait(None) == Wakeup::Internal);
        drop(wake_socket);
        assert!(!path.exists() && !wake_process(&path));
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_an_error() {
        assert!(WakeSocket::at(&std::env::temp_dir().join("x".repeat(200))).is_err());
        let wake_socket = WakeSocket::private().expect("sockets");
        wake_socket.waker().wake();
        assert_eq!(wake_socket.wait(None), Wakeup::Internal);
    }
}
