//! The TCP connection to a backend, as a `ureq` transport.
//!
//! `ureq`'s own TCP transport is designed for few connections: it allocates all its buffers with the first request, and sets the
//! socket timeout before each read. With 256 streams of about 50 small reads a second, the buffers were most of the agent's
//! memory, and the timeouts a fifth of its system calls.
//!
//! Invariants: the input buffer grows and shrinks with the stream, between [`INPUT_MIN`] and [`INPUT_MAX`]. The output buffer
//! exists only while a request is sent. A wait never ends before its timeout: if the kernel's timeout fires early, the wait
//! continues. Received data is acknowledged at once: a server that uses Nagle's algorithm holds back a small write until the previous
//! one is acknowledged, which the kernel would delay by 40 ms.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, Either, NextTimeout, ShutdownHandle, Transport,
};
use ureq::{Error, Timeout};

use crate::net::connect;

/// Input buffer of a stream that sends an event or a few at a time, in bytes.
const INPUT_MIN: usize = 512;
/// Input buffer of a stream that sends faster than it is read, in bytes; a large buffer saves system calls.
const INPUT_MAX: usize = 64 << 10;
/// Consecutive small reads after which a large input buffer is replaced by a small one.
const SMALL_READS: u32 = 64;
/// Output buffer, in bytes; also the largest request head.
const OUTPUT_BYTES: usize = 16 << 10;
/// Size of a read, in bytes, from which the kernel may take it for a full segment and delay its acknowledgement until the next one.
const SEGMENT_MIN: usize = 536; // TCP_MSS_DEFAULT
/// The socket timeout is set to the time left minus this fraction of it: the kernel may fire late by that much, and the next
/// reads need not set the timeout again.
const TIMEOUT_MARGIN: u32 = 8;
/// Resolution of the kernel's timeouts.
const KERNEL_PRECISION: Duration = Duration::from_millis(10);

/// Opens [`Tcp`] connections.
#[derive(Debug)]
pub struct TcpConnector;

impl<In: Transport> Connector<In> for TcpConnector {
    type Out = Either<In, Tcp>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, Error> {
        if let Some(through_proxy) = chained {
            return Ok(Some(Either::A(through_proxy)));
        }
        open(details).map(|tcp| Some(Either::B(tcp)))
    }
}

fn open(details: &ConnectionDetails) -> Result<Tcp, Error> {
    let socket = Arc::new(connect(&details.addrs, details.timeout)?);
    socket.set_nodelay(true)?;
    let handle: Weak<dyn ShutdownHandle> = Arc::<TcpStream>::downgrade(&socket);
    (details.register_shutdown)(handle)?;
    let buffers = StreamBuffers::default();
    Ok(Tcp { socket, buffers, read_timeout: None, write_timeout: None, write_failed: false, delays_acks: true })
}

fn connect(addresses: &[SocketAddr], timeout: NextTimeout) -> Result<TcpStream, Error> {
    let deadline = IoDeadline::starting_now(timeout);
    deadline.left()?;
    connect::connect_any(addresses, deadline.until).or_else(|e| {
        deadline.left()?;
        Err(match e {
            _ if addresses.is_empty() => Error::HostNotFound,
            e if is_timeout(&e) => Error::Timeout(Timeout::Connect),
            e => e.into(),
        })
    })
}

/// One connection, its buffers, and its socket timeouts as last set.
pub struct Tcp {
    socket: Arc<TcpStream>,
    buffers: StreamBuffers,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
    write_failed: bool,
    /// The kernel may delay the acknowledgement of what is read next.
    delays_acks: bool,
}

impl fmt::Debug for Tcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tcp")
    }
}

