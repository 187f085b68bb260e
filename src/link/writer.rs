//! The writer thread: the only one that writes to the socket.
//!
//! It takes control before heartbeats before data, writes what is there into one buffer, and flushes once: a lone frame
//! leaves at once, and many that have queued up leave together. No timer delays anything. A write that makes no progress
//! for [`crate::link::STALL_TIMEOUT`] ends the session.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError, bounded};
use tungstenite::protocol::CloseFrame;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Bytes, Message};

use crate::job_executor::{Control, DATA_LANE_MAX, Frame, Lanes};
use crate::link::WriteHalf;
use crate::link::waking_channel::{Parker, WakingSender};
use crate::sys::threads;

/// Time between heartbeats, and of the first after `capabilities`.
pub const HEARTBEAT: Duration = Duration::from_secs(15);
/// Frames written before a flush.
const BATCH_FRAMES_MAX: usize = 64;
/// Bytes of frames written before a flush.
const BATCH_BYTES_MAX: usize = 256 << 10;

const _: () = assert!(BATCH_FRAMES_MAX <= DATA_LANE_MAX);

/// The handle: the lanes, and the thread that drains them.
pub struct Writer {
    /// Never waits; who fills it asks for its length.
    pub control: WakingSender<Control>,
    /// Bounded: the backpressure.
    pub data: WakingSender<Frame>,
    /// Disconnects when the thread has ended.
    pub ended: Receiver<()>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// The lanes may be filled before the thread runs.
    ///
    /// # Errors
    /// The system refused a thread.
    pub fn spawn(
        half: WriteHalf,
        lanes: Lanes,
        heartbeat: impl Fn() -> String + Send + 'static,
    ) -> std::io::Result<Writer> {
        let Lanes { control, control_inbox, data, data_inbox, parker } = lanes;
        let (ended_sender, ended) = bounded::<()>(0);
        let mut actor = Actor {
            half,
            control: control_inbox,
            data: data_inbox,
            heartbeat: Box::new(heartbeat),
            next_beat: Instant::now() + HEARTBEAT,
            offered: String::new(),
            withdrawn: false,
        };
        let thread = threads::spawn("writer", move || {
            // Dropped at the end, whatever it is.
            let _ended = ended_sender;
            threads::set_batch_scheduling();
            if let Err(e) = actor.run() {
                log::debug!("writing ended: {e}");
                // The reader finds out, and ends the session.
                actor.half.shutdown();
            }
        })?;
        parker.attach(thread.thread());
        Ok(Writer { control, data, ended, thread })
    }

    /// Waits for the thread, which must have been told to end.
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
    next_beat: Instant,
    /// The offer sent last.
    offered: String,
    withdrawn: bool,
}

/// All inputs of the loop.
enum Event {
    Control(Control),
    Heartbeat,
    Data(Frame),
    /// Nobody can send any more.
    Over,
}

#[derive(PartialEq, Eq)]
enum Next {
    GoOn,
    End,
}

impl Actor {
    fn run(&mut self) -> tungstenite::Result<()> {
        loop {
            let next = match self.next_event() {
                Event::Control(control) => self.control(control)?,
                Event::Heartbeat => self.beat()?,
                Event::Data(frame) => self.batch(frame)?,
                Event::Over => Next::End,
            };
            self.half.flush()?;
            if next == Next::End {
                return Ok(());
            }
        }
    }

    /// In the order of their urgency: a cancelled customer's pong or a refusal never waits behind a flood of chunks.
    fn next_event(&mut self) -> Event {
        loop {
            match self.control.try_recv() {
                Ok(control) => return Event::Control(control),
                Err(TryRecvError::Disconnected) => return Event::Over,
                Err(TryRecvError::Empty) => {}
            }
            if Instant::now() >= self.next_beat {
                self.next_beat = Instant::now() + HEARTBEAT;
                return Event::Heartbeat;
            }
            match self.data.try_recv() {
                Ok(frame) => return Event::Data(frame),
                Err(TryRecvError::Disconnected) => return Event::Over,
                Err(TryRecvError::Empty) => Parker::park_until(self.next_beat),
            }
        }
    }

    fn control(&mut self, control: Control) -> tungstenite::Result<Next> {
        match control {
            Control::Text(text) => self.half.write(Message::text(text))?,
            Control::Offer(offer) if self.withdrawn || offer == self.offered => {}
            Control::Offer(offer) => {
                self.half.write(Message::text(offer.clone()))?;
                self.offered = offer;
            }
            Control::Withdraw(empty) => {
                self.withdrawn = true;
                self.half.write(Message::text(empty))?;
            }
            Control::Raw(bytes) => self.half.write_raw(&bytes)?,
            Control::Close => {
                while let Ok(frame) = self.data.try_recv() {
                    self.write_frame(frame)?;
                }
                let goodbye = CloseFrame { code: CloseCode::Normal, reason: "the agent is stopping".into() };
                self.half.write(Message::Close(Some(goodbye)))?;
                return Ok(Next::End);
            }
            Control::Finish => return Ok(Next::End),
        }
        Ok(Next::GoOn)
    }

    fn beat(&mut self) -> tungstenite::Result<Next> {
        self.half.write(Message::text((self.heartbeat)()))?;
        // Its pong proves that the link works in both directions.
        self.half.write(Message::Ping(Bytes::new()))?;
        Ok(Next::GoOn)
    }

    /// This frame and those that have queued up behind it, until control wants to go first.
    fn batch(&mut self, first: Frame) -> tungstenite::Result<Next> {
        let mut bytes = self.write_frame(first)?;
        for _ in 1..BATCH_FRAMES_MAX {
            if bytes >= BATCH_BYTES_MAX || !self.control.is_empty() {
                break;
            }
            let Ok(frame) = self.data.try_recv() else { break };
            bytes += self.write_frame(frame)?;
        }
        Ok(Next::GoOn)
    }

    fn write_frame(&mut self, frame: Frame) -> tungstenite::Result<usize> {
        let bytes = frame.text.len();
        if frame.begin_write() {
            self.half.write(Message::text(frame.text))?;
        }
        Ok(bytes)
    }
}
