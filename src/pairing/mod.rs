//! The pairing of `setup`: the coordinator issues a code, a person enters it on a page, and the coordinator returns the provider
//! id and the terms of the models.
//!
//! Threads: `pairing` polls the coordinator, queues the events and signals them; the caller prints them. The thread ends with the
//! pairing, at the latest when the code expires.
//!
//! Invariants: every wait is bounded, and the whole pairing is bounded by the lifetime of the code; transient errors are retried
//! until then. A host token is never printed or stored.

pub mod agent_toml;
mod client;
mod urls;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

pub use client::{LIFETIME, PairingClient, PairingError, PollStatus};
pub use urls::{BASE_DEFAULT, CoordinatorUrls};

use crate::backend::Kind;
use crate::sys::threads;

/// The time between two polls.
const POLL_INTERVAL: Duration = Duration::from_millis(800);
/// The maximum number of requests for a code.
const ISSUES_MAX: u32 = 5;
/// The delay before the second request for a code; it doubles, so all five take 15 s.
const ISSUE_DELAY: Duration = Duration::from_secs(1);

/// A code that the coordinator has issued.
#[derive(Clone)]
pub struct Issued {
    /// The code that a person enters.
    pub code: String,
    /// The token sent with each poll; a secret.
    poll_token: String,
    /// How long the code is valid after it arrives.
    pub lifetime: Duration,
}

/// The result of a pairing.
#[derive(Clone, Default)]
pub struct Paired {
    /// The token of the host; a secret.
    pub host_token: Option<String>,
    /// The coordinator's id of this agent.
    pub provider_id: Option<String>,
    /// The terms of each model, in the coordinator's order, without duplicates.
    pub models: Vec<ModelTerms>,
}

/// The coordinator's terms for one model. Numbers are at most `i64::MAX`; `None` if missing or invalid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelTerms {
    /// The name that jobs request.
    pub model_id: String,
    /// USDC micro-units per million input tokens.
    pub input_per_1m: Option<u64>,
    /// USDC micro-units per million output tokens.
    pub output_per_1m: Option<u64>,
    /// The number of concurrent jobs.
    pub max_concurrent: Option<u64>,
}

/// A backend, as advertised to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertised {
    /// The kind of server.
    pub kind: Kind,
    /// Its base URL.
    pub url: String,
    /// The models that it lists and the operator offers.
    pub models: Vec<String>,
}

/// What happens during a pairing.
pub enum Event {
    /// The coordinator issued a code. Sent once, before `Paired` and `Expired`.
    Issued(Issued),
    /// Requests fail for this reason and are retried. Sent once for a series of failures.
    Retrying(String),
    /// Requests succeed again.
    Recovered,
    /// The last event: the pairing succeeded.
    Paired(Paired),
    /// The last event: nobody entered the code in time.
    Expired,
    /// The last event: the pairing failed for this reason.
    Failed(String),
}

/// The receiving end of a pairing's events.
pub struct PairingHandle {
    events: Arc<Mutex<Vec<Event>>>,
    ready: Receiver<()>,
}

impl PairingHandle {
    /// Receives a signal when there are new events; disconnects after the last event.
    pub fn ready(&self) -> &Receiver<()> {
        &self.ready
    }

    /// Returns the events since the last call, in order.
    pub fn drain_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Pairs the identity with this public key.
///
/// # Errors
/// The system refused a thread.
pub fn start(client: PairingClient, public_key_base64: String, backends: Vec<Advertised>) -> io::Result<PairingHandle> {
    let events = Arc::new(Mutex::default());
    let (signal, ready) = bounded(1);
    let mut queue = EventQueue { events: events.clone(), signal, is_retrying: false };
    threads::spawn("pairing", move || {
        let end = pair(&client, &public_key_base64, &backends, &mut queue);
        queue.push(end);
    })?;
    Ok(PairingHandle { events, ready })
}

/// The sending end. Reports a series of failures once.
struct EventQueue {
    events: Arc<Mutex<Vec<Event>>>,
    signal: Sender<()>,
    is_retrying: bool,
}

impl EventQueue {
    fn push(&self, event: Event) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        // Full: a signal is already pending. Disconnected: nobody is waiting.
        let _ = self.signal.try_send(());
    }

    fn report_retry(&mut self, why: String) {
        if !std::mem::replace(&mut self.is_retrying, true) {
            self.push(Event::Retrying(why));
        }
    }

    fn report_success(&mut self) {
        if std::mem::take(&mut self.is_retrying) {
            self.push(Event::Recovered);
        }
    }
}

/// Runs the pairing and returns its last event.
fn pair(client: &PairingClient, public_key_base64: &str, backends: &[Advertised], queue: &mut EventQueue) -> Event {
    let mut delay = ISSUE_DELAY;
    let mut issues = 1;
    let issued = loop {
        match client.issue(public_key_base64) {
            Ok(issued) => break issued,
            Err(PairingError::Permanent(why)) => return Event::Failed(why),
            Err(PairingError::Transient(why)) if issues == ISSUES_MAX => {
                return Event::Failed(format!("{why} (tried {ISSUES_MAX} times)"));
            }
            Err(PairingError::Transient(why)) => queue.report_retry(why),
        }
        sleep(delay);
        delay *= 2;
        issues += 1;
    };
    let deadline = Instant::now() + issued.lifetime;
    queue.report_success();
    queue.push(Event::Issued(issued.clone()));
    loop {
        let polled_at = Instant::now();
        match client.poll(&issued.poll_token, backends).map_err(|e| e.without(&issued.poll_token)) {
            Ok(PollStatus::Active(paired)) => return Event::Paired(paired),
            Ok(PollStatus::Expired) => return Event::Expired,
            Ok(PollStatus::Pending) => queue.report_success(),
            Err(PairingError::Permanent(why)) => return Event::Failed(why),
            Err(PairingError::Transient(why)) => queue.report_retry(why),
        }
        // One poll after the deadline, because the code may have been entered at the last moment.
        if polled_at >= deadline {
            return Event::Expired;
        }
        sleep((polled_at + POLL_INTERVAL).saturating_duration_since(Instant::now()));
    }
}
