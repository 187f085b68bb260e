//! WebSocket (RFC 6455) as a scripted peer speaks it: frames, broken ones among them, and the server's end of a connection.
//!
//! The headers are tungstenite's. The rest is not: the library refuses to send a broken frame, and copies each payload.

use std::io;
use std::sync::Arc;

use tungstenite::handshake::derive_accept_key;
use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::OpCode;

use super::connection::Connection;
use super::http::read_request;

pub const CONTINUATION: u8 = 0;
pub const TEXT: u8 = 1;
pub const BINARY: u8 = 2;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

/// Size of the buffer for one read of the socket.
pub const READ_BYTES: usize = 256 << 10;

/// One frame of a server.
pub fn encode(opcode: u8, is_final: bool, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    push_frame(&mut frame, opcode, is_final, None, &[payload]);
    frame
}

/// Appends one frame, whose payload is given in parts. Only a client's frame has a mask.
pub fn push_frame(out: &mut Vec<u8>, opcode: u8, is_final: bool, mask: Option<[u8; 4]>, parts: &[&[u8]]) {
    let header = FrameHeader { is_final, opcode: OpCode::from(opcode), mask, ..FrameHeader::default() };
    let length: usize = parts.iter().map(|part| part.len()).sum();
    header.format(length as u64, out).expect("a vector takes everything");
    let start = out.len();
    parts.iter().for_each(|part| out.extend_from_slice(part));
    if let Some(mask) = mask {
        apply_mask(&mut out[start..], mask);
    }
}

pub fn close_payload(code: u16, reason: &str) -> Vec<u8> {
    [&code.to_be_bytes()[..], reason.as_bytes()].concat()
}

/// The response to an upgrade request with this `Sec-WebSocket-Key`; more header lines may be added.
pub fn switching_protocols(key: &str, headers: &str) -> String {
    let accept = derive_accept_key(key.as_bytes());
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{headers}\
         Sec-WebSocket-Accept: {accept}\r\n\r\n"
    )
}

/// Eight bytes at a time: debug builds mask hundreds of megabytes.
fn apply_mask(payload: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let key = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (words, rest) = payload.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ key).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
}

pub struct Frame<'a> {
    pub header: FrameHeader,
    pub payload: &'a [u8],
}

impl Frame<'_> {
    pub fn opcode(&self) -> u8 {
        self.header.opcode.into()
    }
}

/// Splits received bytes into frames.
#[derive(Default)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    consumed: usize,
}

impl FrameDecoder {
    /// Where to append received bytes. Discards what was consumed.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        self.buffer.drain(..std::mem::take(&mut self.consumed));
        &mut self.buffer
    }

    /// Consumes the HTTP head before the first frame; `None` until it is complete.
    pub fn next_head(&mut self) -> Option<&[u8]> {
        let start = self.consumed;
        let length = self.buffer[start..].windows(4).position(|end| end == b"\r\n\r\n")? + 4;
        self.consumed += length;
        Some(&self.buffer[start..start + length])
    }

    /// Consumes and unmasks the next frame; `None` until it is complete.
    pub fn next_frame(&mut self) -> io::Result<Option<Frame<'_>>> {
        let unread = &self.buffer[self.consumed..];
        let mut cursor = io::Cursor::new(unread);
        let header = FrameHeader::parse(&mut cursor).map_err(io::Error::other)?;
        let Some((header, length)) = header else { return Ok(None) };
        let header_length = cursor.position() as usize;
        if ((unread.len() - header_length) as u64) < length {
            return Ok(None);
        }
        let start = self.consumed + header_length;
        self.consumed = start + length as usize;
        let payload = &mut self.buffer[start..self.consumed];
        if let Some(mask) = header.mask {
            apply_mask(payload, mask);
        }
        Ok(Some(Frame { header, payload }))
    }
}

/// The server's end of a WebSocket. One thread reads; any thread may write to the connection.
pub struct WebSocket {
    pub connection: Arc<Connection>,
    frames: FrameDecoder,
    read_buffer: Vec<u8>,
}

impl WebSocket {
    /// Reads the upgrade request and accepts it, with `more` in the same write as the response.
    pub fn accept(connection: Connection, more: &[u8]) -> io::Result<Self> {
        let connection = Arc::new(connection);
        let mut socket = Self { connection, frames: FrameDecoder::default(), read_buffer: vec![0; READ_BYTES] };
        let request = loop {
            socket.fill(READ_BYTES)?;
            if let Some(mut head) = socket.frames.next_head() {
                break read_request(&mut head, 0, 0)?;
            }
        };
        let key = request.as_ref().and_then(|request| request.header("sec-websocket-key"));
        let key = key.ok_or_else(|| io::Error::other("a request without Sec-WebSocket-Key"))?;
        let response = switching_protocols(key, "");
        socket.connection.write(&[response.as_bytes(), more].concat())?;
        Ok(socket)
    }

    /// Waits for bytes from the client, at most `limit`. An error at the end of the connection.
    pub fn fill(&mut self, limit: usize) -> io::Result<()> {
        self.connection.read(&mut self.read_buffer[..limit], self.frames.buffer())
    }

    /// The next complete frame among the bytes received; an error if it breaks the rules for a client's frame.
    pub fn next_frame(&mut self) -> io::Result<Option<Frame<'_>>> {
        let frame = self.frames.next_frame()?;
        match &frame {
            Some(Frame { header, .. }) if header.mask.is_none() || header.rsv1 || header.rsv2 || header.rsv3 => {
                Err(io::Error::other(format!("a client's frame must be masked, without reserved bits: {header:?}")))
            }
            _ => Ok(frame),
        }
    }
}
