//! The jobs in flight.
//!
//! Invariant: a job leaves the table once, and who takes it out decides its end. A cancel marks the ticket under the same
//! lock, so whoever finds a job gone can tell at once whether it was cancelled.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::in_flight::InFlightJob;
use crate::backend::Job;

/// Of all requests in flight, as text, in bytes, with those that the worker of a cancelled job has yet to let go of. Parsed,
/// one may take several times its text.
pub const REQUEST_BYTES_MAX: usize = 256 << 20;

/// The table.
pub struct JobTable {
    capacity: usize,
    state: Mutex<State>,
    /// Of all requests. Grows under the lock alone.
    bytes: Arc<AtomicUsize>,
    /// Signalled whenever the table has become empty.
    idle: Condvar,
    /// Signalled when the thread that watches the deadlines has to look again.
    deadlines: Condvar,
}

#[derive(Default)]
struct State {
    jobs: HashMap<Uuid, Arc<InFlightJob>>,
    closed: bool,
    /// There is a thread that watches the deadlines, or will be at once.
    has_watcher: bool,
    /// When it looks again by itself.
    next_wakeup: Option<Instant>,
}

impl State {
    /// Takes out this very job, if it is still there.
    fn take(&mut self, ticket: &Arc<InFlightJob>) -> Option<Arc<InFlightJob>> {
        let is_there = self.jobs.get(&ticket.job_id).is_some_and(|t| Arc::ptr_eq(t, ticket));
        if is_there { self.jobs.remove(&ticket.job_id) } else { None }
    }
}

/// How long the deadlines of an empty table are watched on.
const WATCHER_IDLE: Duration = Duration::from_secs(10);

/// The share of [`REQUEST_BYTES_MAX`] that a request takes for as long as it is in memory.
pub struct MemoryPermit {
    bytes: usize,
    taken: Arc<AtomicUsize>,
}

impl Drop for MemoryPermit {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

/// Why there is no place for a job.
#[derive(Debug, PartialEq, Eq)]
pub enum AdmitError {
    /// Its id is in flight already.
    Duplicate,
    /// Every place is taken.
    Full,
    /// A place is free, but not so much memory.
    TooLarge,
    /// No job is taken any more.
    Closed,
}

impl JobTable {
    pub fn new(capacity: usize) -> JobTable {
        JobTable {
            capacity,
            state: Mutex::default(),
            bytes: Arc::default(),
            idle: Condvar::new(),
            deadlines: Condvar::new(),
        }
    }

    /// Gives a job a place, and its request of so many bytes a share of the memory.
    pub fn admit(&self, job: &Job, bytes: usize) -> Result<(Arc<InFlightJob>, MemoryPermit), AdmitError> {
        let state = &mut *self.lock();
        let taken = state.jobs.len();
        match state.jobs.entry(job.job_id) {
            Entry::Occupied(_) => Err(AdmitError::Duplicate),
            Entry::Vacant(_) if state.closed => Err(AdmitError::Closed),
            Entry::Vacant(_) if taken >= self.capacity => Err(AdmitError::Full),
            Entry::Vacant(_) if self.bytes.load(Ordering::SeqCst) + bytes > REQUEST_BYTES_MAX => {
                Err(AdmitError::TooLarge)
            }
            Entry::Vacant(place) => {
                self.bytes.fetch_add(bytes, Ordering::SeqCst);
                let share = MemoryPermit { bytes, taken: self.bytes.clone() };
                let ticket = place.insert(Arc::new(InFlightJob::new(job))).clone();
                if ticket.deadline.is_some_and(|deadline| state.next_wakeup.is_some_and(|at| deadline < at)) {
                    self.deadlines.notify_one();
                }
                Ok((ticket, share))
            }
        }
    }

    /// Whether a job of this id is in flight.
    pub fn holds(&self, job_id: Uuid) -> bool {
        self.lock().jobs.contains_key(&job_id)
    }

    /// Takes out this very job (its id may have been used again since); false when somebody did before.
    pub fn finish(&self, ticket: &Arc<InFlightJob>) -> bool {
        let mut state = self.lock();
        let taken = state.take(ticket).is_some();
        if taken {
            ticket.release_slot();
            self.signal_if_empty(&state);
        }
        taken
    }

    /// Takes out and cancels the job of this id; `None` when none is in flight.
    pub fn cancel(&self, job_id: Uuid) -> Option<Arc<InFlightJob>> {
        let mut state = self.lock();
        let taken = state.jobs.remove(&job_id);
        self.cancelled(state, taken).pop()
    }

    /// Takes out and cancels this very job; false when somebody took it out before.
    pub fn abandon(&self, ticket: &Arc<InFlightJob>) -> bool {
        let mut state = self.lock();
        let taken = state.take(ticket);
        !self.cancelled(state, taken).is_empty()
    }

    /// Takes out and cancels all; returns them.
    pub fn cancel_all(&self) -> Vec<Arc<InFlightJob>> {
        let mut state = self.lock();
        let taken = std::mem::take(&mut state.jobs);
        self.cancelled(state, taken.into_values())
    }

    /// Marks the jobs just taken out while the table is still locked, and wakes their workers when it is not any more.
    fn cancelled(
        &self,
        state: MutexGuard<'_, State>,
        taken: impl IntoIterator<Item = Arc<InFlightJob>>,
    ) -> Vec<Arc<InFlightJob>> {
        let tickets: Vec<Arc<InFlightJob>> = taken.into_iter().collect();
        tickets.iter().for_each(|t| {
            t.mark_cancelled();
            t.release_slot();
        });
        self.signal_if_empty(&state);
        drop(state);
        tickets.iter().for_each(|t| t.interrupt_worker());
        tickets
    }

