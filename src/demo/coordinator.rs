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
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thiserror::Error;
use uuid::Uuid;

use super::agent_protocol::cancel_frame;
use super::agent_sessions::{Offer, Sessions};
use super::job_events::{self, Inbox, JobEvent, Received};
use super::pairing::Pairings;
use super::session;
use super::websocket::Sender;
use crate::http_server::connection::Exchange;
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
    sessions: Arc<Sessions>,
    server: HttpServer,
}

impl Coordinator {
    /// Listens on a free loopback port.
    pub fn start() -> Result<Self, CoordinatorError> {
        Ok(Self::serve(http_server::bind(0)?)?)
    }

    /// Serves agents and the pairing on a socket of one's own.
    pub fn serve(listener: TcpListener) -> io::Result<Self> {
        let sessions = Arc::new(Sessions::default());
        let (of_handler, pairings) = (sessions.clone(), Pairings::default());
        let handle = move |exchange: &mut Exchange<'_>| match exchange.upgrade() {
            Some((key, input)) => session::run(&key, input, &of_handler),
            None => pairings.handle(exchange),
        };
        let server = HttpServer::start(listener, "demo-coordinator", Arc::new(handle))?;
        Ok(Self { sessions, server })
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
        self.sessions.last_seen()
    }

    /// An agent is started now: the connect stage counts from here.
    pub fn expect_agent(&self) {
        self.sessions.expect_agent();
    }

    /// What the current agent offers, if there is one.
    pub fn offer(&self) -> Option<Offer> {
        self.sessions.offer()
    }

    /// Waits until an agent has made an offer that is `wanted`.
    pub fn wait_for_offer(&self, limit: Duration, wanted: fn(&Offer) -> bool) -> Result<Offer, CoordinatorError> {
        self.sessions.wait_for_offer(limit, wanted).map_err(|last_seen| CoordinatorError::NoOffer(limit, last_seen))
    }

    /// Sends a job to the current agent.
    pub fn submit(&self, order: JobOrder) -> Result<Job, CoordinatorError> {
        let JobOrder { job_id, model_id, request, format, deadline } = order;
        let (events, inbox) = job_events::channel();
        let sender = self.sessions.add_job(job_id, events).ok_or(CoordinatorError::NoAgent)?;
        let frame = json!({
            "type": "job",
            "job_id": job_id.to_string(),
            "model_id": model_id,
            "request": request,
            "format": format.as_str(),
            "deadline_ms": u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
        });
        let give_up = Instant::now() + deadline + DEADLINE_GRACE;
        let job = Job {
            job_id,
            inbox,
            give_up,
            arrived_at: Instant::now(),
            ended: false,
            sender,
            sessions: self.sessions.clone(),
        };
        job.sender.send(&frame.to_string()).map_err(CoordinatorError::Send)?;
        Ok(job)
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.sessions.close();
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
    sessions: Arc<Sessions>,
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
                JobEvent::failed("backend_timeout", "the agent did not end the job by its deadline")
            }
            Received::Disconnected => JobEvent::failed("internal", "the connection to the agent was lost"),
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
        if !self.sessions.remove_job(self.job_id) {
            return; // the end was on its way already, or the agent is gone
        }
        if let Err(error) = self.sender.send(&cancel_frame(self.job_id)) {
            log::debug!("the cancel of job {} did not go out: {error}", self.job_id);
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
