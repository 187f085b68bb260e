//! The coordinator's end of a connection, plain or TLS, shared by the thread that reads and those that write.
//!
//! The TLS session is locked for memory work only: the reader waits in the socket without the lock.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection};

use crate::Result;

pub struct Wire {
    socket: TcpStream,
    /// Also what makes the bytes of two writers whole.
    session: Mutex<Option<ServerConnection>>,
    is_tls: bool,
}

impl Wire {
    pub fn new(socket: TcpStream, tls: Option<&Arc<ServerConfig>>) -> Result<Self> {
        socket.set_nodelay(true)?;
        let session = tls.map(|config| ServerConnection::new(Arc::clone(config))).transpose()?;
        Ok(Self { socket, is_tls: session.is_some(), session: Mutex::new(session) })
    }

    /// How long a read may wait.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(timeout)
    }

    /// Waits for bytes and appends them to `out`; 0 at the end. `scratch` is what one read of the socket may fill.
    pub fn read(&self, scratch: &mut [u8], out: &mut Vec<u8>) -> io::Result<usize> {
        let before = out.len();
        while out.len() == before {
            let n = (&self.socket).read(scratch)?;
            if n == 0 {
                return Ok(0);
            }
            if self.is_tls {
                self.decrypt(&scratch[..n], out)?;
            } else {
                out.extend_from_slice(&scratch[..n]);
            }
        }
        Ok(out.len() - before)
    }

    fn decrypt(&self, mut records: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        let mut session = self.lock();
        let Some(tls) = session.as_mut() else { return Ok(()) };
        while !records.is_empty() {
            tls.read_tls(&mut records)?;
            tls.process_new_packets().map_err(io::Error::other)?;
            match tls.reader().read_to_end(out) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
        }
        self.send_records(tls)
    }

    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut session = self.lock();
        match session.as_mut() {
            None => (&self.socket).write_all(bytes),
            Some(tls) => {
                tls.writer().write_all(bytes)?;
                self.send_records(tls)
            }
        }
    }

    fn send_records(&self, tls: &mut ServerConnection) -> io::Result<()> {
        while tls.wants_write() {
            tls.write_tls(&mut &self.socket)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<ServerConnection>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection, and whatever read waits in it.
    pub fn close(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// A server with a certificate for the loopback address, by an authority of its own whose certificate is written to `ca_file`.
pub fn tls_server(ca_file: &Path) -> Result<Arc<ServerConfig>> {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    std::fs::write(ca_file, authority.pem())?;
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(["127.0.0.1".to_owned()])?.signed_by(&key, &authority)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(Arc::new(builder.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key)?))
}
