//! One WebSocket shared by two threads without a lock around it.
//!
//! The reader blocks in the socket without holding anything; under TLS it takes the lock of the rustls session only to
//! decrypt what it has read, the writer only to encrypt what it is about to write. Only the writer writes: what the
//! reading side must send by itself (pong, close reply, TLS alert) is handed to the writer as bytes.
//! No other code handles a TLS session.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::ClientConnection;
use tungstenite::protocol::{Role, WebSocketConfig};
use tungstenite::{Message, WebSocket};

/// So long without a byte in, or without progress out, and the link is dead. Three heartbeats' pongs missed.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(45);

/// The largest message and the largest frame: requests carry pictures.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Read buffer, and under TLS one record more.
pub(super) const READ_BUFFER_BYTES: usize = 16 << 10;

/// Frames are gathered up to this size before they go to the socket, flush or no flush.
const WRITE_BUFFER_BYTES: usize = 64 << 10;

/// A connected socket, with or without TLS.
pub struct Link {
    pub(super) tcp: TcpStream,
    tls: Option<Mutex<ClientConnection>>,
    /// Something has come since this was asked last.
    received: AtomicBool,
    /// Writes to the socket of a link without TLS.
    #[cfg(test)]
    writes: std::sync::atomic::AtomicUsize,
}

impl Link {
    pub(super) fn new(tcp: TcpStream, tls: Option<Mutex<ClientConnection>>) -> Link {
        Link {
            tcp,
            tls,
            received: AtomicBool::new(false),
            #[cfg(test)]
            writes: std::sync::atomic::AtomicUsize::new(0),
        }
    }

    /// Whether the reading side has heard anything since it was asked last.
    pub fn take_received(&self) -> bool {
        self.received.swap(false, Ordering::Relaxed)
    }

    /// So many were made.
    #[cfg(test)]
    pub fn writes(&self) -> usize {
        self.writes.load(Ordering::SeqCst)
    }

    /// Ends both directions at once; blocked reads and writes return.
    pub fn shutdown(&self) {
        let _ = self.tcp.shutdown(Shutdown::Both);
    }

    fn tls(&self) -> Option<MutexGuard<'_, ClientConnection>> {
        self.tls.as_ref().map(|tls| tls.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Encrypts where needed, and writes; the lock is not held while the socket blocks.
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let Some(mut tls) = self.tls() else {
            #[cfg(test)]
            self.writes.fetch_add(1, Ordering::SeqCst);
            return uninterrupted(|| (&self.tcp).write(bytes));
        };
        let taken = tls.writer().write(bytes)?;
        drop(tls);
        self.write_records()?;
        Ok(taken)
    }

    /// Sends what TLS has to say.
    fn write_records(&self) -> io::Result<()> {
        let mut records = Vec::new();
        if let Some(mut tls) = self.tls() {
            while tls.wants_write() {
                tls.write_tls(&mut records)?;
            }
        }
        (&self.tcp).write_all(&records)
    }
}

/// A socket with a timeout says `Interrupted` whenever a signal comes, however its handler was installed; a SIGTERM is to
/// begin a drain, not to break the link.
pub(super) fn uninterrupted<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match attempt() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// The reading end, and before the writer exists the writing end too.
pub struct ReadHalf {
    pub(super) socket: WebSocket<LinkReader>,
}

impl ReadHalf {
    /// The next message; blocks.
    ///
    /// # Errors
    /// The link is dead, or what came breaks the WebSocket protocol or its limits.
    pub fn read(&mut self) -> tungstenite::Result<Message> {
        self.socket.read()
    }

    /// Sends at once. Only while there is no writer.
    ///
    /// # Errors
    /// The link is dead.
    pub fn send(&mut self, text: String) -> tungstenite::Result<()> {
        self.socket.send(Message::text(text))
    }

    /// Says good-bye, and waits for nothing. Only while there is no writer.
    pub fn close(mut self) {
        let _ = self.socket.close(None);
        self.flush();
    }

    /// Hands on a reply that is due (to a close, say) without reading on.
    pub fn flush(&mut self) {
        let _ = self.socket.flush();
    }

    /// Until `deadline` every read must be over; `None` leaves [`STALL_TIMEOUT`] for each.
    ///
    /// # Errors
    /// The socket is no more.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        let reader = self.socket.get_mut();
        reader.deadline = deadline;
        reader.link.tcp.set_read_timeout(Some(STALL_TIMEOUT))
    }

    /// Makes the writing end; from here on this end hands what it has to send to `outlet`, which must not block.
    pub fn split(&mut self, outlet: impl Fn(Vec<u8>) -> io::Result<()> + Send + 'static) -> WriteHalf {
        let reader = self.socket.get_mut();
        reader.outlet = PendingOutput::Writer(Box::new(outlet));
        let config = WebSocketConfig::default().read_buffer_size(0).write_buffer_size(WRITE_BUFFER_BYTES);
        let writer = LinkWriter(reader.link.clone());
        WriteHalf { socket: WebSocket::from_raw_socket(writer, Role::Client, Some(config)) }
    }

    /// The socket itself, to end it from elsewhere.
    pub fn link(&self) -> Arc<Link> {
        self.socket.get_ref().link.clone()
    }
}

/// The writing end.
pub struct WriteHalf {
    socket: WebSocket<LinkWriter>,
}

