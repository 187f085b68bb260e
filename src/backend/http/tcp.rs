//! The TCP connection to a backend, under ureq.
//!
//! ureq has one of its own, which is made for few connections: it takes and clears all its buffers with the first request, and
//! tells the kernel the remaining time before each read. With 256 streams of some 50 small pieces a second the first was most of
//! the agent's memory, the second a fifth of its system calls.
//!
//! Invariants: the buffer for what comes is as large as the stream fills it, between [`INPUT_MIN`] and [`INPUT_MAX`]; the one for
//! what goes out exists only until an answer is awaited. A wait ends when its time is over, and never early: when the kernel rings
//! before that, the wait goes on.

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

/// Held by a stream that sends a small piece at a time: an event, or a few.
const INPUT_MIN: usize = 512;
/// Held by a stream that has more to send than we take: one system call for so much.
const INPUT_MAX: usize = 64 << 10;
/// So many small reads in a row, and a large buffer is given back.
const SMALL_READS: u32 = 64;
/// What is sent at a time; also the largest head of a request.
const OUTPUT_BYTES: usize = 16 << 10;
/// The kernel is told this fraction less than is left: it is late by as much, and the next reads need not tell it anew.
const TIMEOUT_MARGIN: u32 = 8;
/// It has no steps finer than this.
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
    Ok(Tcp { socket, buffers, read_time: None, write_time: None, write_failed: false })
}

fn connect(addresses: &[SocketAddr], timeout: NextTimeout) -> Result<TcpStream, Error> {
    let time = IoDeadline::starting_now(timeout);
    time.left()?;
    connect::connect_any(addresses, time.until).or_else(|e| {
        time.left()?;
        Err(match e {
            _ if addresses.is_empty() => Error::HostNotFound,
            e if is_timeout(&e) => Error::Timeout(Timeout::Connect),
            e => e.into(),
        })
    })
}

/// One connection, its buffers, and what the kernel was told last.
pub struct Tcp {
    socket: Arc<TcpStream>,
    buffers: StreamBuffers,
    read_time: Option<Duration>,
    write_time: Option<Duration>,
    write_failed: bool,
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
        let time = IoDeadline::starting_now(timeout.for_write());
        let mut unsent = 0..amount;
        while !unsent.is_empty() && !self.write_failed {
            if let Some(left) = timeout_to_set(time.left()?, &mut self.write_time) {
                self.socket.set_write_timeout(left)?;
            }
            match (&*self.socket).write(&self.buffers.output()[unsent.clone()]) {
                Ok(n @ 1..) => unsent.start += n,
                Err(e) if e.kind() == ErrorKind::Interrupted || is_timeout(&e) => {}
                // A server that refuses a large request answers and closes while we still write. What it said is worth
                // more than that we could not go on, so the verdict is left to the read that follows. Said here, a TLS
                // session above reads on too.
                Ok(0) | Err(_) => self.write_failed = true,
            }
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let time = IoDeadline::starting_now(timeout.for_read());
        self.buffers.output = Vec::new();
        let free = self.buffers.input_append_buf();
        loop {
            if let Some(left) = timeout_to_set(time.left()?, &mut self.read_time) {
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
        !self.write_failed && quiet().unwrap_or(false)
    }
}

/// Of one wait.
struct IoDeadline {
    until: Option<Instant>,
    reason: Timeout,
}

impl IoDeadline {
    fn starting_now(timeout: NextTimeout) -> IoDeadline {
        // What is too far off for the clock never comes.
        IoDeadline { until: Instant::now().checked_add(*timeout.after), reason: timeout.reason }
    }

    /// `None` is for ever.
    fn left(&self) -> Result<Option<Duration>, Error> {
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) { Err(Error::Timeout(self.reason)) } else { Ok(left) }
    }
}

/// What the kernel has to be told, if what it was `told` does not serve: it must not ring late, nor so early that waking us in
/// vain becomes a habit. A stream that goes on is told anew only once in an eighth of its time.
fn timeout_to_set(left: Option<Duration>, told: &mut Option<Duration>) -> Option<Option<Duration>> {
    let serves = match (left, *told) {
        (Some(left), Some(told)) => left / 2 <= told && told <= left,
        (None, None) => true,
        _ => false,
    };
    if serves {
        return None;
    }
    *told = left.map(|left| if left > KERNEL_PRECISION { left - left / TIMEOUT_MARGIN } else { left });
    Some(*told)
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
            // Half a head, or half of a chunk's size: it is wanted in one piece.
            self.input.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
            // Once beyond what a head may have, for a read without room would look like the end.
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
    fn the_kernel_is_never_told_more_than_is_left() {
        arbtest::arbtest(|u| {
            let mut told = None;
            for _ in 0..u.int_in_range(1..=9)? {
                let left = Duration::from_micros(u.int_in_range(1..=100_000_000)?);
                let _ = timeout_to_set(Some(left), &mut told);
                assert!(told.is_some_and(|told| !told.is_zero() && told <= left), "told {told:?} of {left:?}");
            }
            Ok(())
        })
        .budget_ms(100);
    }

    /// As ureq uses them: what comes is appended, and taken from the front in any amounts.
    #[test]
    fn the_input_is_what_was_appended_and_there_is_room_for_more() {
        arbtest::arbtest(|u| {
            let mut buffers = StreamBuffers::default();
            let (mut came, mut taken) = (0_usize, 0_usize);
            for _ in 0..u.int_in_range(1..=200)? {
                let room = buffers.input_append_buf();
                assert!(!room.is_empty() || came - taken > 64 << 10);
                let n = if u.ratio(1, 3)? { room.len() } else { u.int_in_range(0..=room.len().min(700))? };
                for (i, byte) in room[..n].iter_mut().enumerate() {
                    *byte = ((came + i) % 251) as u8;
                }
                buffers.input_appended(n);
                came += n;
                while !buffers.input().is_empty() {
                    let input = buffers.input();
                    assert_eq!(input.len(), came - taken);
                    assert!(input.iter().enumerate().all(|(i, byte)| *byte == ((taken + i) % 251) as u8));
                    let n = if u.ratio(1, 2)? { input.len() } else { u.int_in_range(0..=input.len())? };
                    buffers.input_consume(n);
                    taken += n;
                    assert_eq!(buffers.can_use_input(), n > 0 && taken < came);
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
