//! Wraps `ureq`'s transport to record the events of a connection, and to limit reads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ureq::Error;
use ureq::unversioned::transport::{
    Buffers, ConnectProxyConnector, ConnectionDetails, Connector, NextTimeout, Transport,
};

use super::tcp::TcpConnector;
use super::tls::TlsConnector;
use crate::net::tls::ExtraRoots;

/// Time after a request within which the end of a kept-alive connection counts as the end of an idle one. A server that ends it
/// later has received the request and may have run it; one that ends it earlier has run little of it.
const CLOSE_RACE_MAX: Duration = Duration::from_secs(1);

/// The events on an agent's connection since the agent was leased.
#[derive(Debug, Default)]
pub struct ConnectionMonitor {
    opened: AtomicBool,
    received: AtomicBool,
    broken: AtomicBool,
    /// When the last part of the request was written.
    sent: Mutex<Option<Instant>>,
    /// The time at which reads time out.
    limit: Mutex<Option<Instant>>,
}

impl ConnectionMonitor {
    /// Clears the record, before the next exchange.
    pub fn reset(&self) {
        *self.limit() = None;
        *self.sent() = None;
        for flag in [&self.opened, &self.received, &self.broken] {
            flag.store(false, Ordering::Relaxed);
        }
    }

    /// Whether a failed exchange used a kept-alive connection that ended without a byte, at once: the server has closed the
    /// connection before it received the request, or at the same moment. Called when the exchange fails.
    pub fn reused_dead_connection(&self) -> bool {
        let was_sent_before = |sent: Instant| sent.elapsed() >= CLOSE_RACE_MAX;
        !self.opened.load(Ordering::Relaxed)
            && !self.received.load(Ordering::Relaxed)
            && !self.sent().is_some_and(was_sent_before)
    }

    /// Whether the connection broke, as opposed to being closed in order. `ureq` treats a reset as the end of a body that is
    /// delimited by the end of the connection.
    pub fn has_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Limits the time for the rest of the response.
    pub fn limit_reads_to(&self, time: Duration) {
        *self.limit() = Instant::now().checked_add(time);
    }

    fn sent(&self) -> MutexGuard<'_, Option<Instant>> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limit(&self) -> MutexGuard<'_, Option<Instant>> {
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connects to a backend; shared by all of its agents.
pub type SharedConnector = Arc<dyn Connector<(), Out = Box<dyn Transport>>>;

/// Connects without TLS or proxy. A separate chain, because the unused connectors would cost each stream a third of its stack
/// and a kilobyte of heap.
pub fn plain_connector() -> SharedConnector {
    Arc::new(().chain(TcpConnector).chain(BoxTransport))
}

/// Connects with TLS for `https` URLs, and through the proxy if one is configured. Trusts `roots` as well as the public web
/// roots.
pub fn connector(roots: ExtraRoots) -> SharedConnector {
    Arc::new(().chain(ConnectProxyConnector::default()).chain(TcpConnector).chain(TlsConnector::new(roots)))
}

/// Ends a chain: boxes its transport, so that all chains have the same type.
#[derive(Debug)]
struct BoxTransport;

impl<In: Transport> Connector<In> for BoxTransport {
    type Out = Box<dyn Transport>;

    fn connect(&self, _: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, Error> {
        Ok(chained.map(|transport| Box::new(transport) as Self::Out))
    }
}

/// Connects, and reports to a [`ConnectionMonitor`].
#[derive(Debug)]
pub struct MonitoredConnector {
    inner: SharedConnector,
    monitor: Arc<ConnectionMonitor>,
}

impl MonitoredConnector {
    pub fn new(inner: SharedConnector, monitor: Arc<ConnectionMonitor>) -> MonitoredConnector {
        MonitoredConnector { inner, monitor }
    }
}

impl Connector<()> for MonitoredConnector {
    type Out = MonitoredTransport;

    fn connect(&self, details: &ConnectionDetails, chained: Option<()>) -> Result<Option<MonitoredTransport>, Error> {
        self.monitor.opened.store(true, Ordering::Relaxed);
        let inner = self.inner.connect(details, chained)?;
        Ok(inner.map(|inner| MonitoredTransport { inner, monitor: self.monitor.clone() }))
    }
}

/// A connection that reports to its [`ConnectionMonitor`].
#[derive(Debug)]
pub struct MonitoredTransport {
    inner: Box<dyn Transport>,
    monitor: Arc<ConnectionMonitor>,
}

impl Transport for MonitoredTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let result = self.inner.transmit_output(amount, timeout);
        *self.monitor.sent() = Some(Instant::now());
        result
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let left = self.monitor.limit().map(|until| until.saturating_duration_since(Instant::now()));
        let after = left.map_or(timeout.after, |left| timeout.after.min(left.into()));
        let result = self.inner.await_input(NextTimeout { after, ..timeout });
        match &result {
            Ok(true) => self.monitor.received.store(true, Ordering::Relaxed),
            Ok(false) => {}
            Err(_) => self.monitor.broken.store(true, Ordering::Relaxed),
        }
        result
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }

    fn is_tls(&self) -> bool {
        self.inner.is_tls()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, BufRead, BufReader, Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::thread;

    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use rustls::version::{TLS12, TLS13};
    use rustls::{HandshakeKind, ServerConfig, ServerConnection, StreamOwned, SupportedProtocolVersion};
    use ureq::Agent;

    use super::super::resolver::SharedResolver;
    use super::*;

    /// Echoes the body of each request, in chunks of `chunk` bytes, until the client closes the connection.
    fn echo(stream: impl Read + Write, chunk: usize) -> io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let mut length = 0;
            loop {
                let mut line = String::new();
                if stream.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().expect("a length");
                }
                if line == "\r\n" {
                    break;
                }
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body)?;
            let out = stream.get_mut();
            out.write_all(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            for piece in body.chunks(chunk) {
                write!(out, "{:x}\r\n", piece.len())?;
                out.write_all(piece)?;
                out.write_all(b"\r\n")?;
            }
            out.write_all(b"0\r\n\r\n")?;
            out.flush()?;
        }
    }

