//! The body of a successful response: relayed as it arrives, and read for its usage and its end.
//!
//! The first bytes decide what the body is, because servers label it with any content type or none. Invariant: no body without an
//! answer is a success.

use std::borrow::Cow;

use memchr::memmem;
use serde::de::IgnoredAny;
use ureq::Body;
use ureq::http::{HeaderMap, Response, header};

use super::bounded_json::{BoundedJson, VERBATIM_BYTES_MAX};
use super::report::{Progress, Report};
use super::sse::Scanner;
use super::usage::Usage;
use crate::backend::{BackendError, BackendResult, JobSink};

/// The beginnings of a stream's first line.
const STREAM_BEGINNINGS: [&[u8]; 6] = [b"data:", b"event:", b"id:", b"retry:", b"error:", b":"];

/// The byte order mark, which may precede a stream.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// One of the keys of an answer that is one JSON text.
const ANSWER_KEYS: [&[u8]; 2] = [b"\"choices\"", b"\"content\""];

/// The body of one response.
pub struct Answer {
    shape: Shape,
    status: u16,
    /// Labelled `text/event-stream`.
    is_labelled_stream: bool,
    has_relayed: bool,
}

enum Shape {
    /// Not known yet. Contains the bytes since the first one that is not blank: too few to decide.
    Undecided(Vec<u8>),
    Stream(Scanner),
    Json(JsonBody),
    /// Neither of the above.
    Text,
    /// Binary or encoded: relayed without being examined.
    Opaque,
}

impl Answer {
    /// The body of this response.
    pub fn of(response: &Response<Body>) -> Answer {
        let value = |name| media_type(response.headers(), name);
        let is_encoded = !matches!(value(header::CONTENT_ENCODING).as_str(), "" | "identity");
        let is_labelled_stream = value(header::CONTENT_TYPE) == "text/event-stream";
        Answer {
            shape: if is_encoded && !is_labelled_stream { Shape::Opaque } else { Shape::Undecided(Vec::new()) },
            status: response.status().as_u16(),
            is_labelled_stream,
            has_relayed: false,
        }
    }

    /// Relays and reads the next bytes. JSON is withheld until it shows an answer, so that another backend can be asked if it shows
    /// none.
    ///
    /// # Errors
    /// As [`JobSink::send_chunk`].
    pub fn relay(&mut self, bytes: &[u8], sink: &mut dyn JobSink) -> BackendResult<()> {
        let text = self.decide(bytes);
        if let Shape::Json(body) = &mut self.shape {
            if body.withholds(bytes, &text) {
                return Ok(());
            }
            self.release(sink)?;
        }
        sink.send_chunk(bytes)?;
        self.has_relayed = true;
        if let Shape::Stream(scanner) = &mut self.shape {
            scanner.feed(&text);
            sink.tokens_emitted(scanner.tokens_emitted());
        }
        Ok(())
    }

    /// How far the response has come.
    pub fn progress(&self) -> Progress {
        match &self.shape {
            Shape::Stream(scanner) => scanner.progress(),
            // More can only follow if the text is not what it seems to be; for an error, a long wait is not worthwhile.
            Shape::Json(body) if body.is_complete && body.is_released => Progress::Finished,
            Shape::Json(body) if body.is_complete => Progress::Done,
            _ => Progress::Open,
        }
    }

    /// Whether an event has come since the last call.
    pub fn take_event(&mut self) -> bool {
        match &mut self.shape {
            Shape::Stream(scanner) => scanner.take_event(),
            _ => false,
        }
    }

    /// Ends the body, and returns the usage.
    ///
    /// # Errors
    /// The body contains no complete answer, or an error. As [`JobSink::send_chunk`].
    pub fn finish(&mut self, sink: &mut dyn JobSink) -> BackendResult<Usage> {
        let result = match &mut self.shape {
            Shape::Json(body) => body.finish(self.status),
            _ if !self.has_relayed => Err(BackendError::Unreachable("its response has no body".into())),
            Shape::Stream(scanner) => scanner.finish(),
            Shape::Undecided(_) | Shape::Text => Err(BackendError::BadAnswer("it is neither a stream nor JSON".into())),
            Shape::Opaque => Ok(Usage::default()),
        };
        if !matches!(result, Err(BackendError::RouteNotFound(_))) {
            self.release(sink)?;
        }
        result
    }

