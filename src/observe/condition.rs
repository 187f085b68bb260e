//! Whether the agent serves, and if not, why.

use super::live::{Connection, Snapshot};
use crate::discovery::{BackendStatus, Catalog, OfferFeed};
use crate::job_executor::token_limit::TokenLimit;

/// Jobs are accepted.
pub const SERVING: &str = "serving";
const DRAINING: &str = "draining";
const CONNECTING: &str = "connecting";
const REJECTED: &str = "rejected";
const PAUSED: &str = "paused";
const NO_HEALTHY_BACKEND: &str = "no_healthy_backend";
const NO_MODELS: &str = "no_models";
const THROTTLED: &str = "throttled";

/// The condition of the agent.
#[derive(Debug)]
pub struct Condition {
    /// One of the names above, which are part of the state file.
    pub name: &'static str,
    /// The reason why the agent does not serve, for the operator.
    pub reason: Option<String>,
}

/// The condition of the agent, with the first reason that prevents it from serving.
pub fn of(
    snapshot: &Snapshot,
    offers: &OfferFeed,
    catalog: &Catalog,
    backends: &[BackendStatus],
    token_limit: &TokenLimit,
) -> Condition {
    let because = |name, reason: &str| Condition { name, reason: Some(reason.to_owned()) };
    if snapshot.is_draining {
        return because(DRAINING, "the agent is stopping; jobs in flight finish");
    }
    match &snapshot.connection {
        Connection::Connecting(error) => return Condition { name: CONNECTING, reason: error.clone() },
        Connection::Rejected(reason) => return because(REJECTED, reason),
        Connection::Connected => {}
    }
    if offers.is_paused() {
        return because(PAUSED, "paused by the operator");
    }
    if catalog.offer.is_empty() {
        return without_offer(backends);
    }
    if let Some(limit) = token_limit.used_up() {
        return because(THROTTLED, &format!("the {limit} tokens that max_tokens_per_minute allows are used up"));
    }
    Condition { name: SERVING, reason: None }
}

/// The condition of an agent with an empty offer.
fn without_offer(backends: &[BackendStatus]) -> Condition {
    let unavailable = |backend: &BackendStatus| Some(format!("{}: {}", backend.id(), backend.unavailable()?));
    let reasons: Vec<String> = backends.iter().filter_map(unavailable).collect();
    let (name, reason) = if backends.is_empty() {
        (NO_HEALTHY_BACKEND, "no [[backends]] in the configuration".to_owned())
    } else if !reasons.is_empty() {
        (NO_HEALTHY_BACKEND, reasons.join("; "))
    } else if backends.iter().any(|backend| backend.models().is_none()) {
        (NO_HEALTHY_BACKEND, "the backends have not answered yet".to_owned())
    } else {
        let exclusions =
            |backend: &BackendStatus| Some(format!("{}: {}", backend.id(), backend.not_offered().exclusions()?));
        let exclusions: Vec<String> = backends.iter().filter_map(exclusions).collect();
        let no_model = "the backends list no model that `models` allows and that has a price above 0".to_owned();
        (NO_MODELS, [vec![no_model], exclusions].concat().join("; "))
    };
    Condition { name, reason: Some(reason) }
}
