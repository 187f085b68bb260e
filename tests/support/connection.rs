//! A server's end of a connection, plain or TLS, shared by the thread that reads and those that write.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};

use rustls::{ServerConfig, ServerConnection};

pub struct Connection {
    pub stream: TcpStream,
    is_tls: bool,
    /// Locked for each write, so that the bytes of two threads do not mix. The reader waits in the socket without the lock.
    session: Mutex<Option<ServerConnection>>,
}

impl Connection {
    pub fn new(stream: TcpStream, tls: Option<&Arc<ServerConfig>>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let session = tls.map(|config| ServerConnection::new(Arc::clone(config)));
        let session = session.transpose().map_err(io::Error::other)?;
        Ok(Self { stream, is_tls: session.is_some(), session: Mutex::new(session) })
    }

    /// Waits for bytes and appends them to `out`; an error at the end of the connection. `buffer` limits one read of the socket.
    pub fn read(&self, buffer: &mut [u8], out: &mut Vec<u8>) -> io::Result<()> {
        let before = out.len();
        while out.len() == before {
            let received = match (&self.stream).read(buffer)? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => &buffer[..n],
            };
            if self.is_tls {
                self.decrypt(received, out)?;
            } else {
                out.extend_from_slice(received);
            }
        }
        Ok(())
    }

    fn decrypt(&self, mut records: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        let mut session = self.session.lock().expect("the session");
        let Some(tls) = session.as_mut() else { return Ok(()) };
        while !records.is_empty() {
            tls.read_tls(&mut records)?;
            let processed = tls.process_new_packets();
            let read = tls.reader().read_to_end(out);
            // Handshake messages, key updates and alerts.
            self.send_records(tls)?;
            processed.map_err(io::Error::other)?;
            match read {
                Err(e) if e.kind() != ErrorKind::WouldBlock => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut session = self.session.lock().expect("the session");
        match session.as_mut() {
            None => (&self.stream).write_all(bytes),
            // A session buffers 64 KiB.
            Some(tls) => bytes.chunks(16 << 10).try_for_each(|chunk| {
                tls.writer().write_all(chunk)?;
                self.send_records(tls)
            }),
        }
    }

    /// Changes the keys of both directions (TLS 1.3).
    pub fn update_keys(&self) {
        let mut session = self.session.lock().expect("the session");
        let tls = session.as_mut().expect("a TLS connection");
        tls.refresh_traffic_keys().expect("TLS 1.3");
        self.send_records(tls).expect("an open connection");
    }

    fn send_records(&self, tls: &mut ServerConnection) -> io::Result<()> {
        while tls.wants_write() {
            tls.write_tls(&mut &self.stream)?;
        }
        Ok(())
    }

    /// Ends both directions, and any read or write that is blocked.
    pub fn close(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
