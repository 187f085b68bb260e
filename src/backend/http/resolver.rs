//! From a backend's name to its addresses, in bounded time.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use crossbeam_channel::{RecvTimeoutError, bounded};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::http::uri::Scheme;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;
use ureq::unversioned::transport::time::Duration as UreqDuration;

use crate::sys::threads;

/// Reads addresses, and knows what `localhost` is; other names are looked up in a thread of their own, for the system's lookup
/// cannot be bounded otherwise.
#[derive(Debug)]
pub struct LocalFirstResolver;

/// The system refused the thread for a lookup.
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
            // Where servers listen that were not told otherwise comes first.
            addresses.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
            addresses.push(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port));
        } else {
            return look_up(uri, config, timeout);
        }
        Ok(addresses)
    }
}

/// Apart from the above, for its stack would be on that of every stream.
#[inline(never)]
fn look_up(uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
    let (found, inbox) = bounded(1);
    let (uri, config) = (uri.clone(), config.clone());
    let unbounded = NextTimeout { after: UreqDuration::NotHappening, ..timeout };
    let lookup = move || drop(found.send(DefaultResolver::default().resolve(&uri, &config, unbounded)));
    threads::spawn("resolve", lookup).map_err(|e| ureq::Error::Other(Box::new(NoThread(e))))?;
    // A lookup that panicked found nothing.
    let in_time = |e| {
        if e == RecvTimeoutError::Timeout { ureq::Error::Timeout(timeout.reason) } else { ureq::Error::HostNotFound }
    };
    inbox.recv_timeout(*timeout.after).map_err(in_time)?
}
