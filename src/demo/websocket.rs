//! The server's side of one WebSocket (RFC 6455), as much of it as a coordinator needs: the upgrade, text messages, pings,
//! the close.
//!
//! Written out here instead of taken from the agent's WebSocket library: as the other side, it shows what the library or our
//! use of it gets wrong.
//!
//! Who runs here: the connection's thread reads; any thread sends, one at a time, under the [`Sender`]'s lock.

use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tungstenite::handshake::derive_accept_key;

use crate::sys::datetime;

/// The largest message taken, in one frame or in many.
const MESSAGE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// How long the goodbye may take when the peer does not read.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(200);

const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// The reading half.
pub(super) struct Reader<'a> {
    input: &'a mut BufReader<TcpStream>,
    replies: Sender,
}

/// The writing half. Clones send on the same connection.
#[derive(Clone)]
pub(super) struct Sender(Arc<Shared>);

struct Shared {
    tcp: TcpStream,
    turn: Mutex<()>,
}

struct Frame {
    last: bool,
    opcode: u8,
    payload: Vec<u8>,
}

/// Answers the upgrade request that had this `Sec-WebSocket-Key`, whatever its path.
pub(super) fn accept<'a>(key: &str, input: &'a mut BufReader<TcpStream>) -> io::Result<(Reader<'a>, Sender)> {
    let tcp = input.get_ref().try_clone()?;
    let sender = Sender(Arc::new(Shared { tcp, turn: Mutex::new(()) }));
    let (accept, date) = (derive_accept_key(key.as_bytes()), datetime::format_http(SystemTime::now()));
    let head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept";
    sender.write(format!("{head}: {accept}\r\nDate: {date}\r\n\r\n").as_bytes())?;
    Ok((Reader { input, replies: sender.clone() }, sender))
}

fn broken(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

impl Reader<'_> {
    /// The next text message; `None` when the client has closed properly. Pings are answered on the way.
    pub(super) fn next_text(&mut self) -> io::Result<Option<String>> {
        let mut message: Option<Vec<u8>> = None;
        loop {
            let room = MESSAGE_BYTES_MAX - message.as_ref().map_or(0, |so_far| so_far.len() as u64);
            let Frame { last, opcode, payload } = read_frame(self.input, room)?;
            match (opcode, &mut message) {
                (PING, _) => self.replies.frame(PONG, &payload)?,
                (PONG, _) => {}
                (CLOSE, _) => {
                    self.replies.frame(CLOSE, payload.get(..2).unwrap_or_default())?;
                    return Ok(None);
                }
                (TEXT, None) => message = Some(payload),
                (CONTINUATION, Some(so_far)) => so_far.extend_from_slice(&payload),
                (BINARY, None) => return Err(broken("a binary frame came where the protocol has only text")),
                _ => return Err(broken("a frame came out of order")),
            }
            if last && matches!(opcode, TEXT | CONTINUATION) {
                let text = String::from_utf8(message.unwrap_or_default());
                return text.map(Some).map_err(|_| broken("a text frame is not UTF-8"));
            }
        }
    }

    /// How long a read may wait from now on; `None` is for ever.
    pub(super) fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.input.get_ref().set_read_timeout(timeout)
    }
}

impl Sender {
    /// Sends one text message. Blocks while the client does not read.
    pub(super) fn send(&self, text: &str) -> io::Result<()> {
        self.frame(TEXT, text.as_bytes())
    }

    /// Says goodbye, best effort, and ends the connection: both halves fail from now on.
    pub(super) fn close(&self) {
        // A connection that is just blocked in a send gets no goodbye: waiting for it would be worse.
        if let Ok(turn) = self.0.turn.try_lock() {
            let _ = self.0.tcp.set_write_timeout(Some(CLOSE_TIMEOUT));
            let _ = (&self.0.tcp).write_all(&framed(CLOSE, &1000_u16.to_be_bytes()));
            drop(turn);
        }
        let _ = self.0.tcp.shutdown(Shutdown::Both);
    }

    fn frame(&self, opcode: u8, payload: &[u8]) -> io::Result<()> {
        self.write(&framed(opcode, payload))
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let _turn = self.0.turn.lock().unwrap_or_else(PoisonError::into_inner);
        (&self.0.tcp).write_all(bytes)
    }
}

