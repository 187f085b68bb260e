//! The writer thread, the only one that writes to the socket.
//!
//! Control messages are written first, then heartbeats, then data. The writer collects queued frames in one buffer and flushes
//! once: a single frame is sent at once, and queued frames are sent together. No timer delays a frame. A write that makes no
//! progress for [`crate::link::STALL_TIMEOUT`] ends the session.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError, bounded};
use tungstenite::protocol::CloseFrame;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Bytes, Message};

use super::transport::WriteHalf;
use super::waking_channel::{Parker, WakingSender};
use super::write_queues::{Control, ControlSender, DATA_LANE_MAX, Frame, Lanes};
use crate::sys::threads;

/// Time between heartbeats, and between the first `capabilities` and the first heartbeat.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(15);
/// Maximum number of frames per flush.
const BATCH_FRAMES_MAX: usize = 64;
/// Maximum number of frame bytes per flush.
const BATCH_BYTES_MAX: usize = 256 << 10;

const _: () = assert!(BATCH_FRAMES_MAX <= DATA_LANE_MAX);

/// The handle of the writer thread, with the lanes into it.
pub struct Writer {
    /// The control lane.
    pub control: ControlSender,
    /// Keeps the data lane connected between jobs.
    data: WakingSender<Frame>,
    /// Disconnects when the thread ends.
    pub ended: Receiver<()>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Starts the thread. `lanes` may already hold messages. `heartbeat` builds the frame, once per interval.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub fn spawn(
        half: WriteHalf,
        lanes: Lanes,
        heartbeat: impl Fn() -> String + Send + 'static,
    ) -> std::io::Result<Writer> {
        let Lanes { control, control_receiver, data, data_receiver, parker } = lanes;
        let (ended_sender, ended) = bounded::<()>(0);
        let mut actor = Actor {
            half,
            control: control_receiver,
            data: data_receiver,
            heartbeat: Box::new(heartbeat),
            next_heartbeat: Instant::now() + HEARTBEAT_INTERVAL,
            last_offer: String::new(),
            is_withdrawn: false,
        };
        let thread = threads::spawn("writer", move || {
            // Disconnects `ended` even after a panic.
            let _ended = ended_sender;
            threads::set_batch_scheduling();
            if let Err(e) = actor.run() {
                crate::debug!("the writer ended: {e}");
                // The reader's next read fails, which ends the session.
                actor.half.shutdown();
            }
        })?;
        parker.attach(thread.thread());
        Ok(Writer { control, data, ended, thread })
    }

    /// Waits for the thread to end. Send [`Control::Close`] or [`Control::Finish`] first, or shut the link down.
    pub fn join(self) {
        let Writer { control, data, ended, thread } = self;
        drop((control, data, ended));
        if thread.join().is_err() {
            log::error!("the writer thread panicked");
        }
    }
}

struct Actor {
    half: WriteHalf,
    control: Receiver<Control>,
    data: Receiver<Frame>,
    heartbeat: Box<dyn Fn() -> String + Send>,
    next_heartbeat: Instant,
    last_offer: String,
    is_withdrawn: bool,
}

/// Every input of the loop.
enum Event {
    Control(Control),
    Heartbeat,
    Data(Frame),
    /// Every sender of a lane was dropped.
    Disconnected,
}

#[derive(PartialEq, Eq)]
enum Next {
    Continue,
    End,
}

impl Actor {
    fn run(&mut self) -> tungstenite::Result<()> {
        loop {
            let next = match self.next_event() {
                Event::Control(control) => self.write_control(control)?,
                Event::Heartbeat => self.write_heartbeat()?,
                Event::Data(frame) => self.write_batch(frame)?,
                Event::Disconnected => Next::End,
            };
            self.half.flush()?;
            if next == Next::End {
                return Ok(());
            }
        }
    }

    /// The most urgent event: a pong or a rejection never waits behind queued chunks.
    fn next_event(&mut self) -> Event {
        loop {
            match self.control.try_recv() {
                Ok(control) => return Event::Control(control),
                Err(TryRecvError::Disconnected) => return Event::Disconnected,
                Err(TryRecvError::Empty) => {}
            }
            if Instant::now() >= self.next_heartbeat {
                self.next_heartbeat = Instant::now() + HEARTBEAT_INTERVAL;
                return Event::Heartbeat;
            }
            match self.data.try_recv() {
                Ok(frame) => return Event::Data(frame),
                Err(TryRecvError::Disconnected) => return Event::Disconnected,
                Err(TryRecvError::Empty) => Parker::park_until(self.next_heartbeat),
            }
        }
    }

