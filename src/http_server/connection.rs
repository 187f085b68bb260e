//! One HTTP/1.1 request and its response, on the thread of its connection.
//!
//! Invariant: a connection is reused only if the request was read and the response written completely.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::SystemTime;

use httparse::Status;
use serde_json::{Value, json};
use tungstenite::http::StatusCode;
use tungstenite::http::uri::Authority;

use crate::net;
use crate::sys::{datetime, sockets};

/// Limit of a request body, in bytes. Requests may contain images; the agent accepts messages of the same size.
pub(crate) const BODY_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Limit of a request head, and of a chunk's size line, in bytes.
const HEAD_BYTES_MAX: u64 = 64 * 1024;

/// Limit of the number of headers in a request.
const HEADERS_MAX: usize = 128;

/// A request whose head has been read, and its response.
pub(crate) struct Exchange<'a> {
    input: &'a mut BufReader<TcpStream>,
    head: Head,
    body_left: Body,
    answered: bool,
}

#[derive(Default)]
struct Head {
    method: String,
    path: String,
    http_1_0: bool,
    close: bool,
    expects_continue: bool,
    websocket_key: Option<String>,
}

enum Body {
    Read,
    Length(u64),
    Chunked,
}

/// Why a request is invalid, with its HTTP status.
#[derive(Debug)]
pub(crate) struct BadRequest {
    pub(crate) status: u16,
    pub(crate) message: String,
}

fn bad(status: u16, message: impl Into<String>) -> BadRequest {
    BadRequest { status, message: message.into() }
}

/// Reads the head of the next request; `None` if the client has closed the connection. Responds to an invalid head itself.
pub(crate) fn read_head(input: &mut BufReader<TcpStream>) -> io::Result<Option<Exchange<'_>>> {
    let mut text = Vec::new();
    loop {
        let left = HEAD_BYTES_MAX - text.len() as u64;
        let start = text.len();
        if input.by_ref().take(left).read_until(b'\n', &mut text)? == 0 {
            break;
        }
        let line_is_empty = matches!(&text[start..], b"\n" | b"\r\n");
        if line_is_empty && start > 0 {
            break;
        } else if line_is_empty {
            text.clear(); // empty lines before a request are ignored
        }
    }
    if text.is_empty() {
        return Ok(None);
    }
    let parsed = match text.len() as u64 {
        HEAD_BYTES_MAX.. => Err(bad(431, "the request head is too long")),
        _ => parse_head(&text),
    };
    match parsed {
        Ok((head, body_left)) => Ok(Some(Exchange { input, head, body_left, answered: false })),
        Err(BadRequest { status, message }) => {
            let head = Head { close: true, ..Head::default() };
            let mut rejected = Exchange { input, head, body_left: Body::Read, answered: false };
            rejected.respond_json(status, &error_document(&message));
            Ok(None)
        }
    }
}

fn parse_head(text: &[u8]) -> Result<(Head, Body), BadRequest> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(text) {
        Ok(Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Err(bad(431, "the request has too many headers")),
        _ => return Err(bad(400, "not an HTTP/1.1 request")),
    }
    let target = request.path.unwrap_or_default();
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    let http_1_0 = request.version == Some(0);
    let mut head = Head { path: path.to_owned(), http_1_0, close: http_1_0, ..Head::default() };
    head.method = request.method.unwrap_or_default().to_owned();
    let mut body = Body::Read;
    let (mut host, mut origin) = (None, None);
    for header in request.headers.iter() {
        let exact = String::from_utf8_lossy(header.value);
        let value = exact.to_ascii_lowercase();
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let length = value.parse().map_err(|_| bad(400, "the Content-Length is not a number"))?;
                body = Body::Length(length);
            }
            "transfer-encoding" if value == "chunked" => body = Body::Chunked,
            "transfer-encoding" => return Err(bad(501, "only the chunked transfer encoding is supported")),
            "connection" => head.close |= value.contains("close"),
            "host" if host.is_some() => return Err(bad(400, "the request has two Host headers")),
            "host" => host = Some(value),
            "origin" => origin = Some(value),
            "sec-websocket-key" => head.websocket_key = Some(exact.into_owned()),
            "expect" => head.expects_continue = value == "100-continue",
            _ => {}
        }
    }
    refuse_foreign_pages(host.as_deref(), origin.as_deref())?;
    match body {
        Body::Length(BODY_BYTES_MAX..) => Err(bad(413, format!("the body exceeds {BODY_BYTES_MAX} bytes"))),
        body => Ok((head, body)),
    }
}

