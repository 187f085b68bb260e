//! A minimal HTTP client: one chat request per connection. The chunked response is handed out read by read.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::ops::Range;

const READ_BYTES: usize = 64 << 10;

pub struct Response {
    socket: TcpStream,
    buffer: Vec<u8>,
    /// The part of the buffer that was received and not yet handed out.
    unread: Range<usize>,
    decoder: ChunkDecoder,
}

impl Response {
    /// Posts a chat request and waits for the head of the response.
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
        Ok(Self { socket, buffer, unread: head..length, decoder: ChunkDecoder::Size(0) })
    }

    /// The bytes of the body from one read, never empty; `None` at the end.
    pub fn next(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            let body = self.decoder.strip(&mut self.buffer, std::mem::take(&mut self.unread))?;
            if body > 0 {
                return Ok(Some(&self.buffer[..body]));
            }
            if matches!(self.decoder, ChunkDecoder::End) {
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

/// Removes the framing of a chunked body. The state is what comes next; a read may end anywhere.
enum ChunkDecoder {
    /// More digits of a size, whose digits so far have this value.
    Size(usize),
    /// This many bytes of a chunk.
    Data(usize),
    /// The line end after a chunk.
    LineEnd,
    End,
}

impl ChunkDecoder {
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
                Self::Size(0) if byte == b'\n' => Self::End,
                Self::Size(size) if byte == b'\n' => Self::Data(size),
                Self::Size(size) if byte == b'\r' => Self::Size(size),
                Self::Size(size) => {
                    let digit = char::from(byte).to_digit(16).ok_or(ErrorKind::InvalidData)?;
                    Self::Size(size * 16 + digit as usize)
                }
                Self::End => break,
            };
            at += used;
        }
        Ok(body)
    }
}
