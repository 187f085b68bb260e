//! The listening half of the scripted coordinator: accepts the agent's connections and upgrades them to [`Session`]s.

use std::io::{self, BufReader, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};

use super::acceptor::Acceptor;
use super::connection::Connection;
use super::http::{Request, read_request};
use super::session::Session;
use super::websocket::WebSocket;
use super::{SOON, read};

pub struct Coordinator {
    acceptor: Acceptor,
    dialled: Receiver<Dialled>,
}

/// A new connection of the agent.
pub struct Dialled {
    pub stream: TcpStream,
    pub at: Instant,
}

impl Coordinator {
    pub fn new() -> Self {
        Self::on("127.0.0.1:0")
    }

    pub fn on(address: &str) -> Self {
        let (sender, dialled) = unbounded();
        let acceptor = Acceptor::new(address, move |stream| {
            // The receiver is dropped before the acceptor.
            let _ = sender.send(Dialled { stream, at: Instant::now() });
        });
        Self { acceptor, dialled }
    }

    /// A coordinator that handles each connection with the same function, on its own thread.
    pub fn played(part: impl Fn(Dialled) + Send + Sync + 'static) -> Self {
        let mut coordinator = Self::new();
        let dialled = std::mem::replace(&mut coordinator.dialled, unbounded().1);
        let part = Arc::new(part);
        std::thread::spawn(move || {
            // Ends with the acceptor.
            for dialled in dialled {
                let part = Arc::clone(&part);
                std::thread::spawn(move || part(dialled));
            }
        });
        coordinator
    }

    pub fn address(&self) -> SocketAddr {
        self.acceptor.address()
    }

    pub fn url(&self) -> String {
        format!("ws://{}/provider/connect", self.address())
    }

    /// The next connection.
    pub fn dialled(&self, within: Duration) -> Dialled {
        self.try_dialled(within).unwrap_or_else(|| panic!("the agent did not dial the coordinator within {within:?}"))
    }

    /// The next connection, if there is one within this time.
    pub fn try_dialled(&self, within: Duration) -> Option<Dialled> {
        self.dialled.recv_timeout(within).ok()
    }

    /// Panics if the agent dials within `time`.
    pub fn assert_not_dialled(&self, time: Duration) {
        assert!(self.dialled.recv_timeout(time).is_err(), "the agent dialled, and must not within {time:?}");
    }

    /// The next connection, upgraded; no frame has been sent yet.
    pub fn accept(&self) -> Session {
        self.dialled(SOON).upgrade()
    }

    /// The next connection, after its handshake.
    pub fn session(&self) -> Session {
        self.accept().authenticate(None)
    }
}

impl Dialled {
    /// Reads the upgrade request.
    pub fn request(&self) -> Request {
        self.try_request().expect("an upgrade request")
    }

    /// Reads a request, unless the connection ends without one.
    pub fn request_if_any(&self) -> Option<Request> {
        self.try_request().ok()
    }

    fn try_request(&self) -> io::Result<Request> {
        self.stream.set_read_timeout(Some(SOON))?;
        // The client sends nothing more before the response, so that the reader's buffer is empty when it is dropped.
        let request = read_request(&mut BufReader::new(&self.stream), 0, 0)?;
        request.ok_or_else(|| ErrorKind::UnexpectedEof.into())
    }

    /// Upgrades; fails if the link breaks.
    pub fn try_upgrade(self) -> io::Result<Session> {
        self.accept(b"")
    }

    pub fn upgrade(self) -> Session {
        self.upgrade_with(b"")
    }

    /// Upgrades, with `more` in the same write as the response.
    pub fn upgrade_with(self, more: &[u8]) -> Session {
        self.accept(more).unwrap_or_else(|e| panic!("failed to upgrade the agent's connection: {e}"))
    }

    fn accept(self, more: &[u8]) -> io::Result<Session> {
        self.stream.set_read_timeout(Some(SOON))?;
        let socket = WebSocket::accept(Connection::new(self.stream, None)?, more)?;
        Ok(Session::new(socket, self.at))
    }

    /// Reads without answering; returns when the agent closed the connection.
    pub fn drain_until_hang_up(&self, within: Duration) -> Instant {
        self.stream.set_read_timeout(Some(within)).expect("a read timeout");
        loop {
            match read(&self.stream, &mut [0; 4096]) {
                Ok(1..) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => panic!("the agent did not hang up within {within:?}"),
                _ => return Instant::now(),
            }
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap_or_else(|e| panic!("failed to answer the agent's dial: {e}"));
    }
}