    fn write_control(&mut self, control: Control) -> tungstenite::Result<Next> {
        match control {
            Control::Text(text) => self.half.write(Message::text(text))?,
            Control::Offer(offer) if self.is_withdrawn || offer == self.last_offer => {}
            Control::Offer(offer) => {
                self.half.write(Message::text(offer.clone()))?;
                if self.last_offer.is_empty() {
                    self.next_heartbeat = Instant::now() + HEARTBEAT_INTERVAL;
                }
                self.last_offer = offer;
            }
            Control::Withdraw(empty) => {
                self.is_withdrawn = true;
                self.half.write(Message::text(empty))?;
            }
            Control::Raw(bytes) => self.half.write_raw(&bytes)?,
            Control::Close => {
                while let Ok(frame) = self.data.try_recv() {
                    self.write_frame(frame)?;
                }
                let close = CloseFrame { code: CloseCode::Normal, reason: "the agent is stopping".into() };
                self.half.write(Message::Close(Some(close)))?;
                return Ok(Next::End);
            }
            Control::Finish => return Ok(Next::End),
        }
        Ok(Next::Continue)
    }

    fn write_heartbeat(&mut self) -> tungstenite::Result<Next> {
        self.half.write(Message::text((self.heartbeat)()))?;
        // The pong prevents the reader's stall timeout, and shows that the link works in both directions.
        self.half.write(Message::Ping(Bytes::new()))?;
        Ok(Next::Continue)
    }

    /// Writes this frame and the frames queued behind it, up to the limits of a flush or until a control message arrives.
    fn write_batch(&mut self, first: Frame) -> tungstenite::Result<Next> {
        let mut bytes = self.write_frame(first)?;
        for _ in 1..BATCH_FRAMES_MAX {
            if bytes >= BATCH_BYTES_MAX || !self.control.is_empty() {
                break;
            }
            let Ok(frame) = self.data.try_recv() else { break };
            bytes += self.write_frame(frame)?;
        }
        Ok(Next::Continue)
    }

    fn write_frame(&mut self, frame: Frame) -> tungstenite::Result<usize> {
        let bytes = frame.text.len();
        if frame.claim.begin_write() {
            self.half.write(Message::text(frame.text))?;
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::Arc;

    use super::super::dial::Dialer;
    use super::super::write_queues::Claim;
    use super::*;
    use crate::net::tls::ExtraRoots;

    struct Wanted;

    impl Claim for Wanted {
        fn begin_write(&self) -> bool {
            true
        }
    }

    /// The number of socket writes that the writer makes for `frames` queued frames of `length` bytes.
    fn writes_for(frames: usize, length: usize) -> usize {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("ws://{}/", listener.local_addr().expect("an address"));
        let coordinator = std::thread::spawn(move || {
            let mut socket = tungstenite::accept(listener.accept().expect("the agent").0).expect("a handshake");
            (0..frames).for_each(|_| assert_eq!(socket.read().expect("a frame").len(), length));
        });
        let dialer = Dialer::new(url.parse().expect("a URL"), ExtraRoots::default());
        let mut half = dialer.dial(&crossbeam_channel::never(), |_| ()).expect("a session");
        let (link, lanes) = (half.link(), Lanes::default());
        for _ in 0..frames {
            let frame = Frame { text: "x".repeat(length), claim: Arc::new(Wanted) };
            lanes.data.send(frame).expect("room in the lane");
        }
        let before = link.writes();
        let writer = Writer::spawn(half.split(|_| Ok(())), lanes, String::new).expect("a thread");
        coordinator.join().expect("all frames");
        let _ = writer.control.send(Control::Finish);
        writer.join();
        link.writes() - before
    }

    #[test]
    fn writer_sends_queued_frames_together() {
        assert_eq!(writes_for(1, 300), 1);
        assert_eq!(writes_for(DATA_LANE_MAX, 300), 1, "small ones in one write");
        // A batch is four buffers of 64 KiB, and a socket sometimes accepts only a part of a buffer.
        let large = writes_for(DATA_LANE_MAX, 20 << 10);
        assert!(large <= DATA_LANE_MAX / 2, "{large} writes for {DATA_LANE_MAX} large ones");
    }
}
