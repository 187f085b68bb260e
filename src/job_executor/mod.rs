//! Admission, the job table, cancellation: everything between a job's arrival and its one terminal frame.
//!
//! - The table holds the jobs in flight; a place is free as soon as a job has left it, which is when its cancel was read
//!   or its terminal frame was queued.
//! - Whoever takes a job out of the table decides its end: a worker's terminal frame, a cancel (no frame at all), or the
//!   end of the session. It can be taken out once.
//! - [`JobExecutor::dispatch`] and [`JobExecutor::cancel`] are called by the thread that reads the socket: they never
//!   wait for a worker, a backend or the coordinator.

mod outbox;
mod table;
mod ticket;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use tungstenite::Message;
use uuid::Uuid;

pub use outbox::{CONTROL_LANE_MAX, Control, DATA_LANE_MAX, Frame, Lanes, Outbox, Overflow};
pub use table::REQUEST_BYTES_MAX;
use table::{JobTable, NoPlace};
use ticket::Ticket;

use crate::backend::{Backend, Job};
use crate::discovery::{Catalog, DiscoveredBackend, Offers, Prober};
use crate::heartbeat::Statistics;
use crate::protocol::{self, ErrorCode};
use crate::worker_pool::WorkerPool;

/// A cancel frees the place at once, but a worker that is resolving a name or connecting notices only afterwards: others
/// take the next jobs meanwhile.
const WORKERS_PER_PLACE: usize = 2;

/// Runs the jobs of one session. Dropping it cancels what is in flight.
pub struct JobExecutor {
    shared: Arc<Shared>,
    pool: WorkerPool,
}

/// What the workers see of it.
struct Shared {
    offers: Arc<Offers>,
    max_concurrent: u32,
    outbox: Outbox,
    statistics: Arc<Statistics>,
    prober: Option<Prober>,
    table: Arc<JobTable>,
}

/// Those that list a model, in order of preference.
type Backends = Vec<Arc<dyn Backend>>;

/// Why a job is not taken.
enum Refusal {
    /// This id is in flight already; to answer would end that job.
    Duplicate,
    /// With this code and message.
    Answer(ErrorCode, String),
}

impl JobExecutor {
    /// An executor over fixed backends, with one lane for all its frames.
    pub fn new(backends: Vec<DiscoveredBackend>, max_concurrent: u32, out: Sender<Message>) -> JobExecutor {
        let offers = Arc::new(Offers::fixed(Catalog::new(backends, Vec::new())));
        JobExecutor::with_outbox(offers, max_concurrent, Outbox::Plain(out), Arc::default(), None)
    }

    /// An executor over changing offers. `statistics` outlives the session; `prober` is told of backends that are gone.
    pub fn with_outbox(
        offers: Arc<Offers>,
        max_concurrent: u32,
        outbox: Outbox,
        statistics: Arc<Statistics>,
        prober: Option<Prober>,
    ) -> JobExecutor {
        let places = max_concurrent as usize;
        let table = Arc::new(JobTable::new(places));
        let shared = Shared { offers, max_concurrent, outbox, statistics, prober, table };
        JobExecutor { shared: Arc::new(shared), pool: WorkerPool::new("job", places * WORKERS_PER_PLACE) }
    }

    /// Starts the job, or answers why not.
    pub fn dispatch(&self, job: Job) {
        // A single lane is the caller's own choice; there is no session to end for it.
        let _ = self.try_dispatch(job, 0);
    }