/// One whole frame as a server sends it: without a mask.
fn framed(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(payload.len() + 10);
    frame.push(0x80 | opcode);
    match payload.len() {
        length @ 0..126 => frame.push(length as u8),
        length @ 126..0x1_0000 => {
            frame.push(126);
            frame.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            frame.push(127);
            frame.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(payload);
    frame
}

/// Reads a client's frame, which has to be masked and to fit into `room`.
fn read_frame(input: &mut impl Read, room: u64) -> io::Result<Frame> {
    let [first, second] = read_bytes(input)?;
    let length = match second & 0x7f {
        126 => u64::from(u16::from_be_bytes(read_bytes(input)?)),
        127 => u64::from_be_bytes(read_bytes(input)?),
        short => u64::from(short),
    };
    let (last, opcode) = (first & 0x80 != 0, first & 0x0f);
    if first & 0x70 != 0 || second & 0x80 == 0 {
        return Err(broken("a frame has reserved bits or no mask"));
    } else if opcode >= CLOSE && (length > 125 || !last) {
        return Err(broken("a control frame is too long or in pieces"));
    } else if length > room {
        return Err(broken("a message is too long"));
    }
    let mask: [u8; 4] = read_bytes(input)?;
    let mut payload = Vec::new();
    if input.take(length).read_to_end(&mut payload)? as u64 != length {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    for (index, byte) in payload.iter_mut().enumerate() {
        *byte ^= mask[index % 4];
    }
    Ok(Frame { last, opcode, payload })
}

fn read_bytes<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use tungstenite::Message;
    use tungstenite::protocol::frame::coding::{Data, OpCode};

    use super::*;

    fn connected() -> (tungstenite::WebSocket<TcpStream>, Reader<'static>, Sender) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let client = std::thread::spawn(move || tungstenite::client("ws://localhost/any/path", client).unwrap().0);
        let input = Box::leak(Box::new(BufReader::new(listener.accept().unwrap().0)));
        let mut request = crate::http_server::connection::read_head(input).unwrap().unwrap();
        let (key, _) = request.upgrade().unwrap();
        let (reader, sender) = accept(&key, input).unwrap();
        reader.set_timeout(Some(Duration::from_secs(10))).unwrap();
        (client.join().unwrap(), reader, sender)
    }

    #[test]
    fn messages_of_every_length_class_go_both_ways() {
        let (mut client, mut reader, sender) = connected();
        for length in [0, 1, 125, 126, 65_535, 65_536, 200_000] {
            let text = "x".repeat(length);
            sender.send(&text).unwrap();
            assert_eq!(client.read().unwrap(), Message::text(text.clone()));
            client.send(Message::text(text.clone())).unwrap();
            assert_eq!(reader.next_text().unwrap(), Some(text));
        }
    }

    #[test]
    fn pieces_pings_and_the_close_are_understood() {
        use tungstenite::protocol::frame::Frame;
        let (mut client, mut reader, _sender) = connected();
        let piece = |text: &'static str, data, last| Message::Frame(Frame::message(text, OpCode::Data(data), last));
        client.write(piece("gr\u{fc}", Data::Text, false)).unwrap();
        client.write(Message::Ping("are you there".into())).unwrap();
        client.write(piece("\u{df}e", Data::Continue, true)).unwrap();
        client.close(None).unwrap();
        assert_eq!(reader.next_text().unwrap().as_deref(), Some("gr\u{fc}\u{df}e"));
        assert_eq!(client.read().unwrap(), Message::Pong("are you there".into()));
        assert_eq!(reader.next_text().unwrap(), None);
        assert!(matches!(client.read(), Ok(Message::Close(_))));
    }

    #[test]
    fn what_a_client_must_not_send_is_refused() {
        let read = |bytes: &[u8], room| read_frame(&mut &*bytes, room).map(|frame| frame.payload);
        assert_eq!(read(&[0x81, 0x82, 1, 2, 3, 4, b'h' ^ 1, b'i' ^ 2], 2).unwrap(), b"hi");
        for (bytes, room, why) in [
            (&[0x81, 0x02, b'h', b'i'][..], 9, "mask"),
            (&[0xc1, 0x80, 0, 0, 0, 0], 9, "reserved"),
            (&[0x09, 0x80, 0, 0, 0, 0], 9, "pieces"),
            (&[0x89, 0xfe, 0, 200, 0, 0, 0, 0], 900, "too long"),
            (&[0x81, 0x8a, 0, 0, 0, 0], 9, "too long"),
            (&[0x81, 0x8a, 0, 0, 0, 0, 1], 99, "end of file"),
        ] {
            let error = read(bytes, room).unwrap_err().to_string();
            assert!(error.contains(why), "{why}: {error}");
        }
        let (mut client, mut reader, _sender) = connected();
        client.send(Message::binary(vec![1])).unwrap();
        assert!(reader.next_text().is_err());
    }
}
