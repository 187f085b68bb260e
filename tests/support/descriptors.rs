//! The file descriptors of the test process. All tests of a run share one limit, and the usual one is 1024.

use std::io;
use std::sync::{Condvar, LazyLock, Mutex};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::secs;

/// The soft limit of this process, raised to the hard one at the first use.
static LIMIT: LazyLock<u64> = LazyLock::new(|| {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit of descriptors");
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
});

/// Half of the limit is shared by the tests that reserve descriptors. The other half is for those that need fewer than a
/// hundred, and reserve none.
static POOL: LazyLock<Pool> =
    LazyLock::new(|| Pool { size: *LIMIT / 2, free: Mutex::new(*LIMIT / 2), returned: Condvar::new() });

struct Pool {
    size: u64,
    free: Mutex<u64>,
    returned: Condvar,
}

/// Descriptors that belong to one test until this is dropped.
pub struct Reserved(u64);

/// Raises the limit; whatever opens sockets or files for a test begins with this.
pub fn raise_limit() {
    LazyLock::force(&LIMIT);
}

/// Waits until `count` descriptors are free, and reserves them. A test reserves once, at its beginning: two that wait for each
/// other's descriptors would wait in vain.
pub fn reserve_descriptors(count: u64) -> Reserved {
    let (pool, limit) = (&*POOL, *LIMIT);
    assert!(count <= pool.size, "this test needs {count} of {} shared descriptors: {}", pool.size, raise_it(limit));
    let free = pool.free.lock().expect("the pool");
    // Longer than all other tests that reserve some, one after the other.
    let (mut free, waited) = pool.returned.wait_timeout_while(free, secs(600), |free| *free < count).expect("the pool");
    if waited.timed_out() {
        // A panic would poison the pool for the other tests.
        drop(free);
        panic!("no {count} descriptors became free within 10 minutes: {}", raise_it(limit));
    }
    *free -= count;
    Reserved(count)
}

impl Drop for Reserved {
    fn drop(&mut self) {
        *POOL.free.lock().expect("the pool") += self.0;
        POOL.returned.notify_all();
    }
}

fn raise_it(limit: u64) -> String {
    format!("raise `ulimit -n`, which is {limit}")
}

/// The error, and what helps if it is the lack of descriptors.
pub fn explain(error: &io::Error) -> String {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE | Errno::ENFILE) => format!("too many open files: {}", raise_it(*LIMIT)),
        _ => error.to_string(),
    }
}

/// What was opened, or a panic that says why it could not be.
#[track_caller]
pub fn opened<T>(result: io::Result<T>, what: &str) -> T {
    result.unwrap_or_else(|e| panic!("{what}: {}", explain(&e)))
}
