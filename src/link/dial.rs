//! From a URL to a WebSocket, within [`CONNECT_TIMEOUT`]: name, TCP, proxy, TLS, upgrade.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use crossbeam_channel::{Receiver, bounded, never, select};
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig, ClientConnection, ProtocolVersion};
use tungstenite::HandshakeError;
use tungstenite::http::{HeaderMap, HeaderName, HeaderValue, Uri};
use tungstenite::protocol::WebSocketConfig;
use ureq::Proxy;

use super::peer_certificate::CapturingVerifier;
use super::transport::{
    Link, LinkReader, MESSAGE_BYTES_MAX, READ_BUFFER_BYTES, ReadHalf, STALL_TIMEOUT, uninterrupted,
};
use crate::logging::sanitize_for_log;
use crate::net::connect;
use crate::net::tls;
use crate::net::tls::ExtraRoots;
use crate::sys::threads;

/// For all steps together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// The longest head of an answer of HTTP that we read ourselves, in bytes.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// The most headers in it.
const HEADERS_MAX: usize = 128;

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
        /// The first address's error.
        error: io::Error,
    },
    /// The proxy would not.
    #[error("the proxy of HTTPS_PROXY refused to connect: {0}")]
    Proxy(String),
    /// The TLS handshake failed.
    #[error("TLS handshake failed: {why}")]
    Tls {
        /// In words.
        why: String,
        /// What is wrong with the server's certificate, if it is that.
        fault: Option<CertificateError>,
    },
    /// The server does not upgrade to a WebSocket.
    #[error("WebSocket upgrade failed: {0}")]
    Upgrade(String),
    /// The system refused something.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Is told of each step of a dial as it is done: what fails is the one after the last.
pub trait DialObserver {
    /// The name has these addresses.
    fn resolved(&mut self, _addresses: &[SocketAddr]) {}
    /// This address accepted.
    fn connected(&mut self, _address: SocketAddr) {}
    /// The proxy has a connection to the coordinator.
    fn tunnelled(&mut self) {}
    /// The TLS session stands, in this version and by this certificate (DER).
    fn secured(&mut self, _version: Option<ProtocolVersion>, _certificate: &[u8]) {}
    /// The server answered the request to upgrade, whatever it says.
    fn answered(&mut self, _headers: &HeaderMap) {}
}

