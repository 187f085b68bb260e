//! A bounded pool of threads for tasks of any kind. A worker is started when no other is idle, and ends after an idle time.
//!
//! The pool never blocks its caller. At the maximum number of workers, tasks are queued, up to a limit. A task that panics does
//! not end its worker.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};

use crate::sys::malloc;
use crate::sys::threads;

/// How long an idle worker waits for a task before it ends.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum number of queued tasks, a few hundred bytes each. More tasks than jobs in flight can be queued, because cancelled
/// jobs stay queued while all workers are blocked.
const TASKS_MAX: usize = 8 << 10;

/// A task for a worker.
pub type Task = Box<dyn FnOnce() + Send>;

/// The pool. When the pool is dropped, the workers finish the queued tasks and end.
pub struct WorkerPool {
    shared: Arc<Shared>,
}

struct Shared {
    name: &'static str,
    workers_max: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The queue; used only while all workers are busy.
    tasks: VecDeque<Task>,
    /// The idle workers, as a stack: the worker that became idle last gets the next task, so that the others end under a light load.
    idle: Vec<Idle>,
    workers: usize,
    /// The number of workers ever started, which is the number of the next worker.
    started: usize,
    is_closed: bool,
}

struct Idle {
    worker: usize,
    task: Sender<Task>,
}

/// Why a task was dropped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No worker is idle, and none could be started.
    #[error("failed to start a worker thread: {0}; raise the limit on threads (`ulimit -u`) or free memory")]
    Spawn(#[from] std::io::Error),
    /// The queue is full.
    #[error("all worker threads are blocked and {TASKS_MAX} tasks are queued")]
    Full,
}

impl WorkerPool {
    /// Creates a pool of at most `workers_max` threads. No thread is started before the first task.
    pub fn new(name: &'static str, workers_max: usize) -> WorkerPool {
        WorkerPool { shared: Arc::new(Shared { name, workers_max, state: Mutex::default() }) }
    }

    /// Gives the task to an idle worker or a new one, or queues it.
    ///
    /// # Errors
    /// The task is dropped.
    pub fn run(&self, task: Task) -> Result<(), RunError> {
        let mut state = self.shared.lock();
        if let Some(idle) = state.idle.pop() {
            // The channel has room: an idle worker gets one task, and removes itself from the list before it ends.
            let _ = idle.task.send(task);
            return Ok(());
        }
        if state.workers >= self.shared.workers_max {
            if state.tasks.len() >= TASKS_MAX {
                return Err(RunError::Full);
            }
            state.tasks.push_back(task);
            return Ok(());
        }
        let (shared, worker) = (self.shared.clone(), state.started);
        // Under the lock, so that no task is queued for a worker that then fails to start.
        threads::spawn(format!("{}-{worker}", shared.name), move || shared.work(worker, task))?;
        state.started += 1;
        state.workers += 1;
        Ok(())
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.is_closed = true;
        // Disconnects the channels of the idle workers, which wakes them.
        state.idle.clear();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, worker: usize, first: Task) {
        let mut next = Some(first);
        while let Some(task) = next {
            // A task handles its own panic in a drop guard; this keeps the worker alive.
            let _ = catch_unwind(AssertUnwindSafe(task));
            next = self.next_task(worker);
        }
        malloc::request_trim();
        if self.lock().workers == 0 {
            // Only the last worker trims, because it delays no task.
            malloc::trim_if_requested();
        }
    }

