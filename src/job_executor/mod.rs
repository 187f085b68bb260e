//! Everything between a job's arrival and its terminal frame: admission, execution, cancellation.
//!
//! - The job table holds the jobs in flight. A job leaves the table when its cancel is read or its terminal frame is queued,
//!   and from then on no longer counts towards `max_concurrent`.
//! - The thread that removes a job from the table decides how the job ends: a worker sends the terminal frame; a cancel and
//!   the end of the session send none. A job can be removed only once.
//! - The thread that reads the socket calls [`JobExecutor::dispatch`] and [`JobExecutor::cancel`]. Neither waits for a
//!   worker, a backend or the coordinator.

mod deadlines;
mod in_flight;
mod memory_permit;
mod outbox;
mod rejection;
mod shared;
mod single_lane;
pub mod stats;
mod table;
pub mod token_limit;
mod worker;
mod worker_pool;

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;
use tungstenite::Message;
use uuid::Uuid;

pub use memory_permit::REQUEST_BYTES_MAX;
pub use outbox::{Outbox, SessionOutbox};
pub use rejection::RejectReason;
pub use shared::ExecutorDeps;

use in_flight::{InFlightJob, Work};
use shared::Shared;
use single_lane::SingleLane;
use stats::Outcome;
use table::{AdmitError, JobTable};
use worker_pool::WorkerPool;

use crate::backend::{Job, RawJob};
use crate::discovery::{Catalog, DiscoveredBackend, Listing, OfferFeed};
use crate::link::protocol::{self, ErrorCode};
use crate::link::write_queues::LaneError;
use crate::sys::threads;

/// Workers per job in flight. The worker of a cancelled job may be resolving a name or connecting, which cannot be
/// interrupted; a second worker runs the next job meanwhile.
const WORKERS_PER_JOB: usize = 2;

/// Runs the jobs of one session. Dropping it cancels the jobs in flight.
pub struct JobExecutor {
    shared: Arc<Shared>,
    pool: WorkerPool,
}

/// Why a job was not started.
enum NotAdmitted {
    /// A job with this id is in flight.
    Duplicate,
    /// The job was admitted, but has since been ended by its deadline or by the end of the session.
    AlreadyEnded,
    /// The job is rejected with this message.
    Rejected(RejectReason, String),
}

impl JobExecutor {
    /// Creates an executor with fixed backends and one channel for all its frames.
    pub fn new(backends: Vec<DiscoveredBackend>, max_concurrent: u32, out: Sender<Message>) -> JobExecutor {
        let listings = backends.into_iter().map(|discovered| Listing::of(discovered, max_concurrent)).collect();
        let offers = Arc::new(OfferFeed::fixed(Catalog::new(listings, Vec::new())));
        let deps = ExecutorDeps { offers, ..ExecutorDeps::default() };
        JobExecutor::with_outbox(max_concurrent, Box::new(SingleLane(out)), deps)
    }

    /// Creates an executor that sends its frames to `outbox`.
    pub fn with_outbox(max_concurrent: u32, outbox: Box<dyn Outbox>, deps: ExecutorDeps) -> JobExecutor {
        let capacity = max_concurrent as usize;
        let table = Arc::new(JobTable::new(capacity));
        let shared = Arc::new(Shared { max_concurrent, outbox, deps, table });
        JobExecutor { shared, pool: WorkerPool::new("job", capacity * WORKERS_PER_JOB) }
    }

    /// Starts the job, or answers with the reason of the rejection.
    pub fn dispatch(&self, job: Job) {
        // Fails only if the rejection cannot be queued.
        let _ = self.try_dispatch(RawJob::from(&job));
    }

    /// Starts the job, or answers with the reason of the rejection.
    ///
    /// # Errors
    /// The rejection could not be queued.
    pub fn try_dispatch(&self, job: RawJob) -> Result<(), LaneError> {
        let job_id = job.job_id;
        match self.admit(job).and_then(|job| self.start(job)) {
            Ok(()) | Err(NotAdmitted::AlreadyEnded) => Ok(()),
            Err(NotAdmitted::Duplicate) => {
                ignore_duplicate(job_id);
                Ok(())
            }
            Err(NotAdmitted::Rejected(reason, message)) => {
                crate::debug!("job {job_id} rejected: {}", reason.name());
                self.reject(job_id, reason, &message)
            }
        }
    }