    /// As [`JobExecutor::dispatch`], for a request of so many bytes.
    ///
    /// # Errors
    /// The coordinator sends jobs without reading the refusals.
    pub fn try_dispatch(&self, job: Job, request_bytes: usize) -> Result<(), Overflow> {
        let job_id = job.job_id;
        let refusal = match self.admit(&job, request_bytes) {
            Err(refusal) => refusal,
            Ok((ticket, backends)) => {
                let (shared, of_worker) = (self.shared.clone(), ticket.clone());
                match self.pool.run(Box::new(move || worker::run(&shared, &of_worker, job, &backends))) {
                    Ok(()) => return Ok(()),
                    Err(e) => {
                        log::error!("{e}; is the box short of threads or memory?");
                        self.shared.table.finish(&ticket);
                        Refusal::Answer(ErrorCode::OutOfCapacity, "the agent cannot start a thread".into())
                    }
                }
            }
        };
        match refusal {
            Refusal::Duplicate => {
                log::warn!("job {job_id} came again while it is in flight; the second is ignored");
                Ok(())
            }
            Refusal::Answer(code, message) => {
                crate::debug!("job {job_id} refused: {}", code.as_str());
                self.refuse(job_id, code, &message)
            }
        }
    }

    /// Answers a job that is not taken.
    ///
    /// # Errors
    /// As [`JobExecutor::try_dispatch`].
    pub fn refuse(&self, job_id: Uuid, code: ErrorCode, message: &str) -> Result<(), Overflow> {
        self.shared.outbox.control(protocol::job_error(job_id, code, message, 0))
    }

    fn admit(&self, job: &Job, request_bytes: usize) -> Result<(Arc<Ticket>, Backends), Refusal> {
        let backends = self.shared.offers.snapshot().backends_of(&job.model_id).to_vec();
        if backends.is_empty() {
            let duplicate = self.shared.table.holds(job.job_id);
            let unknown = Refusal::Answer(ErrorCode::ModelNotLoaded, "no backend serves this model".into());
            return Err(if duplicate { Refusal::Duplicate } else { unknown });
        }
        let deadline = Duration::from_millis(u64::from(job.deadline_ms));
        match self.shared.table.admit(job.job_id, deadline, request_bytes) {
            Ok(ticket) => Ok((ticket, backends)),
            Err(NoPlace::Duplicate) => Err(Refusal::Duplicate),
            Err(NoPlace::Closed) => Err(Refusal::Answer(ErrorCode::OutOfCapacity, "the agent is stopping".into())),
            Err(NoPlace::TooLarge) => {
                let message = "the requests in flight leave no memory for one of this size";
                Err(Refusal::Answer(ErrorCode::OutOfCapacity, message.into()))
            }
            Err(NoPlace::Full) => {
                let message = format!("all {} places are taken", self.shared.max_concurrent);
                Err(Refusal::Answer(ErrorCode::OutOfCapacity, message))
            }
        }
    }

    /// Ends the job without a word; does nothing when it is not in flight.
    pub fn cancel(&self, job_id: Uuid) {
        if self.shared.table.cancel(job_id) {
            crate::debug!("job {job_id} cancelled");
        }
    }

    /// The jobs in flight.
    pub fn queue_depth(&self) -> u32 {
        u32::try_from(self.shared.table.len()).unwrap_or(u32::MAX)
    }

    /// From here on every new job is refused with `out_of_capacity`.
    pub fn refuse_new(&self) {
        self.shared.table.close();
    }

    /// Waits until no job is in flight; false when `until` came first, or `hurry` said so.
    pub fn wait_idle(&self, until: Instant, hurry: impl Fn() -> bool) -> bool {
        self.shared.table.wait_until_empty(until, hurry)
    }

    /// Ends what is in flight with a `job_error` each.
    pub fn abandon_all(&self, message: &str) {
        for ticket in self.shared.table.cancel_all() {
            let tokens = ticket.tokens_emitted();
            let frame = protocol::job_error(ticket.job_id, ErrorCode::Internal, message, tokens);
            let _ = self.shared.outbox.control(frame);
        }
    }

    /// Ends what is in flight without a word, for nobody would hear it.
    pub fn cancel_all(&self) {
        self.refuse_new();
        self.shared.table.cancel_all();
    }
}

impl Drop for JobExecutor {
    fn drop(&mut self) {
        self.cancel_all();
    }
}
