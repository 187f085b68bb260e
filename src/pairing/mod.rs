//! The pairing of `setup`: the coordinator gives a code, a person enters it on a page, and the coordinator then says who this
//! agent is and on which terms its models are offered.
//!
//! Who runs here: one thread, `pairing`, asks the coordinator, notes what it hears and rings; whoever started it shows it. It
//! leaves when the pairing has ended, which is within the life of the code.
//!
//! Invariants: every wait has a bound, and so has the whole, by the life of the code; what may pass is tried again until then.
//! A host token is never shown or kept.

pub mod agent_toml;
mod client;
mod site;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

pub use client::{LIFETIME, PairingClient, PairingError, PollStatus};
pub use site::{BASE_DEFAULT, CoordinatorUrls};

use crate::backend::Kind;
use crate::sys::threads;

/// From one question to the next.
const POLL_INTERVAL: Duration = Duration::from_millis(800);
/// How often a code is asked for.
const ISSUES_MAX: u32 = 5;
/// The first wait between two times; it doubles, so that all of them take 15 s.
const ISSUE_DELAY: Duration = Duration::from_secs(1);

/// A code, and what belongs to it.
#[derive(Clone)]
pub struct Issued {
    /// For the person.
    pub code: String,
    /// For the questions; a secret.
    poll_token: String,
    /// How long the code is good, from its arrival on.
    pub lifetime: Duration,
}

/// What a pairing came to.
#[derive(Clone, Default)]
pub struct Paired {
    /// A secret.
    pub host_token: Option<String>,
    /// What the coordinator calls this agent.
    pub provider_id: Option<String>,
    /// In the coordinator's order, each model once.
    pub models: Vec<ModelTerms>,
}

/// What the coordinator says about one model. Numbers are at most `i64::MAX`; `None` where it says nothing that makes sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelTerms {
    /// The name that jobs ask for.
    pub model_id: String,
    /// USDC micro-units per million input tokens.
    pub input_per_1m: Option<u64>,
    /// USDC micro-units per million output tokens.
    pub output_per_1m: Option<u64>,
    /// Jobs of it at a time.
    pub max_concurrent: Option<u64>,
}

/// A backend, as the coordinator is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertised {
    /// What it is.
    pub kind: Kind,
    /// Where it is.
    pub url: String,
    /// What it lists, as far as the operator offers it.
    pub models: Vec<String>,
}

/// What is heard of a pairing under way.
pub enum Event {
    /// Here is the code. Comes once, before any of the ends.
    Issued(Issued),
    /// There is no answer, for this reason, and it is tried again. Comes once, however long that lasts.
    Trouble(String),
    /// There are answers again.
    TroubleOver,
    /// The end: it is done.
    Paired(Paired),
    /// The end: nobody entered the code in time.
    Expired,
    /// The end: it cannot be done, for this reason.
    Failed(String),
}

/// What is heard of a pairing, by whoever shows it.
pub struct PairingHandle {
    events: Arc<Mutex<Vec<Event>>>,
    rung: Receiver<()>,
}

impl PairingHandle {
    /// Rings when there is something new, and is gone when there will be nothing any more.
    pub fn bell(&self) -> &Receiver<()> {
        &self.rung
    }

    /// What has been heard since the last look, in order.
    pub fn drain_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Pairs the identity with this public key.
///
/// # Errors
/// The system refused a thread.
pub fn start(server: PairingClient, public_key_base64: String, backends: Vec<Advertised>) -> io::Result<PairingHandle> {
    let events = Arc::new(Mutex::default());
    let (bell, rung) = bounded(1);
    let mut teller = EventQueue { events: events.clone(), bell, in_trouble: false };
    threads::spawn("pairing", move || {
        let end = pair(&server, &public_key_base64, &backends, &mut teller);
        teller.tell(end);
    })?;
    Ok(PairingHandle { events, rung })
}

/// Tells of trouble once, however often it is met.
struct EventQueue {
    events: Arc<Mutex<Vec<Event>>>,
    bell: Sender<()>,
    in_trouble: bool,
}

impl EventQueue {
    fn tell(&self, event: Event) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        // It has rung already, or nobody listens any more.
        let _ = self.bell.try_send(());
    }

    fn report_retry(&mut self, why: String) {
        if !std::mem::replace(&mut self.in_trouble, true) {
            self.tell(Event::Trouble(why));
        }
    }

    fn no_trouble(&mut self) {
        if std::mem::take(&mut self.in_trouble) {
            self.tell(Event::TroubleOver);
        }
    }
}

/// Tells how it goes; returns the end.
fn pair(server: &PairingClient, public_key_base64: &str, backends: &[Advertised], teller: &mut EventQueue) -> Event {
    let mut delay = ISSUE_DELAY;
    let mut issues = 1;
    let issued = loop {
        match server.issue(public_key_base64) {
            Ok(issued) => break issued,
            Err(PairingError::Permanent(why)) => return Event::Failed(why),
            Err(PairingError::Transient(why)) if issues == ISSUES_MAX => {
                return Event::Failed(format!("{why} (tried {ISSUES_MAX} times)"));
            }
            Err(PairingError::Transient(why)) => teller.report_retry(why),
        }
        sleep(delay);
        delay *= 2;
        issues += 1;
    };
    let until = Instant::now() + issued.lifetime;
    teller.no_trouble();
    teller.tell(Event::Issued(issued.clone()));
    loop {
        let asked_at = Instant::now();
        match server.poll(&issued.poll_token, backends).map_err(|fault| fault.without(&issued.poll_token)) {
            Ok(PollStatus::Active(paired)) => return Event::Paired(paired),
            Ok(PollStatus::Expired) => return Event::Expired,
            Ok(PollStatus::Pending) => teller.no_trouble(),
            Err(PairingError::Permanent(why)) => return Event::Failed(why),
            Err(PairingError::Transient(why)) => teller.report_retry(why),
        }
        // Asked once more after its end, for it may have been entered in the last moment.
        if asked_at >= until {
            return Event::Expired;
        }
        sleep((asked_at + POLL_INTERVAL).saturating_duration_since(Instant::now()));
    }
}
