//! From a URL to a WebSocket, within [`CONNECT_TIMEOUT`]: name, TCP, proxy, TLS, upgrade.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use crossbeam_channel::{Receiver, bounded, select};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use tungstenite::HandshakeError;
use tungstenite::http::Uri;
use tungstenite::protocol::WebSocketConfig;
use ureq::Proxy;

use super::{Link, LinkReader, MESSAGE_BYTES_MAX, READ_BUFFER_BYTES, ReadHalf, STALL_TIMEOUT, uninterrupted};
use crate::logging::shown;
use crate::{cryptography, files, threads};

/// For all steps together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// The largest file of extra roots, in bytes; a whole distribution's bundle has a quarter of it.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// The longest answer of a proxy to CONNECT, in bytes.
const PROXY_ANSWER_MAX: usize = 8 << 10;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The agent is stopping.
    #[error("the agent is stopping")]
    Stopping,
    /// The time for all steps is over.
    #[error("no connection within {} s", CONNECT_TIMEOUT.as_secs())]
    TimedOut,
    /// The name has no address.
    #[error("failed to resolve `{host}`: {error}")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver says.
        error: io::Error,
    },
    /// No address accepts.
    #[error("failed to connect to `{host}:{port}`: {error}")]
    Connect {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// The last address's error.
        error: io::Error,
    },
    /// The proxy would not.
    #[error("the proxy of HTTPS_PROXY refused to connect: {0}")]
    Proxy(String),
    /// The TLS handshake failed.
    #[error("TLS handshake failed: {0}")]
    Tls(String),
    /// The server does not upgrade to a WebSocket.
    #[error("WebSocket upgrade failed: {0}")]
    Upgrade(String),
    /// The system refused something.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Certificates that are trusted beside those of the web: an operator's own authority, for instance.
#[derive(Debug, Clone, Default)]
pub struct ExtraRoots(Vec<CertificateDer<'static>>);

impl ExtraRoots {
    /// The certificates, in the order of the file.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.0
    }

    /// Reads a PEM file.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn from_file(path: &Path) -> Result<ExtraRoots, String> {
        let pem = files::read_bounded(path, PEM_BYTES_MAX).map_err(|e| format!("failed to read it: {e}"))?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let certificates = certificates.map_err(|e| format!("it is not a PEM file: {e}"))?;
        let mut store = RootCertStore::empty();
        for certificate in &certificates {
            store.add(certificate.clone()).map_err(|e| format!("a certificate in it cannot be a root: {e}"))?;
        }
        if certificates.is_empty() { Err("no certificate is in it".into()) } else { Ok(ExtraRoots(certificates)) }
    }
}

/// Opens connections to one coordinator. Names are resolved anew each time.
pub struct Dialer {
    uri: Uri,
    host: String,
    port: u16,
    secure: bool,
    proxy: Option<Proxy>,
    roots: ExtraRoots,
    tls: OnceLock<Arc<ClientConfig>>,
}

impl Dialer {
    /// `uri` is a checked `ws` or `wss` address. A `proxy` is used unless it excepts the host.
    pub fn new(uri: Uri, roots: ExtraRoots, proxy: Option<Proxy>) -> Dialer {
        let secure = uri.scheme_str() == Some("wss");
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let proxy = proxy.filter(|p| !p.is_no_proxy(&uri));
        Dialer { uri, host, port, secure, proxy, roots, tls: OnceLock::new() }
    }

