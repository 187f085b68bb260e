//! The HTTP proxy from the environment, and the hosts that are reached without it.
//!
//! Invariant: loopback is never reached through a proxy, which would connect to its own machine.

use std::net::IpAddr;

use ureq::Proxy;

use super::is_loopback;

/// The proxy in `HTTPS_PROXY` for a connection to this host; `None` if the host is loopback or listed in `NO_PROXY`. Used for
/// hosted backends and the coordinator.
pub fn from_env(host: &str, port: u16) -> Option<Proxy> {
    let read = |names: [&str; 2]| names.iter().find_map(|n| std::env::var(n).ok().filter(|v| !v.trim().is_empty()));
    let address = read(["HTTPS_PROXY", "https_proxy"])?;
    if is_loopback(host) || is_exempt(&read(["NO_PROXY", "no_proxy"]).unwrap_or_default(), host, port) {
        return None;
    }
    match Proxy::new(address.trim()) {
        Ok(proxy) if proxy.protocol() == ureq::ProxyProtocol::Http => Some(proxy),
        // The address is not logged, because it may contain a password.
        _ => {
            log::warn!("HTTPS_PROXY is ignored: it does not have the form http://HOST:PORT");
            None
        }
    }
}

/// Whether `NO_PROXY` lists the host. Its entries are separated by commas or spaces. Each is `*`, a name, which includes its
/// subdomains with and without a leading dot, an IP address or a CIDR range; and may end in a port.
fn is_exempt(no_proxy: &str, host: &str, port: u16) -> bool {
    let host = host.trim_matches(['[', ']']).trim_end_matches('.').to_ascii_lowercase();
    let ip = host.parse::<IpAddr>().ok().map(|ip| ip.to_canonical());
    no_proxy.split([',', ' ', '\t']).filter(|entry| !entry.is_empty()).any(|entry| {
        let (entry, entry_port) = without_port(entry);
        if entry_port.is_some_and(|entry_port| entry_port != port) {
            return false;
        }
        match ip {
            _ if entry == "*" => true,
            Some(ip) => is_in_range(ip, entry),
            None => is_in_domain(&host, entry),
        }
    })
}

/// Splits `host:port`. An IPv6 address has a port only after brackets.
fn without_port(entry: &str) -> (&str, Option<u16>) {
    let split = entry.rsplit_once(':').filter(|(host, _)| !host.contains(':') || host.ends_with(']'));
    match split.and_then(|(host, port)| Some((host, port.parse().ok()?))) {
        Some((host, port)) => (host, Some(port)),
        None => (entry, None),
    }
}

fn is_in_range(ip: IpAddr, range: &str) -> bool {
    let (network, bits) = match range.rsplit_once('/') {
        Some((network, bits)) => (network, bits.parse::<u32>().ok()),
        None => (range, Some(u128::BITS)),
    };
    let network = network.trim_matches(['[', ']']).parse::<IpAddr>().ok().map(|network| network.to_canonical());
    let (Some(network), Some(bits)) = (network, bits) else { return false };
    let (difference, width) = match (ip, network) {
        (IpAddr::V4(ip), IpAddr::V4(network)) => (u128::from(ip.to_bits() ^ network.to_bits()), u32::BITS),
        (IpAddr::V6(ip), IpAddr::V6(network)) => (ip.to_bits() ^ network.to_bits(), u128::BITS),
        _ => return false,
    };
    difference.checked_shr(width.saturating_sub(bits)).unwrap_or(0) == 0
}

fn is_in_domain(host: &str, domain: &str) -> bool {
    let domain = domain.trim_start_matches('*').trim_matches('.').to_ascii_lowercase();
    let subdomain = host.strip_suffix(&domain).filter(|_| !domain.is_empty());
    subdomain.is_some_and(|subdomain| subdomain.is_empty() || subdomain.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_proxy_lists_names_addresses_and_ranges_with_and_without_a_port() {
        for (no_proxy, host) in [
            ("*", "h.example"),
            ("h.example", "h.example"),
            ("EXAMPLE", "h.Example."),
            (" a.test , .h.example ", "h.example"),
            ("a.test\t*.h.example", "sub.h.example"),
            ("h.example:443", "h.example"),
            ("10.0.0.0/8", "10.255.0.1"),
            ("10.1.2.3", "10.1.2.3"),
            ("10.1.2.3:443", "10.1.2.3"),
            ("10.1.2.3/32:443", "10.1.2.3"),
            ("0.0.0.0/0", "192.0.2.1"),
            ("10.0.0.0/8", "::ffff:10.1.1.1"),
            ("fd00::/8", "[fd12::1]"),
            ("[fd12::1]", "fd12:0::1"),
            ("[fd12::1]:443", "[fd12::1]"),
            ("fd12::1", "[fd12::1]"),
            ("::/0", "[2001:db8::1]"),
        ] {
            assert!(is_exempt(no_proxy, host, 443), "{no_proxy} {host}");
        }
        for (no_proxy, host) in [
            ("", "h.example"),
            (",. ,*.", "h.example"),
            ("example", "hexample"),
            ("ample", "h.example"),
            ("h.example:80", "h.example"),
            ("sub.h.example", "h.example"),
            ("10.0.0.0/8", "11.0.0.1"),
            ("10.0.0.0/x", "10.0.0.1"),
            ("10.0.0", "10.0.0.1"),
            ("10.1.2.3:80", "10.1.2.3"),
            ("2.3", "10.1.2.3"),
            ("::/0", "192.0.2.1"),
            ("fd00::/8", "[fe00::1]"),
            ("[fd12::1]:80", "[fd12::1]"),
        ] {
            assert!(!is_exempt(no_proxy, host, 443), "{no_proxy} {host}");
        }
    }
}
