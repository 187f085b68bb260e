//! The scripted backend. A function of the request decides how each one is answered; held requests are passed to the test as
//! [`Held`], which answers them byte by byte.

use std::collections::HashMap;
use std::io::{self, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use serde_json::{Value, json};

use super::acceptor::Acceptor;
use super::descriptors::opened;
use super::http::{LAST_CHUNK, Request, SSE_HEAD, push_chunk, read_request, response};
use super::{QUIET, SOON, ms, read};

pub enum Answer {
    Json(u16, Value),
    /// These bytes; the connection stays open.
    Raw(Vec<u8>),
    /// These bytes, then closes the connection.
    RawThenClose(Vec<u8>),
    /// Calls this function on the connection's thread; it returns whether the connection stays open.
    Play(Box<Player>),
    /// Holds the request for the test, see [`Backend::next`].
    Hold,
}

pub type Player = dyn FnOnce(&TcpStream) -> io::Result<bool> + Send;
type Routes = dyn Fn(&Request) -> Answer + Send + Sync;

pub struct Backend {
    acceptor: Acceptor,
    shared: Arc<Shared>,
    held: Receiver<Held>,
}

struct Shared {
    routes: Box<Routes>,
    held: Sender<Held>,
    accepting: Mutex<Accepting>,
    accepting_changed: Condvar,
    /// Bytes at the end of each request's body that are not read: closing the socket then sends a reset.
    unread: AtomicUsize,
    /// Whether requests are not kept for [`Backend::seen`].
    forgetful: AtomicBool,
    connected: AtomicUsize,
    open: Mutex<HashMap<usize, Arc<TcpStream>>>,
    seen: Mutex<Vec<Request>>,
    news: Condvar,
}

#[derive(Clone, Copy, PartialEq)]
enum Accepting {
    Yes,
    /// The acceptor is to block once it has accepted one more connection.
    ToPause,
    Paused,
}

impl Backend {
    pub fn new(routes: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::on("127.0.0.1:0", routes)
    }

    /// On a given address, for instance that of an earlier backend.
    pub fn on(address: &str, routes: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let (sender, held) = unbounded();
        let shared = Arc::new(Shared {
            routes: Box::new(routes),
            held: sender,
            accepting: Mutex::new(Accepting::Yes),
            accepting_changed: Condvar::new(),
            unread: AtomicUsize::new(0),
            forgetful: AtomicBool::new(false),
            connected: AtomicUsize::new(0),
            open: Mutex::default(),
            seen: Mutex::default(),
            news: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        let acceptor = Acceptor::new(address, move |stream| accepting.accept(stream));
        Self { acceptor, shared, held }
    }

    /// Healthy, lists `models`, holds every job.
    pub fn vllm(models: &[&str]) -> Self {
        Self::vllm_with(models, |_| Answer::Hold)
    }

    /// Healthy, lists `models`, answers jobs as `jobs` says.
    pub fn vllm_with(models: &[&str], jobs: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::new(serving(models, jobs))
    }

    /// As [`Self::vllm`], on a given address.
    pub fn vllm_on(address: &str, models: &[&str]) -> Self {
        Self::on(address, serving(models, |_| Answer::Hold))
    }

    pub fn address(&self) -> SocketAddr {
        self.acceptor.address()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    /// `[[backends]]` for this one as a vLLM.
    pub fn toml(&self) -> String {
        format!("kind = \"vllm\"\nurl = \"{}\"", self.url())
    }

    /// From the next connection on, closing one resets it.
    pub fn reset_on_close(&self) {
        self.leave_unread(1);
    }

    /// From the next connection on, leaves this many bytes of each body unread, so that closing the connection resets it.
    pub fn leave_unread(&self, bytes: usize) {
        self.shared.unread.store(bytes, Ordering::SeqCst);
    }

    /// Stops keeping requests for [`Self::seen`]; for tests with very many.
    pub fn forget(&self) {
        self.shared.forgetful.store(true, Ordering::SeqCst);
    }

    /// Leaves every further connect unanswered, by filling the queue of connections to be accepted. It stays full as long as the
    /// returned connections live.
    pub fn swallow_connects(&self) -> Vec<TcpStream> {
        self.shared.set_accepting(Accepting::ToPause);
        // The acceptor blocks in `accept` and would empty the queue: one connection makes it leave.
        let last = opened(TcpStream::connect(self.address()), "a connection for the acceptor");
        let accepting = self.shared.accepting.lock().expect("accepting");
        let is_coming = |accepting: &mut Accepting| *accepting != Accepting::Paused;
        let waited = self.shared.accepting_changed.wait_timeout_while(accepting, SOON, is_coming).expect("accepting").1;
        assert!(!waited.timed_out(), "the acceptor goes on accepting");
        let mut queue = vec![last];
        loop {
            // Over loopback, only a full queue delays a connect.
            match TcpStream::connect_timeout(&self.address(), ms(500)) {
                Err(e) if e.kind() == io::ErrorKind::TimedOut => break,
                result => queue.push(opened(result, "a connection for the queue")),
            }
        }
        self.hang_up();
        queue
    }

    /// Ends [`Self::swallow_connects`]; pending connects succeed.
    pub fn accept_again(&self, queue: Vec<TcpStream>) {
        drop(queue);
        self.shared.set_accepting(Accepting::Yes);
    }

    /// The number of connects to this backend whose SYN is unanswered.
    pub fn connects_under_way(&self) -> usize {
        let port = format!(":{:04X}", self.address().port());
        let table = std::fs::read_to_string("/proc/net/tcp").expect("the TCP table");
        let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.filter(|fields| fields.len() > 3 && fields[2].ends_with(&port) && fields[3] == "02").count()
    }

    /// Waits until exactly `count` connects are unanswered.
    pub fn wait_for_connects(&self, count: usize) {
        let began = Instant::now();
        while self.connects_under_way() != count {
            assert!(began.elapsed() < SOON, "{} connects instead of {count}", self.connects_under_way());
            std::thread::sleep(ms(5));
        }
    }

    /// The number of jobs received so far.
    pub fn posts(&self) -> usize {
        self.seen().iter().filter(|request| request.method == "POST").count()
    }

    /// The next held request.
    pub fn next(&self) -> Held {
        self.next_within(SOON)
    }

    /// The next held request, if there is one within this time.
    pub fn try_next(&self, within: Duration) -> Option<Held> {
        self.held.recv_timeout(within).ok()
    }

    pub fn next_within(&self, within: Duration) -> Held {
        self.try_next(within).unwrap_or_else(|| {
            panic!(
                "no held request came within {within:?}; seen: {:?}",
                self.seen().iter().map(Request::line).collect::<Vec<_>>()
            )
        })
    }

    /// Panics if a request is held within `time`.
    pub fn assert_none(&self, time: Duration) {
        if let Some(held) = self.try_next(time) {
            panic!("a request that must not come: {} {}", held.request.line(), held.request.body_text());
        }
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Request> {
        self.shared.seen.lock().expect("requests").clone()
    }

    /// Waits until `count` requests with this method and path were made.
    pub fn wait_for(&self, line: &str, count: usize) {
        let deadline = Instant::now() + SOON;
        let mut seen = self.shared.seen.lock().expect("requests");
        while seen.iter().filter(|request| request.line() == line).count() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited {SOON:?} for {count} × {line}");
            seen = self.shared.news.wait_timeout(seen, left).expect("requests").0;
        }
    }

    pub fn connections(&self) -> usize {
        self.shared.connected.load(Ordering::SeqCst)
    }

    /// Closes every connection that is open now.
    pub fn hang_up(&self) {
        for stream in self.shared.open.lock().expect("connections").values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn serving(
    models: &[&str],
    jobs: impl Fn(&Request) -> Answer + Send + Sync + 'static,
) -> impl Fn(&Request) -> Answer + Send + Sync + 'static {
    let list = json!({"object": "list", "data": models.iter().map(|id| json!({"id": id})).collect::<Vec<_>>()});
    move |request| match request.line().as_str() {
        "GET /health" => Answer::Raw(response(200, "text/plain", "")),
        "GET /v1/models" => Answer::Json(200, list.clone()),
        _ if request.method == "GET" => Answer::Raw(response(404, "text/plain", "no such path")),
        _ => jobs(request),
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.shared.set_accepting(Accepting::Yes);
        // First, so that no new connection is accepted after the others are closed.
        self.acceptor.stop();
        self.hang_up();
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, stream: TcpStream) {
        self.pause_if_asked();
        let (shared, id) = (Arc::clone(self), self.connected.fetch_add(1, Ordering::SeqCst));
        let stream = Arc::new(stream);
        self.open.lock().expect("connections").insert(id, Arc::clone(&stream));
        std::thread::spawn(move || {
            let _ = shared.serve(&stream, id);
            // The last owner closes the socket, here or in the test.
            shared.open.lock().expect("connections").remove(&id);
        });
    }

    fn set_accepting(&self, accepting: Accepting) {
        *self.accepting.lock().expect("accepting") = accepting;
        self.accepting_changed.notify_all();
    }

    fn pause_if_asked(&self) {
        let mut accepting = self.accepting.lock().expect("accepting");
        if *accepting == Accepting::ToPause {
            *accepting = Accepting::Paused;
            self.accepting_changed.notify_all();
        }
        let is_paused = |accepting: &mut Accepting| *accepting == Accepting::Paused;
        drop(self.accepting_changed.wait_while(accepting, is_paused).expect("accepting"));
    }

    fn serve(&self, stream: &Arc<TcpStream>, id: usize) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let (shared_stream, mut stream) = (stream, &**stream);
        // Unread bytes must stay in the socket, not in a buffer.
        let capacity = if self.unread.load(Ordering::SeqCst) > 0 { 1 } else { 8 << 10 };
        let mut reader = BufReader::with_capacity(capacity, stream);
        while let Some(request) = read_request(&mut reader, id, self.unread.load(Ordering::SeqCst))? {
            if !self.forgetful.load(Ordering::SeqCst) {
                self.seen.lock().expect("requests").push(request.clone());
                self.news.notify_all();
            }
            match (self.routes)(&request) {
                Answer::Json(status, body) => {
                    stream.write_all(&response(status, "application/json", body.to_string()))?;
                }
                Answer::Raw(bytes) => stream.write_all(&bytes)?,
                Answer::RawThenClose(bytes) => return stream.write_all(&bytes),
                Answer::Play(player) => {
                    if !player(stream)? {
                        return Ok(());
                    }
                }
                Answer::Hold => {
                    let (release, released) = bounded(1);
                    let held = Held { request, stream: Arc::clone(shared_stream), release };
                    if self.held.send(held).is_err() || released.recv().is_err() {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }
}

fn flood_chunk() -> Vec<u8> {
    let mut chunk = Vec::new();
    push_chunk(&mut chunk, &[b'x'; 1 << 16]);
    chunk
}

/// A request that the test answers. Dropping it closes the connection.
pub struct Held {
    pub request: Request,
    // Declared before `release`, so that the connection's thread is the last owner of the socket.
    stream: Arc<TcpStream>,
    release: Sender<()>,
}

impl Held {
    /// Sends raw bytes; a closed connection is ignored.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes.as_ref());
    }

    /// Sends raw bytes; false if the connection is closed.
    pub fn try_send(&mut self, bytes: &[u8]) -> bool {
        (&*self.stream).write_all(bytes).is_ok()
    }

    /// Sends one endless line in chunks of 64 KiB until the agent hangs up.
    pub fn flood(mut self) -> JoinHandle<()> {
        let chunk = flood_chunk();
        std::thread::spawn(move || while self.try_send(&chunk) {})
    }

    /// The head of a chunked event stream.
    pub fn start_sse(&mut self) {
        self.send(SSE_HEAD);
    }

    pub fn chunk(&mut self, data: impl AsRef<[u8]>) {
        let mut chunk = Vec::new();
        push_chunk(&mut chunk, data.as_ref());
        self.send(chunk);
    }

    /// Ends a chunked body; the connection serves the next request.
    pub fn end(mut self) {
        self.send(LAST_CHUNK);
        self.keep();
    }

    /// Sends a complete, successful answer.
    pub fn finish(mut self) {
        self.send(response(200, "text/event-stream", super::sse(7, 13)));
        self.keep();
    }

    /// Ends the answer; the connection serves the next request.
    pub fn keep(self) {
        let _ = self.release.send(());
    }

    /// Writes chunks until every buffer up to the coordinator is full.
    pub fn flood_until_full(&mut self) {
        self.stream.set_write_timeout(Some(QUIET)).expect("a write timeout");
        let chunk = flood_chunk();
        while self.try_send(&chunk) {}
    }

    /// Waits until the agent has closed the connection; returns how long that took.
    pub fn wait_hang_up(&mut self) -> Duration {
        self.wait_hang_up_within(SOON)
    }

    pub fn wait_hang_up_within(&mut self, within: Duration) -> Duration {
        let began = Instant::now();
        match self.read_to_hang_up(within) {
            Ok(()) => began.elapsed(),
            Err(e) => panic!("the agent did not hang up on {} within {within:?}: {e}", self.request.line()),
        }
    }

    /// Starts a thread that returns when the agent closed the connection, or `None` after this time. It blocks in the read, as
    /// polling would be less precise, and returns the request, as dropping it would delay the other measurements.
    pub fn watch_hang_up(mut self, within: Duration) -> JoinHandle<(Held, Option<Instant>)> {
        std::thread::spawn(move || {
            let closed = self.read_to_hang_up(within).is_ok().then(Instant::now);
            (self, closed)
        })
    }

    fn read_to_hang_up(&mut self, within: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(within)).expect("a read timeout");
        match read(&self.stream, &mut [0; 64]) {
            Ok(0) => Ok(()),
            Ok(n) => panic!("{n} bytes where the agent should hang up"),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Reads the rest of the request up to the end of the connection; returns its length.
    pub fn read_to_end(&mut self, within: Duration) -> usize {
        self.stream.set_read_timeout(Some(within)).expect("a read timeout");
        let (mut buffer, mut total) = ([0; 1 << 16], 0);
        loop {
            match read(&self.stream, &mut buffer) {
                Ok(n @ 1..) => total += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    panic!("the agent did not hang up within {within:?}")
                }
                _ => return total,
            }
        }
    }

    /// Panics if the agent has closed the connection.
    pub fn assert_connected(&mut self) {
        self.stream.set_read_timeout(Some(ms(50))).expect("a read timeout");
        let outcome = read(&self.stream, &mut [0; 64]);
        self.stream.set_read_timeout(None).expect("no read timeout");
        match outcome {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            other => panic!("the connection of {} should be open and silent: {other:?}", self.request.line()),
        }
    }
}