    /// Connects. `opened` is given the socket as soon as there is one, so that it can be closed from elsewhere;
    /// `stop` disconnects when the agent is to stop.
    ///
    /// # Errors
    /// By step.
    pub fn dial(&self, stop: &Receiver<()>, opened: impl FnOnce(TcpStream)) -> Result<ReadHalf, DialError> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let tcp = self.connect(deadline, stop)?;
        opened(tcp.try_clone()?);
        tcp.set_nodelay(true)?;
        tcp.set_write_timeout(Some(CONNECT_TIMEOUT))?;
        if let Some(proxy) = &self.proxy {
            self.tunnel(&tcp, proxy, deadline)?;
        }
        let tls = if self.secure { Some(Mutex::new(self.tls_handshake(&tcp, deadline)?)) } else { None };
        let link = Arc::new(Link::new(tcp, tls));
        let half = self.upgrade(link.clone(), deadline)?;
        link.tcp.set_write_timeout(Some(STALL_TIMEOUT))?;
        Ok(half)
    }

    /// Name resolution cannot be bounded or interrupted, so it happens in a thread that may be left behind.
    fn connect(&self, deadline: Instant, stop: &Receiver<()>) -> Result<TcpStream, DialError> {
        let (host, port) = match &self.proxy {
            Some(proxy) => (proxy.host().trim_matches(['[', ']']).to_owned(), proxy.port()),
            None => (self.host.clone(), self.port),
        };
        let (ended_sender, ended) = bounded::<()>(0);
        let opened = Arc::new(Mutex::new(Err(DialError::TimedOut)));
        let of_thread = opened.clone();
        threads::spawn("dial", move || {
            // Dropped at the end, whatever it is.
            let _ended = ended_sender;
            let tcp = open(host, port, deadline);
            *of_thread.lock().unwrap_or_else(PoisonError::into_inner) = tcp;
        })?;
        select! {
            recv(ended) -> _ => {
                let mut opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::replace(&mut *opened, Err(DialError::TimedOut))
            }
            recv(stop) -> _ => Err(DialError::Stopping),
            default(deadline.saturating_duration_since(Instant::now())) => Err(DialError::TimedOut),
        }
    }

    fn tunnel(&self, tcp: &TcpStream, proxy: &Proxy, deadline: Instant) -> Result<(), DialError> {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let target = format!("{host}:{}", self.port);
        let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n");
        if let Some(user) = proxy.username() {
            let credentials = BASE64.encode(format!("{user}:{}", proxy.password().unwrap_or_default()));
            request.push_str(&format!("Proxy-Authorization: Basic {credentials}\r\n"));
        }
        request.push_str("\r\n");
        let mut stream = Bounded { tcp, deadline };
        stream.write_all(request.as_bytes()).map_err(timed_out_or(|e| DialError::Proxy(e.to_string())))?;
        // Byte by byte: what follows the head belongs to the coordinator.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            let read = stream.read(&mut byte).map_err(timed_out_or(|e| DialError::Proxy(e.to_string())))?;
            if read == 0 || head.len() >= PROXY_ANSWER_MAX {
                return Err(DialError::Proxy("it does not answer as an HTTP proxy".into()));
            }
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head);
        let status_line = head.lines().next().unwrap_or_default();
        match status_line.split(' ').nth(1) {
            Some(status) if status_line.starts_with("HTTP/1.") && status.starts_with('2') => Ok(()),
            _ => Err(DialError::Proxy(shown(status_line))),
        }
    }

    fn tls_handshake(&self, tcp: &TcpStream, deadline: Instant) -> Result<ClientConnection, DialError> {
        let tls_error = |e: rustls::Error| DialError::Tls(e.to_string());
        let name = ServerName::try_from(self.host.clone())
            .map_err(|_| DialError::Tls(format!("`{}` is not a name that a certificate can have", self.host)))?;
        let config = match self.tls.get() {
            Some(config) => config.clone(),
            None => {
                let config = client_config(&self.roots).map_err(tls_error)?;
                self.tls.get_or_init(|| config).clone()
            }
        };
        let mut connection = ClientConnection::new(config, name).map_err(tls_error)?;
        let mut stream = Bounded { tcp, deadline };
        while connection.is_handshaking() {
            connection.complete_io(&mut stream).map_err(timed_out_or(|e| DialError::Tls(e.to_string())))?;
        }
        Ok(connection)
    }

    fn upgrade(&self, link: Arc<Link>, deadline: Instant) -> Result<ReadHalf, DialError> {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0)
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX));
        let reader = LinkReader::new(link, deadline);
        match tungstenite::client::client_with_config(&self.uri, reader, Some(config)) {
            // Kept as it is: its buffer may hold what came right behind the upgrade.
            Ok((socket, _)) => Ok(ReadHalf { socket }),
            Err(HandshakeError::Interrupted(_)) => Err(DialError::TimedOut),
            Err(HandshakeError::Failure(tungstenite::Error::Io(e))) => {
                Err(timed_out_or(|e| DialError::Upgrade(e.to_string()))(e))
            }
            Err(HandshakeError::Failure(tungstenite::Error::Http(response))) => {
                Err(DialError::Upgrade(format!("the server answered HTTP {}", response.status())))
            }
            Err(HandshakeError::Failure(e)) => Err(DialError::Upgrade(e.to_string())),
        }
    }
}

fn timed_out_or(other: impl Fn(io::Error) -> DialError) -> impl Fn(io::Error) -> DialError {
    move |e| match e.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => DialError::TimedOut,
        _ => other(e),
    }
}

/// Tries each address of the name in turn.
fn open(host: String, port: u16, deadline: Instant) -> Result<TcpStream, DialError> {
    let addresses = match (host.as_str(), port).to_socket_addrs() {
        Ok(addresses) => addresses,
        Err(error) => return Err(DialError::Resolve { host, error }),
    };
    let addresses: Vec<_> = addresses.collect();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for (tried, address) in addresses.iter().enumerate() {
        // What is left is shared by the addresses that are left, so that one that swallows packets costs its part only.
        let share = deadline.saturating_duration_since(Instant::now()) / (addresses.len() - tried) as u32;
        match TcpStream::connect_timeout(address, share.max(Duration::from_millis(1))) {
            Ok(tcp) => return Ok(tcp),
            Err(e) => last = e,
        }
    }
    Err(DialError::Connect { host, port, error: last })
}

/// The roots of the web and the operator's own, TLS 1.2 and 1.3.
fn client_config(extra: &ExtraRoots) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    for certificate in &extra.0 {
        roots.add(certificate.clone())?;
    }
    let provider = cryptography::provider();
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}

/// A socket whose reads and writes must all be over by the deadline.
struct Bounded<'a> {
    tcp: &'a TcpStream,
    deadline: Instant,
}

impl Bounded<'_> {
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        uninterrupted(|| {
            self.tcp.set_read_timeout(Some(self.left()?))?;
            (&mut &*self.tcp).read(buffer)
        })
    }
}

impl Write for Bounded<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        uninterrupted(|| {
            self.tcp.set_write_timeout(Some(self.left()?))?;
            (&mut &*self.tcp).write(bytes)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
