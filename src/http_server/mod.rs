//! A small HTTP server on loopback with one thread per connection, used by the demo's servers.
//!
//! Not `tiny_http`: its fixed thread pool lets a burst of kept-alive connections block all others, and it does not report that a
//! client has disconnected before the first byte of its response, which is when a cancel saves most.
//!
//! Threads: `NAME-accept` accepts connections; `NAME-N` reads the requests of one connection and runs the handler. Dropping the
//! [`HttpServer`] shuts the connections down and joins all threads.

pub(crate) mod connection;

use std::io::{self, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use crate::sys::datetime;
use crate::sys::threads::spawn;
use connection::Exchange;

/// Limit of concurrent connections; each takes a thread. Further connections receive a 503.
const CONNECTIONS_MAX: usize = 256;

/// Time limit for receiving data, between requests and within one.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Time limit for sending data; a client that does not read for longer counts as disconnected.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Limits for reading from a client before its connection is closed: time per read, and bytes in total.
const LINGER_TIMEOUT: Duration = Duration::from_millis(200);
const LINGER_BYTES_MAX: u64 = 1024 * 1024;

/// Binds `127.0.0.1:port`; 0 means any free port.
pub(crate) fn bind(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port))
}

/// Handles a request. Called from many threads concurrently.
pub(crate) type Handler = Arc<dyn Fn(&mut Exchange<'_>) + Send + Sync>;

/// A running server.
pub(crate) struct HttpServer {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
}

struct Shared {
    name: String,
    stopping: AtomicBool,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    accepted: u64,
    connections: Vec<(u64, TcpStream)>,
    threads: Vec<JoinHandle<()>>,
}

impl HttpServer {
    /// Starts a server that calls `handle` for each request to `listener`, concurrently.
    pub(crate) fn start(listener: TcpListener, name: &str, handle: Handler) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let shared =
            Arc::new(Shared { name: name.to_owned(), stopping: AtomicBool::new(false), open: Mutex::default() });
        let shared_with_thread = shared.clone();
        let accept = move || accept_connections(&listener, &shared_with_thread, &handle);
        let accept = spawn(format!("{name}-accept"), accept)?;
        Ok(Self { address, shared, accept: Some(accept) })
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address); // wakes the accept thread
        let accept = self.accept.take().map(JoinHandle::join);
        let threads = {
            let mut open = self.shared.lock();
            for (_, connection) in &open.connections {
                let _ = connection.shutdown(Shutdown::Both);
            }
            std::mem::take(&mut open.threads)
        };
        let panicked = threads.into_iter().map(JoinHandle::join).chain(accept).filter(Result::is_err).count();
        if panicked > 0 {
            log::warn!("{panicked} threads of {} panicked", self.shared.name);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept_connections(listener: &TcpListener, shared: &Arc<Shared>, handle: &Handler) {
    for tcp in listener.incoming() {
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        if let Err(error) = tcp.and_then(|tcp| start_connection(tcp, shared, handle)) {
            crate::log_repeatable!(log::Level::Warn, "{}: failed to accept a connection: {error}", shared.name);
            std::thread::sleep(Duration::from_millis(50)); // out of threads or file descriptors: do not spin
        }
    }
}

fn start_connection(mut tcp: TcpStream, shared: &Arc<Shared>, handle: &Handler) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(READ_TIMEOUT))?;
    tcp.set_write_timeout(Some(WRITE_TIMEOUT))?;
    let mut open = shared.lock();
    open.threads.retain(|thread| !thread.is_finished());
    if open.connections.len() >= CONNECTIONS_MAX {
        drop(open);
        let date = datetime::format_http(SystemTime::now());
        let head = format!(
            "HTTP/1.1 503 Service Unavailable\r\nDate: {date}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        return tcp.write_all(head.as_bytes());
    }
    open.accepted += 1;
    let number = open.accepted;
    open.connections.push((number, tcp.try_clone()?));
    drop(open);
    let guard = RemoveOnDrop { shared: shared.clone(), number };
    let (shared_with_thread, handle) = (shared.clone(), handle.clone());
    let connection = move || {
        let _guard = guard;
        serve(tcp, &shared_with_thread, &handle);
    };
    let thread = spawn(format!("{}-{number}", shared.name), connection)?;
    shared.lock().threads.push(thread);
    Ok(())
}

/// Removes a connection from the list, however its thread ends.
struct RemoveOnDrop {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        self.shared.lock().connections.retain(|(number, _)| *number != self.number);
    }
}

