//! Queues the frames of jobs in the lanes of a session: rejections in the control lane, answers in the data lane.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Sender, TrySendError, select};

use super::in_flight::InFlightJob;
use super::table::JobTable;
use crate::backend::{BackendError, BackendResult};
use crate::link::waking_channel::WakingSender;
use crate::link::write_queues::{Claim, Control, ControlSender, Frame, LaneError, Lanes};

/// Receives the frames of an executor.
pub trait Outbox: Send + Sync {
    /// Queues a frame of a job that is not in flight. Called by the thread that reads the socket, so it must not wait for
    /// the coordinator.
    ///
    /// # Errors
    /// The lane is full or closed.
    fn send_control(&self, text: String) -> Result<(), LaneError>;

    /// Queues a chunk of a job's answer. Blocks while the lane is full, until the job's deadline or its cancel.
    ///
    /// # Errors
    /// [`BackendError::Cancelled`], [`BackendError::DeadlinePassed`] or [`BackendError::SessionGone`].
    fn send_chunk(&self, job: &Arc<InFlightJob>, text: String) -> BackendResult<()>;

    /// Queues a job's terminal frame, and removes the job from the table. Blocks while the lane is full, even past the
    /// deadline: the answer is complete and worth sending.
    ///
    /// # Errors
    /// [`BackendError::Cancelled`] or [`BackendError::SessionGone`]; the job has left the table nevertheless.
    fn send_terminal(&self, table: &Arc<JobTable>, job: &Arc<InFlightJob>, text: String) -> BackendResult<()>;
}

/// The outbox of a session.
pub struct SessionOutbox {
    control: ControlSender,
    data: WakingSender<Frame>,
}

impl SessionOutbox {
    /// Sends into these lanes.
    pub fn new(lanes: &Lanes) -> SessionOutbox {
        SessionOutbox { control: lanes.control.clone(), data: lanes.data.clone() }
    }

    fn send_data(
        &self,
        claim: Arc<dyn Claim>,
        text: String,
        job: &InFlightJob,
        deadline: Option<Instant>,
    ) -> BackendResult<()> {
        self.data.send_with(|lane| send_unless_cancelled(lane, Frame { text, claim }, job, deadline))
    }
}

impl Outbox for SessionOutbox {
    fn send_control(&self, text: String) -> Result<(), LaneError> {
        self.control.send(Control::Text(text))
    }

    fn send_chunk(&self, job: &Arc<InFlightJob>, text: String) -> BackendResult<()> {
        self.send_data(job.clone(), text, job, job.deadline)
    }

    fn send_terminal(&self, table: &Arc<JobTable>, job: &Arc<InFlightJob>, text: String) -> BackendResult<()> {
        let claim = Arc::new(TerminalClaim { table: table.clone(), job: job.clone() });
        let sent = self.send_data(claim, text, job, None);
        table.finish(job);
        sent
    }
}

/// A chunk is written unless its job was cancelled.
impl Claim for InFlightJob {
    fn begin_write(&self) -> bool {
        !self.is_cancelled()
    }
}

/// A terminal frame is written unless its job was cancelled. The job leaves the table first, because the coordinator may send
/// the next job as soon as it has read the frame.
struct TerminalClaim {
    table: Arc<JobTable>,
    job: Arc<InFlightJob>,
}

impl Claim for TerminalClaim {
    fn begin_write(&self) -> bool {
        self.table.finish(&self.job);
        self.job.begin_write()
    }
}

/// Sends to a bounded lane. While the lane is full, waits for room, the job's cancel or the deadline.
pub fn send_unless_cancelled<T>(
    lane: &Sender<T>,
    frame: T,
    job: &InFlightJob,
    deadline: Option<Instant>,
) -> BackendResult<()> {
    if job.is_cancelled() {
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
        recv(job.cancel_signal) -> _ => Err(BackendError::Cancelled),
        recv(passed) -> _ => Err(BackendError::DeadlinePassed),
    }
}
