//! Opens a WebSocket to a URL within [`CONNECT_TIMEOUT`]: name resolution, TCP, proxy, TLS, upgrade.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use crossbeam_channel::{Receiver, bounded, never, select};
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig, ClientConnection, ProtocolVersion};
use tungstenite::WebSocket;
use tungstenite::http::{HeaderMap, Uri};
use tungstenite::protocol::{Role, WebSocketConfig};
use ureq::Proxy;

use super::peer_certificate::CapturingVerifier;
use super::response::{BODY_TIMEOUT, Refusal, read_head};
use super::transport::{
    Link, LinkReader, MESSAGE_BYTES_MAX, READ_BUFFER_BYTES, ReadHalf, STALL_TIMEOUT, uninterrupted,
};
use super::upgrade;
use crate::net::resolve::{ResolveError, resolve};
use crate::net::tls::{ExtraRoots, LazyClientConfig};
use crate::net::{connect, proxy};
use crate::sys::threads;

/// Time limit for all steps together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The agent is stopping.
    #[error("the agent is stopping")]
    Stopping,
    /// [`CONNECT_TIMEOUT`] has passed.
    #[error("no connection within {} s", CONNECT_TIMEOUT.as_secs())]
    TimedOut,
    /// The host name could not be resolved.
    #[error("failed to resolve `{host}`: {error}")]
    Resolve {
        /// The host name.
        host: String,
        /// The resolver's error.
        error: ResolveError,
    },
    /// No address accepted the connection.
    #[error("failed to connect to `{host}:{port}`: {error}")]
    Connect {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// The error of the first address.
        error: io::Error,
    },
    /// The proxy failed, or does not speak HTTP.
    #[error("the proxy in HTTPS_PROXY failed: {0}")]
    Proxy(String),
    /// The proxy refused the connection.
    #[error("the proxy in HTTPS_PROXY refused the connection: {0}")]
    ProxyRefused(Refusal),
    /// The TLS handshake failed.
    #[error("TLS handshake failed: {why}")]
    Tls {
        /// The reason, for the operator.
        why: String,
        /// Set if the server's certificate was rejected.
        fault: Option<CertificateError>,
    },
    /// The server did not upgrade to a WebSocket.
    #[error("WebSocket upgrade failed: {0}")]
    Upgrade(String),
    /// The server, or something in between, refused the upgrade.
    #[error("WebSocket upgrade failed: {0}")]
    UpgradeRefused(Refusal),
    /// A system call failed.
    #[error(transparent)]
    System(#[from] io::Error),
}

impl DialError {
    /// The minimum delay before the next attempt, as the server or the proxy requested.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            DialError::ProxyRefused(refusal) | DialError::UpgradeRefused(refusal) => refusal.retry_after,
            _ => None,
        }
    }
}

/// Observes a dial. A method is called after each step; a dial that fails has failed in the step after the last call.
pub trait DialObserver {
    /// The host name was resolved to these addresses.
    fn resolved(&mut self, _addresses: &[SocketAddr]) {}
    /// This address accepted the connection.
    fn connected(&mut self, _address: SocketAddr) {}
    /// The proxy has connected to the coordinator.
    fn tunnelled(&mut self) {}
    /// The TLS handshake succeeded, with this version and this certificate (DER).
    fn secured(&mut self, _version: Option<ProtocolVersion>, _certificate: &[u8]) {}
    /// The server has answered the upgrade request, with any status.
    fn answered(&mut self, _headers: &HeaderMap) {}
}

/// Observes nothing.
impl DialObserver for () {}

/// Opens connections to one coordinator. Resolves its name for each connection.
pub struct Dialer {
    uri: Uri,
    host: String,
    port: u16,
    secure: bool,
    proxy: Option<Proxy>,
    tls: LazyClientConfig,
}

impl Dialer {
    /// Creates a dialer for `uri`, a valid `ws` or `wss` address. Uses the proxy from the environment, if that applies to the host.
    pub fn new(uri: Uri, roots: ExtraRoots) -> Dialer {
        let secure = uri.scheme_str() == Some("wss");
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let proxy = proxy::from_env(&host, port);
        Dialer { uri, host, port, secure, proxy, tls: LazyClientConfig::new(roots) }
    }

    /// Host and port of the TCP connection: the proxy's if one is used.
    pub fn peer(&self) -> (&str, u16) {
        match &self.proxy {
            Some(proxy) => (proxy.host().trim_matches(['[', ']']), proxy.port()),
            None => (&self.host, self.port),
        }
    }

    /// The coordinator's host.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether a proxy is used.
    pub fn uses_proxy(&self) -> bool {
        self.proxy.is_some()
    }

