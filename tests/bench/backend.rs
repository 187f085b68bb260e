//! The backend: a scripted vLLM that answers each job by its [`Script`].
//!
//! Each connection has a thread. The events of all paced streams are written by one more, the pacer, each at its own time, so
//! that their spacing does not depend on how the machine schedules 256 threads.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use nix::sys::prctl;

use crate::Result;
use crate::event::{EVENT_BYTES, TAIL, push_event};
use crate::job::{INTERVAL_NS, Job, Script};
use crate::process::now_ns;
use crate::support::http::{LAST_CHUNK, SSE_HEAD, push_chunk, response};
use crate::support::{self, Answer};

/// For a subject that does not read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Size of one write of a flood, unless one chunk is larger.
const FLOOD_WRITE_BYTES: usize = 64 << 10;

pub struct Backend {
    server: support::Backend,
    shared: Arc<Shared>,
    events: Receiver<BackendEvent>,
}

pub enum BackendEvent {
    /// The request of a [`Script::Silence`] was received.
    Silent { job_id: u64 },
    /// A stream is about to end, after `bytes` of body.
    Ended { job_id: u64, bytes: u64 },
    /// The subject closed the connection of a silent job.
    Closed { job_id: u64, at_ns: u64 },
}

struct Shared {
    ends_streams: AtomicBool,
    /// Streams that the pacer has not seen yet.
    new_streams: Mutex<Vec<PacedStream>>,
    events: Sender<BackendEvent>,
}

impl Backend {
    pub fn new() -> Result<Self> {
        let (sender, events) = mpsc::channel();
        let shared =
            Arc::new(Shared { ends_streams: AtomicBool::new(false), new_streams: Mutex::default(), events: sender });
        let pacing = Arc::clone(&shared);
        let pacer = thread::Builder::new().name("pacer".into()).spawn(move || pacing.pace())?.thread().clone();
        let playing = Arc::clone(&shared);
        let server = support::Backend::vllm_with(&["m"], move |request| {
            let job = std::str::from_utf8(&request.body).ok().and_then(Job::find);
            let Some(job) = job else { return Answer::Raw(response(404, "text/plain", "")) };
            let (shared, pacer) = (Arc::clone(&playing), pacer.clone());
            Answer::Play(Box::new(move |stream| Player { stream, shared: &shared, pacer: &pacer }.play(job)))
        });
        server.forget();
        Ok(Self { server, shared, events })
    }

    pub fn port(&self) -> u16 {
        self.server.address().port()
    }

    /// `[[backends]]` of an `agent.toml`.
    pub fn toml(&self) -> String {
        self.server.toml()
    }

    /// Whether streams without an end of their own end: floods at once, paced ones instead of their next event.
    pub fn end_streams(&self, ends: bool) {
        self.shared.ends_streams.store(ends, Relaxed);
    }

    pub fn events(&self) -> &Receiver<BackendEvent> {
        &self.events
    }
}

/// A stream that the pacer writes.
struct PacedStream {
    job_id: u64,
    due_ns: u64,
    events_left: u64,
    bytes: u64,
    stream: TcpStream,
}

impl Shared {
    /// The pacer's loop.
    fn pace(&self) {
        // By default the kernel may wake a thread 50 µs late. Events of 256 streams are 78 µs apart.
        let _ = prctl::set_timerslack(1);
        let mut streams = BTreeMap::new();
        let mut out = Vec::new();
        loop {
            let new = std::mem::take(&mut *self.new_streams.lock().unwrap_or_else(PoisonError::into_inner));
            streams.extend(new.into_iter().map(|stream| ((stream.due_ns, stream.job_id), stream)));
            match streams.first_entry() {
                None => thread::park(),
                Some(first) => {
                    let wait_ns = first.key().0.saturating_sub(now_ns());
                    if wait_ns > 0 {
                        thread::park_timeout(Duration::from_nanos(wait_ns));
                    } else if let Some(next) = self.write_due(first.remove(), &mut out) {
                        streams.insert((next.due_ns, next.job_id), next);
                    }
                }
            }
        }
    }

