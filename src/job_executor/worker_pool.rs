//! A bounded pool of threads: spawned when a task finds none idle, gone when idle for a while. Knows nothing of jobs.
//!
//! Nothing here blocks the caller but one short lock. At its maximum the pool queues, up to a limit. A task that panics costs
//! nothing but itself.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};

use crate::sys::malloc;
use crate::sys::threads;

/// How long a worker waits for the next task before it leaves.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Tasks that may wait for a worker. The jobs of a session's table are far fewer: the others were cancelled while all workers
/// were stuck, and each is some hundred bytes.
const TASKS_MAX: usize = 8 << 10;

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
}

#[derive(Default)]
struct State {
    /// Waiting for a worker, which happens only at the maximum.
    tasks: VecDeque<Task>,
    /// The worker that became idle last is the last, and the next to be given a task: under a light load the others go on
    /// being idle, and leave.
    idle: Vec<Idle>,
    workers: usize,
    /// Workers ever started: the number of the next.
    started: usize,
    closed: bool,
}

struct Idle {
    worker: usize,
    task: Sender<Task>,
}

/// Why a task is not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No worker is idle and none could be started.
    #[error("failed to start a worker thread: {0}; is the box short of threads or memory?")]
    Spawn(#[from] std::io::Error),
    /// As many tasks wait as may.
    #[error("all worker threads are stuck, and {TASKS_MAX} tasks wait for them")]
    Full,
}

impl WorkerPool {
    /// No thread is started before the first task.
    pub fn new(name: &'static str, workers_max: usize) -> WorkerPool {
        WorkerPool { shared: Arc::new(Shared { name, workers_max, state: Mutex::default() }) }
    }

    /// Has `task` run soon, by an idle worker, a new one, or the next that is through with its own.
    ///
    /// # Errors
    /// The task is dropped.
    pub fn run(&self, task: Task) -> Result<(), RunError> {
        let mut state = self.shared.lock();
        if let Some(idle) = state.idle.pop() {
            // There is room for the one task that an idle worker is ever given, and it leaves the list before it leaves.
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
        // Under the lock: nobody is to queue a task for a worker that is counted and then refused.
        threads::spawn(format!("{}-{worker}", shared.name), move || shared.work(worker, task))?;
        state.started += 1;
        state.workers += 1;
        Ok(())
    }

    /// Threads alive.
    pub fn workers(&self) -> usize {
        self.shared.lock().workers
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        // Wakes them: their channels disconnect.
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
            // The task answers for itself from a drop guard; here only the worker is to survive.
            let _ = catch_unwind(AssertUnwindSafe(task));
            next = self.next_task(worker);
        }
        malloc::request_trim();
        if self.lock().workers == 0 {
            // The last one to leave has time.
            malloc::trim_if_requested();
        }
    }

    /// `None` when this worker is to leave; it is no longer counted then.
    #[inline(never)] // its frame is not to lie below that of every task
    fn next_task(&self, worker: usize) -> Option<Task> {
        let mut state = self.lock();
        if let Some(task) = state.tasks.pop_front() {
            return Some(task);
        }
        if state.closed {
            state.workers -= 1;
            return None;
        }
        let (task, inbox) = bounded(1);
        state.idle.push(Idle { worker, task });
        drop(state);
        if let Ok(task) = inbox.recv_timeout(IDLE_TIMEOUT) {
            return Some(task);
        }
        let mut state = self.lock();
        state.idle.retain(|idle| idle.worker != worker);
        // Between the timeout and the lock a task may have been given.
        let late = inbox.try_recv().ok();
        state.workers -= usize::from(late.is_none());
        late
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
    fn the_worker_that_became_idle_last_gets_the_next_task() {
        let pool = WorkerPool::new("test", 2);
        let (started_tx, started) = unbounded();
        let (first, first_rx) = bounded(0);
        let (second, second_rx) = bounded(0);
        pool.run(blocking_task(&started_tx, &first_rx)).expect("spawned");
        pool.run(blocking_task(&started_tx, &second_rx)).expect("spawned");
        for _ in 0..2 {
            started.recv_timeout(PATIENCE).expect("both run");
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
        let task = move || tx.send(std::thread::current().name().map(str::to_owned)).expect("the test listens");
        pool.run(Box::new(task)).expect("given to an idle worker");
        assert_eq!(rx.recv_timeout(PATIENCE).expect("it ran").as_deref(), Some("test-1"));
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
    fn the_queue_has_an_end() {
        let pool = WorkerPool::new("test", 1);
        let (started_tx, started) = unbounded();
        let (release, release_rx) = bounded(0);
        pool.run(blocking_task(&started_tx, &release_rx)).expect("spawned");
        started.recv_timeout(PATIENCE).expect("it runs");
        let (tx, rx) = unbounded();
        let queue = || {
            let tx = tx.clone();
            pool.run(Box::new(move || tx.send(()).expect("the test listens")))
        };
        (0..TASKS_MAX).for_each(|_| queue().expect("queued"));
        assert!(matches!(queue(), Err(RunError::Full)));
        drop(release);
        (0..TASKS_MAX).for_each(|_| rx.recv_timeout(PATIENCE).expect("what was queued runs"));
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
