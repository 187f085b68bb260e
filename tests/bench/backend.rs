//! The backend: speaks enough of vLLM, and plays what the request's [`Script`] says.
//!
//! A thread a connection reads; the events of all paced streams are written by one thread, each at its own time, so that their
//! spacing does not depend on how the machine schedules 256 threads.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use nix::sys::prctl;

use crate::Result;
use crate::event::{EVENT_BYTES, TAIL, push_event};
use crate::job::{INTERVAL_NS, Order, Script};
use crate::process::now_ns;

/// For a subject that does not read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a flood writes at a time, at least one chunk.
const FLOOD_WRITE_BYTES: usize = 64 << 10;

const SSE_HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";
const MODELS: &str = r#"{"object":"list","data":[{"id":"m","object":"model","max_model_len":8192}]}"#;

pub struct Backend {
    port: u16,
    shared: Arc<Shared>,
    notes: Receiver<Note>,
}

pub enum Note {
    /// A request for silence came.
    Silent { seq: u64 },
    /// A stream is about to end, after so many bytes of body.
    Ended { seq: u64, bytes: u64 },
    /// The subject closed the connection of a stream that waits for just that.
    Closed { seq: u64, at_ns: u64 },
}

impl Note {
    /// Of a stream that ends: its number and its bytes.
    pub fn ended(self) -> Option<(u64, u64)> {
        match self {
            Self::Ended { seq, bytes } => Some((seq, bytes)),
            _ => None,
        }
    }
}

struct Shared {
    is_stopping: AtomicBool,
    /// For the pacer.
    begun: Mutex<Vec<Paced>>,
    pacer: Thread,
}

impl Backend {
    pub fn new() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let (sender, notes) = mpsc::channel();
        let (shared_sender, shared_receiver) = mpsc::channel::<Arc<Shared>>();
        let pacer_notes = sender.clone();
        let pacer = thread::Builder::new().name("pacer".into()).spawn(move || {
            if let Ok(shared) = shared_receiver.recv() {
                pace(&shared, &pacer_notes);
            }
        })?;
        let shared = Arc::new(Shared {
            is_stopping: AtomicBool::new(false),
            begun: Mutex::default(),
            pacer: pacer.thread().clone(),
        });
        shared_sender.send(Arc::clone(&shared))?;
        let accepting = Arc::clone(&shared);
        thread::Builder::new().name("backend".into()).spawn(move || {
            for socket in listener.incoming().map_while(io::Result::ok) {
                let connection =
                    Connection { socket: Arc::new(socket), notes: sender.clone(), shared: Arc::clone(&accepting) };
                // A subject that goes away in the middle is none of the backend's business.
                thread::spawn(move || connection.serve());
            }
        })?;
        Ok(Self { port, shared, notes })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on streams without an end of their own end (paced ones at their next event), or no longer do.
    pub fn stop(&self, is_stopping: bool) {
        self.shared.is_stopping.store(is_stopping, Relaxed);
    }

    pub fn notes(&self) -> &Receiver<Note> {
        &self.notes
    }
}

/// A stream of the pacer.
struct Paced {
    seq: u64,
    due_ns: u64,
    events_left: u64,
    bytes: u64,
    socket: Arc<TcpStream>,
}

fn pace(shared: &Shared, notes: &Sender<Note>) {
    // The kernel may wake a thread 50 µs late to save power, which is more than half of what lies between events of 256 streams.
    let _ = prctl::set_timerslack(1);
    let mut streams = BTreeMap::new();
    let mut out = Vec::new();
    loop {
        let begun = std::mem::take(&mut *shared.begun.lock().unwrap_or_else(PoisonError::into_inner));
        streams.extend(begun.into_iter().map(|stream| ((stream.due_ns, stream.seq), stream)));
        match streams.first_entry() {
            None => thread::park(),
            Some(first) => {
                let wait_ns = first.key().0.saturating_sub(now_ns());
                if wait_ns > 0 {
                    thread::park_timeout(Duration::from_nanos(wait_ns));
                } else if let Some(next) = first.remove().step(shared.is_stopping.load(Relaxed), &mut out, notes) {
                    streams.insert((next.due_ns, next.seq), next);
                }
            }
        }
    }
}

impl Paced {
    /// Writes what is due; nothing comes back when that was the end.
    fn step(mut self, is_stopping: bool, out: &mut Vec<u8>, notes: &Sender<Note>) -> Option<Self> {
        out.clear();
        if is_stopping || self.events_left == 0 {
            push_tail(out);
            let _ = notes.send(Note::Ended { seq: self.seq, bytes: self.bytes + TAIL.len() as u64 });
            let _ = (&*self.socket).write_all(out);
            return None;
        }
        push_event_chunk(out);
        (&*self.socket).write_all(out).ok()?;
        self.events_left -= 1;
        self.bytes += EVENT_BYTES as u64;
        self.due_ns += INTERVAL_NS;
        Some(self)
    }
}

struct Connection {
    socket: Arc<TcpStream>,
    notes: Sender<Note>,
    shared: Arc<Shared>,
}

