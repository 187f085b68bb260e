//! Probes backends, each on a thread of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use super::backend_status::ProbeResult;
use crate::backend::{Backend, BackendError, PROBE_TIME};
use crate::sys::threads;

/// Time limit of a round. A probe limits its requests to half of this time; what remains is for processing the responses.
pub const ROUND_TIME_MAX: Duration = Duration::from_secs(2 * PROBE_TIME.as_secs());

/// The result of a probe that did not end in time.
pub fn unanswered() -> ProbeResult {
    Err(BackendError::ProbeTimeout(ROUND_TIME_MAX.as_secs()))
}

/// Probes all backends concurrently, for the time of a round. The results are in the order of the backends.
pub fn probe_all(backends: &[Arc<dyn Backend>]) -> Vec<ProbeResult> {
    let results = probe_within(backends, ROUND_TIME_MAX).into_iter();
    results.map(|result| result.unwrap_or_else(unanswered)).collect()
}

/// Like [`probe_all`], with a time limit. The result is `None` for backends that have not responded by then.
pub fn probe_within(backends: &[Arc<dyn Backend>], limit: Duration) -> Vec<Option<ProbeResult>> {
    let started = Instant::now();
    let mut results: Vec<Option<ProbeResult>> = backends.iter().map(|_| None).collect();
    let (sender, arrived) = bounded(backends.len());
    let all = backends.iter().cloned().enumerate().collect();
    start_probes(all, &Arc::new(move |index, result| _ = sender.send((index, result))));
    // The channel disconnects with the last probe.
    while let Ok((index, result)) = arrived.recv_timeout(limit.saturating_sub(started.elapsed())) {
        results[index] = Some(result);
    }
    results
}

/// Probes each backend on a thread of its own, and calls `report` with each result as it arrives.
pub fn start_probes<R>(backends: Vec<(usize, Arc<dyn Backend>)>, report: &Arc<R>)
where
    R: Fn(usize, ProbeResult) + Send + Sync + 'static,
{
    for (index, backend) in backends {
        let probe = {
            let report = report.clone();
            move || {
                // A panic in one backend must not affect the others.
                let result = catch_unwind(AssertUnwindSafe(|| backend.probe()));
                report(index, result.unwrap_or(Err(BackendError::Panicked)));
            }
        };
        let on_thread = probe.clone();
        if threads::spawn(format!("probe-{index}"), on_thread).is_err() {
            probe();
        }
    }
}
