//! Runs one job on one HTTP backend: posts the request and relays the response as it arrives.
//!
//! Invariants: bytes are relayed in order and unchanged. A truncated stream is an error, after its last byte has been
//! relayed. After an interrupt, no byte counts as part of the response.

use std::io::Read;
use std::time::{Duration, Instant};

use ureq::Body;
use ureq::http::Response;

use super::bounded_json::BoundedJson;
use super::sse::Scanner;
use super::usage::Usage;
use crate::backend::http::{AgentLease, Client, connect_error, read_bounded};
use crate::backend::{BackendError, BackendResult, ERROR_BODY_MAX, JobResult, JobSink};

/// Largest chunk, in bytes of the response.
const CHUNK_MAX: usize = 16 << 10;

/// Initial read buffer, in bytes: enough for a stream of small events. It grows up to [`CHUNK_MAX`].
const READ_BUFFER_MIN: usize = 512;

/// Maximum part of an error body that is read, in bytes: more than is passed on, because an API key may be removed from it.
const ERROR_READ_MAX: usize = 4 * ERROR_BODY_MAX;

/// Time limit for reading an error body.
const ERROR_READ_TIME: Duration = Duration::from_secs(1);

/// Precision of connect timeouts, which are whole milliseconds: a timeout derived from the deadline may fire just before it.
const CONNECT_PRECISION: Duration = Duration::from_millis(1);

/// Posts `body` to `url` and relays the response into `sink`, all within `deadline`.
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
    // The body may be 60 MB, and the response may take minutes.
    drop(body);
    let status = response.status().as_u16();
    if !(200..300).contains(&status) {
        // The status is sufficient if the body breaks off or stalls.
        lease.monitor().limit_reads_to(ERROR_READ_TIME);
        let (error_body, _) = read_bounded(response.into_body(), ERROR_READ_MAX);
        sink.still_wanted()?;
        return Err(client.status_error(status, &error_body));
    }
    let mut usage_reader = UsageReader::for_response(&response);
    let usage = relay_body(&lease, response.into_body(), &mut usage_reader, sink)?;
    lease.give_back();
    let duration_ms = u32::try_from(started.elapsed().as_millis()).unwrap_or(u32::MAX);
    Ok(JobResult { input_tokens: usage.input, output_tokens: usage.output, duration_ms })
}

/// Posts the request. From then on, the sink's owner can interrupt the exchange.
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

// Not inlined: the buffer and reader would be in the frame below the deepest calls of the exchange, and the stack pages that those
// touch stay resident.
#[inline(never)]
fn relay_body(
    lease: &AgentLease<'_>,
    body: Body,
    usage_reader: &mut UsageReader,
    sink: &mut dyn JobSink,
) -> BackendResult<Usage> {
    let mut reader = body.into_reader();
    let mut buffer = vec![0; READ_BUFFER_MIN];
    let mut relayed = false;
    loop {
        // Do not read from a socket that was shut down: closing it sends a reset only if unread data is left, and without a
        // reset a backend blocked in a write would notice a minute later.
        sink.still_wanted()?;
        let read = reader.read(&mut buffer);
        sink.still_wanted()?;
        match read {
            Ok(0) if lease.monitor().has_broken() => return Err(broken_error("the connection was reset", relayed)),
            Ok(0) => return usage_reader.finish().map_err(|e| if relayed { e } else { empty_stream_error(e) }),
            Ok(n) => {
                sink.send_chunk(&buffer[..n])?;
                relayed = true;
                usage_reader.feed(&buffer[..n]);
                sink.tokens_emitted(usage_reader.tokens_emitted());
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

/// The error for a response that breaks off.
fn broken_error(how: &str, relayed: bool) -> BackendError {
    if relayed {
        BackendError::Broken(how.to_owned())
    } else {
        BackendError::Unreachable(format!("{how} before the first byte of the response"))
    }
}

/// A stream that ends without a single byte counts as unreachable.
fn empty_stream_error(e: BackendError) -> BackendError {
    match e {
        BackendError::CutStream(how) => broken_error(&how, false),
        e => e,
    }
}

/// Reads the usage off a response, depending on its content type.
enum UsageReader {
    Stream(Scanner),
    Json(BoundedJson),
    Opaque,
}

impl UsageReader {
    fn for_response(response: &Response<Body>) -> UsageReader {
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
            UsageReader::Json(body) => Ok(body.bytes().map(Usage::from_body).unwrap_or_default()),
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
