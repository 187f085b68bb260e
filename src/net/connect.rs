//! Connects to one of several addresses, in bounded time, as described by RFC 8305 (Happy Eyeballs): an address that does not respond
//! delays the next one by only `ATTEMPT_DELAY`, and the first that accepts is used.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6};

/// How long an attempt may take before the next address is tried as well; the value that RFC 8305 recommends.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Connects to the first address that accepts. Attempts start in the order of the addresses, alternating between IPv4 and IPv6, and
/// run concurrently; after one that fails, the next starts at once. `None` means no time limit.
///
/// # Errors
/// The error of the first address; `TimedOut` if it did not respond in time; `NotFound` if there is no address.
pub fn connect_any(addresses: &[SocketAddr], until: Option<Instant>) -> io::Result<TcpStream> {
    let mut race = Race::default();
    let mut untried = alternating(addresses).into_iter().enumerate().peekable();
    let mut next_start = Instant::now();
    loop {
        let now = Instant::now();
        if until.is_some_and(|until| until <= now) {
            if let Some((rank, _)) = untried.peek() {
                race.fail(*rank, io::ErrorKind::TimedOut.into());
            }
            return Err(race.into_error());
        }
        if std::mem::take(&mut race.has_failed) || next_start <= now {
            match untried.next() {
                Some((rank, address)) => {
                    next_start = now + ATTEMPT_DELAY;
                    race.start(rank, address);
                }
                None if race.pending.is_empty() => return Err(race.into_error()),
                None => {}
            }
        }
        let wake_at = untried.peek().map(|_| next_start).into_iter().chain(until).min();
        if let Some(connected) = race.wait(wake_at)? {
            return Ok(connected);
        }
    }
}

/// Orders the addresses so that the families alternate, as long as there are addresses of both.
fn alternating(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let is_first_family = |address: &SocketAddr| address.is_ipv4() == addresses[0].is_ipv4();
    let (first, second): (Vec<_>, Vec<_>) = addresses.iter().copied().partition(is_first_family);
    let mut ordered = Vec::with_capacity(addresses.len());
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    while ordered.len() < addresses.len() {
        ordered.extend(first.next().into_iter().chain(second.next()));
    }
    ordered
}

/// The attempts of one call.
#[derive(Default)]
struct Race {
    pending: Vec<(usize, TcpStream)>,
    /// The error of the address with the lowest rank among those that failed.
    failure: Option<(usize, io::Error)>,
    /// Whether an attempt has failed since the last one started.
    has_failed: bool,
}

impl Race {
    fn start(&mut self, rank: usize, address: SocketAddr) {
        match start_connect(address) {
            Ok(socket) => self.pending.push((rank, socket)),
            Err(e) => self.fail(rank, e),
        }
    }

    fn fail(&mut self, rank: usize, error: io::Error) {
        self.has_failed = true;
        if self.failure.as_ref().is_none_or(|(lowest, _)| rank < *lowest) {
            self.failure = Some((rank, error));
        }
    }

    /// Waits until an attempt ends or `until` has passed. Returns the socket of an attempt that succeeded.
    fn wait(&mut self, until: Option<Instant>) -> io::Result<Option<TcpStream>> {
        if self.pending.is_empty() {
            return Ok(None);
        }
        let mut polled: Vec<_> =
            self.pending.iter().map(|(_, socket)| PollFd::new(socket.as_fd(), PollFlags::POLLOUT)).collect();
        match poll(&mut polled, timeout_until(until)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let ended: Vec<bool> = polled.iter().map(|polled| polled.any().unwrap_or(false)).collect();
        let attempts = std::mem::take(&mut self.pending).into_iter().zip(ended);
        let mut connected = None;
        for ((rank, socket), has_ended) in attempts {
            match socket.take_error() {
                _ if !has_ended => self.pending.push((rank, socket)),
                Ok(None) if connected.is_none() => {
                    socket.set_nonblocking(false)?;
                    connected = Some(socket);
                }
                Ok(None) => {}
                Ok(Some(e)) | Err(e) => self.fail(rank, e),
            }
        }
        Ok(connected)
    }

    fn into_error(mut self) -> io::Error {
        if let Some((rank, _)) = self.pending.first() {
            self.fail(*rank, io::ErrorKind::TimedOut.into());
        }
        match self.failure {
            Some((_, error)) => error,
            None => io::Error::new(io::ErrorKind::NotFound, "the name has no address"),
        }
    }
}

/// Rounded up to the next millisecond, so that the time has passed afterwards.
fn timeout_until(until: Option<Instant>) -> PollTimeout {
    let Some(until) = until else { return PollTimeout::NONE };
    let left = until.saturating_duration_since(Instant::now());
    PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX)
}

fn start_connect(address: SocketAddr) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = TcpStream::from(socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?);
    socket.set_nonblocking(true)?;
    let started = match address {
        SocketAddr::V4(address) => socket::connect(socket.as_raw_fd(), &SockaddrIn::from(address)),
        SocketAddr::V6(address) => socket::connect(socket.as_raw_fd(), &SockaddrIn6::from(address)),
    };
    match started {
        Ok(()) | Err(Errno::EINPROGRESS | Errno::EINTR) => Ok(socket),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn connect_any_takes_the_first_that_accepts_and_reports_the_first_error() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let open = listener.local_addr().expect("an address");
        // Nothing listens on the discard port of this loopback address.
        let closed: SocketAddr = "127.0.0.71:9".parse().expect("an address");
        let soon = || Some(Instant::now() + Duration::from_secs(10));
        for until in [None, soon()] {
            assert_eq!(connect_any(&[closed, open], until).expect("connected").peer_addr().ok(), Some(open));
            let error = connect_any(&[closed, closed], until).expect_err("nobody there");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        }
        assert_eq!(connect_any(&[], soon()).expect_err("no address").kind(), io::ErrorKind::NotFound);
        let over = connect_any(&[open], Some(Instant::now())).expect_err("no time");
        assert_eq!(over.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn alternating_begins_with_the_family_of_the_first_address() {
        let parsed =
            |texts: &[&str]| -> Vec<SocketAddr> { texts.iter().map(|t| t.parse().expect("an address")).collect() };
        let given = parsed(&["[::1]:1", "[::2]:1", "[::3]:1", "1.0.0.1:1", "1.0.0.2:1"]);
        assert_eq!(alternating(&given), parsed(&["[::1]:1", "1.0.0.1:1", "[::2]:1", "1.0.0.2:1", "[::3]:1"]));
        assert_eq!(alternating(&[]), []);
    }
}
