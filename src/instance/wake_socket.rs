//! What the housekeeping thread sleeps on: a socket, because another process can ring that too, and no thread has to listen
//! for it.
//!
//! Invariants: ringing never waits; every ring is followed by a return from [`Bell::wait`], though several may share one. A
//! ring says only that there is something to look at, never what, so whoever may ring cannot do harm by it.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sys::files;

/// What a ring from outside carries; one from within is empty.
const FROM_OUTSIDE: &[u8] = b"!";

/// The end that sleeps.
pub struct Bell {
    socket: UnixDatagram,
    ringer: Ringer,
    path: Option<PathBuf>,
}

/// Rings from within the process.
#[derive(Clone)]
pub struct Ringer(Arc<UnixDatagram>);

/// Why a wait was over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// Somebody in this process rang.
    Within,
    /// Another process did.
    Outside,
    /// The time had come, or there was no reason at all.
    Time,
}

impl Bell {
    /// A bell that other processes of this user can ring, at a path that is this process's to use.
    ///
    /// # Errors
    /// There can be no socket: the path is too long (some 100 bytes), or its folder cannot be written.
    pub fn at(path: &Path) -> io::Result<Bell> {
        // One that a killed agent left behind would be in the way.
        files::unmark(path)?;
        let socket = UnixDatagram::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        let ringer = UnixDatagram::unbound()?;
        ringer.connect(path)?;
        Bell::new(socket, ringer, Some(path.to_owned()))
    }

    /// A bell that only this process can ring.
    ///
    /// # Errors
    /// The system refused a socket.
    pub fn private() -> io::Result<Bell> {
        let (socket, ringer) = UnixDatagram::pair()?;
        Bell::new(socket, ringer, None)
    }

    fn new(socket: UnixDatagram, ringer: UnixDatagram, path: Option<PathBuf>) -> io::Result<Bell> {
        ringer.set_nonblocking(true)?;
        Ok(Bell { socket, ringer: Ringer(Arc::new(ringer)), path })
    }

    /// Another handle to ring by.
    pub fn ringer(&self) -> Ringer {
        self.ringer.clone()
    }

    /// Sleeps until somebody rings, or has rung since the last time, or `until`.
    pub fn wait(&self, until: Option<Instant>) -> Woken {
        // A timeout of nothing would be none at all.
        let left = until.map(|at| at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
        if self.socket.set_read_timeout(left).is_err() {
            return Woken::Time;
        }
        match self.socket.recv(&mut [0]) {
            Ok(0) => Woken::Within,
            Ok(_) => Woken::Outside,
            Err(_) => Woken::Time,
        }
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Ringer {
    /// Wakes the sleeper, or keeps it from its next sleep. When the socket is full, enough rings are on their way.
    pub fn ring(&self) {
        let _ = self.0.send(&[]);
    }
}

/// Rings the bell of another process; false when there is none.
pub fn ring_at(path: &Path) -> bool {
    let ring = || {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.send_to(FROM_OUTSIDE, path)
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
        assert!(!ring_at(&path));
        std::fs::write(&path, "left behind").expect("a file");
        let bell = Bell::at(&path).expect("a socket");
        assert!(ring_at(&path));
        assert_eq!(bell.wait(None), Woken::Outside);
        bell.ringer().ring();
        assert_eq!(bell.wait(None), Woken::Within);
        assert_eq!(bell.wait(Some(Instant::now())), Woken::Time);
        (0..5000).for_each(|_| bell.ringer().ring());
        assert!(ring_at(&path) && bell.wait(None) == Woken::Within);
        drop(bell);
        assert!(!path.exists() && !ring_at(&path));
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_an_error() {
        assert!(Bell::at(&std::env::temp_dir().join("x".repeat(200))).is_err());
        let bell = Bell::private().expect("sockets");
        bell.ringer().ring();
        assert_eq!(bell.wait(None), Woken::Within);
    }
}
