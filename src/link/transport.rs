//! One WebSocket shared by two threads without a lock around it.
//!
//! The reader blocks in the socket and holds no lock. Under TLS, the reader locks the rustls session only to decrypt, and the
//! writer only to encrypt; neither holds the lock while the socket blocks. Only the writer writes: the reader passes its own
//! output (a pong, the reply to a close, a TLS alert) to the writer as bytes.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::ClientConnection;
use tungstenite::protocol::{Role, WebSocketConfig};
use tungstenite::{Message, WebSocket};

/// Time without a received byte, or without progress while sending, after which the link counts as dead: three heartbeats.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(45);

/// Maximum size of a message and of a frame, in bytes. Requests may contain images.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Size of the read buffer, in bytes. Under TLS there is a second buffer of this size, for ciphertext.
pub(super) const READ_BUFFER_BYTES: usize = 16 << 10;

/// Size of the writer's buffer, in bytes. The buffer is written to the socket when it is full, and at each flush.
const WRITE_BUFFER_BYTES: usize = 64 << 10;

/// A connected socket, with or without TLS.
pub struct Link {
    pub(super) tcp: TcpStream,
    tls: Option<Mutex<ClientConnection>>,
    /// Set by each read that returns data.
    received: AtomicBool,
    /// Counts writes to the socket of a link without TLS.
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

    /// Whether data was received since the last call.
    pub fn take_received(&self) -> bool {
        self.received.swap(false, Ordering::Relaxed)
    }

    /// The number of writes to the socket.
    #[cfg(test)]
    pub fn writes(&self) -> usize {
        self.writes.load(Ordering::SeqCst)
    }

    /// Shuts both directions down; blocked reads and writes return.
    pub fn shutdown(&self) {
        let _ = self.tcp.shutdown(Shutdown::Both);
    }

    fn tls(&self) -> Option<MutexGuard<'_, ClientConnection>> {
        self.tls.as_ref().map(|tls| tls.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes to the socket, through TLS if there is a session.
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

    /// Sends the TLS records that are ready.
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

/// Retries after `Interrupted`. A signal interrupts a socket that has a timeout even with `SA_RESTART`, and SIGTERM must start a
/// drain, not break the link.
pub(super) fn uninterrupted<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match attempt() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// The reading half. It also sends until [`ReadHalf::split`] creates the writing half.
pub struct ReadHalf {
    pub(super) socket: WebSocket<LinkReader>,
}

impl ReadHalf {
    /// Blocks until the next message.
    ///
    /// # Errors
    /// The link is dead, or the message violates the WebSocket protocol or its limits.
    pub fn read(&mut self) -> tungstenite::Result<Message> {
        self.socket.read()
    }

    /// Sends a message at once. Must be called before [`ReadHalf::split`].
    ///
    /// # Errors
    /// The link is dead.
    pub fn send(&mut self, text: String) -> tungstenite::Result<()> {
        self.socket.send(Message::text(text))
    }

    /// Sends a close frame and does not wait for the reply. Must be called before [`ReadHalf::split`].
    pub fn close(mut self) {
        let _ = self.socket.close(None);
        self.flush();
    }

    /// Sends pending replies, for example to a close frame, without reading further.
    pub fn flush(&mut self) {
        let _ = self.socket.flush();
    }

    /// Sets the time by which all reads must return. With `None`, each read has [`STALL_TIMEOUT`].
    ///
    /// # Errors
    /// The socket is closed.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        let reader = self.socket.get_mut();
        reader.deadline = deadline;
        reader.link.tcp.set_read_timeout(Some(STALL_TIMEOUT))
    }

    /// Creates the writing half. From then on, this half passes its own output to `to_writer`, which must not block.
    pub fn split(&mut self, to_writer: impl Fn(Vec<u8>) -> io::Result<()> + Send + 'static) -> WriteHalf {
        let reader = self.socket.get_mut();
        reader.output = PendingOutput::ToWriter(Box::new(to_writer));
        let config = WebSocketConfig::default().read_buffer_size(0).write_buffer_size(WRITE_BUFFER_BYTES);
        let writer = LinkWriter(reader.link.clone());
        WriteHalf { socket: WebSocket::from_raw_socket(writer, Role::Client, Some(config)) }
    }

    /// The link, for shutting it down from another thread.
    pub fn link(&self) -> Arc<Link> {
        self.socket.get_ref().link.clone()
    }
}

/// The writing half.
pub struct WriteHalf {
    socket: WebSocket<LinkWriter>,
}

impl WriteHalf {
    /// Writes a message to the buffer, and the buffer to the socket when it is full.
    ///
    /// # Errors
    /// The link is dead.
    pub fn write(&mut self, message: Message) -> tungstenite::Result<()> {
        match self.socket.write(message) {
            // tungstenite flushes a close at once, and then returns this.
            Err(tungstenite::Error::ConnectionClosed) => Ok(()),
            other => other,
        }
    }

