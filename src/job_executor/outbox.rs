//! The way of frames from the workers to the socket.
//!
//! In a session there are two lanes: control (refusals, pongs, heartbeats) never waits and is bounded by its length;
//! data is bounded by its capacity, and a full one is the backpressure that makes workers stop reading their backends.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Sender, TrySendError, select};
use tungstenite::Message;

use super::table::JobTable;
use super::ticket::Ticket;
use crate::backend::{BackendError, BackendResult};
use crate::writer::{CONTROL_LANE_MAX, Control};

/// How long [`JobExecutor::dispatch`](super::JobExecutor::dispatch) waits for room in a single, bounded lane.
const PLAIN_LANE_PATIENCE: std::time::Duration = std::time::Duration::from_millis(250);

/// Where frames go.
pub enum Outbox {
    /// One lane for everything.
    Plain(Sender<Message>),
    /// A session's two.
    Lanes {
        /// To the writer, ahead of all data.
        control: Sender<Control>,
        /// To the writer, in order.
        data: Sender<Frame>,
    },
}

/// The control lane is full: the coordinator sends without reading what we answer.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator sends jobs but does not read the answers")]
pub struct Overflow;

/// A frame of a job, on its way. The writer asks [`Frame::claim`] last thing before it writes.
pub struct Frame {
    /// The JSON text.
    pub text: String,
    ticket: Arc<Ticket>,
    /// Set for the terminal frame.
    last_of: Option<Arc<JobTable>>,
}

impl Frame {
    /// Whether it is to be written: no frame follows a cancel, queued or not. Frees the place of a job whose last frame
    /// this is, for the coordinator may send the next job as soon as it has seen it.
    pub fn claim(&self) -> bool {
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
            Outbox::Plain(out) => out.send_timeout(Message::text(text), PLAIN_LANE_PATIENCE).map_err(|_| Overflow),
            Outbox::Lanes { control, .. } if control.len() >= CONTROL_LANE_MAX => Err(Overflow),
            Outbox::Lanes { control, .. } => control.send(Control::Text(text)).map_err(|_| Overflow),
        }
    }

    /// Queues a piece of a job's answer, waiting for room until its deadline or a cancel.
    ///
    /// # Errors
    /// [`BackendError::Cancelled`], [`BackendError::DeadlinePassed`] or [`BackendError::SessionGone`].
    pub fn chunk(&self, ticket: &Arc<Ticket>, text: String) -> BackendResult<()> {
        match self {
            Outbox::Plain(out) => send_unless_cancelled(out, Message::text(text), ticket, ticket.deadline),
            Outbox::Lanes { data, .. } => {
                let frame = Frame { text, ticket: ticket.clone(), last_of: None };
                send_unless_cancelled(data, frame, ticket, ticket.deadline)
            }
        }
    }

    /// Queues a job's terminal frame and frees its place. Waits for room without a deadline: an answer that was earned
    /// is not dropped.
    ///
    /// # Errors
    /// [`BackendError::Cancelled`] or [`BackendError::SessionGone`]; the place is free all the same.
    pub fn terminal(&self, table: &Arc<JobTable>, ticket: &Arc<Ticket>, text: String) -> BackendResult<()> {
        match self {
            Outbox::Plain(out) => {
                // Whoever reads this lane sees the frame at once and may dispatch the next job: the place goes first.
                table.finish(ticket);
                send_unless_cancelled(out, Message::text(text), ticket, None)
            }
            Outbox::Lanes { data, .. } => {
                let frame = Frame { text, ticket: ticket.clone(), last_of: Some(table.clone()) };
                let sent = send_unless_cancelled(data, frame, ticket, None);
                table.finish(ticket);
                sent
            }
        }
    }
}

fn send_unless_cancelled<T>(
    lane: &Sender<T>,
    frame: T,
    ticket: &Ticket,
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