    /// Waits for the next task. `None` if the worker must end; it is then no longer counted.
    #[inline(never)] // keeps its stack frame from lying below that of every task
    fn next_task(&self, worker: usize) -> Option<Task> {
        let mut state = self.lock();
        if let Some(task) = state.tasks.pop_front() {
            return Some(task);
        }
        if state.is_closed {
            state.workers -= 1;
            return None;
        }
        let (task, receiver) = bounded(1);
        state.idle.push(Idle { worker, task });
        drop(state);
        if let Ok(task) = receiver.recv_timeout(IDLE_TIMEOUT) {
            return Some(task);
        }
        let mut state = self.lock();
        state.idle.retain(|idle| idle.worker != worker);
        // A task may have arrived between the timeout and the lock.
        let late = receiver.try_recv().ok();
        state.workers -= usize::from(late.is_none());
        late
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn blocking_task(started: &Sender<()>, release: &Receiver<()>) -> Task {
        let (started, release) = (started.clone(), release.clone());
        Box::new(move || {
            started.send(()).expect("the test receives");
            let _ = release.recv();
        })
    }

    #[test]
    fn pool_starts_threads_on_demand_reuses_them_and_never_exceeds_its_maximum() {
        let pool = WorkerPool::new("test", 2);
        assert_eq!(pool.shared.lock().workers, 0);
        let (started_tx, started) = unbounded();
        let (release, release_rx) = bounded(0);
        for _ in 0..3 {
            pool.run(blocking_task(&started_tx, &release_rx)).expect("spawned");
        }
        for _ in 0..2 {
            started.recv_timeout(TIMEOUT).expect("two run");
        }
        assert!(started.try_recv().is_err(), "the third is queued");
        assert_eq!(pool.shared.lock().workers, 2);
        release.send(()).expect("released");
        started.recv_timeout(TIMEOUT).expect("the third runs");
        drop(release);
        assert_eq!(pool.shared.lock().workers, 2);
    }

    #[test]
    fn idle_worker_that_became_idle_last_gets_the_next_task() {
        let pool = WorkerPool::new("test", 2);
        let (started_tx, started) = unbounded();
        let (first, first_rx) = bounded(0);
        let (second, second_rx) = bounded(0);
        pool.run(blocking_task(&started_tx, &first_rx)).expect("spawned");
        pool.run(blocking_task(&started_tx, &second_rx)).expect("spawned");
        for _ in 0..2 {
            started.recv_timeout(TIMEOUT).expect("both run");
        }
        let wait_for_idle = |count| {
            while pool.shared.lock().idle.len() < count {
                std::thread::yield_now();
            }
        };
        drop(first);
        wait_for_idle(1);
        drop(second);
        wait_for_idle(2);
        let (tx, rx) = bounded(1);
        let task = move || tx.send(std::thread::current().name().map(str::to_owned)).expect("the test receives");
        pool.run(Box::new(task)).expect("given to an idle worker");
        assert_eq!(rx.recv_timeout(TIMEOUT).expect("it ran").as_deref(), Some("test-1"));
    }

    #[test]
    fn worker_survives_a_task_that_panics() {
        let pool = WorkerPool::new("test", 1);
        pool.run(Box::new(|| std::panic::resume_unwind(Box::new("bug")))).expect("spawned");
        let (tx, rx) = bounded(1);
        pool.run(Box::new(move || tx.send(()).expect("the test receives"))).expect("the worker is alive");
        rx.recv_timeout(TIMEOUT).expect("the next task runs");
    }

    #[test]
    fn queue_is_bounded() {
        let pool = WorkerPool::new("test", 1);
        let (started_tx, started) = unbounded();
        let (release, release_rx) = bounded(0);
        pool.run(blocking_task(&started_tx, &release_rx)).expect("spawned");
        started.recv_timeout(TIMEOUT).expect("it runs");
        let (tx, rx) = unbounded();
        let queue = || {
            let tx = tx.clone();
            pool.run(Box::new(move || tx.send(()).expect("the test receives")))
        };
        (0..TASKS_MAX).for_each(|_| queue().expect("queued"));
        assert!(matches!(queue(), Err(RunError::Full)));
        drop(release);
        (0..TASKS_MAX).for_each(|_| rx.recv_timeout(TIMEOUT).expect("what was queued runs"));
    }

    #[test]
    fn dropped_pool_finishes_queued_tasks() {
        let (tx, rx) = unbounded();
        {
            let pool = WorkerPool::new("test", 1);
            for n in 0..5 {
                let tx = tx.clone();
                pool.run(Box::new(move || tx.send(n).expect("the test receives"))).expect("spawned");
            }
        }
        drop(tx);
        assert_eq!(rx.iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }
}
