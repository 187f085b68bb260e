//! Connects to one of several addresses, in bounded time.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Minimum time for an address that does not respond, unless it is the last.
const ADDRESS_TIME_MIN: Duration = Duration::from_millis(10);

/// Tries the addresses in order until one accepts. The remaining time is divided among the remaining addresses, so that an
/// address that drops packets uses up only its share. `None` means no time limit.
///
/// # Errors
/// The error of the first (preferred) address; `TimedOut` if no time was left; `NotFound` if there is no address.
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
}
