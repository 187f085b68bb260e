//! A TCP relay that can cut, stall and trickle the bytes.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, Weak};

use super::acceptor::Acceptor;
use super::descriptors::opened;
use super::ms;

#[derive(Clone, Copy, PartialEq)]
pub enum Mode {
    Pass,
    /// Discards the bytes of both sides, like a dead link behind a middlebox.
    Swallow,
    /// Relays nothing until the mode changes, then all of it, like TCP after an interruption of the link.
    Stall,
    /// Relays one byte per write, each in its own segment.
    Trickle,
}

pub struct FaultProxy {
    acceptor: Acceptor,
    shared: Arc<Shared>,
}

struct Shared {
    target: SocketAddr,
    mode: Mutex<Mode>,
    changed: Condvar,
    open: Mutex<Vec<Weak<Connection>>>,
}

struct Connection {
    near: TcpStream,
    far: TcpStream,
}

impl FaultProxy {
    pub fn to(target: SocketAddr) -> Self {
        let shared =
            Arc::new(Shared { target, mode: Mutex::new(Mode::Pass), changed: Condvar::new(), open: Mutex::default() });
        let accepting = Arc::clone(&shared);
        let acceptor = Acceptor::new("127.0.0.1:0", move |stream| accepting.relay(stream));
        Self { acceptor, shared }
    }

    pub fn address(&self) -> SocketAddr {
        self.acceptor.address()
    }

    pub fn set(&self, mode: Mode) {
        *self.shared.mode.lock().expect("mode") = mode;
        self.shared.changed.notify_all();
    }

    /// Closes all connections.
    pub fn cut(&self) {
        let open = std::mem::take(&mut *self.shared.open.lock().expect("connections"));
        for connection in open.iter().filter_map(Weak::upgrade) {
            let _ = connection.near.shutdown(Shutdown::Both);
            let _ = connection.far.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.acceptor.stop();
        self.cut();
        self.set(Mode::Pass);
    }
}

impl Shared {
    fn relay(self: &Arc<Self>, near: TcpStream) {
        let far = match TcpStream::connect(self.target) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => return,
            result => opened(result, "the target of the proxy"),
        };
        let connection = Arc::new(Connection { near, far });
        let mut open = self.open.lock().expect("connections");
        open.retain(|connection| connection.strong_count() > 0);
        open.push(Arc::downgrade(&connection));
        drop(open);
        let (up, down) = ((Arc::clone(self), Arc::clone(&connection)), (Arc::clone(self), connection));
        std::thread::spawn(move || up.0.pump(&up.1.near, &up.1.far));
        std::thread::spawn(move || down.0.pump(&down.1.far, &down.1.near));
    }

    fn pump(&self, mut from: &TcpStream, to: &TcpStream) {
        let _ = to.set_nodelay(true);
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if self.pass_on(&buffer[..n], to).is_err() {
                break;
            }
        }
        self.passing_mode();
        let _ = to.shutdown(Shutdown::Write);
    }

    /// The mode, once it is not `Stall`.
    fn passing_mode(&self) -> Mode {
        let mode = self.mode.lock().expect("mode");
        *self.changed.wait_while(mode, |mode| *mode == Mode::Stall).expect("mode")
    }

    /// Relays as the mode says, which may change meanwhile.
    fn pass_on(&self, mut bytes: &[u8], mut to: &TcpStream) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.passing_mode() {
                Mode::Swallow => break,
                Mode::Trickle => {
                    std::thread::sleep(ms(1));
                    to.write_all(&bytes[..1])?;
                    bytes = &bytes[1..];
                }
                Mode::Pass | Mode::Stall => {
                    to.write_all(bytes)?;
                    break;
                }
            }
        }
        Ok(())
    }
}