    /// Serves one connection after another.
    fn serve(each: impl Fn(TcpStream) -> io::Result<()> + Send + 'static) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let address = listener.local_addr().expect("an address");
        thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                let _ = each(socket);
            }
        });
        address
    }

    fn body(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i * i / 7) as u8).collect()
    }

    fn assert_echoed(agent: &Agent, monitor: &ConnectionMonitor, url: &str) {
        for (nth, length) in [0, 1, 511, 512, 513, 16 << 10, (16 << 10) + 1, 3 << 20].into_iter().enumerate() {
            monitor.reset();
            let sent = body(length);
            let response = agent.post(url).send(&sent[..]).expect("an answer");
            let mut got = Vec::new();
            response.into_body().into_reader().read_to_end(&mut got).expect("the body");
            assert!(got == sent, "{length} bytes became {}", got.len());
            assert_eq!(monitor.opened.load(Ordering::Relaxed), nth == 0, "one connection for all");
        }
    }

    #[test]
    fn transport_carries_bodies_of_any_length_and_keeps_the_connection() {
        for chunk in [1000, 100_000] {
            let address = serve(move |socket| echo(socket, chunk));
            let monitor = Arc::new(ConnectionMonitor::default());
            let agent = agent(MonitoredConnector::new(plain_connector(), monitor.clone()));
            assert_echoed(&agent, &monitor, &format!("http://localhost:{}/", address.port()));
        }
    }

    /// A server with a certificate, and a connector that trusts it.
    fn serve_tls(
        version: &'static SupportedProtocolVersion,
        algorithm: &'static rcgen::SignatureAlgorithm,
        each: impl Fn(StreamOwned<ServerConnection, TcpStream>) -> io::Result<()> + Send + 'static,
    ) -> (String, SharedConnector) {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
        let key = KeyPair::generate_for(algorithm).expect("a key");
        let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let server = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[version])
            .expect("a version")
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .expect("a certificate and its key");
        let server = Arc::new(server);
        let address = serve(move |socket| {
            let session = ServerConnection::new(server.clone()).expect("a session");
            each(StreamOwned::new(session, socket))
        });
        let connector = connector(issuer.der().clone().into());
        (format!("https://localhost:{}/", address.port()), connector)
    }

    #[test]
    fn tls_transport_carries_bodies_of_any_length_in_either_version() {
        for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
            for version in [&TLS12, &TLS13] {
                let (url, connector) = serve_tls(version, algorithm, |stream| echo(stream, 5000));
                let monitor = Arc::new(ConnectionMonitor::default());
                assert_echoed(&agent(MonitoredConnector::new(connector, monitor.clone())), &monitor, &url);
            }
        }
    }

    #[test]
    fn tls_sessions_are_resumed_by_other_agents_of_the_backend() {
        for version in [&TLS12, &TLS13] {
            let (seen, kinds) = crossbeam_channel::unbounded();
            let (url, shared) = serve_tls(version, &rcgen::PKCS_ECDSA_P256_SHA256, move |mut stream| {
                let end = echo(&mut stream, 5000);
                let _ = seen.send(stream.conn.handshake_kind());
                end
            });
            for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
                let agent = agent(MonitoredConnector::new(shared.clone(), Arc::default()));
                let request = ureq::http::Request::post(&url).body("x").expect("a request");
                let request = agent.configure_request(request).timeout_global(Some(Duration::from_secs(60))).build();
                let answer = agent.run(request).expect("an answer").into_body().read_to_string();
                assert_eq!(answer.expect("a body"), "x");
                drop(agent);
                assert_eq!(kinds.recv().expect("a connection"), Some(kind));
            }
        }
    }

    #[test]
    fn tls_response_that_precedes_the_whole_request_is_received() {
        let (url, connector) = serve_tls(&TLS13, &rcgen::PKCS_ECDSA_P256_SHA256, |mut stream| {
            stream.sock.set_nodelay(true)?;
            stream.read_exact(&mut [0; 1000])?;
            stream.write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")?;
            // Closing with this much unread data resets the connection.
            stream.flush()
        });
        let agent = agent(MonitoredConnector::new(connector, Arc::default()));
        let answer = agent.post(url).send(&body(20 << 20)[..]);
        assert!(matches!(answer, Err(Error::StatusCode(413))), "{answer:?}");
    }

    #[test]
    fn response_head_that_is_too_large_is_reported_as_such() {
        let address = serve(|mut socket| {
            socket.write_all(b"HTTP/1.1 200 OK\r\n")?;
            loop {
                socket.write_all(&[b'x'; 1000])?;
            }
        });
        let agent = agent(MonitoredConnector::new(plain_connector(), Arc::default()));
        let answer = agent.get(format!("http://{address}/")).call();
        assert!(matches!(answer, Err(Error::LargeResponseHeader(..))), "{answer:?}");
    }

    #[test]
    fn tls_handshake_without_a_response_ends_at_the_timeout_or_the_cancel() {
        let (sender, begun) = crossbeam_channel::unbounded();
        let address = serve(move |mut socket| {
            socket.read_exact(&mut [0; 5])?;
            let _ = sender.send(());
            socket.read_to_end(&mut Vec::new()).map(drop)
        });
        let silent = || agent(MonitoredConnector::new(connector(ExtraRoots::default()), Arc::default()));
        let ask = |agent: &Agent, time| {
            let request = ureq::http::Request::get(format!("https://{address}/")).body(()).expect("a request");
            agent.run(agent.configure_request(request).timeout_global(Some(time)).build())
        };
        let late = ask(&silent(), Duration::from_millis(100));
        assert!(matches!(late, Err(Error::Timeout(ureq::Timeout::Global))), "{late:?}");
        let _ = begun.try_recv();
        let agent = silent();
        thread::scope(|scope| {
            let asking = scope.spawn({
                let (agent, ask) = (agent.clone(), &ask);
                move || ask(&agent, Duration::from_secs(60))
            });
            begun.recv_timeout(Duration::from_secs(10)).expect("a hello");
            let cancelled = Instant::now();
            agent.shutdown();
            let answer = asking.join().expect("no panic");
            assert!(matches!(answer, Err(Error::Io(_))), "{answer:?}");
            assert!(cancelled.elapsed() < Duration::from_secs(5));
        });
    }

    #[test]
    fn tls_connection_cut_without_close_notify_counts_as_broken() {
        for version in [&TLS12, &TLS13] {
            let (url, connector) = serve_tls(version, &rcgen::PKCS_ECDSA_P256_SHA256, |mut stream| {
                let mut head = BufReader::new(&mut stream).lines();
                while head.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
                stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf")
            });
            let monitor = Arc::new(ConnectionMonitor::default());
            let answer = agent(MonitoredConnector::new(connector, monitor.clone())).get(url).call().expect("an answer");
            let body = answer.into_body().read_to_string();
            assert!(body.is_err() || monitor.has_broken(), "{body:?}");
        }
    }

    fn agent(connector: MonitoredConnector) -> Agent {
        Agent::with_parts(Agent::config_builder().build(), connector, SharedResolver)
    }
}
