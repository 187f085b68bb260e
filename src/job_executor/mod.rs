//! Admission, the job table, cancellation: everything between a job's arrival and its one terminal frame.
//!
//! - The table holds the jobs in flight; a place is free as soon as a job has left it, which is when its cancel was read
//!   or its terminal frame was queued.
//! - Whoever takes a job out of the table decides its end: a worker's terminal frame, a cancel (no frame at all), or the
//!   end of the session. It can be taken out once.
//! - [`JobExecutor::dispatch`] and [`JobExecutor::cancel`] are called by the thread that reads the socket: they never
//!   wait for a worker, a backend or the coordinator.

mod deadlines;
mod outbox;
mod rejection;
mod table;
mod in_flight;
pub mod stats;
pub mod token_limit;
pub mod worker_pool;
mod worker;

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;
use tungstenite::Message;
use uuid::Uuid;

use in_flight::InFlightJob;
pub use outbox::{CONTROL_LANE_MAX, Control, DATA_LANE_MAX, Frame, Lanes, Outbox, Overflow};
pub use rejection::RejectReason;
pub use table::REQUEST_BYTES_MAX;
use table::{AdmitError, JobTable};

use crate::backend::{BackendError, BackendResult, Job, JobResult};
use crate::discovery::{BackendHandle, Catalog, DiscoveredBackend, Listing, OfferFeed, Prober};
use crate::job_executor::stats::{JobStats, Outcome};
use crate::job_executor::token_limit::TokenLimit;
use crate::job_executor::worker_pool::WorkerPool;
use crate::link::protocol::{self, ErrorCode};
use crate::sys::threads;

/// A cancel frees the place at once, but a worker that is resolving a name or connecting notices only afterwards: others
/// take the next jobs meanwhile.
const WORKERS_PER_PLACE: usize = 2;

/// Runs the jobs of one session. Dropping it cancels what is in flight.
pub struct JobExecutor {
    shared: Arc<Shared>,
    pool: WorkerPool,
}

/// What an executor works with that outlives it.
#[derive(Default)]
pub struct ExecutorDeps {
    /// Where jobs may go.
    pub offers: Arc<OfferFeed>,
    /// Records how each job ends.
    pub stats: Arc<JobStats>,
    /// Rejects jobs while it is used up.
    pub token_limit: Arc<TokenLimit>,
    /// Notified of backends that are gone or fail their jobs.
    pub prober: Option<Prober>,
    /// Called when the token limit rejects a job.
    pub on_throttled: Option<Box<dyn Fn() + Send + Sync>>,
}

/// What the workers see of it.
struct Shared {
    max_concurrent: u32,
    outbox: Outbox,
    deps: ExecutorDeps,
    table: Arc<JobTable>,
}

impl Shared {
    /// Keeps what a job's end says of the backend that ran it.
    fn update_backend_health(&self, member: &BackendHandle, outcome: &BackendResult<JobResult>) {
        let fails_now = member.record_outcome(outcome);
        let Some(prober) = &self.deps.prober else { return };
        if fails_now {
            prober.withdraw_failing();
        }
        if outcome.as_ref().is_err_and(BackendError::invalidates_offer) {
            prober.request_refresh();
        }
    }

    /// Answers a job that was cancelled by its table, not by the coordinator. The frame goes ahead of the data lane, where
    /// a cancelled job has no frame left that it could overtake.
    fn answer_with_error(&self, job: &InFlightJob, code: ErrorCode, message: &str) {
        let output_tokens = job.tokens_emitted();
        let sent = self.outbox.control(protocol::job_error(job.job_id, code, message, output_tokens));
        self.deps.stats.record(match sent {
            Ok(()) => Outcome::Failed {
                model_id: &job.model_id,
                latency: job.accepted.elapsed(),
                output_tokens,
                code,
                reason: message.to_owned(),
                is_requesters_fault: false,
            },
            Err(Overflow) => Outcome::Lost,
        });
    }
}

/// Where a job may go when the member whose slot it has cannot take it, in order of preference.
type FallbackRoute = Vec<Arc<BackendHandle>>;