impl Connection {
    fn serve(&self) -> io::Result<()> {
        self.socket.set_nodelay(true)?;
        self.socket.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let mut input = Vec::new();
        while let Some(request) = Request::read(&self.socket, &mut input)? {
            match (request.target.as_str(), Order::find(&request.body)) {
                ("GET /health", _) => self.respond("200 OK", "")?,
                ("GET /v1/models", _) => self.respond("200 OK", MODELS)?,
                ("POST /v1/chat/completions", Some(order)) => self.play(order)?,
                _ => self.respond("404 Not Found", "{}")?,
            }
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        (&*self.socket).write_all(bytes)
    }

    fn respond(&self, status: &str, body: &str) -> io::Result<()> {
        let length = body.len();
        self.write(
            format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
                .as_bytes(),
        )
    }

    fn play(&self, Order { seq, script }: Order) -> io::Result<()> {
        match script {
            Script::Paced { phase_ns, events } => {
                self.write(SSE_HEAD)?;
                let due_ns = (now_ns() / INTERVAL_NS + 1) * INTERVAL_NS + phase_ns;
                let socket = Arc::clone(&self.socket);
                let stream = Paced { seq, due_ns, events_left: events, bytes: 0, socket };
                self.shared.begun.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
                self.shared.pacer.unpark();
                Ok(())
            }
            Script::Flood { events_a_chunk } => self.flood(seq, events_a_chunk as usize),
            Script::One => {
                // Head, event and end leave in three writes, as a server that streams does it.
                self.write(SSE_HEAD)?;
                let mut out = Vec::new();
                push_event_chunk(&mut out);
                self.write(&out)?;
                self.end(seq, EVENT_BYTES)
            }
            Script::OneThenSilence => {
                let mut out = SSE_HEAD.to_vec();
                push_event_chunk(&mut out);
                self.write(&out)?;
                self.wait_closed(seq)
            }
            Script::Silence => {
                self.note(Note::Silent { seq });
                self.wait_closed(seq)
            }
        }
    }

    fn flood(&self, seq: u64, events_a_chunk: usize) -> io::Result<()> {
        let mut chunk = Vec::new();
        (0..events_a_chunk).for_each(|_| push_event(&mut chunk, 0));
        let mut out = Vec::new();
        push_chunk(&mut out, &chunk);
        let chunks = (FLOOD_WRITE_BYTES / out.len()).max(1);
        let out = out.repeat(chunks);
        self.write(SSE_HEAD)?;
        let mut bytes = 0;
        while !self.shared.is_stopping.load(Relaxed) {
            self.write(&out)?;
            bytes += chunks * chunk.len();
        }
        self.end(seq, bytes)
    }

    fn end(&self, seq: u64, bytes: usize) -> io::Result<()> {
        self.note(Note::Ended { seq, bytes: (bytes + TAIL.len()) as u64 });
        let mut out = Vec::new();
        push_tail(&mut out);
        self.write(&out)
    }

    /// The subject sends nothing in the middle of a stream: whatever the read brings is the end.
    fn wait_closed(&self, seq: u64) -> io::Result<()> {
        let _ = (&*self.socket).read(&mut [0]);
        self.note(Note::Closed { seq, at_ns: now_ns() });
        Ok(())
    }

    fn note(&self, note: Note) {
        // The bench is over when there is nobody to take it.
        let _ = self.notes.send(note);
    }
}

fn push_chunk(out: &mut Vec<u8>, body: &[u8]) {
    out.extend_from_slice(format!("{:x}\r\n", body.len()).as_bytes());
    out.extend_from_slice(body);
    out.extend_from_slice(b"\r\n");
}

/// One event of this moment.
fn push_event_chunk(out: &mut Vec<u8>) {
    const { assert!(EVENT_BYTES == 0xb4) };
    out.extend_from_slice(b"b4\r\n");
    push_event(out, now_ns());
    out.extend_from_slice(b"\r\n");
}

fn push_tail(out: &mut Vec<u8>) {
    push_chunk(out, TAIL);
    out.extend_from_slice(LAST_CHUNK);
}

struct Request {
    /// Method and path.
    target: String,
    body: String,
}

impl Request {
    /// The next request on a connection; `input` keeps what was read beyond it. Nothing when the connection has ended.
    fn read(mut socket: &TcpStream, input: &mut Vec<u8>) -> io::Result<Option<Self>> {
        let mut buffer = [0; 16 << 10];
        loop {
            if let Some((request, end)) = Self::parse(input) {
                input.drain(..end);
                return Ok(Some(request));
            }
            match socket.read(&mut buffer)? {
                0 => return Ok(None),
                n => input.extend_from_slice(&buffer[..n]),
            }
        }
    }

    /// Bodies have a length; one without is taken for none, and its order is not found.
    fn parse(input: &[u8]) -> Option<(Self, usize)> {
        let head_end = input.windows(4).position(|end| end == b"\r\n\r\n")? + 4;
        let head = str::from_utf8(&input[..head_end]).ok()?;
        let (target, _) = head.split_once(" HTTP/1.1\r\n")?;
        let mut headers = head.lines().filter_map(|line| line.split_once(':'));
        let length = headers.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let end = head_end + length.and_then(|(_, length)| length.trim().parse::<usize>().ok()).unwrap_or(0);
        let body = str::from_utf8(input.get(head_end..end)?).ok()?;
        Some((Self { target: target.to_owned(), body: body.to_owned() }, end))
    }
}
