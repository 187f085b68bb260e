//! A certificate authority, and a proxy that speaks TLS with the agent and plain TCP with the scripted coordinator.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration, OffsetDateTime};

use super::Scratch;
use super::acceptor::Acceptor;
use super::connection::Connection;
use super::descriptors::opened;

/// A certificate authority of one test.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// The fault of a server's certificate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    None,
    /// It names another host.
    WrongName,
    Expired,
    /// It is not valid yet.
    NotYet,
    /// It expires in five and a half days.
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

    /// For a server on loopback.
    pub fn server_config(&self, flaw: Flaw) -> Arc<ServerConfig> {
        let names = if flaw == Flaw::WrongName { &["elsewhere.example"][..] } else { &["localhost", "127.0.0.1"] };
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
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
        Arc::new(builder.with_single_cert(vec![certificate.der().clone()], key).expect("a certificate and its key"))
    }
}

/// Speaks TLS with the agent and plain TCP with a scripted peer.
pub struct TlsProxy {
    acceptor: Acceptor,
    newest: Arc<Mutex<Option<Arc<Connection>>>>,
}

impl TlsProxy {
    pub fn new(authority: &Authority, flaw: Flaw, target: SocketAddr) -> Self {
        let config = authority.server_config(flaw);
        let newest = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&newest);
        let acceptor = Acceptor::new("127.0.0.1:0", move |stream| {
            let plain = opened(TcpStream::connect(target), "a connection to the target of the proxy");
            plain.set_nodelay(true).expect("no delay");
            let (agent, plain) = (Connection::new(stream, Some(&config)).expect("a TLS session"), Arc::new(plain));
            let agent = Arc::new(agent);
            *slot.lock().expect("newest") = Some(Arc::clone(&agent));
            let up = (Arc::clone(&agent), Arc::clone(&plain));
            std::thread::spawn(move || relay_up(&up.0, &up.1));
            std::thread::spawn(move || relay_down(&plain, &agent));
        });
        Self { acceptor, newest }
    }

    /// Where the agent is to dial.
    pub fn url(&self) -> String {
        format!("wss://localhost:{}/provider/connect", self.acceptor.address().port())
    }

    /// Changes the keys of the newest connection, both ways.
    pub fn update_keys(&self) {
        self.newest.lock().expect("newest").as_ref().expect("a connection").update_keys();
    }
}

fn relay_up(agent: &Connection, mut plain: &TcpStream) {
    let (mut buffer, mut bytes) = (vec![0; 16 << 10], Vec::new());
    loop {
        let read = agent.read(&mut buffer, &mut bytes);
        // Bytes that were decrypted before an error are relayed, too.
        if plain.write_all(&bytes).is_err() || read.is_err() {
            break;
        }
        bytes.clear();
    }
    close(agent, plain);
}

fn relay_down(mut plain: &TcpStream, agent: &Connection) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(n @ 1..) = plain.read(&mut buffer)
        && agent.write(&buffer[..n]).is_ok()
    {}
    close(agent, plain);
}

fn close(agent: &Connection, plain: &TcpStream) {
    agent.close();
    let _ = plain.shutdown(Shutdown::Both);
}