/// Why a job is not taken.
enum NotAdmitted {
    /// This id is in flight already; to answer would end that job.
    Duplicate,
    /// Its deadline, or the end of the session, came first: it has had its end.
    AlreadyEnded,
    /// For this cause, told in these words.
    Answer(RejectReason, String),
}

impl JobExecutor {
    /// An executor over fixed backends, with one lane for all its frames.
    pub fn new(backends: Vec<DiscoveredBackend>, max_concurrent: u32, out: Sender<Message>) -> JobExecutor {
        let listings = backends.into_iter().map(|discovered| Listing::of(discovered, max_concurrent)).collect();
        let offers = Arc::new(OfferFeed::fixed(Catalog::new(listings, Vec::new())));
        let surroundings = ExecutorDeps { offers, ..ExecutorDeps::default() };
        JobExecutor::with_outbox(max_concurrent, Outbox::Plain(out), surroundings)
    }

    /// An executor of one session.
    pub fn with_outbox(max_concurrent: u32, outbox: Outbox, surroundings: ExecutorDeps) -> JobExecutor {
        let places = max_concurrent as usize;
        let table = Arc::new(JobTable::new(places));
        let shared = Arc::new(Shared { max_concurrent, outbox, deps: surroundings, table });
        JobExecutor { shared, pool: WorkerPool::new("job", places * WORKERS_PER_PLACE) }
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
        let refusal = match self.admit(job, request_bytes) {
            Err(refusal) => refusal,
            Ok((ticket, member, alternatives)) => {
                let (shared, of_worker) = (self.shared.clone(), ticket.clone());
                match self.pool.run(Box::new(move || worker::run(&shared, &of_worker, member, alternatives))) {
                    Ok(()) => {
                        // After the worker, for there may be one thread left.
                        self.watch_deadlines();
                        return Ok(());
                    }
                    Err(e) => {
                        log::error!("{e}");
                        self.reject_admitted(&ticket, RejectReason::NoThread, "the agent has no thread for it".into())
                    }
                }
            }
        };
        match refusal {
            NotAdmitted::Duplicate => {
                log::warn!("job {job_id} came again while it is in flight; the second is ignored");
                Ok(())
            }
            NotAdmitted::AlreadyEnded => Ok(()),
            NotAdmitted::Answer(cause, message) => {
                log::debug!("job {job_id} refused: {}", cause.name());
                self.refuse(job_id, cause, &message)
            }
        }
    }

    fn watch_deadlines(&self) {
        if self.shared.table.claim_watcher() {
            let shared = self.shared.clone();
            if let Err(e) = threads::spawn("deadlines", move || deadlines::watch(&shared)) {
                // The timeouts of the sockets are still there.
                log::warn!("failed to start a thread, so deadlines are late: {e}");
                self.shared.table.release_watcher();
            }
        }
    }

    /// Answers a job that is not taken.
    ///
    /// # Errors
    /// As [`JobExecutor::try_dispatch`].
    pub fn refuse(&self, job_id: Uuid, cause: RejectReason, message: &str) -> Result<(), Overflow> {
        let ExecutorDeps { stats, on_throttled, .. } = &self.shared.deps;
        stats.record(Outcome::Rejected(cause));
        if let Some(on_throttled) = on_throttled.as_ref().filter(|_| cause == RejectReason::TokenLimit) {
            on_throttled();
        }
        self.shared.outbox.control(protocol::job_error(job_id, cause.code(), message, 0))
    }

