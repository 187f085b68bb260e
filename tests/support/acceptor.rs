//! A listening socket, and a thread that accepts its connections until it is dropped.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use super::descriptors::{explain, opened, raise_limit};
use super::{SOON, join_within, ms};

pub struct Acceptor {
    address: SocketAddr,
    /// A second handle of the listening socket, as the type that has `shutdown`: that ends a blocked `accept`, and needs no
    /// descriptor, which a connection to wake it would.
    listening: TcpStream,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    /// Hands each connection to `serve`, on the acceptor's thread.
    pub fn new(address: &str, mut serve: impl FnMut(TcpStream) + Send + 'static) -> Self {
        let listener = listen(address);
        let address = listener.local_addr().expect("a bound address");
        let listening = opened(listener.try_clone(), "a second handle of the listening socket");
        let stopped = Arc::new(AtomicBool::new(false));
        let is_stopped = Arc::clone(&stopped);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if is_stopped.load(Ordering::SeqCst) {
                    return;
                }
                match stream {
                    Ok(stream) => serve(stream),
                    Err(e) => report(&e),
                }
            }
        });
        Self { address, listening: OwnedFd::from(listening).into(), stopped, thread: Some(thread) }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Once this returns, whoever connects is refused.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.stopped.store(true, Ordering::SeqCst);
        let _ = self.listening.shutdown(Shutdown::Both);
        join_within(SOON, thread, "the acceptor");
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The connection stays in the queue until there is a descriptor for it.
fn report(error: &io::Error) {
    #[expect(clippy::print_stderr, reason = "the harness shows it with the failed test")]
    {
        eprintln!("failed to accept a connection: {}", explain(error));
    }
    std::thread::sleep(ms(20));
}

/// Listens where somebody may have listened until a moment ago: a process that was just forked holds its sockets until it
/// becomes another program.
fn listen(address: &str) -> TcpListener {
    raise_limit();
    let began = Instant::now();
    loop {
        match TcpListener::bind(address) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && began.elapsed() < SOON => std::thread::sleep(ms(10)),
            result => return opened(result, &format!("failed to bind {address}")),
        }
    }
}