impl WriteHalf {
    /// Puts a message into the buffer, and the buffer on the wire when it is full.
    ///
    /// # Errors
    /// The link is dead.
    pub fn write(&mut self, message: Message) -> tungstenite::Result<()> {
        match self.socket.write(message) {
            // tungstenite flushes a close by itself, and then says so.
            Err(tungstenite::Error::ConnectionClosed) => Ok(()),
            other => other,
        }
    }

    /// Puts whole frames on the wire that the reading side has made.
    ///
    /// # Errors
    /// The link is dead.
    pub fn write_raw(&mut self, frames: &[u8]) -> tungstenite::Result<()> {
        self.socket.flush()?;
        self.socket.get_mut().write_all(frames)?;
        Ok(())
    }

    /// Puts the buffer on the wire.
    ///
    /// # Errors
    /// The link is dead.
    pub fn flush(&mut self) -> tungstenite::Result<()> {
        match self.socket.flush() {
            Err(tungstenite::Error::ConnectionClosed) => Ok(()),
            other => other,
        }
    }

    /// Ends the link, both directions.
    pub fn shutdown(&self) {
        self.socket.get_ref().0.shutdown();
    }
}

/// The byte stream under the reading WebSocket.
pub(super) struct LinkReader {
    link: Arc<Link>,
    deadline: Option<Instant>,
    /// Ciphertext that was read but not yet decrypted; empty without TLS.
    ciphertext: Vec<u8>,
    unread: std::ops::Range<usize>,
    outlet: PendingOutput,
    /// Written by the WebSocket, not yet flushed.
    gathered: Vec<u8>,
}

enum PendingOutput {
    /// There is no writer yet.
    Direct,
    Writer(Box<dyn Fn(Vec<u8>) -> io::Result<()> + Send>),
}

impl LinkReader {
    pub(super) fn new(link: Arc<Link>, deadline: Instant) -> LinkReader {
        let ciphertext = if link.tls.is_some() { vec![0; READ_BUFFER_BYTES] } else { Vec::new() };
        LinkReader {
            link,
            deadline: Some(deadline),
            ciphertext,
            unread: 0..0,
            outlet: PendingOutput::Direct,
            gathered: Vec::new(),
        }
    }

    fn read_decrypted(&mut self, plaintext: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.decrypt(plaintext) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            let n = read_socket(&self.link.tcp, self.deadline, &mut self.ciphertext)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.unread = 0..n;
        }
    }

    /// `WouldBlock` when more ciphertext is needed.
    fn decrypt(&mut self, plaintext: &mut [u8]) -> io::Result<usize> {
        let link = self.link.clone();
        let Some(mut tls) = link.tls() else { return Err(io::ErrorKind::WouldBlock.into()) };
        let outcome = loop {
            match tls.reader().read(plaintext) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => break other,
            }
            if self.unread.is_empty() {
                break Err(io::ErrorKind::WouldBlock.into());
            }
            let mut ciphertext = &self.ciphertext[self.unread.clone()];
            self.unread.start += tls.read_tls(&mut ciphertext)?;
            if let Err(e) = tls.process_new_packets() {
                break Err(io::Error::new(io::ErrorKind::InvalidData, e));
            }
        };
        let pending = tls.wants_write();
        drop(tls);
        if pending && let PendingOutput::Writer(outlet) = &self.outlet {
            // No bytes of ours: the writer is to send what TLS has to say.
            outlet(Vec::new())?;
        }
        outcome
    }
}

/// Reads until the deadline, or for [`STALL_TIMEOUT`] where there is none, for which the socket is set: a signal in
/// between does not start the time anew.
fn read_socket(mut tcp: &TcpStream, deadline: Option<Instant>, buffer: &mut [u8]) -> io::Result<usize> {
    let until = deadline.unwrap_or_else(|| Instant::now() + STALL_TIMEOUT);
    let mut shortened = deadline.is_some();
    loop {
        if shortened {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            tcp.set_read_timeout(Some(left))?;
        }
        let read = tcp.read(buffer);
        if !matches!(&read, Err(e) if e.kind() == io::ErrorKind::Interrupted) {
            if shortened && deadline.is_none() {
                tcp.set_read_timeout(Some(STALL_TIMEOUT))?;
            }
            return read;
        }
        shortened = true;
    }
}

impl Read for LinkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = if self.link.tls.is_some() {
            self.read_decrypted(buffer)
        } else {
            read_socket(&self.link.tcp, self.deadline, buffer)
        };
        match read {
            // What a timed-out socket says; the WebSocket would take `WouldBlock` for a reason to come again.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
            Err(e) => Err(e),
            Ok(read) => {
                self.link.received.store(true, Ordering::Relaxed);
                Ok(read)
            }
        }
    }
}

impl Write for LinkReader {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.gathered.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let bytes = std::mem::take(&mut self.gathered);
        if bytes.is_empty() {
            return Ok(());
        }
        match &self.outlet {
            PendingOutput::Direct => LinkWriter(self.link.clone()).write_all(&bytes),
            PendingOutput::Writer(outlet) => outlet(bytes),
        }
    }
}

/// The byte stream under the writing WebSocket.
struct LinkWriter(Arc<Link>);

impl Read for LinkWriter {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Write for LinkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.write_records()
    }
}