fn serve(tcp: TcpStream, shared: &Shared, handle: &Handler) {
    let mut input = BufReader::new(tcp);
    while !shared.stopping.load(Ordering::SeqCst) {
        match connection::read_head(&mut input) {
            Ok(Some(mut exchange)) => {
                handle(&mut exchange);
                if !exchange.may_continue() {
                    break;
                }
            }
            Ok(None) => break,
            Err(error) => {
                crate::debug!("{}: connection failed: {error}", shared.name);
                return;
            }
        }
    }
    if let Err(error) = close_after_reading(input.get_mut()) {
        crate::debug!("{}: failed to close a connection: {error}", shared.name);
    }
}

/// Shuts down our half of the connection, then reads what the client is still sending, within limits. Closing a socket with unread
/// bytes resets the connection, and the client would lose the response that says why its request was rejected.
fn close_after_reading(tcp: &mut TcpStream) -> io::Result<()> {
    tcp.shutdown(Shutdown::Write)?;
    tcp.set_read_timeout(Some(LINGER_TIMEOUT))?;
    io::copy(&mut tcp.take(LINGER_BYTES_MAX), &mut io::sink())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn server() -> HttpServer {
        let handle = |exchange: &mut Exchange<'_>| match exchange.path() {
            "/stream" => {
                let mut body = exchange.stream("text/event-stream").unwrap();
                body.send(b"one").unwrap();
                body.send(b"").unwrap();
                body.send(b"two").unwrap();
                body.finish().unwrap();
            }
            "/json" => match exchange.read_json() {
                Ok(body) => exchange.respond_json(200, &json!({ "got": body })),
                Err(bad) => exchange.respond_json(bad.status, &json!(bad.message)),
            },
            _ => exchange.respond_json(404, &json!({})),
        };
        HttpServer::start(bind(0).unwrap(), "test", Arc::new(handle)).unwrap()
    }

    fn talk(server: &HttpServer, request: &str) -> String {
        let mut tcp = TcpStream::connect(server.address).unwrap();
        tcp.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        tcp.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).unwrap();
        answer
    }

    const CLOSE: &str = "Connection: close\r\n\r\n";

    #[test]
    fn streamed_response_is_chunked_and_keeps_the_connection() {
        let answer = talk(&server(), &format!("GET /stream?x HTTP/1.1\r\n\r\nGET /stream HTTP/1.1\r\n{CLOSE}"));
        assert_eq!(answer.matches("\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n").count(), 2, "{answer}");
        let old = talk(&server(), "GET /stream HTTP/1.0\r\n\r\n");
        assert!(old.ends_with("\r\n\r\nonetwo") && !old.contains("chunked"), "{old}");
    }

    #[test]
    fn bodies_are_read_by_length_in_chunks_and_after_100_continue() {
        let server = server();
        let answer = talk(&server, &format!("POST /json HTTP/1.1\r\nContent-Length: 2\r\n{CLOSE}42"));
        assert!(answer.ends_with("{\"got\":42}"), "{answer}");
        let chunked =
            format!("POST /json HTTP/1.1\r\nTransfer-Encoding: chunked\r\n{CLOSE}1;x=y\r\n4\r\n1\r\n2\r\n0\r\n\r\n");
        assert!(talk(&server, &chunked).ends_with("{\"got\":42}"));
        let asking = format!("POST /json HTTP/1.1\r\nContent-Length: 1\r\nExpect: 100-continue\r\n{CLOSE}7");
        assert!(talk(&server, &asking).starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"));
    }

    #[test]
    fn invalid_requests_are_rejected_and_end_the_connection() {
        let server = server();
        for (request, status) in [
            ("nonsense\r\n\r\n".to_owned(), "400"),
            ("POST /json HTTP/1.1\r\nContent-Length: x\r\n\r\n".to_owned(), "400"),
            ("POST /json HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n".to_owned(), "413"),
            ("POST /json HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".to_owned(), "400"),
            (format!("POST /json HTTP/1.1\r\nContent-Length: 1\r\n{CLOSE}{{"), "400"),
            (format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000)), "431"),
            (format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(129)), "431"),
            ("GET / HTTP/1.1\r\nno colon\r\n\r\n".to_owned(), "400"),
            ("GET / HTTP/1.1\r\nname : value\r\n\r\n".to_owned(), "400"),
            ("GET / HTTP/2.0\r\n\r\n".to_owned(), "400"),
        ] {
            let answer = talk(&server, &request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {answer}");
        }
    }

    #[test]
    fn idle_connections_block_no_others_and_do_not_outlive_the_server() {
        let server = server();
        let mut idle: Vec<_> = (0..40).map(|_| TcpStream::connect(server.address).unwrap()).collect();
        assert!(talk(&server, &format!("GET /x HTTP/1.1\r\n{CLOSE}")).starts_with("HTTP/1.1 404 "));
        drop(server);
        assert!(idle.iter_mut().all(|tcp| tcp.read(&mut [0]).is_ok_and(|read| read == 0)));
    }
}
