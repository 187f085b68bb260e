//! One job against one HTTP backend: post, then pass on each piece of the answer as it arrives.
//!
//! Invariants: bytes leave in the order and the form they came in; a stream that is not whole is an error, after its
//! last byte has been passed on; after an interrupt no byte is taken for an answer.

use std::io::Read;
use std::time::{Duration, Instant};

use ureq::Body;
use ureq::http::Response;

use super::bounded_json::BoundedJson;
use super::sse::Scanner;
use super::usage::Usage;
use crate::backend::http::{AgentLease, Client, connect_error, read_bounded};
use crate::backend::{BackendError, BackendResult, ERROR_BODY_MAX, JobResult, JobSink};

/// The most that one chunk carries, in bytes of the answer: what the backend has sent when we look, up to this.
const CHUNK_MAX: usize = 16 << 10;

/// What a stream of small pieces needs; the buffer grows with what comes.
const CHUNK_USUAL: usize = 512;

/// Read of an error's body, in bytes: more than is passed on, for the key that may have to be taken out of it.
const ERROR_READ_MAX: usize = 4 * ERROR_BODY_MAX;

/// The body of an error has so much time.
const ERROR_READ_TIME: Duration = Duration::from_secs(1);

/// A connect is given whole milliseconds, so that one which the deadline ends may end just before it.
const CONNECT_PRECISION: Duration = Duration::from_millis(1);

/// Posts `body` to `url` and relays the answer into `sink`, all within `deadline`.
pub fn relay(
    client: &Client,
    url: &str,
    body: Vec<u8>,
    deadline: Duration,
    sink: &mut dyn JobSink,
) -> BackendResult<JobResult> {
    let started = Instant::now();
    let lease = client.lease();
    let response = post(&lease, url, &body, deadline, sink)?;
    // It may be 60 MB, and the answer may take minutes.
    drop(body);
    let status = response.status().as_u16();
    if !(200..300).contains(&status) {
        // The status is known: what came of its explanation before it broke off, or stalled, tells enough.
        lease.monitor().limit_reads_to(ERROR_READ_TIME);
        let (error_body, _) = read_bounded(response.into_body(), ERROR_READ_MAX);
        sink.still_wanted()?;
        return Err(client.status_error(status, &error_body));
    }
    let mut watch = UsageReader::of(&response);
    let usage = relay_body(&lease, response.into_body(), &mut watch, sink)?;
    lease.give_back();
    let duration_ms = u32::try_from(started.elapsed().as_millis()).unwrap_or(u32::MAX);
    Ok(JobResult { input_tokens: usage.input, output_tokens: usage.output, duration_ms })
}

fn post(
    lease: &AgentLease<'_>,
    url: &str,
    body: &[u8],
    deadline: Duration,
    sink: &mut dyn JobSink,
) -> BackendResult<Response<Body>> {
    let started = Instant::now();
    sink.interrupt_with(lease.interrupt());
    sink.still_wanted()?;
    lease.post(url, body, deadline).or_else(|e| {
        sink.still_wanted()?;
        if deadline.saturating_sub(started.elapsed()) <= CONNECT_PRECISION {
            return Err(BackendError::DeadlinePassed);
        }
        Err(connect_error(e))
    })
}

// Not in its caller's frame: that one is below the deepest calls of the exchange, and what they touch of the stack stays.
#[inline(never)]
fn relay_body(
    lease: &AgentLease<'_>,
    body: Body,
    watch: &mut UsageReader,
    sink: &mut dyn JobSink,
) -> BackendResult<Usage> {
    let mut reader = body.into_reader();
    let mut buffer = vec![0; CHUNK_USUAL];
    let mut relayed = false;
    loop {
        // Reading on from a socket that was shut down can empty it, and closing an empty one sends no reset: a backend
        // blocked in its write would find out when the kernel forgets the connection, a minute later.
        sink.still_wanted()?;
        let read = reader.read(&mut buffer);
        sink.still_wanted()?;
        match read {
            Ok(0) if lease.monitor().has_broken() => return Err(broken_error("the connection was reset", relayed)),
            Ok(0) => return watch.finish().map_err(|e| if relayed { e } else { empty_stream_error(e) }),
            Ok(n) => {
                sink.send_chunk(&buffer[..n])?;
                relayed = true;
                watch.feed(&buffer[..n]);
                sink.tokens_emitted(watch.tokens_emitted());
                if n == buffer.len() && n < CHUNK_MAX {
                    buffer.resize(2 * n, 0);
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => match ureq::Error::from(e) {
                ureq::Error::Timeout(ureq::Timeout::Global) => return Err(BackendError::DeadlinePassed),
                e => return Err(broken_error(&e.to_string(), relayed)),
            },
        }
    }
}

fn broken_error(how: &str, relayed: bool) -> BackendError {
    if relayed {
        BackendError::Broken(how.to_owned())
    } else {
        BackendError::Unreachable(format!("{how} before the first byte of the answer"))
    }
}

/// A stream without a single byte has not begun.
fn empty_stream_error(e: BackendError) -> BackendError {
    match e {
        BackendError::CutStream(how) => broken_error(&how, false),
        e => e,
    }
}

/// What is read off the answer, by its content type.
enum UsageReader {
    Stream(Scanner),
    Json(BoundedJson),
    Opaque,
}

impl UsageReader {
    fn of(response: &Response<Body>) -> UsageReader {
        let content_type = response.headers().get("content-type").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let media_type = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        match media_type.as_str() {
            "text/event-stream" => UsageReader::Stream(Scanner::default()),
            json if json.ends_with("json") => UsageReader::Json(BoundedJson::default()),
            _ => UsageReader::Opaque,
        }
    }

    fn feed(&mut self, bytes: &[u8]) {
        match self {
            UsageReader::Stream(scanner) => scanner.feed(bytes),
            UsageReader::Json(body) => body.push(bytes),
            UsageReader::Opaque => {}
        }
    }

    fn finish(&mut self) -> BackendResult<Usage> {
        match self {
            UsageReader::Stream(scanner) => scanner.finish(),
            UsageReader::Json(body) => Ok(body.bytes().map(Usage::of_body).unwrap_or_default()),
            UsageReader::Opaque => Ok(Usage::default()),
        }
    }

    fn tokens_emitted(&self) -> u32 {
        match self {
            UsageReader::Stream(scanner) => scanner.tokens_emitted(),
            UsageReader::Json(_) | UsageReader::Opaque => 0,
        }
    }
}
