//! Addresses, TCP, TLS and the HTTP proxy, shared by the connections to the coordinator and to the backends.

pub mod connect;
pub mod proxy;
pub mod resolve;
pub mod tls;

use std::net::IpAddr;

/// Whether the host of a URL is this machine: `localhost` or a loopback address, with or without brackets.
pub fn is_loopback(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    let is_ip = host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback());
    is_ip || name == "localhost"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_loopback_in_each_spelling() {
        for host in ["localhost", "LocalHost.", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "[::ffff:127.0.0.1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["", "localhost.example", "not.localhost", "128.0.0.1", "0.0.0.0", "[::2]", "[::ffff:10.0.0.1]"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
