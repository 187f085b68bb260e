//! The way of frames from the workers to the socket.
//!
//! In a session there are two lanes: control (refusals, pongs, heartbeats) never waits and is bounded by its length;
//! data is bounded by its capacity, and a full one is the backpressure that makes workers stop reading their backends.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select, unbounded};
use tungstenite::Message;

use super::in_flight::InFlightJob;
use super::table::JobTable;
use crate::backend::{BackendError, BackendResult};
use crate::link::waking_channel::{Parker, WakingSender};

/// Frames of jobs that may wait: 22 KiB each at the most, so 1.4 MiB, and one more in each worker that waits. Twice as many
/// make a flood no faster.
pub const DATA_LANE_MAX: usize = 64;
/// Control messages that may wait: some 250 bytes each, so 8 MiB; more mean that the coordinator does not read.
pub const CONTROL_LANE_MAX: usize = 32 << 10;
/// How long [`JobExecutor::dispatch`](super::JobExecutor::dispatch) waits for room in a single, bounded lane.
const PLAIN_SEND_TIMEOUT: std::time::Duration = std::time::Duration::from_millis(250);

/// What goes out ahead of all data.
pub enum Control {
    /// A frame of no job in flight: a refusal, a `job_error` of a stopping agent.
    Text(String),
    /// The offer; nothing is sent when it is what was sent last, or when it was withdrawn.
    Offer(String),
    /// The empty offer of an agent that is stopping; no other follows it.
    Withdraw(String),
    /// Bytes that the reading side has to send by itself: a pong, the reply to a close, a TLS alert.
    Raw(Vec<u8>),
    /// Write all data that is queued, then Close(1000), and end.
    Close,
    /// Write what is in this lane, and end.
    Finish,
}

/// Both lanes, both ends, and what their writer sleeps on.
pub struct Lanes {
    /// To the writer.
    pub control: WakingSender<Control>,
    pub(crate) control_inbox: Receiver<Control>,
    /// To the writer.
    pub data: WakingSender<Frame>,
    pub(crate) data_inbox: Receiver<Frame>,
    pub(crate) parker: Parker,
}

impl Default for Lanes {
    fn default() -> Self {
        // Unbounded, for a bounded channel of this length would take its memory at once; `CONTROL_LANE_MAX` bounds it.
        let (control, control_inbox) = unbounded();
        let (data, data_inbox) = bounded(DATA_LANE_MAX);
        let parker = Parker::default();
        let (control, data) = (WakingSender::new(control, &parker), WakingSender::new(data, &parker));
        Lanes { control, control_inbox, data, data_inbox, parker }
    }
}

/// Where frames go.
pub enum Outbox {
    /// One lane for everything.
    Plain(Sender<Message>),
    /// A session's two.
    Lanes {
        /// To the writer, ahead of all data.
        control: WakingSender<Control>,
        /// To the writer, in order.
        data: WakingSender<Frame>,
    },
}

/// The control lane is full: the coordinator sends without reading what we answer.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator sends jobs but does not read the answers")]
pub struct Overflow;

/// A frame of a job, on its way. The writer asks [`Frame::begin_write`] last thing before it writes.
pub struct Frame {
    /// The JSON text.
    pub text: String,
    ticket: Arc<InFlightJob>,
    /// Set for the terminal frame.
    last_of: Option<Arc<JobTable>>,
}

impl Frame {
    /// Whether it is to be written: no frame follows a cancel, queued or not. Frees the place of a job whose last frame
    /// this is, for the coordinator may send the next job as soon as it has seen it.
    pub fn begin_write(&self) -> bool {
        if let Some(table) = &self.last_of {
            table.finish(&self.ticket);
        }
        !self.ticket.is_cancelled()
    }
}

impl Outbox {
    /// Queues a frame that belongs to no job in flight, without waiting.
    ///
    /// # Errors
    /// There is no room.
    pub fn control(&self, text: String) -> Result<(), Overflow> {
        match self {
            Outbox::Plain(out) => out.send_timeout(Message::text(text), PLAIN_SEND_TIMEOUT).map_err(|_| Overflow),
            Outbox::Lanes { control, .. } if control.waiting() >= CONTROL_LANE_MAX => Err(Overflow),
            Outbox::Lanes { control, .. } => control.send(Control::Text(text)).map_err(|_| Overflow),
        }
    }