    /// Adds the job to the table, and acquires a slot of the first backend that has one.
    fn admit(&self, job: RawJob) -> Result<Arc<InFlightJob>, NotAdmitted> {
        let Shared { deps, table, max_concurrent, .. } = &*self.shared;
        let rejected = |reason, message: &str| Err(NotAdmitted::Rejected(reason, message.to_owned()));
        let mut route = deps.offers.snapshot().candidates(&job.model_id);
        if route.is_empty() {
            return rejected(RejectReason::UnknownModel, "no backend serves this model");
        }
        if deps.offers.is_paused() {
            return rejected(RejectReason::Paused, "the operator has paused the agent");
        }
        let (in_flight, permit) = match table.admit(&job, job.request.len()) {
            Ok(admitted) => admitted,
            Err(AdmitError::Duplicate) => return Err(NotAdmitted::Duplicate),
            Err(AdmitError::Closed) => return rejected(RejectReason::Stopping, "the agent is stopping"),
            Err(AdmitError::NoMemory) => {
                let message = "the requests in flight leave too little memory for one of this size";
                return rejected(RejectReason::NoMemory, message);
            }
            Err(AdmitError::Full) => {
                let message = format!("the agent already runs its maximum of {max_concurrent} jobs");
                return rejected(RejectReason::AtCapacity, &message);
            }
        };
        if let Some(limit) = deps.token_limit.used_up() {
            let message = format!("the {limit} tokens that max_tokens_per_minute allows are used up");
            return Err(self.reject_admitted(&in_flight, RejectReason::TokenLimit, message));
        }
        // If no backend serves the format, the first one reports so.
        let (serving, others): (Vec<_>, Vec<_>) =
            route.into_iter().partition(|candidate| candidate.backend.serves(job.format));
        route = if serving.is_empty() { others } else { serving };
        let slot = route.iter().enumerate().find_map(|(at, backend)| Some((at, backend.try_acquire_slot()?)));
        let Some((at, slot)) = slot else {
            let message = "every backend of this model already runs its max_concurrent jobs";
            return Err(self.reject_admitted(&in_flight, RejectReason::BackendsFull, message.to_owned()));
        };
        in_flight.attach_slot(slot);
        let backend = route.remove(at);
        in_flight.park_work(Work { job, permit, backend, fallback_route: route });
        Ok(in_flight)
    }

    /// Hands an admitted job to a worker.
    fn start(&self, job: Arc<InFlightJob>) -> Result<(), NotAdmitted> {
        let (shared, of_worker) = (self.shared.clone(), job.clone());
        if let Err(e) = self.pool.run(Box::new(move || worker::run(&shared, &of_worker))) {
            crate::log_repeatable!(log::Level::Error, "job {} rejected: {e}", job.job_id);
            return Err(self.reject_admitted(&job, RejectReason::NoThread, "the agent has no thread for it".into()));
        }
        // After the worker: if only one more thread can be started, the worker needs it more than the deadlines do.
        self.watch_deadlines();
        Ok(())
    }

    fn watch_deadlines(&self) {
        if self.shared.table.claim_watcher() {
            let shared = self.shared.clone();
            if let Err(e) = threads::spawn("deadlines", move || deadlines::watch(&shared)) {
                // Workers check the deadline themselves whenever they do not block.
                crate::log_repeatable!(
                    log::Level::Warn,
                    "failed to start the deadline thread: {e}; jobs may end after their deadlines"
                );
                self.shared.table.release_watcher();
            }
        }
    }

    /// Removes a job that was just admitted from the table.
    fn reject_admitted(&self, job: &Arc<InFlightJob>, reason: RejectReason, message: String) -> NotAdmitted {
        match self.shared.table.finish(job) {
            true => NotAdmitted::Rejected(reason, message),
            false => NotAdmitted::AlreadyEnded,
        }
    }

    /// Answers a job with an error, unless a job with its id is in flight.
    ///
    /// # Errors
    /// The answer could not be queued.
    pub fn reject(&self, job_id: Uuid, reason: RejectReason, message: &str) -> Result<(), LaneError> {
        if self.shared.table.contains(job_id) {
            ignore_duplicate(job_id);
            return Ok(());
        }
        let ExecutorDeps { stats, on_throttled, .. } = &self.shared.deps;
        stats.record(Outcome::Rejected(reason));
        if let Some(on_throttled) = on_throttled.as_ref().filter(|_| reason == RejectReason::TokenLimit) {
            on_throttled();
        }
        self.shared.outbox.send_control(protocol::job_error(job_id, reason.code(), message, 0))
    }

