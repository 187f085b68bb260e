//! Resolves a backend's host name for `ureq`.

use std::time::Instant;

use ureq::config::Config;
use ureq::http::Uri;
use ureq::http::uri::Scheme;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use crate::net::resolve::{ResolveError, resolve};

/// Resolves with [`resolve`], so that concurrent requests share one lookup.
#[derive(Debug)]
pub struct SharedResolver;

/// The thread for a lookup could not be started.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct NoThread(ResolveError);

impl Resolver for SharedResolver {
    fn resolve(&self, uri: &Uri, _: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().unwrap_or_default();
        let port = uri.port_u16().unwrap_or(if uri.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 });
        let mut resolved = self.empty();
        for address in resolve(host, port, Instant::now().checked_add(*timeout.after)).map_err(|e| match e {
            ResolveError::TimedOut => ureq::Error::Timeout(timeout.reason),
            ResolveError::NoThread(_) => ureq::Error::Other(Box::new(NoThread(e))),
            ResolveError::Failed(e) => std::io::Error::new(e.kind(), e).into(),
        })? {
            resolved.push(address);
        }
        Ok(resolved)
    }
}