impl Transport for Tcp {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let deadline = IoDeadline::starting_now(timeout.for_write());
        // After a write, the kernel delays acknowledgements in order to send them with more data.
        self.delays_acks = true;
        let mut unsent = 0..amount;
        while !unsent.is_empty() && !self.write_failed {
            if let Some(left) = timeout_to_set(deadline.left()?, &mut self.write_timeout) {
                self.socket.set_write_timeout(left)?;
            }
            match (&*self.socket).write(&self.buffers.output()[unsent.clone()]) {
                Ok(n @ 1..) => unsent.start += n,
                Err(e) if e.kind() == ErrorKind::Interrupted || is_timeout(&e) => {}
                // A server that rejects a large request responds and closes while we are still writing. Its response says
                // more than this error, so the error is left to the next read. A TLS session on top then also continues
                // to read.
                Ok(0) | Err(_) => self.write_failed = true,
            }
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let deadline = IoDeadline::starting_now(timeout.for_read());
        self.buffers.output = Vec::new();
        if std::mem::take(&mut self.delays_acks) {
            acknowledge_at_once(&self.socket);
        }
        let free = self.buffers.input_append_buf();
        loop {
            if let Some(left) = timeout_to_set(deadline.left()?, &mut self.read_timeout) {
                self.socket.set_read_timeout(left)?;
            }
            match (&*self.socket).read(free) {
                Ok(n) => {
                    // More follows at once if the buffer is full.
                    self.delays_acks = n >= SEGMENT_MIN && n < free.len();
                    self.buffers.input_appended(n);
                    return Ok(n > 0);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted || is_timeout(&e) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn is_open(&mut self) -> bool {
        let quiet = || {
            self.socket.set_nonblocking(true)?;
            // No response is pending: a connection that has received even one byte is unusable.
            let quiet = matches!(self.socket.peek(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock);
            self.socket.set_nonblocking(false)?;
            io::Result::Ok(quiet)
        };
        !self.write_failed && quiet().unwrap_or(false)
    }
}

/// Makes the kernel acknowledge received data at once, until the next write. Small reads do not end this, so a stream of small events
/// does not cost a call for each.
fn acknowledge_at_once(socket: &TcpStream) {
    #[cfg(target_os = "linux")]
    {
        use std::os::linux::net::TcpStreamExt;
        // A failure only makes the connection slower.
        let _ = socket.set_quickack(true);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = socket;
}

/// When one wait ends.
struct IoDeadline {
    until: Option<Instant>,
    reason: Timeout,
}

impl IoDeadline {
    fn starting_now(timeout: NextTimeout) -> IoDeadline {
        // `None` (no limit) if the clock cannot represent it.
        IoDeadline { until: Instant::now().checked_add(*timeout.after), reason: timeout.reason }
    }

    /// The time left; `None` means no limit.
    fn left(&self) -> Result<Option<Duration>, Error> {
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) { Err(Error::Timeout(self.reason)) } else { Ok(left) }
    }
}

/// The socket timeout to set; `None` if `last_set` still applies, that is, if it fires neither late nor before half of the
/// time left. A running stream then sets the timeout about once per eighth of its time.
fn timeout_to_set(left: Option<Duration>, last_set: &mut Option<Duration>) -> Option<Option<Duration>> {
    let will_do = match (left, *last_set) {
        (Some(left), Some(set)) => left / 2 <= set && set <= left,
        (None, None) => true,
        _ => false,
    };
    if will_do {
        return None;
    }
    *last_set = left.map(|left| if left > KERNEL_PRECISION { left - left / TIMEOUT_MARGIN } else { left });
    Some(*last_set)
}

/// Whether a socket timeout fired, which the kernel reports as either error.
fn is_timeout(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

#[derive(Default)]
struct StreamBuffers {
    input: Vec<u8>,
    /// The part of `input` that was received and not yet consumed.
    unread: std::ops::Range<usize>,
    /// The last read filled the buffer.
    was_full: bool,
    small_reads: u32,
    /// The last call to consume input consumed some.
    progress: bool,
    /// Allocated during a request only. The first half is sent, the second half is scratch space.
    output: Vec<u8>,
}

impl StreamBuffers {
    /// Called while the buffer is empty, so that replacing it needs no copy.
    fn resize(&mut self) {
        let size = match self.input.len() {
            0 => INPUT_MIN,
            size if self.was_full && size < INPUT_MAX => size * 2,
            _ if self.small_reads >= SMALL_READS => INPUT_MIN,
            size => size,
        };
        if size != self.input.len() {
            self.input = vec![0; size];
            self.small_reads = 0;
        }
    }

    fn halves(&mut self) -> (&mut [u8], &mut [u8]) {
        if self.output.is_empty() {
            self.output = vec![0; 2 * OUTPUT_BYTES];
        }
        self.output.split_at_mut(OUTPUT_BYTES)
    }
}

impl Buffers for StreamBuffers {
    fn output(&mut self) -> &mut [u8] {
        self.halves().0
    }

    fn tmp_and_output(&mut self) -> (&mut [u8], &mut [u8]) {
        let (output, tmp) = self.halves();
        (tmp, output)
    }

    fn input(&self) -> &[u8] {
        &self.input[self.unread.clone()]
    }

    fn input_append_buf(&mut self) -> &mut [u8] {
        if self.unread.is_empty() {
            self.unread = 0..0;
            self.resize();
        } else if self.unread.end == self.input.len() {
            // Part of a head or of a chunk size, which must be contiguous.
            self.input.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
            // May exceed the limit of a head once: a read into an empty slice would look like the end of input.
            if self.unread.end == self.input.len() && self.input.len() <= INPUT_MAX {
                self.input.resize(self.input.len() * 2, 0);
            }
        }
        &mut self.input[self.unread.end..]
    }

    fn input_appended(&mut self, amount: usize) {
        self.unread.end += amount;
        self.was_full = self.unread.end == self.input.len();
        self.small_reads = if self.unread.len() <= INPUT_MIN { self.small_reads.saturating_add(1) } else { 0 };
    }

    fn input_consume(&mut self, amount: usize) {
        self.progress = amount > 0;
        self.unread.start += amount;
    }

    fn can_use_input(&self) -> bool {
        self.progress && !self.unread.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_timeout_never_exceeds_the_time_left() {
        arbtest::arbtest(|u| {
            let mut set = None;
            for _ in 0..u.int_in_range(1..=9)? {
                let left = Duration::from_micros(u.int_in_range(1..=100_000_000)?);
                let _ = timeout_to_set(Some(left), &mut set);
                assert!(set.is_some_and(|set| !set.is_zero() && set <= left), "{set:?} of {left:?}");
            }
            Ok(())
        })
        .budget_ms(100);
    }

    /// As ureq uses them: input is appended at the end, and consumed from the front in any amounts.
    #[test]
    fn stream_buffers_return_what_was_appended_and_always_have_room() {
        arbtest::arbtest(|u| {
            let mut buffers = StreamBuffers::default();
            let (mut appended, mut consumed) = (0_usize, 0_usize);
            for _ in 0..u.int_in_range(1..=200)? {
                let room = buffers.input_append_buf();
                assert!(!room.is_empty() || appended - consumed > 64 << 10);
                let n = if u.ratio(1, 3)? { room.len() } else { u.int_in_range(0..=room.len().min(700))? };
                for (i, byte) in room[..n].iter_mut().enumerate() {
                    *byte = ((appended + i) % 251) as u8;
                }
                buffers.input_appended(n);
                appended += n;
                while !buffers.input().is_empty() {
                    let input = buffers.input();
                    assert_eq!(input.len(), appended - consumed);
                    assert!(input.iter().enumerate().all(|(i, byte)| *byte == ((consumed + i) % 251) as u8));
                    let n = if u.ratio(1, 2)? { input.len() } else { u.int_in_range(0..=input.len())? };
                    buffers.input_consume(n);
                    consumed += n;
                    assert_eq!(buffers.can_use_input(), n > 0 && consumed < appended);
                    if n == 0 {
                        break;
                    }
                }
            }
            Ok(())
        })
        .budget_ms(300);
    }
}