    /// Ends the job without a frame. Does nothing if the job is not in flight.
    pub fn cancel(&self, job_id: Uuid) {
        if let Some(job) = self.shared.table.cancel(job_id) {
            self.shared.deps.stats.record(Outcome::Cancelled { output_tokens: job.tokens_emitted() });
            crate::debug!("job {job_id} cancelled");
        }
    }

    /// The number of jobs in flight.
    pub fn queue_depth(&self) -> u32 {
        u32::try_from(self.shared.table.len()).unwrap_or(u32::MAX)
    }

    /// Rejects all further jobs with `out_of_capacity`.
    pub fn close_admission(&self) {
        self.shared.table.close();
    }

    /// Waits until no job is in flight. Returns false at `until`, or as soon as `is_forced` returns true.
    pub fn wait_idle(&self, until: Instant, is_forced: impl Fn() -> bool) -> bool {
        self.shared.table.wait_until_empty(until, is_forced)
    }

    /// Ends each job in flight with a `job_error`.
    pub fn abandon_all(&self, message: &str) {
        for job in self.shared.table.cancel_all() {
            self.shared.answer_abandoned(&job, ErrorCode::Internal, message);
        }
    }

    /// Ends each job in flight without a frame, because its session has ended.
    pub fn cancel_all(&self) {
        self.close_admission();
        for _ in self.shared.table.cancel_all() {
            self.shared.deps.stats.record(Outcome::Lost);
        }
    }
}

/// No answer is sent, because it would end the job that is in flight.
fn ignore_duplicate(job_id: Uuid) {
    crate::log_repeatable!(log::Level::Warn, "job {job_id} ignored: a job with this id is in flight");
}

impl Drop for JobExecutor {
    fn drop(&mut self) {
        self.cancel_all();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::{Backend, BackendHealth, BackendModel, BackendResult, JobResult, JobSink, WireFormat};
    use crate::discovery::ResolvedModel;

    /// A backend that answers each job at once, without a byte if its model is `silent`.
    struct Answering;

    impl Backend for Answering {
        fn kind(&self) -> &'static str {
            "vllm"
        }

        fn id(&self) -> &str {
            "answering"
        }

        fn list_models(&self) -> BackendResult<Vec<BackendModel>> {
            Ok(Vec::new())
        }

        fn health(&self) -> BackendResult<BackendHealth> {
            Ok(BackendHealth::default())
        }

        fn execute(&self, job: &Job, sink: &mut dyn JobSink) -> BackendResult<JobResult> {
            match job.model_id.as_str() {
                "silent" => Ok(JobResult::default()),
                _ => sink.send_chunk(b"a").map(|()| JobResult::default()),
            }
        }
    }

    fn job(model_id: &str) -> Job {
        Job {
            job_id: Uuid::nil(),
            model_id: model_id.to_owned(),
            request: serde_json::Value::Null,
            format: WireFormat::Openai,
            deadline_ms: 60_000,
        }
    }

    #[test]
    fn executor_counts_answers_that_cannot_be_sent_as_lost() {
        let model = |id: &str| ResolvedModel {
            model_id: id.to_owned(),
            input_per_1m: 1,
            output_per_1m: 1,
            max_concurrent: 1,
            backend: "vllm".to_owned(),
            context_window: None,
        };
        let models = vec![model("silent"), model("chatty")];
        let out = crossbeam_channel::unbounded().0;
        let executor = JobExecutor::new(vec![DiscoveredBackend { backend: Arc::new(Answering), models }], 1, out);
        for model_id in ["silent", "chatty"] {
            executor.dispatch(job(model_id));
            assert!(executor.wait_idle(Instant::now() + Duration::from_secs(10), || false));
        }
        let shared = executor.shared.clone();
        drop(executor);
        let until = Instant::now() + Duration::from_secs(10);
        while shared.deps.stats.totals().lost != 2 {
            assert!(Instant::now() < until, "not counted");
            std::thread::yield_now();
        }
    }

    #[test]
    fn reject_admitted_does_not_answer_a_job_that_has_ended() {
        let executor = JobExecutor::new(Vec::new(), 1, crossbeam_channel::unbounded().0);
        let table = &executor.shared.table;
        let admit = || table.admit(&RawJob::from(&job("m")), 0).expect("admitted").0;
        let reject = |job: &Arc<InFlightJob>| executor.reject_admitted(job, RejectReason::NoThread, String::new());
        assert!(matches!(reject(&admit()), NotAdmitted::Rejected(RejectReason::NoThread, _)));
        let job = admit();
        assert!(table.abandon(&job));
        assert!(matches!(reject(&job), NotAdmitted::AlreadyEnded));
    }
}
