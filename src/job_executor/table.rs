//! The table of the jobs in flight.
//!
//! Invariant: a job leaves the table once, and the thread that removes it decides how the job ends. A cancel marks the job under
//! the same lock, so a thread that no longer finds a job knows whether it was cancelled.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::in_flight::InFlightJob;
use super::memory_permit::{MemoryPermit, RequestMemory};
use crate::backend::RawJob;

/// How long the deadline thread stays alive while the table is empty.
const WATCHER_IDLE: Duration = Duration::from_secs(10);

/// The jobs in flight, at most `capacity`.
pub struct JobTable {
    capacity: usize,
    state: Mutex<State>,
    memory: RequestMemory,
    /// Signaled when the table becomes empty.
    idle: Condvar,
    /// Signaled when the deadline thread has to recompute its next wake-up.
    deadlines: Condvar,
}

#[derive(Default)]
struct State {
    jobs: HashMap<Uuid, Arc<InFlightJob>>,
    is_closed: bool,
    /// Whether the deadline thread is running or about to start.
    has_watcher: bool,
    /// When the deadline thread wakes up unless signaled.
    next_wakeup: Option<Instant>,
}

impl State {
    /// Removes this job, if it is still in the table. Another job may have the same id by now.
    fn take(&mut self, job: &Arc<InFlightJob>) -> Option<Arc<InFlightJob>> {
        let is_present = self.jobs.get(&job.job_id).is_some_and(|present| Arc::ptr_eq(present, job));
        if is_present { self.jobs.remove(&job.job_id) } else { None }
    }
}

/// Why a job was not added to the table.
#[derive(Debug, PartialEq, Eq)]
pub enum AdmitError {
    /// A job with this id is in flight.
    Duplicate,
    /// The table is at its capacity.
    Full,
    /// The requests in flight leave too little memory.
    NoMemory,
    /// The table is closed.
    Closed,
}

impl JobTable {
    pub fn new(capacity: usize) -> JobTable {
        JobTable {
            capacity,
            state: Mutex::default(),
            memory: RequestMemory::default(),
            idle: Condvar::new(),
            deadlines: Condvar::new(),
        }
    }

    /// Adds a job, and reserves memory for its request of `request_bytes`.
    pub fn admit(&self, job: &RawJob, request_bytes: usize) -> Result<(Arc<InFlightJob>, MemoryPermit), AdmitError> {
        let state = &mut *self.lock();
        let in_flight = state.jobs.len();
        match state.jobs.entry(job.job_id) {
            Entry::Occupied(_) => Err(AdmitError::Duplicate),
            Entry::Vacant(_) if state.is_closed => Err(AdmitError::Closed),
            Entry::Vacant(_) if in_flight >= self.capacity => Err(AdmitError::Full),
            Entry::Vacant(entry) => {
                let permit = self.memory.reserve(request_bytes).ok_or(AdmitError::NoMemory)?;
                let job = entry.insert(Arc::new(InFlightJob::new(job))).clone();
                if job.deadline.is_some_and(|deadline| state.next_wakeup.is_some_and(|at| deadline < at)) {
                    self.deadlines.notify_one();
                }
                Ok((job, permit))
            }
        }
    }

    /// Whether a job with this id is in flight.
    pub fn contains(&self, job_id: Uuid) -> bool {
        self.lock().jobs.contains_key(&job_id)
    }

    /// Removes this job; false if another thread has removed it.
    pub fn finish(&self, job: &Arc<InFlightJob>) -> bool {
        let mut state = self.lock();
        let taken = state.take(job).is_some();
        if taken {
            job.release_slot();
            self.signal_if_empty(&state);
        }
        taken
    }

    /// Removes and cancels the job with this id; `None` if there is none.
    pub fn cancel(&self, job_id: Uuid) -> Option<Arc<InFlightJob>> {
        let mut state = self.lock();
        let taken = state.jobs.remove(&job_id);
        self.cancel_taken(state, taken).pop()
    }

    /// Removes and cancels this job; false if another thread has removed it.
    pub fn abandon(&self, job: &Arc<InFlightJob>) -> bool {
        let mut state = self.lock();
        let taken = state.take(job);
        !self.cancel_taken(state, taken).is_empty()
    }

    /// Removes and cancels all jobs, and returns them.
    pub fn cancel_all(&self) -> Vec<Arc<InFlightJob>> {
        let mut state = self.lock();
        let taken = std::mem::take(&mut state.jobs);
        self.cancel_taken(state, taken.into_values())
    }

    /// Marks jobs as cancelled under the lock under which they were removed, then unlocks and wakes their workers.
    fn cancel_taken(
        &self,
        state: MutexGuard<'_, State>,
        taken: impl IntoIterator<Item = Arc<InFlightJob>>,
    ) -> Vec<Arc<InFlightJob>> {
        let jobs: Vec<Arc<InFlightJob>> = taken.into_iter().collect();
        jobs.iter().for_each(|job| {
            job.mark_cancelled();
            job.release_slot();
        });
        self.signal_if_empty(&state);
        drop(state);
        jobs.iter().for_each(|job| job.interrupt_worker());
        jobs
    }

