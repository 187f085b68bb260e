//! ureq's transport, watched: what happened on a connection.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ureq::Error;
use ureq::unversioned::transport::{
    Buffers, ConnectProxyConnector, ConnectionDetails, Connector, NextTimeout, RustlsConnector, Transport,
};

use super::tcp::TcpConnector;

/// What one agent's connection was seen to do since it was leased.
#[derive(Debug, Default)]
pub struct Wire {
    opened: AtomicBool,
    received: AtomicBool,
    broken: AtomicBool,
    /// Nothing is waited for beyond this moment.
    limit: Mutex<Option<Instant>>,
}

impl Wire {
    /// For the next exchange.
    pub fn reset(&self) {
        *self.limit() = None;
        for flag in [&self.opened, &self.received, &self.broken] {
            flag.store(false, Ordering::Relaxed);
        }
    }

    /// Whether a failed exchange used a kept-alive connection and got no byte back: it had been closed under us, and
    /// the backend never saw the request.
    pub fn was_stale(&self) -> bool {
        !self.opened.load(Ordering::Relaxed) && !self.received.load(Ordering::Relaxed)
    }

    /// Whether the connection broke (rather than being closed in order): ureq takes a reset for the end of a body that
    /// only the connection's end delimits.
    pub fn has_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Leaves the rest of the answer at most so much time.
    pub fn hurry(&self, time: Duration) {
        *self.limit() = Instant::now().checked_add(time);
    }

    fn limit(&self) -> MutexGuard<'_, Option<Instant>> {
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to a backend, for all of its agents.
pub type SharedConnector = Arc<dyn Connector<(), Out = Box<dyn Transport>>>;

/// Within one's own network, without TLS. It has a chain of its own since the places for a proxy and a TLS session would be a
/// third of the stack, and a kilobyte of heap, of each of its streams.
pub fn plain_connector() -> SharedConnector {
    Arc::new(().chain(TcpConnector).chain(Boxing))
}

/// With TLS where the URL says so, whose configuration it keeps, and through a proxy where there is one.
pub fn connector() -> SharedConnector {
    let chain = ().chain(ConnectProxyConnector::default()).chain(TcpConnector).chain(RustlsConnector::default());
    Arc::new(chain.chain(Boxing))
}

/// The end of a chain, which has a type of its own for each of its links.
#[derive(Debug)]
struct Boxing;

impl<In: Transport> Connector<In> for Boxing {
    type Out = Box<dyn Transport>;

    fn connect(&self, _: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, Error> {
        Ok(chained.map(|transport| Box::new(transport) as Self::Out))
    }
}

/// Connects, with a [`Wire`] to tell of it.
#[derive(Debug)]
pub struct WatchedConnector {
    inner: SharedConnector,
    wire: Arc<Wire>,
}

impl WatchedConnector {
    pub fn new(inner: SharedConnector, wire: Arc<Wire>) -> WatchedConnector {
        WatchedConnector { inner, wire }
    }
}

impl Connector<()> for WatchedConnector {
    type Out = Watched;

    fn connect(&self, details: &ConnectionDetails, chained: Option<()>) -> Result<Option<Watched>, Error> {
        self.wire.opened.store(true, Ordering::Relaxed);
        let inner = self.inner.connect(details, chained)?;
        Ok(inner.map(|inner| Watched { inner, wire: self.wire.clone(), write_failed: false }))
    }
}

/// A connection that tells its [`Wire`] what happens on it.
#[derive(Debug)]
pub struct Watched {
    inner: Box<dyn Transport>,
    wire: Arc<Wire>,
    write_failed: bool,
}

impl Transport for Watched {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        if self.write_failed {
            return Ok(());
        }
        match self.inner.transmit_output(amount, timeout) {
            // A server that refuses a large request answers and closes while we still write. What it said is worth
            // more than that we could not go on, so the verdict is left to the read that follows.
            Err(Error::Io(_)) => {
                self.write_failed = true;
                Ok(())
            }
            other => other,
        }
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let left = self.wire.limit().map(|until| until.saturating_duration_since(Instant::now()));
        let after = left.map_or(timeout.after, |left| timeout.after.min(left.into()));
        let result = self.inner.await_input(NextTimeout { after, ..timeout });
        match &result {
            Ok(true) => self.wire.received.store(true, Ordering::Relaxed),
            Ok(false) => {}
            Err(_) => self.wire.broken.store(true, Ordering::Relaxed),
        }
        result
    }

    fn is_open(&mut self) -> bool {
        !self.write_failed && self.inner.is_open()
    }

    fn is_tls(&self) -> bool {
        self.inner.is_tls()
    }
}
