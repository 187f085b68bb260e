//! The server side of one WebSocket: the upgrade, text messages, pings and the close.
//!
//! Threads: the connection's thread reads. Any thread can send; a lock keeps frames whole, including those that the reader sends in
//! reply.

use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tungstenite::handshake::derive_accept_key;
use tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tungstenite::protocol::frame::{CloseFrame, Frame};
use tungstenite::protocol::{Role, WebSocketConfig};
use tungstenite::{Error, Message, WebSocket};

use crate::sys::datetime;

/// Limit of a received message, in bytes.
const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Time limit for sending the close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(200);

/// The reading half. It replies through its [`Sender`].
pub(super) struct Reader(WebSocket<Sender>);

/// The writing half. Clones send on the same connection.
#[derive(Clone)]
pub(super) struct Sender(Arc<Shared>);

struct Shared {
    tcp: TcpStream,
    turn: Mutex<()>,
}

/// Accepts the upgrade request with this `Sec-WebSocket-Key`, regardless of its path.
pub(super) fn accept(key: &str, input: &BufReader<TcpStream>) -> io::Result<(Reader, Sender)> {
    let tcp = input.get_ref().try_clone()?;
    let mut sender = Sender(Arc::new(Shared { tcp, turn: Mutex::new(()) }));
    let (accept, date) = (derive_accept_key(key.as_bytes()), datetime::format_http(SystemTime::now()));
    let head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept";
    sender.write_all(format!("{head}: {accept}\r\nDate: {date}\r\n\r\n").as_bytes())?;
    let limit = Some(MESSAGE_BYTES_MAX);
    let config = WebSocketConfig::default().max_message_size(limit).max_frame_size(limit);
    let received = input.buffer().to_vec();
    Ok((Reader(WebSocket::from_partially_read(sender.clone(), received, Role::Server, Some(config))), sender))
}

impl Reader {
    /// Reads the next text message, and answers pings; `None` once the client has closed the WebSocket.
    pub(super) fn next_text(&mut self) -> io::Result<Option<String>> {
        loop {
            match self.0.read().map_err(io_error)? {
                Message::Text(text) => return Ok(Some(text.as_str().to_owned())),
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
                Message::Close(_) => {
                    let _ = self.0.flush(); // sends the close frame of the reply
                    return Ok(None);
                }
                Message::Binary(_) => return Err(io::Error::new(ErrorKind::InvalidData, "a binary message")),
            }
        }
    }

    /// Sets the time limit for reads; `None` for no limit.
    pub(super) fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.get_ref().0.tcp.set_read_timeout(timeout)
    }
}

fn io_error(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        error => io::Error::new(ErrorKind::InvalidData, error),
    }
}

impl Read for Sender {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.0.tcp).read(buffer)
    }
}

/// Each call writes all of `frames`, so that those of different threads do not mix.
impl Write for Sender {
    fn write(&mut self, frames: &[u8]) -> io::Result<usize> {
        let _turn = self.0.turn.lock().unwrap_or_else(PoisonError::into_inner);
        (&self.0.tcp).write_all(frames)?;
        Ok(frames.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sender {
    /// Sends a text message. Blocks while the client does not read.
    pub(super) fn send(&self, text: &str) -> io::Result<()> {
        self.clone().write_all(&bytes_of(Frame::message(text.to_owned(), OpCode::Data(Data::Text), true))?)
    }

    /// Sends a close frame, if possible, and shuts the connection down; both halves then fail.
    pub(super) fn close(&self) {
        // No close frame if a send is blocked: waiting for it would take too long.
        if let Ok(turn) = self.0.turn.try_lock() {
            let _ = self.0.tcp.set_write_timeout(Some(CLOSE_TIMEOUT));
            let close = Frame::close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }));
            let _ = bytes_of(close).and_then(|frame| (&self.0.tcp).write_all(&frame));
            drop(turn);
        }
        let _ = self.0.tcp.shutdown(Shutdown::Both);
    }
}

fn bytes_of(frame: Frame) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(frame.len());
    frame.format(&mut bytes).map_err(io_error)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn connected() -> (WebSocket<TcpStream>, Reader, Sender) {
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
    fn reader_handles_fragments_pings_and_the_close() {
        let (mut client, mut reader, _sender) = connected();
        let fragment = |text: &'static str, data, last| Message::Frame(Frame::message(text, OpCode::Data(data), last));
        client.write(fragment("gr\u{fc}", Data::Text, false)).unwrap();
        client.write(Message::Ping("are you there".into())).unwrap();
        client.write(fragment("\u{df}e", Data::Continue, true)).unwrap();
        client.close(None).unwrap();
        assert_eq!(reader.next_text().unwrap().as_deref(), Some("gr\u{fc}\u{df}e"));
        assert_eq!(client.read().unwrap(), Message::Pong("are you there".into()));
        assert_eq!(reader.next_text().unwrap(), None);
        assert!(matches!(client.read(), Ok(Message::Close(_))));
    }

    #[test]
    fn close_sends_a_close_frame_and_ends_both_halves() {
        let (mut client, mut reader, sender) = connected();
        sender.close();
        let Ok(Message::Close(Some(frame))) = client.read() else { panic!("no close frame") };
        assert_eq!(frame.code, CloseCode::Normal);
        assert!(reader.next_text().is_err() && sender.send("x").is_err());
    }

    #[test]
    fn reader_rejects_invalid_frames() {
        let next_text = |bytes: &[u8]| {
            let (mut client, mut reader, _sender) = connected();
            client.get_mut().write_all(bytes).unwrap();
            client.get_mut().shutdown(Shutdown::Write).unwrap();
            reader.next_text()
        };
        assert_eq!(next_text(&[0x81, 0x82, 1, 2, 3, 4, b'h' ^ 1, b'i' ^ 2]).unwrap().as_deref(), Some("hi"));
        for (bytes, why) in [
            (&[0x81, 0x02, b'h', b'i'][..], "no mask"),
            (&[0xc1, 0x80, 0, 0, 0, 0], "a reserved bit"),
            (&[0x09, 0x80, 0, 0, 0, 0], "a fragmented control frame"),
            (&[0x89, 0xfe, 0, 200, 0, 0, 0, 0], "a long control frame"),
            (&[0x81, 0xff, 0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0, 0], "a long message"),
            (&[0x81, 0x8a, 0, 0, 0, 0, 1], "a truncated frame"),
            (&[0x82, 0x80, 0, 0, 0, 0], "a binary message"),
        ] {
            let error = next_text(bytes).expect_err(why);
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{why}: {error}");
        }
    }
}
