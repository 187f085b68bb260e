//! The pairing of `setup`: the coordinator gives a code, a person enters it on a page, and the coordinator then says who this
//! agent is and on which terms its models are offered.
//!
//! Who runs here: one thread, `pairing`, asks the coordinator and tells what it hears through a channel; whoever started it
//! shows it. It leaves when the pairing has ended, or when nobody listens any more.
//!
//! Invariants: every wait has a bound, and so has the whole, by the life of the code; what may pass is tried again until then.
//! A host token is never shown or kept.

pub mod agent_toml;
mod client;
mod site;

use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendError, Sender, unbounded};

pub use client::{Fault, LIFETIME, Polled, Server};
pub use site::{BASE_DEFAULT, Site};

use crate::backend::Kind;
use crate::threads;

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

/// Pairs the identity with this public key.
///
/// # Errors
/// The system refused a thread.
pub fn start(server: Server, public_key_base64: String, backends: Vec<Advertised>) -> io::Result<Receiver<Event>> {
    let (events, receiver) = unbounded();
    threads::spawn("pairing", move || {
        let teller = Teller { events, in_trouble: false };
        // Nobody listens any more: then there is nobody to pair for.
        let _ = pair(&server, &public_key_base64, &backends, teller);
    })?;
    Ok(receiver)
}

/// Tells of trouble once, however often it is met.
struct Teller {
    events: Sender<Event>,
    in_trouble: bool,
}

impl Teller {
    fn tell(&self, event: Event) -> Result<(), SendError<Event>> {
        self.events.send(event)
    }

    fn trouble(&mut self, why: String) -> Result<(), SendError<Event>> {
        if std::mem::replace(&mut self.in_trouble, true) { Ok(()) } else { self.tell(Event::Trouble(why)) }
    }

    fn no_trouble(&mut self) -> Result<(), SendError<Event>> {
        if std::mem::take(&mut self.in_trouble) { self.tell(Event::TroubleOver) } else { Ok(()) }
    }
}

fn pair(
    server: &Server,
    public_key_base64: &str,
    backends: &[Advertised],
    mut teller: Teller,
) -> Result<(), SendError<Event>> {
    let mut delay = ISSUE_DELAY;
    let mut issues = 1;
    let issued = loop {
        match server.issue(public_key_base64) {
            Ok(issued) => break issued,
            Err(Fault::Refused(why)) => return teller.tell(Event::Failed(why)),
            Err(Fault::Passing(why)) if issues == ISSUES_MAX => {
                return teller.tell(Event::Failed(format!("{why} (tried {ISSUES_MAX} times)")));
            }
            Err(Fault::Passing(why)) => teller.trouble(why)?,
        }
        sleep(delay);
        delay *= 2;
        issues += 1;
    };
    let until = Instant::now() + issued.lifetime;
    teller.no_trouble()?;
    teller.tell(Event::Issued(issued.clone()))?;
    loop {
        let asked_at = Instant::now();
        match server.poll(&issued.poll_token, backends).map_err(|fault| fault.without(&issued.poll_token)) {
            Ok(Polled::Active(paired)) => return teller.tell(Event::Paired(paired)),
            Ok(Polled::Expired) => return teller.tell(Event::Expired),
            Ok(Polled::Pending) => teller.no_trouble()?,
            Err(Fault::Refused(why)) => return teller.tell(Event::Failed(why)),
            Err(Fault::Passing(why)) => teller.trouble(why)?,
        }
        // Asked once more after its end, for it may have been entered in the last moment.
        if asked_at >= until {
            return teller.tell(Event::Expired);
        }
        sleep((asked_at + POLL_INTERVAL).saturating_duration_since(Instant::now()));
    }
}
