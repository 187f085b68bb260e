//! The TCP connection to a backend, under ureq.
//!
//! ureq has one of its own, which is made for few connections: it takes and clears all its buffers with the first request, and
//! tells the kernel the remaining time before each read. With 256 streams of some 50 small pieces a second the first was most of
//! the agent's memory, the second a fifth of its system calls.
//!
//! Invariants: the buffer for what comes is as large as the stream fills it, between [`INPUT_MIN`] and [`INPUT_MAX`]; the one for
//! what goes out exists only until an answer is awaited. A wait ends late by a sixteenth of its time at most (the kernel's own
//! clock for it is coarser), and never early.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, Either, NextTimeout, ShutdownHandle, Transport,
};
use ureq::{Error, Timeout};

/// Held by a stream that sends a small piece at a time: an event, or a few.
const INPUT_MIN: usize = 512;
/// Held by a stream that has more to send than we take: one system call for so much.
const INPUT_MAX: usize = 64 << 10;
/// So many small reads in a row, and a large buffer is given back.
const SMALL_READS: u32 = 64;
/// What is sent at a time; also the largest head of a request.
const OUTPUT_BYTES: usize = 16 << 10;
/// A read or write may be this fraction of its time late for want of telling the kernel.
const LATENESS: u32 = 16;
/// An address that does not answer has at least so long.
const ADDRESS_TIME_MIN: Duration = Duration::from_millis(10);

/// Opens [`Tcp`] connections.
#[derive(Debug)]
pub struct TcpConnector;

impl<In: Transport> Connector<In> for TcpConnector {
    type Out = Either<In, Tcp>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, Error> {
        if let Some(through_proxy) = chained {
            return Ok(Some(Either::A(through_proxy)));
        }
        let socket = Arc::new(connect(&details.addrs, details.timeout)?);
        socket.set_nodelay(true)?;
        let handle: Weak<dyn ShutdownHandle> = Arc::<TcpStream>::downgrade(&socket);
        (details.register_shutdown)(handle)?;
        Ok(Some(Either::B(Tcp { socket, buffers: StreamBuffers::default(), read_time: None, write_time: None })))
    }
}

/// Tries the addresses in turn. One that does not answer leaves half of the time to those behind it.
fn connect(addresses: &[SocketAddr], timeout: NextTimeout) -> Result<TcpStream, Error> {
    let time = Time::starting_now(timeout);
    let mut failure = None;
    for (at, address) in addresses.iter().enumerate() {
        let is_last = at + 1 == addresses.len();
        let attempt = match time.left()? {
            Some(left) if is_last => TcpStream::connect_timeout(address, left),
            Some(left) => TcpStream::connect_timeout(address, (left / 2).max(ADDRESS_TIME_MIN)),
            None => TcpStream::connect(address),
        };
        match attempt {
            Ok(socket) => return Ok(socket),
            // The first address is the one that was meant.
            Err(e) => failure = failure.or(Some(e)),
        }
    }
    time.left()?;
    Err(match failure {
        Some(e) if is_timeout(&e) => Error::Timeout(Timeout::Connect),
        Some(e) => e.into(),
        None => Error::HostNotFound,
    })
}

/// One connection, its buffers, and what the kernel was told last.
pub struct Tcp {
    socket: Arc<TcpStream>,
    buffers: StreamBuffers,
    read_time: Option<Duration>,
    write_time: Option<Duration>,
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
        let time = Time::starting_now(timeout.for_write());
        let mut unsent = 0..amount;
        while !unsent.is_empty() {
            if let Some(left) = news(time.left()?, &mut self.write_time) {
                self.socket.set_write_timeout(left)?;
            }
            match (&*self.socket).write(&self.buffers.output()[unsent.clone()]) {
                Ok(0) => return Err(io::Error::from(ErrorKind::WriteZero).into()),
                Ok(n) => unsent.start += n,
                Err(e) if e.kind() == ErrorKind::Interrupted || is_timeout(&e) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let time = Time::starting_now(timeout.for_read());
        self.buffers.output = Vec::new();
        let free = self.buffers.input_append_buf();
        loop {
            if let Some(left) = news(time.left()?, &mut self.read_time) {
                self.socket.set_read_timeout(left)?;
            }
            match (&*self.socket).read(free) {
                Ok(n) => {
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
            // Nothing was asked for, so that even a byte makes the connection unfit for the next exchange.
            let quiet = matches!(self.socket.peek(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock);
            self.socket.set_nonblocking(false)?;
            io::Result::Ok(quiet)
        };
        quiet().unwrap_or(false)
    }
}

/// Of one wait.
struct Time {
    until: Option<Instant>,
    reason: Timeout,
}

impl Time {
    fn starting_now(timeout: NextTimeout) -> Time {
        // What is too far off for the clock never comes.
        Time { until: Instant::now().checked_add(*timeout.after), reason: timeout.reason }
    }

    /// `None` is for ever.
    fn left(&self) -> Result<Option<Duration>, Error> {
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) { Err(Error::Timeout(self.reason)) } else { Ok(left) }
    }
}

/// What the kernel has to be told: the time that is left, unless what it was `told` is near enough. It must not ring early, for
/// that would wake us in vain.
fn news(left: Option<Duration>, told: &mut Option<Duration>) -> Option<Option<Duration>> {
    let is_near = match (left, *told) {
        (Some(left), Some(told)) => left <= told && told <= left + left / LATENESS,
        (None, None) => true,
        _ => false,
    };
    if is_near {
        return None;
    }
    *told = left;
    Some(left)
}

/// The kernel says either when the time of a socket is over.
fn is_timeout(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

#[derive(Default)]
struct StreamBuffers {
    input: Vec<u8>,
    /// The part of it that has come and is not consumed.
    unread: std::ops::Range<usize>,
    /// A read left no room.
    was_full: bool,
    small_reads: u32,
    /// The last look at the input took something out of it.
    progress: bool,
    /// Empty but for the time of a request: what is sent, then what is about to be.
    output: Vec<u8>,
}

impl StreamBuffers {
    /// Called while nothing is held, when a new buffer costs no copy.
    fn fit(&mut self) {
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
            self.fit();
        } else if self.unread.end == self.input.len() {
            // Half a head, or half of a chunk's size: it is wanted in one piece.
            self.input.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
            if self.unread.end == self.input.len() && self.input.len() < INPUT_MAX {
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