    /// The error for a body that breaks off.
    ///
    /// # Errors
    /// As [`JobSink::send_chunk`].
    pub fn break_off(&mut self, how: String, sink: &mut dyn JobSink) -> BackendResult<BackendError> {
        self.release(sink)?;
        Ok(match self.has_relayed {
            true => BackendError::Broken(how),
            false => BackendError::Unreachable(format!("{how} before the first byte of the response")),
        })
    }

    /// Relays what was withheld.
    fn release(&mut self, sink: &mut dyn JobSink) -> BackendResult<()> {
        let Shape::Json(body) = &mut self.shape else { return Ok(()) };
        let withheld = std::mem::take(&mut body.withheld);
        if !withheld.is_empty() {
            sink.send_chunk(&withheld)?;
            self.has_relayed = true;
        }
        Ok(())
    }

    /// Decides the shape if it is not known yet. Returns the bytes to read.
    fn decide<'b>(&mut self, bytes: &'b [u8]) -> Cow<'b, [u8]> {
        let Shape::Undecided(seen) = &mut self.shape else { return bytes.into() };
        let text = match seen.is_empty() {
            true => Cow::Borrowed(bytes),
            false => [&seen[..], bytes].concat().into(),
        };
        let blanks = blanks_at_start(&text);
        let text = match text {
            Cow::Borrowed(text) => Cow::Borrowed(&text[blanks..]),
            Cow::Owned(mut text) => {
                text.drain(..blanks);
                text.into()
            }
        };
        match shape_of(&text, self.is_labelled_stream) {
            Some(shape) => self.shape = shape,
            None => *seen = text.to_vec(),
        }
        text
    }
}

/// The number of bytes before the first one that is neither blank nor part of a byte order mark.
fn blanks_at_start(text: &[u8]) -> usize {
    let mut rest = text.trim_ascii_start();
    while let Some(after) = rest.strip_prefix(BYTE_ORDER_MARK) {
        rest = after.trim_ascii_start();
    }
    text.len() - rest.len()
}

/// The shape of a body that starts with `text`; `None` if more is needed.
fn shape_of(text: &[u8], is_labelled_stream: bool) -> Option<Shape> {
    let first = *text.first()?;
    let may_become = |beginning: &[u8]| text.len() < beginning.len() && beginning.starts_with(text);
    match first {
        b'{' => Some(Shape::Json(JsonBody::default())),
        _ if STREAM_BEGINNINGS.iter().any(|beginning| text.starts_with(beginning)) => {
            Some(Shape::Stream(Scanner::default()))
        }
        _ if STREAM_BEGINNINGS.iter().any(|beginning| may_become(beginning)) || may_become(BYTE_ORDER_MARK) => None,
        _ if is_labelled_stream => Some(Shape::Stream(Scanner::default())),
        _ if first.is_ascii_graphic() => Some(Shape::Text),
        _ => Some(Shape::Opaque),
    }
}

/// The value of a header in lower case, without parameters.
fn media_type(headers: &HeaderMap, name: header::HeaderName) -> String {
    let value = headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// A body that is one JSON text.
#[derive(Default)]
struct JsonBody {
    text: BoundedJson,
    /// The part of the body that was not relayed yet, at most [`VERBATIM_BYTES_MAX`].
    withheld: Vec<u8>,
    /// Further bytes are relayed as they arrive.
    is_released: bool,
    is_complete: bool,
}

impl JsonBody {
    /// Reads the next bytes, and returns whether they are withheld. `text` are the bytes without what precedes the JSON.
    fn withholds(&mut self, bytes: &[u8], text: &[u8]) -> bool {
        self.text.push(text);
        let text = self.text.bytes().unwrap_or_default().trim_ascii_end();
        if text.ends_with(b"}") {
            self.is_complete = serde_json::from_slice::<IgnoredAny>(text).is_ok();
        }
        if !self.is_released {
            self.is_released = self.withheld.len() + bytes.len() > VERBATIM_BYTES_MAX
                || ANSWER_KEYS.iter().any(|key| memmem::find(text, key).is_some());
        }
        if !self.is_released {
            self.withheld.extend_from_slice(bytes);
        }
        !self.is_released
    }

    fn finish(&self, status: u16) -> BackendResult<Usage> {
        // A text that is too long to be buffered, even without its strings, is not examined.
        let Some(text) = self.text.bytes() else { return Ok(Usage::default()) };
        let mut report = Report::of_body(text, status)?;
        report.take_failure().map_or(Ok(report.usage()), Err)
    }
}
