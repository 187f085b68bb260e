//! Notifies systemd of the agent's start, signs of life and stop. systemd sets `NOTIFY_SOCKET` for a unit with `Type=notify`;
//! without it, nothing is sent.
//!
//! Invariant: a notification never blocks. If systemd's queue is full, it is dropped; the next sign of life follows within a minute.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The agent has started.
pub const READY: &str = "READY=1";
/// The agent shows a sign of life, which restarts the time of `WatchdogSec=`.
pub const WATCHDOG: &str = "WATCHDOG=1";
/// The agent is stopping.
pub const STOPPING: &str = "STOPPING=1";

/// Sends a notification. A failure is ignored, because nothing else depends on it.
pub fn notify(message: &str) {
    if let Some(name) = std::env::var_os("NOTIFY_SOCKET") {
        let _ = send(name.as_bytes(), message);
    }
}

fn send(name: &[u8], message: &str) -> io::Result<usize> {
    // `@` begins the name of a socket that is not a file.
    let address = match name {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        name => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to_addr(message.as_bytes(), &address)
}
