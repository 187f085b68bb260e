//! A bounded pool of threads: spawned when a task finds none idle, gone when idle for a while. Knows nothing of jobs.
//!
//! Nothing here blocks the caller but one short lock. The pool never refuses a task for being busy: at its maximum it
//! queues, for the caller's own admission keeps the queue no longer than the workers that are just unwinding.
//! A task that panics costs nothing but itself.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::threads;

/// How long a worker waits for the next task before it leaves.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a worker runs.
pub type Task = Box<dyn FnOnce() + Send>;

/// The pool; dropping it lets the workers finish what is queued, and leave.
pub struct WorkerPool {
    shared: Arc<Shared>,
}

struct Shared {
    name: &'static str,
    workers_max: usize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    tasks: VecDeque<Task>,
    workers: usize,
    idle: usize,
    closed: bool,
}

/// No worker is there and none could be started.
#[derive(Debug, thiserror::Error)]
#[error("failed to start a worker thread: {0}")]
pub struct SpawnError(#[from] std::io::Error);

impl WorkerPool {
    /// No thread is started before the first task.
    pub fn new(name: &'static str, workers_max: usize) -> WorkerPool {
        let shared = Shared { name, workers_max, state: Mutex::default(), wake: Condvar::new() };
        WorkerPool { shared: Arc::new(shared) }
    }

    /// Has `task` run soon, by an idle worker, a new one, or the next that is through with its own.
    ///
    /// # Errors
    /// The system refused a thread; the task is dropped.
    pub fn run(&self, task: Task) -> Result<(), SpawnError> {
        let mut state = self.shared.lock();
        state.tasks.push_back(task);
        if state.idle >= state.tasks.len() {
            self.shared.wake.notify_one();
        } else if state.workers < self.shared.workers_max {
            // Spawned under the lock, so that the task cannot be taken by another while we may have to take it back.
            let shared = self.shared.clone();
            let name = format!("{}-{}", shared.name, state.workers);
            let spawned = threads::spawn(name, move || shared.work());
            match spawned {
                Ok(_) => state.workers += 1,
                Err(e) => {
                    let task = state.tasks.pop_back();
                    drop(state);
                    drop(task);
                    return Err(e.into());
                }
            }
        }
        Ok(())
    }

    /// Threads alive.
    pub fn workers(&self) -> usize {
        self.shared.lock().workers
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some(task) = self.next_task() {
            // The task answers for itself from a drop guard; here only the worker is to survive.
            let _ = catch_unwind(AssertUnwindSafe(task));
        }
    }

    /// `None` when this worker is to leave; it is no longer counted then.
    fn next_task(&self) -> Option<Task> {
        let mut state = self.lock();
        loop {
            if let Some(task) = state.tasks.pop_front() {
                return Some(task);
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let (guard, waited) = self.wake.wait_timeout(state, IDLE_TIMEOUT).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if waited.timed_out() && state.tasks.is_empty() {
                break;
            }
        }
        state.workers -= 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

    const PATIENCE: Duration = Duration::from_secs(10);

    fn blocking_task(started: &Sender<()>, release: &Receiver<()>) -> Task {
        let (started, release) = (started.clone(), release.clone());
        Box::new(move || {
            started.send(()).expect("the test listens");
            let _ = release.recv();
        })
    }

    #[test]
    fn threads_are_started_on_demand_reused_and_never_more_than_the_maximum() {
        let pool = WorkerPool::new("test", 2);
        assert_eq!(pool.workers(), 0);
        let (started_tx, started) = unbounded();
        let (release, release_rx) = bounded(0);
        for _ in 0..3 {
            pool.run(blocking_task(&started_tx, &release_rx)).expect("spawned");
        }
        for _ in 0..2 {
            started.recv_timeout(PATIENCE).expect("two run");
        }
        assert!(started.try_recv().is_err(), "the third waits");
        assert_eq!(pool.workers(), 2);
        release.send(()).expect("released");
        started.recv_timeout(PATIENCE).expect("the third runs");
        drop(release);
        assert_eq!(pool.workers(), 2);
    }

    #[test]
    fn a_panic_costs_the_task_alone() {
        let pool = WorkerPool::new("test", 1);
        pool.run(Box::new(|| std::panic::resume_unwind(Box::new("bug")))).expect("spawned");
        let (tx, rx) = bounded(1);
        pool.run(Box::new(move || tx.send(()).expect("the test listens"))).expect("the worker is alive");
        rx.recv_timeout(PATIENCE).expect("the next task runs");
    }

    #[test]
    fn a_dropped_pool_finishes_what_is_queued() {
        let (tx, rx) = unbounded();
        {
            let pool = WorkerPool::new("test", 1);
            for n in 0..5 {
                let tx = tx.clone();
                pool.run(Box::new(move || tx.send(n).expect("the test listens"))).expect("spawned");
            }
        }
        drop(tx);
        assert_eq!(rx.iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }
}
