//! Resolves host names, in bounded time. The system's lookup has no time limit and cannot be interrupted, so it runs on a thread of
//! its own, which may outlive the call.
//!
//! Invariants: at most one lookup of a name runs at a time; all callers that wait for the name share its result. Results are not
//! kept: each attempt to connect resolves the name again.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::sys::threads;

/// Maximum number of addresses of a name that are used.
const ADDRESSES_MAX: usize = 16;

/// Why a name has no address.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ResolveError {
    /// The system did not answer in time.
    #[error("no answer in time")]
    TimedOut,
    /// The thread for the lookup could not be started.
    #[error("failed to start a thread: {0}")]
    NoThread(Arc<io::Error>),
    /// The lookup failed.
    #[error("{0}")]
    Failed(Arc<io::Error>),
}

type Outcome = Result<Vec<SocketAddr>, ResolveError>;

/// A lookup in progress.
#[derive(Default)]
struct Lookup {
    outcome: Mutex<Option<Outcome>>,
    ended: Condvar,
}

/// The lookups in progress, by name.
static LOOKUPS: Mutex<BTreeMap<String, Arc<Lookup>>> = Mutex::new(BTreeMap::new());

/// Returns the addresses of `host`, which may be an address itself. `None` means no time limit.
///
/// # Errors
/// The name cannot be resolved, or not by `until`.
pub fn resolve(host: &str, port: u16, until: Option<Instant>) -> Outcome {
    let host = host.trim_matches(['[', ']']);
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    if host.eq_ignore_ascii_case("localhost") {
        // Most servers listen on IPv4 by default.
        return Ok(vec![(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()]);
    }
    let mut addresses = shared_lookup(host)?.wait(until)?;
    addresses.iter_mut().for_each(|address| address.set_port(port));
    Ok(addresses)
}

/// The lookup of this name that is in progress, else a new one.
fn shared_lookup(host: &str) -> Result<Arc<Lookup>, ResolveError> {
    let name = host.to_ascii_lowercase();
    let mut lookups = lock(&LOOKUPS);
    if let Some(lookup) = lookups.get(&name) {
        return Ok(lookup.clone());
    }
    let lookup = Arc::new(Lookup::default());
    let (of_thread, wanted) = (lookup.clone(), name.clone());
    let run = move || {
        let outcome = system_lookup(&wanted);
        // Later callers start a new lookup.
        lock(&LOOKUPS).remove(&wanted);
        *lock(&of_thread.outcome) = Some(outcome);
        of_thread.ended.notify_all();
    };
    threads::spawn("resolve", run).map_err(|e| ResolveError::NoThread(Arc::new(e)))?;
    lookups.insert(name, lookup.clone());
    Ok(lookup)
}

fn system_lookup(name: &str) -> Outcome {
    // Port 0: a lookup is for a name, whatever the port.
    let found = (name, 0).to_socket_addrs().map_err(|e| ResolveError::Failed(Arc::new(e)))?;
    Ok(found.take(ADDRESSES_MAX).collect())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lookup {
    fn wait(&self, until: Option<Instant>) -> Outcome {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            outcome = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => return Err(ResolveError::TimedOut),
                Some(left) => self.ended.wait_timeout(outcome, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.ended.wait(outcome).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}