    /// Queues a piece of a job's answer, waiting for room until its deadline or a cancel.
    ///
    /// # Errors
    /// [`BackendError::Cancelled`], [`BackendError::DeadlinePassed`] or [`BackendError::SessionGone`].
    pub fn chunk(&self, ticket: &Arc<InFlightJob>, text: String) -> BackendResult<()> {
        match self {
            Outbox::Plain(out) => send_unless_cancelled(out, Message::text(text), ticket, ticket.deadline),
            Outbox::Lanes { data, .. } => {
                let frame = Frame { text, ticket: ticket.clone(), last_of: None };
                data.send_with(|lane| send_unless_cancelled(lane, frame, ticket, ticket.deadline))
            }
        }
    }

    /// Queues a job's terminal frame and frees its place. Waits for room without a deadline: an answer that was earned
    /// is not dropped.
    ///
    /// # Errors
    /// [`BackendError::Cancelled`] or [`BackendError::SessionGone`]; the place is free all the same.
    pub fn terminal(&self, table: &Arc<JobTable>, ticket: &Arc<InFlightJob>, text: String) -> BackendResult<()> {
        match self {
            Outbox::Plain(out) => {
                // Whoever reads this lane sees the frame at once and may dispatch the next job: the place goes first.
                table.finish(ticket);
                send_unless_cancelled(out, Message::text(text), ticket, None)
            }
            Outbox::Lanes { data, .. } => {
                let frame = Frame { text, ticket: ticket.clone(), last_of: Some(table.clone()) };
                let sent = data.send_with(|lane| send_unless_cancelled(lane, frame, ticket, None));
                table.finish(ticket);
                sent
            }
        }
    }
}

fn send_unless_cancelled<T>(
    lane: &Sender<T>,
    frame: T,
    ticket: &InFlightJob,
    deadline: Option<Instant>,
) -> BackendResult<()> {
    if ticket.is_cancelled() {
        return Err(BackendError::Cancelled);
    }
    let frame = match lane.try_send(frame) {
        Ok(()) => return Ok(()),
        Err(TrySendError::Disconnected(_)) => return Err(BackendError::SessionGone),
        Err(TrySendError::Full(frame)) => frame,
    };
    let passed = deadline.map_or_else(crossbeam_channel::never, crossbeam_channel::at);
    select! {
        send(lane, frame) -> sent => sent.map_err(|_| BackendError::SessionGone),
        recv(ticket.cancel_signal) -> _ => Err(BackendError::Cancelled),
        recv(passed) -> _ => Err(BackendError::DeadlinePassed),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use uuid::Uuid;

    use super::super::in_flight::tests::job;
    use super::*;
    use crate::link::Dialer;
    use crate::link::writer::Writer;
    use crate::net::tls::ExtraRoots;

    /// Writes to the socket until `frames` frames of `length` bytes that wait in the lane are with the coordinator.
    fn writes_for(frames: usize, length: usize) -> usize {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("ws://{}/", listener.local_addr().expect("an address"));
        let coordinator = std::thread::spawn(move || {
            let mut socket = tungstenite::accept(listener.accept().expect("the agent").0).expect("a handshake");
            (0..frames).for_each(|_| assert_eq!(socket.read().expect("a frame").len(), length));
        });
        let dialer = Dialer::new(url.parse().expect("a URL"), ExtraRoots::default(), None);
        let mut half = dialer.dial(&crossbeam_channel::never(), |_| ()).expect("a session");
        let (link, lanes) = (half.link(), Lanes::default());
        let outbox = Outbox::Lanes { control: lanes.control.clone(), data: lanes.data.clone() };
        let ticket = Arc::new(InFlightJob::new(&job(Uuid::nil(), u32::MAX)));
        (0..frames).for_each(|_| outbox.chunk(&ticket, "x".repeat(length)).expect("room in the lane"));
        let before = link.writes();
        let writer = Writer::spawn(half.split(|_| Ok(())), lanes, String::new).expect("a thread");
        coordinator.join().expect("all frames");
        let _ = writer.control.send(Control::Finish);
        drop(outbox);
        writer.join();
        link.writes() - before
    }

    #[test]
    fn frames_that_wait_leave_together() {
        assert_eq!(writes_for(1, 300), 1);
        assert_eq!(writes_for(DATA_LANE_MAX, 300), 1, "small ones in one write");
        // Four buffers of 64 KiB make a batch; a socket takes less than it is given at most once in a while.
        let large = writes_for(DATA_LANE_MAX, 20 << 10);
        assert!(large <= DATA_LANE_MAX / 2, "{large} writes for {DATA_LANE_MAX} large ones");
    }
}
