//! Resolves a backend's host name, in bounded time.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use crossbeam_channel::{RecvTimeoutError, bounded};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::http::uri::Scheme;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;
use ureq::unversioned::transport::time::Duration as UreqDuration;

use crate::sys::threads;

/// Resolves IP addresses and `localhost` directly. Looks up other names on a separate thread, because the system's lookup
/// has no time limit.
#[derive(Debug)]
pub struct LocalFirstResolver;

/// The thread for a lookup could not be started.
#[derive(Debug, thiserror::Error)]
#[error("failed to start a thread: {0}")]
pub struct NoThread(std::io::Error);

impl Resolver for LocalFirstResolver {
    fn resolve(&self, uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().unwrap_or_default();
        let port = uri.port_u16().unwrap_or(if uri.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 });
        let mut addresses = self.empty();
        if let Ok(address) = host.trim_matches(['[', ']']).parse() {
            addresses.push(SocketAddr::new(address, port));
        } else if host.eq_ignore_ascii_case("localhost") {
            // Most servers listen on IPv4 by default.
            addresses.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
            addresses.push(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port));
        } else {
            return look_up(uri, config, timeout);
        }
        Ok(addresses)
    }
}

// Not inlined: its frame would be on the stack of every stream.
#[inline(never)]
fn look_up(uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
    let (result, results) = bounded(1);
    let (uri, config) = (uri.clone(), config.clone());
    let unbounded = NextTimeout { after: UreqDuration::NotHappening, ..timeout };
    let lookup = move || drop(result.send(DefaultResolver::default().resolve(&uri, &config, unbounded)));
    threads::spawn("resolve", lookup).map_err(|e| ureq::Error::Other(Box::new(NoThread(e))))?;
    // The sender is dropped without a result if the lookup panics.
    let lookup_error = |e| {
        if e == RecvTimeoutError::Timeout { ureq::Error::Timeout(timeout.reason) } else { ureq::Error::HostNotFound }
    };
    results.recv_timeout(*timeout.after).map_err(lookup_error)?
}