    /// Gives the job a place in the table and a slot of the first member that has one.
    fn admit(
        &self,
        job: Job,
        request_bytes: usize,
    ) -> Result<(Arc<InFlightJob>, Arc<BackendHandle>, FallbackRoute), NotAdmitted> {
        let Shared { deps: surroundings, table, max_concurrent, .. } = &*self.shared;
        let refusal = |cause, message: String| Err(NotAdmitted::Answer(cause, message));
        let mut route = surroundings.offers.snapshot().candidates(&job.model_id);
        if route.is_empty() {
            return match table.holds(job.job_id) {
                true => Err(NotAdmitted::Duplicate),
                false => refusal(RejectReason::UnknownModel, "no backend serves this model".into()),
            };
        }
        if surroundings.offers.is_paused() {
            return match table.holds(job.job_id) {
                true => Err(NotAdmitted::Duplicate),
                false => refusal(RejectReason::Paused, "the operator has paused the agent".into()),
            };
        }
        let (ticket, share) = match table.admit(&job, request_bytes) {
            Ok(admitted) => admitted,
            Err(AdmitError::Duplicate) => return Err(NotAdmitted::Duplicate),
            Err(AdmitError::Closed) => return refusal(RejectReason::Stopping, "the agent is stopping".into()),
            Err(AdmitError::TooLarge) => {
                let message = "the requests in flight leave no memory for one of this size";
                return refusal(RejectReason::NoMemory, message.into());
            }
            Err(AdmitError::Full) => {
                return refusal(RejectReason::AtCapacity, format!("all {max_concurrent} places are taken"));
            }
        };
        let (cause, why) = match surroundings.token_limit.used_up() {
            Some(limit) => {
                (RejectReason::TokenLimit, format!("the {limit} tokens that max_tokens_per_minute allows are used up"))
            }
            None => {
                let slot = route.iter().enumerate().find_map(|(at, member)| Some((at, member.try_acquire_slot()?)));
                if let Some((at, slot)) = slot {
                    ticket.attach_slot(slot);
                    ticket.park_job(job, share);
                    let member = route.remove(at);
                    return Ok((ticket, member, route));
                }
                let why = "every backend of this model runs as many jobs as its max_concurrent allows";
                (RejectReason::BackendsFull, why.into())
            }
        };
        Err(self.reject_admitted(&ticket, cause, why))
    }

    /// Takes out a job that had its place.
    fn reject_admitted(&self, ticket: &Arc<InFlightJob>, cause: RejectReason, why: String) -> NotAdmitted {
        match self.shared.table.finish(ticket) {
            true => NotAdmitted::Answer(cause, why),
            false => NotAdmitted::AlreadyEnded,
        }
    }

    /// Ends the job without a word; does nothing when it is not in flight.
    pub fn cancel(&self, job_id: Uuid) {
        if let Some(ticket) = self.shared.table.cancel(job_id) {
            self.shared.deps.stats.record(Outcome::Cancelled { output_tokens: ticket.tokens_emitted() });
            log::debug!("job {job_id} cancelled");
        }
    }

    /// The jobs in flight.
    pub fn queue_depth(&self) -> u32 {
        u32::try_from(self.shared.table.len()).unwrap_or(u32::MAX)
    }

    /// From here on every new job is refused with `out_of_capacity`.
    pub fn close_admission(&self) {
        self.shared.table.close();
    }

    /// Waits until no job is in flight; false when `until` came first, or `hurry` said so.
    pub fn wait_idle(&self, until: Instant, hurry: impl Fn() -> bool) -> bool {
        self.shared.table.wait_until_empty(until, hurry)
    }

    /// Ends what is in flight with a `job_error` each.
    pub fn abandon_all(&self, message: &str) {
        for ticket in self.shared.table.cancel_all() {
            self.shared.answer_with_error(&ticket, ErrorCode::Internal, message);
        }
    }

    /// Ends what is in flight without a word, for nobody would hear it.
    pub fn cancel_all(&self) {
        self.close_admission();
        for _ in self.shared.table.cancel_all() {
            self.shared.deps.stats.record(Outcome::Lost);
        }
    }
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
    use crate::backend::{Backend, BackendHealth, BackendModel, JobSink, WireFormat};
    use crate::discovery::ResolvedModel;

    /// Its jobs end in the middle of an answer.
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
    fn an_answer_that_nobody_can_be_sent_counts_as_lost() {
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
    fn a_job_that_has_had_its_end_is_not_turned_away_as_well() {
        let executor = JobExecutor::new(Vec::new(), 1, crossbeam_channel::unbounded().0);
        let table = &executor.shared.table;
        let admit = || table.admit(&job("m"), 0).expect("a place").0;
        let turn_away =
            |ticket: &Arc<InFlightJob>| executor.reject_admitted(ticket, RejectReason::NoThread, String::new());
        assert!(matches!(turn_away(&admit()), NotAdmitted::Answer(RejectReason::NoThread, _)));
        let ticket = admit();
        assert!(table.abandon(&ticket));
        assert!(matches!(turn_away(&ticket), NotAdmitted::AlreadyEnded));
    }
}