    /// From here on no job gets a place.
    pub fn close(&self) {
        self.lock().closed = true;
        self.deadlines.notify_one();
    }

    /// True when the caller is to start the thread that watches the deadlines.
    pub fn claim_watcher(&self) -> bool {
        !std::mem::replace(&mut self.lock().has_watcher, true)
    }

    /// There is no such thread after all.
    pub fn release_watcher(&self) {
        self.lock().has_watcher = false;
    }

    /// Waits for deadlines to pass; returns the jobs in flight whose did, each once. `None` when there has been none for a
    /// while, and nobody watches any more.
    pub fn wait_for_deadlines(&self) -> Option<Vec<Arc<InFlightJob>>> {
        let mut state = self.lock();
        let mut has_lingered = false;
        loop {
            let now = Instant::now();
            let has_passed = |ticket: &&Arc<InFlightJob>| ticket.deadline.is_some_and(|d| d <= now) && ticket.expire();
            let expired: Vec<_> = state.jobs.values().filter(has_passed).cloned().collect();
            if !expired.is_empty() {
                return Some(expired);
            }
            let is_empty = state.jobs.is_empty();
            if is_empty && (state.closed || has_lingered) {
                (state.has_watcher, state.next_wakeup) = (false, None);
                return None;
            }
            let ahead = state.jobs.values().filter_map(|ticket| ticket.deadline).filter(|deadline| *deadline > now);
            // A last job may have ended long before its deadline: nobody says so.
            let until = ahead.fold(now + WATCHER_IDLE, Instant::min);
            state.next_wakeup = Some(until);
            let waited = self.deadlines.wait_timeout(state, until - now).unwrap_or_else(PoisonError::into_inner);
            has_lingered = is_empty && waited.1.timed_out();
            state = waited.0;
        }
    }

    /// The jobs in flight.
    pub fn len(&self) -> usize {
        self.lock().jobs.len()
    }

    /// Waits until it is empty; false when `until` came first, or `hurry` said so.
    pub fn wait_until_empty(&self, until: Instant, hurry: impl Fn() -> bool) -> bool {
        /// How soon a second signal is noticed; only a stopping agent looks so often.
        const POLL_INTERVAL: Duration = Duration::from_millis(20);
        let mut state = self.lock();
        while !state.jobs.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || hurry() {
                return false;
            }
            state = self.idle.wait_timeout(state, left.min(POLL_INTERVAL)).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn signal_if_empty(&self, state: &State) {
        if state.jobs.is_empty() {
            self.idle.notify_all();
            if state.closed {
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
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);
    const LONG_MS: u32 = 3_600_000;

    #[test]
    fn deadlines_are_told_once_each_and_in_time_and_nobody_watches_a_closed_table() {
        let table = Arc::new(JobTable::new(8));
        assert!(table.claim_watcher() && !table.claim_watcher());
        let (told, inbox) = crossbeam_channel::unbounded();
        let of_thread = table.clone();
        let watcher = std::thread::spawn(move || {
            while let Some(expired) = of_thread.wait_for_deadlines() {
                expired.iter().for_each(|ticket| told.send(ticket.job_id).expect("the test listens"));
            }
        });
        let admit = |n, ms| table.admit(&job(Uuid::from_u128(n), ms), 0).expect("a place").0;
        let jobs = [admit(1, 3_600_000), admit(2, 300), admit(3, 150)];
        table.finish(&admit(4, 200));
        let next = || inbox.recv_timeout(LONG).expect("told").as_u128();
        assert_eq!((next(), next()), (3, 2), "in their order, and none of the job that had ended");
        assert!(jobs[1].deadline.is_some_and(|deadline| deadline <= Instant::now()));
        table.close();
        table.cancel_all();
        watcher.join().expect("left");
        assert!(inbox.try_recv().is_err() && table.claim_watcher());
    }

    #[test]
    fn a_place_is_free_once_whatever_order_ends_meet_in() {
        let table = JobTable::new(1);
        let id = Uuid::from_u128(1);
        let (first, _) = table.admit(&job(id, LONG_MS), 0).expect("a place");
        assert_eq!(table.admit(&job(id, LONG_MS), 0).err(), Some(AdmitError::Duplicate));
        assert_eq!(table.admit(&job(Uuid::from_u128(2), LONG_MS), 0).err(), Some(AdmitError::Full));
        assert!(table.cancel(id).is_some());
        assert!(table.cancel(id).is_none());
        let (again, _) = table.admit(&job(id, LONG_MS), 0).expect("the same id, anew");
        table.finish(&first);
        assert_eq!(table.len(), 1, "the first job's end does not end the second");
        table.finish(&again);
        table.finish(&again);
        assert_eq!(table.len(), 0);
        assert!(first.is_cancelled() && !again.is_cancelled());
        let (_, share) = table.admit(&job(id, LONG_MS), REQUEST_BYTES_MAX).expect("room for it alone");
        assert!(table.cancel(id).is_some());
        assert_eq!(
            table.admit(&job(id, LONG_MS), 1).err(),
            Some(AdmitError::TooLarge),
            "a worker still holds the request"
        );
        drop(share);
        assert_eq!(table.admit(&job(id, LONG_MS), REQUEST_BYTES_MAX + 1).err(), Some(AdmitError::TooLarge));
        table.close();
        assert_eq!(table.admit(&job(id, LONG_MS), 0).err(), Some(AdmitError::Closed));
    }
}
