//! A TCP relay that can cut, stall and trickle what passes.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::ms;

#[derive(Clone, Copy, PartialEq)]
pub enum Mode {
    Pass,
    /// Takes the bytes of both sides and passes on none, as a dead link behind a middlebox does.
    Swallow,
    /// One byte a write, and each in a segment of its own.
    Trickle,
}

pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    target: SocketAddr,
    mode: Mutex<Mode>,
    stopped: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

impl FaultProxy {
    pub fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let address = listener.local_addr().expect("a bound address");
        let shared = Arc::new(Shared {
            target,
            mode: Mutex::new(Mode::Pass),
            stopped: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let acceptor = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if acceptor.stopped.load(Ordering::SeqCst) {
                    return;
                }
                acceptor.relay(stream);
            }
        });
        Self { address, shared }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn set(&self, mode: Mode) {
        *self.shared.mode.lock().expect("mode") = mode;
    }

    /// Ends every connection there is.
    pub fn cut(&self) {
        for stream in self.shared.open.lock().expect("connections").drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        self.cut();
    }
}

impl Shared {
    fn relay(self: &Arc<Self>, near: TcpStream) {
        let Ok(far) = TcpStream::connect(self.target) else { return };
        let handle = |stream: &TcpStream| stream.try_clone().expect("a second handle of the socket");
        self.open.lock().expect("connections").extend([handle(&near), handle(&far)]);
        for (from, to) in [(handle(&near), handle(&far)), (far, near)] {
            let shared = Arc::clone(self);
            std::thread::spawn(move || shared.pump(from, to));
        }
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream) {
        let _ = to.set_nodelay(true);
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let mode = *self.mode.lock().expect("mode");
            let sent = match mode {
                Mode::Pass => to.write_all(&buffer[..n]),
                Mode::Swallow => Ok(()),
                Mode::Trickle => buffer[..n].chunks(1).try_for_each(|byte| {
                    std::thread::sleep(ms(1));
                    to.write_all(byte)
                }),
            };
            if sent.is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }
}
