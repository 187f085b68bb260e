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
use tungstenite::HandshakeError;
use tungstenite::http::{HeaderMap, HeaderName, HeaderValue, Uri};
use tungstenite::protocol::WebSocketConfig;
use ureq::Proxy;

use super::peer_certificate::CapturingVerifier;
use super::transport::{
    Link, LinkReader, MESSAGE_BYTES_MAX, READ_BUFFER_BYTES, ReadHalf, STALL_TIMEOUT, uninterrupted,
};
use crate::logging::sanitize_for_log;
use crate::net::resolve::{ResolveError, resolve};
use crate::net::tls::{ExtraRoots, LazyClientConfig};
use crate::net::{connect, proxy};
use crate::sys::threads;

/// Time limit for all steps together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// Maximum length of the head of an HTTP response, in bytes.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Maximum number of headers in a response: as many as fit, since the shortest, `a:` and a line feed, takes 3 bytes.
const HEADERS_MAX: usize = HEAD_BYTES_MAX / 3;

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
    /// The proxy refused the connection.
    #[error("the proxy in HTTPS_PROXY refused the connection: {0}")]
    Proxy(String),
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
    /// A system call failed.
    #[error(transparent)]
    System(#[from] io::Error),
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
        let host = self.uri.authority().map_or(self.host.as_str(), |a| a.as_str());
        let host = host.rsplit('@').next().unwrap_or_default();
        write!(stream, "HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
        stream.flush()?;
        match read_head(&mut stream)? {
            Some(head) => Ok(head.headers),
            None => Err(DialError::Upgrade("the server's response is not HTTP".into())),
        }
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
        let head = head.ok_or_else(|| DialError::Proxy("its response is not HTTP".into()))?;
        match head.status {
            200..=299 => Ok(()),
            _ => Err(DialError::Proxy(sanitize_for_log(&head.status_line))),
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
        let reader = LinkReader::new(link.clone(), deadline);
        let socket = match tungstenite::client::client_with_config(&self.uri, reader, Some(config)) {
            Ok((socket, response)) => {
                observer.answered(response.headers());
                socket
            }
            Err(HandshakeError::Interrupted(_)) => return Err(DialError::TimedOut),
            Err(HandshakeError::Failure(tungstenite::Error::Io(e))) => {
                return Err(timed_out_or(|e| DialError::Upgrade(e.to_string()))(e));
            }
            Err(HandshakeError::Failure(tungstenite::Error::Http(response))) => {
                observer.answered(response.headers());
                return Err(DialError::Upgrade(format!("the server answered HTTP {}", response.status())));
            }
            Err(HandshakeError::Failure(e)) => return Err(DialError::Upgrade(e.to_string())),
        };
        link.tcp.set_write_timeout(Some(STALL_TIMEOUT))?;
        // The same WebSocket is kept, because its buffer may contain data that followed the upgrade.
        Ok(ReadHalf { socket })
    }
}

/// The head of an HTTP response.
struct Head {
    status: u16,
    status_line: String,
    headers: HeaderMap,
}

/// Reads byte by byte, because data after the head belongs to the next protocol. `None` if the response is not HTTP.
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

/// Only the status line must be valid: some proxies send malformed headers. Those are left out.
fn parse_head(head: &[u8]) -> Option<Head> {
    let mut headers = vec![httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    // After an error, `response` has the status if that was valid, and `headers` are those before the error.
    let _ = httparse::ParserConfig::default()
        .allow_spaces_after_header_name_in_responses(true)
        .allow_obsolete_multiline_headers_in_responses(true)
        .ignore_invalid_headers_in_responses(true)
        .parse_response(&mut response, head);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn head_of(text: &[u8]) -> Option<Head> {
        read_head(&mut &*text).expect("a slice can be read")
    }

    #[test]
    fn read_head_needs_a_valid_status_line_only() {
        let many = b"a:b\r\n".repeat(1000);
        let headers: [&[u8]; 8] = [
            b"",
            b"Proxy-Agent : x\r\n",
            b"Via: a\r\n\tb\r\n",
            b" folded\r\n",
            b"no colon\r\n",
            b"Pr\xe9sent: x\r\n",
            b"X: \x01\r\n",
            &many,
        ];
        for header in headers {
            let text = [b"HTTP/1.1 200 OK\r\n", header, b"Date: today\r\n\r\n"].concat();
            let head = head_of(&text).unwrap_or_else(|| panic!("refused: {}", header.escape_ascii()));
            assert_eq!((head.status, head.status_line.as_str()), (200, "HTTP/1.1 200 OK"));
            assert_eq!(head.headers.get("date").map(HeaderValue::as_bytes), Some(&b"today"[..]));
        }
        assert_eq!(head_of(b"HTTP/1.0 407 No\r\nDate: today\r\nX: \0\r\n\r\n").map(|head| head.status), Some(407));
        assert!(head_of(b"SSH-2.0-OpenSSH_9.6\r\n\r\n").is_none());
    }

    #[test]
    fn read_head_is_bounded() {
        let of_length = |length: usize| {
            let start = b"HTTP/1.1 200 OK\r\n".to_vec();
            let filler = vec![b'a'; length - start.len() - 6];
            head_of(&[start, b"a:".to_vec(), filler, b"\r\n\r\n".to_vec()].concat())
        };
        assert!(of_length(HEAD_BYTES_MAX).is_some());
        assert!(of_length(HEAD_BYTES_MAX + 1).is_none());
    }

    #[test]
    fn read_head_takes_as_many_headers_as_fit() {
        let start = b"HTTP/1.1 200 OK\n";
        let headers = b"a:\n".repeat((HEAD_BYTES_MAX - start.len() - 20) / 3);
        let head = head_of(&[&start[..], &headers, b"Date: now\r\n\r\n"].concat()).expect("HTTP");
        assert!(head.headers.contains_key("date"));
    }
}
