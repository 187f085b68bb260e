//! Runs one job on one HTTP backend: posts the request and relays the response as it arrives.
//!
//! Invariants: bytes are relayed in order and unchanged. A truncated stream is an error, after its last byte has been
//! relayed. After an interrupt, no byte counts as part of the response.

use std::io::Read;
use std::time::{Duration, Instant};

use ureq::Body;
use ureq::http::Response;

use super::answer::Answer;
use super::completion::Completion;
use super::report::Progress;
use super::usage::Usage;
use crate::backend::http::{AgentLease, Client, RequestBody, connect_error, read_bounded};
use crate::backend::{BackendError, BackendResult, ERROR_BODY_MAX, JobSink};

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

/// A request that was answered with a successful status. Its response is still to be relayed.
pub struct Exchange<'a> {
    lease: AgentLease<'a>,
    response: Response<Body>,
}

/// Posts the request, within `time`. From then on, the sink's owner can interrupt the exchange.
pub fn post<'a>(
    client: &'a Client,
    url: &str,
    body: &RequestBody,
    time: Duration,
    sink: &mut dyn JobSink,
) -> BackendResult<Exchange<'a>> {
    let started = Instant::now();
    let lease = client.lease();
    sink.interrupt_with(lease.interrupt());
    sink.still_wanted()?;
    let response = lease.post(url, body, time).or_else(|e| {
        sink.still_wanted()?;
        if time.saturating_sub(started.elapsed()) <= CONNECT_PRECISION {
            return Err(BackendError::DeadlinePassed);
        }
        Err(connect_error(e))
    })?;
    let status = response.status().as_u16();
    if !(200..300).contains(&status) {
        // The status is sufficient if the body breaks off or stalls.
        lease.monitor().limit_reads_to(ERROR_READ_TIME);
        let (error_body, _) = read_bounded(response.into_body(), ERROR_READ_MAX);
        sink.still_wanted()?;
        return Err(client.status_error(status, &error_body));
    }
    Ok(Exchange { lease, response })
}

impl Exchange<'_> {
    /// Relays the response into `sink`. Returns its usage.
    pub fn relay(self, sink: &mut dyn JobSink) -> BackendResult<Usage> {
        let Exchange { lease, response } = self;
        let mut answer = Answer::of(&response);
        let end = relay_body(&lease, response.into_body(), &mut answer, sink)?;
        let usage = answer.finish(sink)?;
        if end == BodyEnd::Reached {
            lease.give_back();
        }
        sink.cached_tokens(usage.cached.unwrap_or(0));
        Ok(usage)
    }
}

/// How the relay of a body ended.
#[derive(PartialEq, Eq)]
enum BodyEnd {
    /// The body has ended.
    Reached,
    /// The response is complete, but its body is open. The connection cannot be reused.
    NotAwaited,
}

// Not inlined: the buffer and reader would be in the frame below the deepest calls of the exchange, and the stack pages that those
// touch stay resident.
#[inline(never)]
fn relay_body(
    lease: &AgentLease<'_>,
    body: Body,
    answer: &mut Answer,
    sink: &mut dyn JobSink,
) -> BackendResult<BodyEnd> {
    let mut reader = body.into_reader();
    let mut buffer = vec![0; READ_BUFFER_MIN];
    let mut completion = Completion::default();
    loop {
        if let Some(time) = completion.read_timeout() {
            lease.monitor().limit_reads_to(time);
        }
        let read = read_wanted(lease, &mut reader, &mut buffer, sink);
        let is_last = completion.is_due();
        match read {
            Ok(0) => return Ok(BodyEnd::Reached),
            Ok(n) => {
                answer.relay(&buffer[..n], sink)?;
                completion.update(answer.progress(), answer.take_event());
                if is_last && completion.is_due() {
                    return Ok(BodyEnd::NotAwaited);
                }
                if n == buffer.len() && n < CHUNK_MAX {
                    buffer.resize(2 * n, 0);
                }
            }
            // The time for the rest is up, or the deadline has passed.
            Err(BackendError::DeadlinePassed) if answer.progress() > Progress::Open => return Ok(BodyEnd::NotAwaited),
            Err(BackendError::Broken(_)) if answer.progress() == Progress::Done => return Ok(BodyEnd::NotAwaited),
            Err(BackendError::Broken(how)) => return Err(answer.break_off(how, sink)?),
            Err(e) => return Err(e),
        }
    }
}

/// Reads the next bytes of the body. If the job was interrupted, that takes precedence over the result of the read.
fn read_wanted(
    lease: &AgentLease<'_>,
    reader: &mut impl Read,
    buffer: &mut [u8],
    sink: &mut dyn JobSink,
) -> BackendResult<usize> {
    loop {
        // Do not read from a socket that was shut down: closing it sends a reset only if unread data is left, and without a
        // reset a backend blocked in a write would notice a minute later.
        sink.still_wanted()?;
        let read = reader.read(buffer);
        sink.still_wanted()?;
        return match read {
            Ok(0) if lease.monitor().has_broken() => Err(BackendError::Broken("the connection was reset".into())),
            Ok(n) => Ok(n),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => Err(match ureq::Error::from(e) {
                ureq::Error::Timeout(ureq::Timeout::Global) => BackendError::DeadlinePassed,
                e => BackendError::Broken(e.to_string()),
            }),
        };
    }
}
