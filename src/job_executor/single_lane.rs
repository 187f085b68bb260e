//! The outbox of [`JobExecutor::new`](super::JobExecutor::new): sends all frames into one channel that the caller provides.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{SendTimeoutError, Sender};
use tungstenite::Message;

use super::in_flight::InFlightJob;
use super::outbox::{Outbox, send_unless_cancelled};
use super::table::JobTable;
use crate::backend::BackendResult;
use crate::link::write_queues::LaneError;

/// Limits how long [`JobExecutor::dispatch`](super::JobExecutor::dispatch) waits for room in a bounded channel.
const CONTROL_SEND_TIMEOUT: Duration = Duration::from_millis(250);

/// One lane for all frames. The reader receives a frame as soon as it is queued.
pub struct SingleLane(pub Sender<Message>);

impl Outbox for SingleLane {
    fn send_control(&self, text: String) -> Result<(), LaneError> {
        self.0.send_timeout(Message::text(text), CONTROL_SEND_TIMEOUT).map_err(|e| match e {
            SendTimeoutError::Timeout(_) => LaneError::Full,
            SendTimeoutError::Disconnected(_) => LaneError::Closed,
        })
    }

    fn send_chunk(&self, job: &Arc<InFlightJob>, text: String) -> BackendResult<()> {
        send_unless_cancelled(&self.0, Message::text(text), job, job.deadline)
    }

    fn send_terminal(&self, table: &Arc<JobTable>, job: &Arc<InFlightJob>, text: String) -> BackendResult<()> {
        // Before the frame is queued, because the reader may dispatch the next job at once.
        table.finish(job);
        send_unless_cancelled(&self.0, Message::text(text), job, None)
    }
}
