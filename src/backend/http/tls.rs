//! TLS to a backend, as a `ureq` transport on top of the TCP connection.
//!
//! `ureq`'s own TLS connector builds a new configuration for each request that has its own settings, so no session is
//! resumed. Invariant: all connections of a backend share one configuration, so each can resume the session of another.

use std::fmt;
use std::io::{Read, Write};
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use ureq::Error;
use ureq::unversioned::transport::time::Instant;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport, TransportAdapter,
};

use crate::net::tls::{ExtraRoots, LazyClientConfig};

/// Adds TLS to the connection for `https` URLs.
#[derive(Debug)]
pub struct TlsConnector(LazyClientConfig);

impl TlsConnector {
    /// Trusts `roots` as well as the public web roots.
    pub fn new(roots: ExtraRoots) -> TlsConnector {
        TlsConnector(LazyClientConfig::new(roots))
    }

    fn wrap(&self, details: &ConnectionDetails, below: Box<dyn Transport>) -> Result<Tls, Error> {
        let host = details.uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| Error::Tls("the host is not a name that a certificate can have"))?;
        let mut conn =
            self.0.get().and_then(|config| ClientConnection::new(config, name)).map_err(std::io::Error::other)?;
        let mut sock = TransportAdapter::new(below, details.current_time.clone());
        // The connect timeout started before the TCP connect.
        let spent = match details.now {
            Instant::Exact(began) => began.elapsed(),
            _ => Duration::ZERO,
        };
        let left = details.timeout.after.saturating_sub(spent);
        if left.is_zero() {
            return Err(Error::Timeout(details.timeout.reason));
        }
        sock.set_timeout(NextTimeout { after: left.into(), ..details.timeout });
        conn.complete_io(&mut sock)?;
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Tls { buffers, stream: StreamOwned { conn, sock } })
    }
}

impl<In: Transport> Connector<In> for TlsConnector {
    type Out = Box<dyn Transport>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, Error> {
        let Some(below) = chained else { return Ok(None) };
        let below: Box<dyn Transport> = Box::new(below);
        if !details.needs_tls() || below.is_tls() {
            return Ok(Some(below));
        }
        Ok(Some(Box::new(self.wrap(details, below)?)))
    }
}

/// A TLS session and its plaintext buffers.
struct Tls {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Transport for Tls {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.stream.sock.set_timeout(timeout);
        self.stream.write_all(&self.buffers.output()[..amount])?;
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.stream.sock.set_timeout(timeout);
        let amount = self.stream.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.sock.get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}