    /// Sends complete frames that the reading half has built.
    ///
    /// # Errors
    /// The link is dead.
    pub fn write_raw(&mut self, frames: &[u8]) -> tungstenite::Result<()> {
        self.socket.flush()?;
        self.socket.get_mut().write_all(frames)?;
        Ok(())
    }

    /// Writes the buffer to the socket.
    ///
    /// # Errors
    /// The link is dead.
    pub fn flush(&mut self) -> tungstenite::Result<()> {
        match self.socket.flush() {
            Err(tungstenite::Error::ConnectionClosed) => Ok(()),
            other => other,
        }
    }

    /// Shuts both directions of the link down.
    pub fn shutdown(&self) {
        self.socket.get_ref().0.shutdown();
    }
}

/// The byte stream under the reading WebSocket.
pub(super) struct LinkReader {
    link: Arc<Link>,
    deadline: Option<Instant>,
    /// Ciphertext as read from the socket; empty without TLS.
    ciphertext: Vec<u8>,
    /// The part of `ciphertext` that is not decrypted yet.
    unread: std::ops::Range<usize>,
    output: PendingOutput,
    /// The bytes that the WebSocket has written since the last flush.
    write_buffer: Vec<u8>,
}

/// Where the reading half sends its output.
enum PendingOutput {
    /// To the socket: there is no writer yet.
    Direct,
    ToWriter(Box<dyn Fn(Vec<u8>) -> io::Result<()> + Send>),
}

impl LinkReader {
    pub(super) fn new(link: Arc<Link>, deadline: Instant) -> LinkReader {
        let ciphertext = if link.tls.is_some() { vec![0; READ_BUFFER_BYTES] } else { Vec::new() };
        LinkReader {
            link,
            deadline: Some(deadline),
            ciphertext,
            unread: 0..0,
            output: PendingOutput::Direct,
            write_buffer: Vec::new(),
        }
    }

    pub(super) fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
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

    /// Returns `WouldBlock` if more ciphertext is needed.
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
        if pending && let PendingOutput::ToWriter(to_writer) = &self.output {
            // An empty write makes the writer flush, which sends the TLS records that are ready.
            to_writer(Vec::new())?;
        }
        outcome
    }
}

/// Reads until the deadline, or for [`STALL_TIMEOUT`] if there is none. The timeout of the socket is [`STALL_TIMEOUT`]; it is
/// shortened after a signal, which would otherwise restart it.
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
            // A socket reports a timeout as `WouldBlock`, on which the WebSocket would retry.
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
        self.write_buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let bytes = std::mem::take(&mut self.write_buffer);
        if bytes.is_empty() {
            return Ok(());
        }
        match &self.output {
            PendingOutput::Direct => LinkWriter(self.link.clone()).write_all(&bytes),
            PendingOutput::ToWriter(to_writer) => to_writer(bytes),
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
