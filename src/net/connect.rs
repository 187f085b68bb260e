//! A TCP connection to one of several addresses, in bounded time.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// An address that does not answer has at least so long, unless it is the last.
const ADDRESS_TIME_MIN: Duration = Duration::from_millis(10);

/// Tries the addresses in turn until one accepts. What is left of the time is shared by the addresses that are left, so that one
/// that swallows packets costs its part only; `None` is for ever.
///
/// # Errors
/// That of the first address, which is the one that was meant; `TimedOut` when the time was over before any was tried;
/// `NotFound` when there is none.
pub fn connect_any(addresses: &[SocketAddr], until: Option<Instant>) -> io::Result<TcpStream> {
    let mut failure = None;
    for (tried, address) in addresses.iter().enumerate() {
        let attempt = match until.map(|until| until.saturating_duration_since(Instant::now())) {
            None => TcpStream::connect(address),
            Some(Duration::ZERO) => Err(io::ErrorKind::TimedOut.into()),
            Some(left) => {
                let (share, is_last) = (left / (addresses.len() - tried) as u32, tried + 1 == addresses.len());
                TcpStream::connect_timeout(address, if is_last { left } else { share.max(ADDRESS_TIME_MIN) })
            }
        };
        match attempt {
            Ok(tcp) => return Ok(tcp),
            Err(e) => failure = failure.or(Some(e)),
        }
    }
    Err(failure.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address")))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_first_that_accepts_is_taken_and_the_first_error_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let open = listener.local_addr().expect("an address");
        // Nothing listens on the discard port of a loopback address of our own.
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
}
