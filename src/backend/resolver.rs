//! From a backend's name to its addresses, in bounded time.

use crossbeam_channel::{RecvTimeoutError, bounded};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;
use ureq::unversioned::transport::time::Duration as UreqDuration;

use crate::threads;

/// Resolves addresses and `localhost` in place, which take no time to speak of, and other names in a thread of their own, for
/// the system's lookup cannot be bounded otherwise.
#[derive(Debug, Default)]
pub struct LocalFirstResolver(DefaultResolver);

/// The system refused the thread for a lookup.
#[derive(Debug, thiserror::Error)]
#[error("failed to start a thread: {0}")]
pub struct NoThread(std::io::Error);

impl Resolver for LocalFirstResolver {
    fn resolve(&self, uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let unbounded = NextTimeout { after: UreqDuration::NotHappening, ..timeout };
        let host = uri.host().unwrap_or_default();
        let literal = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok();
        if literal || host.eq_ignore_ascii_case("localhost") {
            return self.0.resolve(uri, config, unbounded);
        }
        let (found, inbox) = bounded(1);
        let (uri, config) = (uri.clone(), config.clone());
        let lookup = move || drop(found.send(DefaultResolver::default().resolve(&uri, &config, unbounded)));
        threads::spawn("resolve", lookup).map_err(|e| ureq::Error::Other(Box::new(NoThread(e))))?;
        // A lookup that panicked found nothing.
        let in_time = |e| {
            if e == RecvTimeoutError::Timeout {
                ureq::Error::Timeout(timeout.reason)
            } else {
                ureq::Error::HostNotFound
            }
        };
        inbox.recv_timeout(*timeout.after).map_err(in_time)?
    }
}