/// Rejects requests that a web page of another site makes a browser send to this machine, either across origins or through a host
/// name that resolves to a loopback address.
fn refuse_foreign_pages(host: Option<&str>, origin: Option<&str>) -> Result<(), BadRequest> {
    if host.is_some_and(|host| !is_loopback(host)) {
        return Err(bad(403, "this server serves only its own machine; address it as 127.0.0.1 or localhost"));
    }
    let is_own_page = |origin: &str| host.is_some_and(|host| origin.strip_prefix("http://") == Some(host));
    match origin {
        Some(origin) if !is_own_page(origin) => Err(bad(403, "this server does not serve web pages of other origins")),
        _ => Ok(()),
    }
}

/// Whether a Host header names this machine.
fn is_loopback(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let has_port_or_none = authority.port_u16().is_some() || authority.host() == host;
    has_port_or_none && !host.contains('@') && net::is_loopback(authority.host())
}

impl Exchange<'_> {
    /// The method, such as `GET`.
    pub(crate) fn method(&self) -> &str {
        &self.head.method
    }

    /// The path, without the query.
    pub(crate) fn path(&self) -> &str {
        &self.head.path
    }

    /// For a WebSocket upgrade, the key and the connection, which serves no further request; `None` for other requests.
    pub(crate) fn upgrade(&mut self) -> Option<(String, &BufReader<TcpStream>)> {
        let key = self.head.websocket_key.take()?;
        self.head.close = true;
        Some((key, self.input))
    }

    /// Reads the body as JSON.
    pub(crate) fn read_json(&mut self) -> Result<Value, BadRequest> {
        let body = self.read_body()?;
        serde_json::from_slice(&body).map_err(|error| bad(400, format!("the body is not JSON: {error}")))
    }

    /// Reads the body.
    pub(crate) fn read_body(&mut self) -> Result<Vec<u8>, BadRequest> {
        if std::mem::take(&mut self.head.expects_continue) {
            let sent = self.input.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
            sent.map_err(|error| bad(400, error.to_string()))?;
        }
        let mut body = Vec::new();
        match self.body_left {
            Body::Read => {}
            Body::Length(length) => self.read_exactly(length, &mut body)?,
            Body::Chunked => self.read_chunks(&mut body)?,
        }
        self.body_left = Body::Read;
        Ok(body)
    }

    fn read_exactly(&mut self, length: u64, body: &mut Vec<u8>) -> Result<(), BadRequest> {
        match self.input.by_ref().take(length).read_to_end(body) {
            Ok(read) if read as u64 == length => Ok(()),
            Ok(_) => Err(bad(400, "the body is truncated")),
            Err(error) => Err(bad(400, format!("failed to read the body: {error}"))),
        }
    }

    fn read_chunks(&mut self, body: &mut Vec<u8>) -> Result<(), BadRequest> {
        loop {
            let Ok(Status::Complete((_, size))) = httparse::parse_chunk_size(&self.read_line()?) else {
                return Err(bad(400, "a chunk size is not a number"));
            };
            if size == 0 {
                while self.read_line()? != b"\r\n" {} // trailers
                return Ok(());
            }
            if size.saturating_add(body.len() as u64) >= BODY_BYTES_MAX {
                return Err(bad(413, format!("the body exceeds {BODY_BYTES_MAX} bytes")));
            }
            self.read_exactly(size, body)?;
            if self.read_line()? != b"\r\n" {
                return Err(bad(400, "a chunk is longer than its size"));
            }
        }
    }

    fn read_line(&mut self) -> Result<Vec<u8>, BadRequest> {
        let mut line = Vec::new();
        match self.input.by_ref().take(HEAD_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(1..) if line.ends_with(b"\n") => Ok(line),
            Ok(_) => Err(bad(400, "the body is truncated")),
            Err(error) => Err(bad(400, format!("failed to read the body: {error}"))),
        }
    }

    /// Responds with a JSON document. Ignores write errors, because the client may have disconnected.
    pub(crate) fn respond_json(&mut self, status: u16, document: &Value) {
        self.respond(status, "application/json", &document.to_string());
    }

    /// Like [`Exchange::respond_json`], with a text of any type.
    pub(crate) fn respond(&mut self, status: u16, content_type: &str, body: &str) {
        let head = self.response_head(status, &format!("{content_type}\r\nContent-Length: {}", body.len()));
        match self.input.get_mut().write_all(&[head.as_bytes(), body.as_bytes()].concat()) {
            Ok(()) => self.answered = true,
            Err(error) => crate::debug!("a client disconnected before its response: {error}"),
        }
    }

    /// Starts a streamed response.
    pub(crate) fn stream(&mut self, content_type: &str) -> io::Result<StreamedBody<'_>> {
        // HTTP/1.0 has no chunks: the body ends with the connection.
        let chunked = !self.head.http_1_0;
        let framing = if chunked { "\r\nTransfer-Encoding: chunked" } else { "" };
        let head = self.response_head(200, &format!("{content_type}\r\nCache-Control: no-cache{framing}"));
        let out = self.input.get_mut();
        out.write_all(head.as_bytes())?;
        Ok(StreamedBody { out, answered: &mut self.answered, chunked, frame: Vec::new() })
    }

    fn response_head(&mut self, status: u16, content: &str) -> String {
        // An unread body would be parsed as the next request.
        self.head.close |= !matches!(self.body_left, Body::Read);
        let connection = if self.head.close { "close" } else { "keep-alive" };
        let reason =
            StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Unknown");
        let date = datetime::format_http(SystemTime::now());
        format!(
            "HTTP/1.1 {status} {reason}\r\nContent-Type: {content}\r\nDate: {date}\r\nConnection: {connection}\r\n\r\n"
        )
    }

    /// Whether the client has closed the connection or its half of it.
    pub(crate) fn client_has_disconnected(&self) -> bool {
        sockets::peer_has_closed(self.input.get_ref())
    }

    /// Whether another request may follow on this connection.
    pub(crate) fn may_continue(&self) -> bool {
        self.answered && !self.head.close && matches!(self.body_left, Body::Read)
    }
}

