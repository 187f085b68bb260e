//! A coordinator for one machine: what the market's coordinator does with an agent, on loopback.
//!
//! Who runs here: the threads of its `HttpServer`, one a connection, which answer the pairing or become an agent's session
//! (see `session`). Whoever submits a job sends it on its own thread, and receives the job's events through a channel. One
//! agent is current: a newer one replaces it, and the jobs of the older one are lost.
//!
//! Invariants: no lock of the state is held across I/O. A job's events are its chunks in order, then exactly one end. A
//! [`Job`] that is dropped before its end cancels. The buffered bytes of a job are bounded by its inbox.

use std::io;
use std::net::TcpListener;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use thiserror::Error;
use uuid::Uuid;

use super::agent_protocol::{JobEnd, OfferedModel};
use super::job_events::{self, Inbox, Received};
use super::pairing::Pairings;
use super::session;
use super::websocket::Sender;
use crate::http_server::connection::{Exchange, quoted};
use crate::http_server::{self, HttpServer};

/// How much later than its deadline a job is given up when the agent stays silent.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// Whose wire format a job's request has, as the `format` of the job frame says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `/v1/chat/completions`
    Openai,
    /// `/v1/messages`
    Anthropic,
}

impl Format {
    fn as_str(self) -> &'static str {
        match self {
            Self::Openai => "openai",
            Self::Anthropic => "anthropic",
        }
    }
}

/// What came of waiting for a job's next event.
pub enum Waited {
    /// Here it is.
    Event(JobEvent),
    /// Nothing within the limit.
    NotYet,
    /// The job has ended: no event will come.
    Over,
}

/// A job to be dispatched.
pub struct JobOrder {
    /// The job's id; fresh for every job.
    pub job_id: Uuid,
    /// The model asked for.
    pub model_id: String,
    /// The request body.
    pub request: Value,
    /// Its format.
    pub format: Format,
    /// How long the whole job may take.
    pub deadline: Duration,
}

/// What the agent says about a job.
#[derive(Debug, Clone, PartialEq)]
pub enum JobEvent {
    /// Bytes of the backend's answer.
    Chunk(Vec<u8>),
    /// The job is complete.
    Done(JobEnd),
    /// The job has failed, with a code of the protocol.
    Failed {
        /// The protocol's error code.
        code: String,
        /// What the agent says about it.
        message: String,
    },
}

/// How long the stages up to the first offer took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stages {
    /// From [`Coordinator::expect_agent`] to the connection.
    pub connect: Duration,
    /// From the connection to the verified signature.
    pub auth: Duration,
    /// From `auth_ok` to `capabilities`.
    pub discovery: Duration,
}

/// What the current agent offers.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    /// The models, as the agent sorted them.
    pub models: Vec<OfferedModel>,
    /// How the agent got here.
    pub stages: Stages,
    /// The version that the agent gave.
    pub agent_version: String,
    /// What the agent is called here.
    pub provider_id: String,
}

/// Why the coordinator cannot do what was asked.
#[derive(Debug, Error)]
pub enum CoordinatorError {
    /// The listening socket or a thread could not be made.
    #[error("failed to start the local coordinator: {0}")]
    Start(#[from] io::Error),
    /// The agent did not get to its offer in time; the second part is the last thing seen.
    #[error("no agent has made an offer within {limit} s ({1})", limit = .0.as_secs())]
    NoOffer(Duration, String),
    /// A job was submitted without an agent.
    #[error("no agent is connected; wait for it to reconnect, or start it anew")]
    NoAgent,
    /// The agent's connection broke while the job was sent.
    #[error("failed to send to the agent: {0}")]
    Send(io::Error),
}

/// The running coordinator; dropping it ends its connections and joins its threads.
pub struct Coordinator {
    shared: Arc<Shared>,
    server: HttpServer,
}

/// What its connections share.
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    expected_at: Instant,
    connections: u64,
    agent: Option<Agent>,
    offer: Option<Offer>,
    last_seen: String,
    jobs: Vec<Waiting>,
}

struct Agent {
    connection: u64,
    sender: Sender,
}

struct Waiting {
    job_id: Uuid,
    connection: u64,
    events: job_events::Sender,
}

