//! Ends a session gracefully: withdraws the offer, lets the jobs in flight finish, closes the connection.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::early_jobs::EarlyJobs;
use super::shutdown::GracefulStop;
use crate::job_executor::JobExecutor;
use crate::link::Link;
use crate::link::protocol::{self, OfferLimits};
use crate::link::write_queues::{Control, ControlSender};
use crate::observe::LiveState;

/// How long a session that ends waits for the writer, which may be blocked in a dead socket.
pub(super) const WRITER_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the last frames of a stopping agent may take to reach the network.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the coordinator may take to answer the close frame.
const CLOSE_REPLY_TIMEOUT: Duration = Duration::from_millis(300);
/// How often a draining session checks for a second signal.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Ends a session from another thread.
pub struct SessionHandle {
    /// Runs the jobs of the session.
    pub executor: Arc<JobExecutor>,
    /// The jobs that wait for the first offer; rejected when the drain begins.
    pub early_jobs: Arc<EarlyJobs>,
    /// The writer's control lane.
    pub control: ControlSender,
    /// The connection.
    pub link: Arc<Link>,
    /// The limits, repeated in the frame that withdraws the offer.
    pub limits: OfferLimits,
    /// How long jobs in flight may take.
    pub drain_timeout: Duration,
    /// Disconnects when the writer thread ends.
    pub writer_ended: Receiver<()>,
    /// Disconnects when the session ends.
    pub session_ended: Receiver<()>,
    /// Updated when the drain begins.
    pub live: Arc<LiveState>,
}

impl GracefulStop for SessionHandle {
    /// Withdraws the offer, refuses new jobs, waits for the jobs in flight and closes. Once `is_forced` returns true or the drain
    /// timeout has passed, the remaining jobs are answered with an error.
    fn drain(&self, is_forced: &dyn Fn() -> bool) {
        self.executor.close_admission();
        self.early_jobs.release();
        self.live.draining();
        let _ = self.control.send(Control::Withdraw(protocol::capabilities(&[], self.limits)));
        let in_flight = self.executor.queue_depth();
        if in_flight > 0 {
            log::info!("stopping: {in_flight} job(s) in flight have up to {} s", self.drain_timeout.as_secs());
        }
        if !self.executor.wait_idle(Instant::now() + self.drain_timeout, is_forced) {
            log::warn!("stopping with {} job(s) unfinished", self.executor.queue_depth());
            self.executor.abandon_all("the agent is stopping");
        }
        let _ = self.control.send(Control::Close);
        self.wait_for_writer(is_forced);
        let _ = self.session_ended.recv_timeout(CLOSE_REPLY_TIMEOUT);
        self.abort();
    }

    fn abort(&self) {
        self.link.shutdown();
    }
}

impl SessionHandle {
    /// Waits until the last frames are written. A coordinator that does not read delays a forced stop by at most [`WRITER_TIMEOUT`].
    fn wait_for_writer(&self, is_forced: &dyn Fn() -> bool) {
        let began = Instant::now();
        while began.elapsed() < if is_forced() { WRITER_TIMEOUT } else { FLUSH_TIMEOUT } {
            if self.writer_ended.recv_timeout(POLL_INTERVAL) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    }
}