/// Nobody listens.
impl DialObserver for () {}

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

    /// Host and port that the TCP connection goes to: the proxy's, where one is used.
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

    /// Connects. `opened` is given the socket as soon as there is one, so that it can be closed from elsewhere;
    /// `stop` disconnects when the agent is to stop.
    ///
    /// # Errors
    /// By step.
    pub fn dial(&self, stop: &Receiver<()>, opened: impl FnOnce(TcpStream)) -> Result<ReadHalf, DialError> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let tcp = self.connect(deadline, stop, &mut ())?;
        opened(tcp.try_clone()?);
        self.upgrade(self.link(tcp, deadline, &mut ())?, deadline, &mut ())
    }

    /// Connects, and tells of each step.
    ///
    /// # Errors
    /// By step.
    pub fn dial_observed(&self, steps: &mut dyn DialObserver) -> Result<ReadHalf, DialError> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let tcp = self.connect(deadline, &never(), steps)?;
        self.upgrade(self.link(tcp, deadline, steps)?, deadline, steps)
    }

    /// Asks the server for an ordinary HTTP answer, over a connection of its own, and returns its headers.
    ///
    /// # Errors
    /// By step.
    pub fn fetch_headers(&self, time: Duration) -> Result<HeaderMap, DialError> {
        let deadline = Instant::now() + time;
        let link = self.link(self.connect(deadline, &never(), &mut ())?, deadline, &mut ())?;
        let mut stream = LinkReader::new(link, deadline);
        let host = self.uri.authority().map_or(self.host.as_str(), |a| a.as_str());
        let host = host.rsplit('@').next().unwrap_or_default();
        write!(stream, "HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
        stream.flush()?;
        let head =
            read_head(&mut stream)?.ok_or_else(|| DialError::Upgrade("the server does not answer as HTTP".into()));
        Ok(head?.headers)
    }

    /// The certificate that the server presents, believed or not, DER; over a connection of its own, which ends there.
    pub fn fetch_peer_certificate(&self, time: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + time;
        let tcp = self.connect(deadline, &never(), &mut ()).ok()?;
        self.connect_proxy(&tcp, deadline, &mut ()).ok()?;
        let onlooker = Arc::new(CapturingVerifier::default());
        // Fails, as it must.
        let _ = self.tls_handshake(&tcp, onlooker.clone().config().ok()?, deadline);
        Some(onlooker.captured()).filter(|der| !der.is_empty())
    }

    /// Name resolution cannot be bounded or interrupted, so it happens in a thread that may be left behind.
    fn connect(
        &self,
        deadline: Instant,
        stop: &Receiver<()>,
        steps: &mut dyn DialObserver,
    ) -> Result<TcpStream, DialError> {
        let (host, port) = self.peer();
        let host = host.to_owned();
        let progress = Arc::new(Mutex::new(Progress { resolved: None, opened: Err(DialError::TimedOut) }));
        // Rung once there are addresses, and gone at the end, whatever it is.
        let (parker, rung) = bounded::<()>(1);
        let of_thread = progress.clone();
        threads::spawn("dial", move || {
            let opened = match (host.as_str(), port).to_socket_addrs() {
                Ok(addresses) => {
                    let addresses: Vec<SocketAddr> = addresses.collect();
                    Progress::of(&of_thread).resolved = Some(addresses.clone());
                    let _ = parker.send(());
                    connect::connect_any(&addresses, Some(deadline)).map_err(|error| DialError::Connect {
                        host,
                        port,
                        error,
                    })
                }
                Err(error) => Err(DialError::Resolve { host, error }),
            };
            Progress::of(&of_thread).opened = opened;
        })?;
        loop {
            let ended = select! {
                recv(rung) -> ring => ring.is_err(),
                recv(stop) -> _ => return Err(DialError::Stopping),
                default(deadline.saturating_duration_since(Instant::now())) => return Err(DialError::TimedOut),
            };
            let mut progress = Progress::of(&progress);
            if let Some(addresses) = progress.resolved.take() {
                steps.resolved(&addresses);
            }
            if ended {
                let opened = std::mem::replace(&mut progress.opened, Err(DialError::TimedOut));
                // One that is closed again already has no address; the next step finds out.
                if let Some(address) = opened.as_ref().ok().and_then(|tcp| tcp.peer_addr().ok()) {
                    steps.connected(address);
                }
                return opened;
            }
        }
    }

    /// Through the proxy, where there is to be one.
    fn connect_proxy(&self, tcp: &TcpStream, deadline: Instant, steps: &mut dyn DialObserver) -> Result<(), DialError> {
        tcp.set_nodelay(true)?;
        tcp.set_write_timeout(Some(CONNECT_TIMEOUT))?;
        if let Some(proxy) = &self.proxy {
            self.tunnel(tcp, proxy, deadline)?;
            steps.tunnelled();
        }
        Ok(())
    }

    /// Prepared, and under TLS where it is to be.
    fn link(&self, tcp: TcpStream, deadline: Instant, steps: &mut dyn DialObserver) -> Result<Arc<Link>, DialError> {
        self.connect_proxy(&tcp, deadline, steps)?;
        let tls = if self.secure { Some(self.tls_handshake(&tcp, self.tls_config()?, deadline)?) } else { None };
        if let Some(tls) = &tls {
            let certificate = tls.peer_certificates().and_then(|chain| chain.first());
            steps.secured(tls.protocol_version(), certificate.map_or(&[], |certificate| certificate));
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
        let head = head.ok_or_else(|| DialError::Proxy("it does not answer as an HTTP proxy".into()))?;
        match head.status {
            200..=299 => Ok(()),
            _ => Err(DialError::Proxy(sanitize_for_log(&head.status_line))),
        }
    }

    fn tls_config(&self) -> Result<Arc<ClientConfig>, DialError> {
        if let Some(config) = self.tls.get() {
            return Ok(config.clone());
        }
        let config = tls::client_config(&self.roots).map_err(tls_error)?;
        Ok(self.tls.get_or_init(|| config).clone())
    }

    fn tls_handshake(
        &self,
        tcp: &TcpStream,
        config: Arc<ClientConfig>,
        deadline: Instant,
    ) -> Result<ClientConnection, DialError> {
        let no_name = |_| DialError::Tls {
            why: format!("`{}` is not a name that a certificate can have", self.host),
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

    fn upgrade(&self, link: Arc<Link>, deadline: Instant, steps: &mut dyn DialObserver) -> Result<ReadHalf, DialError> {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0)
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX));
        let reader = LinkReader::new(link.clone(), deadline);
        let socket = match tungstenite::client::client_with_config(&self.uri, reader, Some(config)) {
            Ok((socket, response)) => {
                steps.answered(response.headers());
                socket
            }
            Err(HandshakeError::Interrupted(_)) => return Err(DialError::TimedOut),
            Err(HandshakeError::Failure(tungstenite::Error::Io(e))) => {
                return Err(timed_out_or(|e| DialError::Upgrade(e.to_string()))(e));
            }
            Err(HandshakeError::Failure(tungstenite::Error::Http(response))) => {
                steps.answered(response.headers());
                return Err(DialError::Upgrade(format!("the server answered HTTP {}", response.status())));
            }
            Err(HandshakeError::Failure(e)) => return Err(DialError::Upgrade(e.to_string())),
        };
        link.tcp.set_write_timeout(Some(STALL_TIMEOUT))?;
        // Kept as it is: its buffer may hold what came right behind the upgrade.
        Ok(ReadHalf { socket })
    }
}

/// The head of an HTTP answer.
struct Head {
    status: u16,
    status_line: String,
    headers: HeaderMap,
}

/// Reads byte by byte, for what follows the head belongs to somebody else; `None` if the answer is not HTTP.
fn read_head(stream: &mut impl Read) -> io::Result<Option<Head>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte)? == 0 || head.len() >= HEAD_BYTES_MAX {
            return Ok(None);
        }
        head.push(byte[0]);
    }
    Ok(parse_head(&head))
}

fn parse_head(head: &[u8]) -> Option<Head> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    response.parse(head).ok()?;
    let header = |header: &httparse::Header<'_>| {
        Some((HeaderName::from_bytes(header.name.as_bytes()).ok()?, HeaderValue::from_bytes(header.value).ok()?))
    };
    Some(Head {
        status: response.code?,
        status_line: String::from_utf8_lossy(head).lines().next()?.to_owned(),
        headers: response.headers.iter().filter_map(header).collect(),
    })
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

/// How far the thread of a dial has come.
struct Progress {
    resolved: Option<Vec<SocketAddr>>,
    opened: Result<TcpStream, DialError>,
}

impl Progress {
    fn of(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
        progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A socket whose reads and writes must all be over by the deadline.
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