    /// Connects. `on_socket` receives the socket as soon as it is open, so that another thread can shut it down. The dial ends
    /// when `stop` disconnects.
    ///
    /// # Errors
    /// A step failed or timed out.
    pub fn dial(&self, stop: &Receiver<()>, on_socket: impl FnOnce(TcpStream)) -> Result<ReadHalf, DialError> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let tcp = self.connect(deadline, stop, &mut ())?;
        on_socket(tcp.try_clone()?);
        self.upgrade(self.link(tcp, deadline, &mut ())?, deadline, &mut ())
    }

    /// Connects, and calls `observer` after each step.
    ///
    /// # Errors
    /// A step failed or timed out.
    pub fn dial_observed(&self, observer: &mut dyn DialObserver) -> Result<ReadHalf, DialError> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let tcp = self.connect(deadline, &never(), observer)?;
        self.upgrade(self.link(tcp, deadline, observer)?, deadline, observer)
    }

    /// Sends an ordinary HTTP request over a new connection, and returns the headers of the response.
    ///
    /// # Errors
    /// A step failed or timed out.
    pub fn fetch_headers(&self, timeout: Duration) -> Result<HeaderMap, DialError> {
        let deadline = Instant::now() + timeout;
        let link = self.link(self.connect(deadline, &never(), &mut ())?, deadline, &mut ())?;
        let mut stream = LinkReader::new(link, deadline);
        write!(stream, "HEAD / HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.host_header())?;
        stream.flush()?;
        Ok(upgrade::response(&mut stream)?.0.headers)
    }

    /// The host of the URL with its port, if it has one.
    fn host_header(&self) -> &str {
        let authority = self.uri.authority().map_or("", |authority| authority.as_str());
        authority.rsplit('@').next().unwrap_or_default()
    }

    /// The certificate that the server presents, trusted or not, in DER. Opens a new connection, which ends during the TLS
    /// handshake.
    pub fn fetch_peer_certificate(&self, timeout: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + timeout;
        let tcp = self.connect(deadline, &never(), &mut ()).ok()?;
        self.connect_proxy(&tcp, deadline, &mut ()).ok()?;
        let verifier = Arc::new(CapturingVerifier::default());
        // Always fails: the verifier rejects every certificate.
        let _ = self.tls_handshake(&tcp, verifier.clone().config().ok()?, deadline);
        Some(verifier.captured()).filter(|der| !der.is_empty())
    }

    /// Opens the TCP connection. Name resolution and connecting cannot be interrupted, so they run on a separate thread, which may
    /// outlive this call.
    fn connect(
        &self,
        deadline: Instant,
        stop: &Receiver<()>,
        observer: &mut dyn DialObserver,
    ) -> Result<TcpStream, DialError> {
        let (host, port) = self.peer();
        let host = host.to_owned();
        // Never full: the thread sends two messages at most.
        let (sender, progress) = bounded(2);
        threads::spawn("dial", move || {
            let opened = match resolve(&host, port, Some(deadline)) {
                Ok(addresses) => {
                    let _ = sender.send(Progress::Resolved(addresses.clone()));
                    let connected = connect::connect_any(&addresses, Some(deadline));
                    connected.map_err(|error| DialError::Connect { host, port, error })
                }
                Err(ResolveError::TimedOut) => Err(DialError::TimedOut),
                Err(error) => Err(DialError::Resolve { host, error }),
            };
            let _ = sender.send(Progress::Ended(opened));
        })?;
        loop {
            select! {
                recv(progress) -> message => match message {
                    Ok(Progress::Resolved(addresses)) => observer.resolved(&addresses),
                    Ok(Progress::Ended(opened)) => {
                        // A socket that was closed again has no address, and the next step fails.
                        if let Some(address) = opened.as_ref().ok().and_then(|tcp| tcp.peer_addr().ok()) {
                            observer.connected(address);
                        }
                        return opened;
                    }
                    Err(_) => return Err(DialError::TimedOut),
                },
                recv(stop) -> _ => return Err(DialError::Stopping),
                default(deadline.saturating_duration_since(Instant::now())) => return Err(DialError::TimedOut),
            }
        }
    }

    /// Prepares the socket, and connects through the proxy if one is used.
    fn connect_proxy(
        &self,
        tcp: &TcpStream,
        deadline: Instant,
        observer: &mut dyn DialObserver,
    ) -> Result<(), DialError> {
        tcp.set_nodelay(true)?;
        tcp.set_write_timeout(Some(CONNECT_TIMEOUT))?;
        if let Some(proxy) = &self.proxy {
            self.tunnel(tcp, proxy, deadline)?;
            observer.tunnelled();
        }
        Ok(())
    }

    /// Creates a link from the socket, with TLS if the address is `wss`.
    fn link(&self, tcp: TcpStream, deadline: Instant, observer: &mut dyn DialObserver) -> Result<Arc<Link>, DialError> {
        self.connect_proxy(&tcp, deadline, observer)?;
        let tls = if self.secure {
            Some(self.tls_handshake(&tcp, self.tls.get().map_err(tls_error)?, deadline)?)
        } else {
            None
        };
        if let Some(tls) = &tls {
            let certificate = tls.peer_certificates().and_then(|chain| chain.first());
            observer.secured(tls.protocol_version(), certificate.map_or(&[], |certificate| certificate));
        }
        Ok(Arc::new(Link::new(tcp, tls.map(Mutex::new))))
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
        let mut stream = DeadlineStream { tcp, deadline };
        stream.write_all(request.as_bytes()).map_err(timed_out_or(|e| DialError::Proxy(e.to_string())))?;
        let head = read_head(&mut stream).map_err(timed_out_or(|e| DialError::Proxy(e.to_string())))?;
        let (head, rest) = head.ok_or_else(|| DialError::Proxy("its response is not HTTP".into()))?;
        match head.status {
            // The server does not send anything before it is asked.
            200..=299 if rest.is_empty() => Ok(()),
            200..=299 => Err(DialError::Proxy("it sent data of its own through the tunnel".into())),
            _ => {
                stream.deadline = stream.deadline.min(Instant::now() + BODY_TIMEOUT);
                Err(DialError::ProxyRefused(Refusal::read(&head, rest, stream)))
            }
        }
    }

    fn tls_handshake(
        &self,
        tcp: &TcpStream,
        config: Arc<ClientConfig>,
        deadline: Instant,
    ) -> Result<ClientConnection, DialError> {
        let no_name = |_| DialError::Tls {
            why: format!("`{}` is not a valid TLS server name", self.host),
            fault: Some(CertificateError::NotValidForName),
        };
        let name = ServerName::try_from(self.host.clone()).map_err(no_name)?;
        let mut connection = ClientConnection::new(config, name).map_err(tls_error)?;
        let mut stream = DeadlineStream { tcp, deadline };
        while connection.is_handshaking() {
            connection.complete_io(&mut stream).map_err(timed_out_or(|e| {
                let why = e.to_string();
                match e.downcast() {
                    Ok(rustls::Error::InvalidCertificate(fault)) => DialError::Tls { why, fault: Some(fault) },
                    _ => DialError::Tls { why, fault: None },
                }
            }))?;
        }
        Ok(connection)
    }

    fn upgrade(
        &self,
        link: Arc<Link>,
        deadline: Instant,
        observer: &mut dyn DialObserver,
    ) -> Result<ReadHalf, DialError> {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0)
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX));
        let mut reader = LinkReader::new(link.clone(), deadline);
        let failed = |e: io::Error| timed_out_or(|e| DialError::Upgrade(e.to_string()))(e);
        let key = upgrade::request(&self.uri, self.host_header(), &mut reader).map_err(failed)?;
        let (head, rest) = upgrade::response(&mut reader).map_err(failed)?;
        observer.answered(&head.headers);
        if head.status != 101 {
            reader.set_deadline(deadline.min(Instant::now() + BODY_TIMEOUT));
            return Err(DialError::UpgradeRefused(Refusal::read(&head, rest, reader)));
        }
        upgrade::verify(&head, &key).map_err(|what| DialError::Upgrade(what.into()))?;
        link.tcp.set_write_timeout(Some(STALL_TIMEOUT))?;
        // The coordinator speaks first, so `rest` may contain its first frames.
        Ok(ReadHalf { socket: WebSocket::from_partially_read(reader, rest, Role::Client, Some(config)) })
    }
}

fn tls_error(e: rustls::Error) -> DialError {
    DialError::Tls { why: e.to_string(), fault: None }
}

fn timed_out_or(other: impl Fn(io::Error) -> DialError) -> impl Fn(io::Error) -> DialError {
    move |e| match e.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => DialError::TimedOut,
        _ => other(e),
    }
}

/// The messages of the thread of [`Dialer::connect`].
enum Progress {
    Resolved(Vec<SocketAddr>),
    Ended(Result<TcpStream, DialError>),
}

/// A socket whose reads and writes fail after the deadline.
struct DeadlineStream<'a> {
    tcp: &'a TcpStream,
    deadline: Instant,
}

impl DeadlineStream<'_> {
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

impl Read for DeadlineStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        uninterrupted(|| {
            self.tcp.set_read_timeout(Some(self.left()?))?;
            (&mut &*self.tcp).read(buffer)
        })
    }
}

impl Write for DeadlineStream<'_> {
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