impl State {
    /// Takes a job off the list. The list is as short as the agent's `max_concurrent` makes it.
    fn take(&mut self, job_id: Uuid) -> Option<Waiting> {
        let index = self.jobs.iter().position(|waiting| waiting.job_id == job_id)?;
        Some(self.jobs.swap_remove(index))
    }
}

impl Coordinator {
    /// Listens on a free loopback port.
    pub fn start() -> Result<Self, CoordinatorError> {
        Ok(Self::serve(http_server::bind(0)?)?)
    }

    /// Serves agents and the pairing on a socket of one's own.
    pub fn serve(listener: TcpListener) -> io::Result<Self> {
        let state = State {
            expected_at: Instant::now(),
            connections: 0,
            agent: None,
            offer: None,
            last_seen: "it did not connect".to_owned(),
            jobs: Vec::new(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let (of_handler, pairings) = (shared.clone(), Pairings::default());
        let handle = move |exchange: &mut Exchange<'_>| match exchange.upgrade() {
            Some((key, input)) => session::run(&key, input, &of_handler),
            None => pairings.handle(exchange),
        };
        let server = HttpServer::start(listener, "demo-coordinator", Arc::new(handle))?;
        Ok(Self { shared, server })
    }

    /// Where agents are paired.
    pub fn base(&self) -> String {
        format!("http://{}", self.server.address)
    }

    /// Where agents connect to.
    pub fn url(&self) -> String {
        format!("ws://{}/provider/connect", self.server.address)
    }

    /// The last thing that was seen of an agent, for a person.
    pub fn last_seen(&self) -> String {
        self.shared.lock().last_seen.clone()
    }

    /// An agent is started now: the connect stage counts from here.
    pub fn expect_agent(&self) {
        self.shared.lock().expected_at = Instant::now();
    }

    /// What the current agent offers, if there is one.
    pub fn offer(&self) -> Option<Offer> {
        self.shared.lock().offer.clone()
    }

    /// Waits until an agent has made an offer that is `wanted`.
    pub fn wait_for_offer(&self, limit: Duration, wanted: fn(&Offer) -> bool) -> Result<Offer, CoordinatorError> {
        let state = self.shared.lock();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, limit, |state| !state.offer.as_ref().is_some_and(wanted))
            .unwrap_or_else(PoisonError::into_inner);
        let offer = state.offer.clone().filter(wanted);
        offer.ok_or_else(|| CoordinatorError::NoOffer(limit, state.last_seen.clone()))
    }

    /// Sends a job to the current agent.
    pub fn submit(&self, order: JobOrder) -> Result<Job, CoordinatorError> {
        let JobOrder { job_id, model_id, request, format, deadline } = order;
        let (events, inbox) = job_events::channel();
        let sender = {
            let mut state = self.shared.lock();
            let agent = state.agent.as_ref().ok_or(CoordinatorError::NoAgent)?;
            let (connection, sender) = (agent.connection, agent.sender.clone());
            state.jobs.push(Waiting { job_id, connection, events });
            sender
        };
        let frame = format!(
            "{{\"type\":\"job\",\"job_id\":\"{job_id}\",\"model_id\":{},\"request\":{request},\"format\":\"{}\",\
             \"deadline_ms\":{}}}",
            quoted(&model_id),
            format.as_str(),
            deadline.as_millis(),
        );
        let give_up = Instant::now() + deadline + DEADLINE_GRACE;
        let job = Job {
            job_id,
            inbox,
            give_up,
            arrived_at: Instant::now(),
            ended: false,
            sender,
            shared: self.shared.clone(),
        };
        job.sender.send(&frame).map_err(CoordinatorError::Send)?;
        Ok(job)
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        let agent = self.shared.lock().agent.take();
        if let Some(agent) = agent {
            agent.sender.close();
        }
    }
}

/// A job in flight. Dropped before its end, it is cancelled.
pub struct Job {
    job_id: Uuid,
    inbox: Inbox,
    give_up: Instant,
    arrived_at: Instant,
    ended: bool,
    sender: Sender,
    shared: Arc<Shared>,
}

impl Job {
    /// The next event; `None` after the end. Blocks no longer than the job's deadline and a little grace.
    pub fn next_event(&mut self) -> Option<JobEvent> {
        loop {
            match self.wait(Duration::from_secs(60)) {
                Waited::Event(event) => return Some(event),
                Waited::Over => return None,
                Waited::NotYet => {}
            }
        }
    }

