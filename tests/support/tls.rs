//! A certificate authority, and a proxy that speaks TLS with the agent and plain TCP with the scripted coordinator.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection};
use time::{Duration, OffsetDateTime};

use super::Scratch;
use super::acceptor::Acceptor;
use super::descriptors::opened;

/// An authority of this test alone.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// What is wrong with a server's certificate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    None,
    /// It is for another host.
    WrongName,
    Expired,
    /// It holds from a later day on.
    NotYet,
    /// It holds for five days and a half.
    EndsSoon,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("a certificate"))
    }

    /// Writes its certificate for `ca_file`.
    pub fn write(&self, scratch: &Scratch) -> PathBuf {
        scratch.write("ca.pem", self.0.pem())
    }

    fn server_config(&self, flaw: Flaw) -> ServerConfig {
        let name = if flaw == Flaw::WrongName { "elsewhere.example" } else { "localhost" };
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        match flaw {
            Flaw::None | Flaw::WrongName => {}
            Flaw::Expired => {
                (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1))
            }
            Flaw::NotYet => params.not_before = date_time_ymd(2090, 1, 1),
            Flaw::EndsSoon => params.not_after = OffsetDateTime::now_utc() + Duration::hours(5 * 24 + 12),
        }
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = versions.expect("versions").with_no_client_auth();
        builder.with_single_cert(vec![certificate.der().clone()], key).expect("a certificate and its key")
    }
}

/// Takes connections for as long as the test lives.
pub struct TlsProxy {
    acceptor: Acceptor,
    newest: Arc<Mutex<Option<Arc<Pipe>>>>,
}

/// One connection: the TLS session is locked for memory work only, so that both directions flow at once.
struct Pipe {
    agent: TcpStream,
    coordinator: TcpStream,
    tls: Mutex<ServerConnection>,
}

impl TlsProxy {
    pub fn new(authority: &Authority, flaw: Flaw, coordinator: SocketAddr) -> Self {
        let config = Arc::new(authority.server_config(flaw));
        let newest = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&newest);
        let acceptor = Acceptor::new("127.0.0.1:0", move |agent| {
            let coordinator = opened(TcpStream::connect(coordinator), "the scripted coordinator");
            for socket in [&agent, &coordinator] {
                socket.set_nodelay(true).expect("no delay");
            }
            let tls = Mutex::new(ServerConnection::new(Arc::clone(&config)).expect("a TLS session"));
            let pipe = Arc::new(Pipe { agent, coordinator, tls });
            *slot.lock().expect("newest") = Some(Arc::clone(&pipe));
            let up = Arc::clone(&pipe);
            std::thread::spawn(move || up.pump_up());
            std::thread::spawn(move || pipe.pump_down());
        });
        Self { acceptor, newest }
    }

    /// Where the agent is to dial.
    pub fn url(&self) -> String {
        format!("wss://localhost:{}/provider/connect", self.acceptor.address().port())
    }

    /// Gives the newest connection new keys in the middle of whatever flows, and asks the agent for new ones too.
    pub fn update_keys(&self) {
        let pipe = self.newest.lock().expect("newest").clone().expect("a connection");
        let mut tls = pipe.tls.lock().expect("tls");
        tls.refresh_traffic_keys().expect("TLS 1.3");
        pipe.send_records(&mut tls);
    }
}

impl Pipe {
    fn pump_up(&self) {
        let mut buffer = [0; 16 << 10];
        'connection: while let Ok(n @ 1..) = (&self.agent).read(&mut buffer) {
            let mut ciphertext = &buffer[..n];
            while !ciphertext.is_empty() {
                let mut tls = self.tls.lock().expect("tls");
                let read = tls.read_tls(&mut ciphertext).is_ok() && tls.process_new_packets().is_ok();
                let mut plaintext = Vec::new();
                match tls.reader().read_to_end(&mut plaintext) {
                    Err(e) if e.kind() != ErrorKind::WouldBlock => break 'connection,
                    _ => {}
                }
                // The handshake's answers, and alerts.
                self.send_records(&mut tls);
                drop(tls);
                if (&self.coordinator).write_all(&plaintext).is_err() || !read {
                    break 'connection;
                }
            }
        }
        self.end();
    }

    fn pump_down(&self) {
        let mut buffer = [0; 16 << 10];
        while let Ok(n @ 1..) = (&self.coordinator).read(&mut buffer) {
            let mut tls = self.tls.lock().expect("tls");
            tls.writer().write_all(&buffer[..n]).expect("room in the session");
            self.send_records(&mut tls);
        }
        self.end();
    }

    /// Under the lock, so that records leave in the order in which they were made.
    fn send_records(&self, tls: &mut ServerConnection) {
        while tls.wants_write() {
            if tls.write_tls(&mut &self.agent).is_err() {
                return;
            }
        }
    }

    fn end(&self) {
        for socket in [&self.agent, &self.coordinator] {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