    /// Writes what is due of a stream; `None` after its end.
    fn write_due(&self, mut paced: PacedStream, out: &mut Vec<u8>) -> Option<PacedStream> {
        out.clear();
        if self.ends_streams.load(Relaxed) || paced.events_left == 0 {
            self.announce_end(paced.job_id, paced.bytes);
            push_tail(out);
            let _ = paced.stream.write_all(out);
            return None;
        }
        push_event_chunk(out);
        paced.stream.write_all(out).ok()?;
        paced.events_left -= 1;
        paced.bytes += EVENT_BYTES as u64;
        paced.due_ns += INTERVAL_NS;
        Some(paced)
    }

    /// Reports the end of a stream after `bytes` of events. Comes before the end is written, which the client reports.
    fn announce_end(&self, job_id: u64, bytes: u64) {
        self.report(BackendEvent::Ended { job_id, bytes: bytes + TAIL.len() as u64 });
    }

    fn report(&self, event: BackendEvent) {
        // Without a receiver the bench has ended.
        let _ = self.events.send(event);
    }
}

/// Answers one job.
struct Player<'a> {
    stream: &'a TcpStream,
    shared: &'a Shared,
    pacer: &'a Thread,
}

impl Player<'_> {
    /// Returns whether the connection can be used again.
    fn play(&self, Job { id, script }: Job) -> io::Result<bool> {
        let mut out = Vec::new();
        match script {
            Script::Paced { phase_ns, events } => {
                self.stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
                self.write(SSE_HEAD)?;
                let due_ns = (now_ns() / INTERVAL_NS + 1) * INTERVAL_NS + phase_ns;
                let stream = self.stream.try_clone()?;
                let paced = PacedStream { job_id: id, due_ns, events_left: events, bytes: 0, stream };
                self.shared.new_streams.lock().unwrap_or_else(PoisonError::into_inner).push(paced);
                self.pacer.unpark();
                Ok(true)
            }
            Script::Flood { events_per_chunk } => self.flood(id, events_per_chunk as usize),
            Script::OneEvent => {
                // Head, event and end leave in three writes, as from a server that streams.
                self.write(SSE_HEAD)?;
                push_event_chunk(&mut out);
                self.write(&out)?;
                self.end(id, EVENT_BYTES)
            }
            Script::OneEventThenSilence => {
                out.extend_from_slice(SSE_HEAD);
                push_event_chunk(&mut out);
                self.write(&out)?;
                self.wait_closed(id)
            }
            Script::Silence => {
                self.shared.report(BackendEvent::Silent { job_id: id });
                self.wait_closed(id)
            }
        }
    }

    fn flood(&self, job_id: u64, events_per_chunk: usize) -> io::Result<bool> {
        let mut events = Vec::new();
        (0..events_per_chunk).for_each(|_| push_event(&mut events, 0));
        let mut chunk = Vec::new();
        push_chunk(&mut chunk, &events);
        let chunks = (FLOOD_WRITE_BYTES / chunk.len()).max(1);
        let out = chunk.repeat(chunks);
        self.stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        self.write(SSE_HEAD)?;
        let mut bytes = 0;
        while !self.shared.ends_streams.load(Relaxed) {
            self.write(&out)?;
            bytes += chunks * events.len();
        }
        self.end(job_id, bytes)
    }

    fn end(&self, job_id: u64, bytes: usize) -> io::Result<bool> {
        self.shared.announce_end(job_id, bytes as u64);
        let mut out = Vec::new();
        push_tail(&mut out);
        self.write(&out)?;
        Ok(true)
    }

    /// A subject sends nothing in the middle of a stream: any result of the read is the end.
    fn wait_closed(&self, job_id: u64) -> io::Result<bool> {
        let mut stream = self.stream;
        let _ = stream.read(&mut [0]);
        self.shared.report(BackendEvent::Closed { job_id, at_ns: now_ns() });
        Ok(false)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut stream = self.stream;
        stream.write_all(bytes)
    }
}

/// One event, sent now.
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