    /// Waits up to `limit` for the next event.
    pub fn wait(&mut self, limit: Duration) -> Waited {
        if self.ended {
            return Waited::Over;
        }
        let until = self.give_up.min(Instant::now() + limit);
        let event = match self.inbox.receive(until) {
            Received::Event(at, event) => {
                self.arrived_at = at;
                event
            }
            Received::Timeout if until < self.give_up => return Waited::NotYet,
            Received::Timeout => {
                self.cancel();
                failed("backend_timeout", "the agent did not end the job by its deadline")
            }
            Received::Disconnected => failed("internal", "the connection to the agent was lost"),
        };
        self.ended |= !matches!(event, JobEvent::Chunk(_));
        Waited::Event(event)
    }

    /// When the event that was given last came from the agent, however long it waited here to be asked for.
    pub fn arrived_at(&self) -> Instant {
        self.arrived_at
    }

    /// Tells the agent to stop. No event follows.
    pub fn cancel(&mut self) {
        self.ended = true;
        if self.shared.lock().take(self.job_id).is_none() {
            return; // the end was on its way already, or the agent is gone
        }
        if let Err(error) = self.sender.send(&cancel_frame(self.job_id)) {
            crate::debug!("the cancel of job {} did not go out: {error}", self.job_id);
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.ended {
            self.cancel();
        }
    }
}

pub(super) fn cancel_frame(job_id: Uuid) -> String {
    format!("{{\"type\":\"job_cancel\",\"job_id\":\"{job_id}\"}}")
}

fn failed(code: &str, message: &str) -> JobEvent {
    JobEvent::Failed { code: code.to_owned(), message: message.to_owned() }
}

/// The taker of a job has let too much pile up.
pub(super) struct TooSlow;

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for one more connection of an agent.
    pub(super) fn connect(&self) -> u64 {
        let mut state = self.lock();
        state.connections += 1;
        state.connections
    }

    /// How long ago an agent was expected at that moment.
    pub(super) fn expected_for(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.lock().expected_at)
    }

    /// Makes the connection the current one.
    pub(super) fn enter(&self, connection: u64, sender: Sender) {
        let replaced = {
            let mut state = self.lock();
            state.offer = None;
            state.last_seen = "it is authenticated, but sent no capabilities".to_owned();
            state.agent.replace(Agent { connection, sender })
        };
        if let Some(replaced) = replaced {
            replaced.sender.close();
        }
    }

    pub(super) fn offered(&self, connection: u64, mut offer: Offer) {
        let mut state = self.lock();
        if state.agent.as_ref().is_some_and(|agent| agent.connection == connection) {
            if let Some(earlier) = &state.offer {
                offer.stages = earlier.stages; // an offer made anew does not change how long the first one took
            }
            state.offer = Some(offer);
            self.changed.notify_all();
        }
    }

    /// The connection is over: its jobs are lost, and it offers nothing any more.
    pub(super) fn leave(&self, connection: u64, end: &str) {
        let mut state = self.lock();
        state.jobs.retain(|waiting| waiting.connection != connection);
        end.clone_into(&mut state.last_seen);
        if state.agent.as_ref().is_some_and(|agent| agent.connection == connection) {
            state.agent = None;
            state.offer = None;
        }
        self.changed.notify_all();
    }

    pub(super) fn deliver_chunk(&self, job_id: Uuid, bytes: Vec<u8>) -> Result<(), TooSlow> {
        let mut state = self.lock();
        let Some(waiting) = state.jobs.iter().find(|waiting| waiting.job_id == job_id) else {
            crate::debug!("a chunk of the unknown job {job_id}");
            return Ok(());
        };
        if waiting.events.send(JobEvent::Chunk(bytes)) {
            return Ok(());
        }
        waiting.events.send(failed("internal", "the client reads too slowly"));
        drop(state.take(job_id));
        Err(TooSlow)
    }

    pub(super) fn deliver_end(&self, job_id: Uuid, end: JobEvent) {
        match self.lock().take(job_id) {
            Some(waiting) => {
                waiting.events.send(end);
            }
            None => crate::debug!("the end of the unknown job {job_id}"),
        }
    }
}