    /// Closes the table: no more jobs are admitted.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.deadlines.notify_one();
    }

    /// Returns true if the caller must start the deadline thread.
    pub fn claim_watcher(&self) -> bool {
        !std::mem::replace(&mut self.lock().has_watcher, true)
    }

    /// Reverts [`JobTable::claim_watcher`] when the thread could not be started.
    pub fn release_watcher(&self) {
        self.lock().has_watcher = false;
    }

    /// Waits for deadlines to pass, and returns the jobs in flight whose deadlines have passed, each job once. Returns `None` when
    /// the table is closed and empty, or has been empty for [`WATCHER_IDLE`]; the calling thread is then no longer the watcher.
    pub fn wait_for_deadlines(&self) -> Option<Vec<Arc<InFlightJob>>> {
        let mut state = self.lock();
        let mut was_idle = false;
        loop {
            let now = Instant::now();
            let has_passed = |job: &&Arc<InFlightJob>| job.deadline.is_some_and(|d| d <= now) && job.expire();
            let expired: Vec<_> = state.jobs.values().filter(has_passed).cloned().collect();
            if !expired.is_empty() {
                return Some(expired);
            }
            let is_empty = state.jobs.is_empty();
            if is_empty && (state.is_closed || was_idle) {
                (state.has_watcher, state.next_wakeup) = (false, None);
                return None;
            }
            let ahead = state.jobs.values().filter_map(|job| job.deadline).filter(|deadline| *deadline > now);
            // At most the idle time, because no signal is sent when a job ends before its deadline.
            let until = ahead.fold(now + WATCHER_IDLE, Instant::min);
            state.next_wakeup = Some(until);
            let waited = self.deadlines.wait_timeout(state, until - now).unwrap_or_else(PoisonError::into_inner);
            was_idle = is_empty && waited.1.timed_out();
            state = waited.0;
        }
    }

    /// The number of jobs in flight.
    pub fn len(&self) -> usize {
        self.lock().jobs.len()
    }

    /// Waits until the table is empty. Returns false at `until`, or as soon as `is_forced` returns true.
    pub fn wait_until_empty(&self, until: Instant, is_forced: impl Fn() -> bool) -> bool {
        /// How often `is_forced` is checked. Only a stopping agent waits here.
        const POLL_INTERVAL: Duration = Duration::from_millis(20);
        let mut state = self.lock();
        while !state.jobs.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || is_forced() {
                return false;
            }
            state = self.idle.wait_timeout(state, left.min(POLL_INTERVAL)).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn signal_if_empty(&self, state: &State) {
        if state.jobs.is_empty() {
            self.idle.notify_all();
            if state.is_closed {
                self.deadlines.notify_one();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::in_flight::tests::job;
    use super::super::memory_permit::REQUEST_BYTES_MAX;
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const HOUR_MS: u32 = 3_600_000;

    #[test]
    fn wait_for_deadlines_returns_each_job_once_in_time_and_ends_with_a_closed_table() {
        let table = Arc::new(JobTable::new(8));
        assert!(table.claim_watcher() && !table.claim_watcher());
        let (sender, expired_ids) = crossbeam_channel::unbounded();
        let of_thread = table.clone();
        let watcher = std::thread::spawn(move || {
            while let Some(expired) = of_thread.wait_for_deadlines() {
                expired.iter().for_each(|job| sender.send(job.job_id).expect("the test receives"));
            }
        });
        let admit = |n, ms| table.admit(&job(Uuid::from_u128(n), ms), 0).expect("admitted").0;
        let jobs = [admit(1, HOUR_MS), admit(2, 300), admit(3, 150)];
        table.finish(&admit(4, 200));
        let next = || expired_ids.recv_timeout(HOUR).expect("an expired job").as_u128();
        assert_eq!((next(), next()), (3, 2), "in their order, and without the job that had ended");
        assert!(jobs[1].deadline.is_some_and(|deadline| deadline <= Instant::now()));
        table.close();
        table.cancel_all();
        watcher.join().expect("ended");
        assert!(expired_ids.try_recv().is_err() && table.claim_watcher());
    }

    #[test]
    fn capacity_is_freed_once_in_whatever_order_the_ends_of_a_job_meet() {
        let table = JobTable::new(1);
        let id = Uuid::from_u128(1);
        let (first, _) = table.admit(&job(id, HOUR_MS), 0).expect("admitted");
        assert_eq!(table.admit(&job(id, HOUR_MS), 0).err(), Some(AdmitError::Duplicate));
        assert_eq!(table.admit(&job(Uuid::from_u128(2), HOUR_MS), 0).err(), Some(AdmitError::Full));
        assert!(table.cancel(id).is_some());
        assert!(table.cancel(id).is_none());
        let (second, _) = table.admit(&job(id, HOUR_MS), 0).expect("the same id again");
        table.finish(&first);
        assert_eq!(table.len(), 1, "the first job's end does not end the second");
        table.finish(&second);
        table.finish(&second);
        assert_eq!(table.len(), 0);
        assert!(first.is_cancelled() && !second.is_cancelled());
        let (_, permit) = table.admit(&job(id, HOUR_MS), REQUEST_BYTES_MAX).expect("memory for this one alone");
        assert!(table.cancel(id).is_some());
        assert_eq!(table.admit(&job(id, HOUR_MS), 1).err(), Some(AdmitError::NoMemory), "a worker holds the request");
        drop(permit);
        assert_eq!(table.admit(&job(id, HOUR_MS), REQUEST_BYTES_MAX + 1).err(), Some(AdmitError::NoMemory));
        table.close();
        assert_eq!(table.admit(&job(id, HOUR_MS), 0).err(), Some(AdmitError::Closed));
    }
}
