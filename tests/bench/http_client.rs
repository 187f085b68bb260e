//! An HTTP client with nothing in it: one request on one connection, its chunked answer read by read.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::ops::Range;

/// What one read may bring.
const READ_BYTES: usize = 64 << 10;

pub struct Answer {
    socket: TcpStream,
    buffer: Vec<u8>,
    /// What of the buffer is read and not yet given out.
    unread: Range<usize>,
    chunks: Dechunker,
}

impl Answer {
    /// Posts a chat request; returns when the head of the answer has come.
    pub fn to(request: &[u8], backend_port: u16) -> io::Result<Self> {
        let mut socket = TcpStream::connect(("127.0.0.1", backend_port))?;
        socket.set_nodelay(true)?;
        let mut message = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            request.len()
        )
        .into_bytes();
        message.extend_from_slice(request);
        socket.write_all(&message)?;
        let mut buffer = vec![0; READ_BYTES];
        let mut length = 0;
        let head = loop {
            length += read(&mut socket, &mut buffer[length..])?;
            if let Some(head) = buffer[..length].windows(4).position(|end| end == b"\r\n\r\n") {
                break head + 4;
            }
        };
        if !buffer.starts_with(b"HTTP/1.1 200 ") {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                String::from_utf8_lossy(&buffer[..head]).trim().to_owned(),
            ));
        }
        Ok(Self { socket, buffer, unread: head..length, chunks: Dechunker::Size(0) })
    }

    /// The body's bytes of one read, never empty; nothing at its end.
    pub fn next(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            let body = self.chunks.strip(&mut self.buffer, std::mem::take(&mut self.unread))?;
            if body > 0 {
                return Ok(Some(&self.buffer[..body]));
            }
            if matches!(self.chunks, Dechunker::Nothing) {
                return Ok(None);
            }
            self.unread = 0..read(&mut self.socket, &mut self.buffer)?;
        }
    }
}

fn read(socket: &mut TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    match socket.read(buffer)? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        n => Ok(n),
    }
}

/// Takes the framing out of a chunked body, wherever reads cut it: what comes next.
enum Dechunker {
    /// The rest of a size, of which so much is known.
    Size(usize),
    /// So many bytes of a chunk.
    Data(usize),
    /// The line end behind a chunk.
    LineEnd,
    Nothing,
}

impl Dechunker {
    /// Moves the payload in `buffer[unread]` to the front of the buffer and returns its length.
    fn strip(&mut self, buffer: &mut [u8], unread: Range<usize>) -> io::Result<usize> {
        let (mut at, mut body) = (unread.start, 0);
        while at < unread.end {
            let byte = buffer[at];
            let mut used = 1;
            *self = match *self {
                Self::Data(left) => {
                    used = left.min(unread.end - at);
                    buffer.copy_within(at..at + used, body);
                    body += used;
                    if used == left { Self::LineEnd } else { Self::Data(left - used) }
                }
                Self::LineEnd if byte == b'\n' => Self::Size(0),
                Self::LineEnd => Self::LineEnd,
                Self::Size(0) if byte == b'\n' => Self::Nothing,
                Self::Size(size) if byte == b'\n' => Self::Data(size),
                Self::Size(size) if byte == b'\r' => Self::Size(size),
                Self::Size(size) => {
                    let digit = char::from(byte).to_digit(16).ok_or(ErrorKind::InvalidData)?;
                    Self::Size(size * 16 + digit as usize)
                }
                Self::Nothing => break,
            };
            at += used;
        }
        Ok(body)
    }
}
