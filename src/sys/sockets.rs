//! Socket functions that std and nix lack.

use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// Whether the peer has closed the connection, or its half of it, even if it has sent data that is not read yet. Does not block.
pub fn peer_has_closed(tcp: &TcpStream) -> bool {
    const CLOSED: libc::c_short = libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR;
    let mut polled = libc::pollfd { fd: tcp.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    #[expect(unsafe_code, reason = "std has no poll, and nix no POLLRDHUP")]
    // SAFETY: the descriptor is open as long as `tcp` is borrowed, and poll writes one `pollfd`, which `polled` is.
    let ready = unsafe { libc::poll(&raw mut polled, 1, 0) };
    ready > 0 && polled.revents & CLOSED != 0
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{Shutdown, TcpListener};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn peer_has_closed_sees_the_end_behind_unread_data() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let mut client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
        let server = listener.accept().expect("accepted").0;
        client.write_all(b"unread").expect("written");
        server.peek(&mut [0]).expect("data");
        assert!(!peer_has_closed(&server));
        client.shutdown(Shutdown::Write).expect("shut down");
        let began = Instant::now();
        while !peer_has_closed(&server) {
            assert!(began.elapsed() < Duration::from_secs(10), "the end is not seen");
            std::thread::yield_now();
        }
    }
}