/// A streamed response. Each piece is written to the socket at once.
pub(crate) struct StreamedBody<'a> {
    out: &'a mut TcpStream,
    answered: &'a mut bool,
    chunked: bool,
    frame: Vec<u8>,
}

impl StreamedBody<'_> {
    /// Sends `bytes`. Fails if the client has disconnected.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if !self.chunked {
            return self.out.write_all(bytes);
        }
        if bytes.is_empty() {
            return Ok(()); // an empty chunk would end the body
        }
        self.frame.clear();
        write!(self.frame, "{:x}\r\n", bytes.len())?;
        self.frame.extend_from_slice(bytes);
        self.frame.extend_from_slice(b"\r\n");
        self.out.write_all(&self.frame)
    }

    /// Whether the client has closed the connection or its half of it.
    pub(crate) fn client_has_disconnected(&self) -> bool {
        sockets::peer_has_closed(self.out)
    }

    /// Ends the body. If dropped without this call, the connection closes, and the client sees a truncated body.
    pub(crate) fn finish(self) -> io::Result<()> {
        if self.chunked {
            self.out.write_all(b"0\r\n\r\n")?;
        }
        *self.answered = true;
        Ok(())
    }
}

/// A JSON document with an error message.
pub(crate) fn error_document(message: &str) -> Value {
    json!({"error": {"message": message}})
}

/// Decodes percent-encoding: clients encode the slash in a model id as `%2F`. Invalid escapes are kept.
pub(crate) fn percent_decoded(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_loopback_takes_this_machine_alone() {
        for host in ["127.0.0.1", "127.0.0.1:8788", "127.9.9.9", "localhost", "localhost:1", "[::1]", "[::1]:8788"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8788",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "0.0.0.0",
            "::1",
            "",
            "[::2]",
            "192.0.2.1",
            "localhost:80@evil.example",
            "127.0.0.1:x",
            "[::1]evil",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn percent_decoded_keeps_invalid_escapes() {
        assert_eq!(percent_decoded("meta%2Fllama%20%zz%"), "meta/llama %zz%");
    }
}
