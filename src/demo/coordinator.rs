//! A local coordinator: implements the market's coordinator for one agent on loopback.
//!
//! Each connection has a thread, which handles pairing requests or runs an agent's session (see `session`). A job is sent from the
//! thread that submits it, which receives the job's events from a queue. One agent is current: a newer one replaces it, and the jobs
//! of the older one fail.
//!
//! Invariants: a job's events are its chunks in order, then exactly one end. Dropping a [`Job`] before its end cancels it. The queue
//! of a job is bounded.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use serde::Serialize;
use serde_json::value::RawValue;
use thiserror::Error;
use uuid::Uuid;

use super::agent_protocol::cancel_frame;
use super::agent_sessions::{Offer, Sessions};
use super::job_events::{self, JobEvent, Receiver};
use super::pairing::Pairings;
use super::session;
use super::websocket::Sender;
use crate::http_server::connection::Exchange;
use crate::http_server::{self, HttpServer};

/// The path to which agents connect.
const AGENT_PATH: &str = "/provider/connect";

/// Time after its deadline at which a job without an end fails.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// The API of a job's request, as in the `format` of the job frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `/v1/chat/completions`
    Openai,
    /// `/v1/messages`
    Anthropic,
}

/// A job to submit.
pub struct JobOrder {
    /// The job's id.
    pub job_id: Uuid,
    /// The requested model.
    pub model_id: String,
    /// The request body, which is sent byte for byte.
    pub request: Box<RawValue>,
    /// The API of the request.
    pub format: Format,
    /// Time limit of the whole job.
    pub deadline: Duration,
}

impl JobOrder {
    /// The frame that sends the job to an agent.
    fn frame(&self) -> String {
        #[derive(Serialize)]
        #[serde(tag = "type", rename = "job")]
        struct Frame<'a> {
            job_id: String,
            model_id: &'a str,
            request: &'a RawValue,
            format: Format,
            deadline_ms: u64,
        }
        let frame = Frame {
            job_id: self.job_id.to_string(),
            model_id: &self.model_id,
            request: &self.request,
            format: self.format,
            deadline_ms: u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX),
        };
        // Strings, numbers and JSON can always be serialized.
        serde_json::to_string(&frame).unwrap_or_default()
    }
}

/// Why a call to the coordinator failed.
#[derive(Debug, Error)]
pub enum CoordinatorError {
    /// The socket or a thread could not be created.
    #[error("failed to start the local coordinator: {0}")]
    Start(#[from] io::Error),
    /// The agent made no offer in time. The text is the last thing seen of the agent.
    #[error("no agent has made an offer within {limit} s ({1})", limit = .0.as_secs())]
    NoOffer(Duration, String),
    /// A job was submitted without an agent.
    #[error("no agent is connected; wait for it to reconnect, or restart it")]
    NoAgent,
    /// The connection to the agent broke while the job was sent.
    #[error("failed to send to the agent: {0}")]
    Send(io::Error),
}

/// A running coordinator. Dropping it closes its connections and joins its threads.
pub struct Coordinator {
    sessions: Arc<Sessions>,
    server: HttpServer,
}

impl Coordinator {
    /// Starts a coordinator on a free loopback port.
    pub fn start() -> Result<Self, CoordinatorError> {
        Ok(Self::serve(http_server::bind(0)?)?)
    }

    /// Serves agents and pairing requests on this socket.
    pub fn serve(listener: TcpListener) -> io::Result<Self> {
        let sessions = Arc::new(Sessions::default());
        let (handler_sessions, pairings) = (sessions.clone(), Pairings::default());
        // Any other path is a mistake in the agent's configuration, which must not go unnoticed here.
        let handle = move |exchange: &mut Exchange<'_>| {
            let is_agents = exchange.path() == AGENT_PATH;
            match if is_agents { exchange.upgrade() } else { None } {
                Some((key, input)) => session::run(&key, input, &handler_sessions),
                None => pairings.handle(exchange),
            }
        };
        let server = HttpServer::start(listener, "demo-coordinator", Arc::new(handle))?;
        Ok(Self { sessions, server })
    }

    /// The base URL for pairing.
    pub fn base(&self) -> String {
        format!("http://{}", self.server.address)
    }

    /// The URL for agents.
    pub fn url(&self) -> String {
        format!("ws://{}{AGENT_PATH}", self.server.address)
    }

    /// The last thing seen of an agent, for people.
    pub fn last_seen(&self) -> String {
        self.sessions.last_seen()
    }

    /// Starts the clock of the connect stage, just before an agent starts.
    pub fn expect_agent(&self) {
        self.sessions.expect_agent();
    }

    /// The offer of the current agent.
    pub fn offer(&self) -> Option<Offer> {
        self.sessions.offer()
    }

    /// Waits for an offer that is `wanted`.
    pub fn wait_for_offer(&self, limit: Duration, wanted: fn(&Offer) -> bool) -> Result<Offer, CoordinatorError> {
        self.sessions.wait_for_offer(limit, wanted).map_err(|last_seen| CoordinatorError::NoOffer(limit, last_seen))
    }

    /// Sends a job to the current agent.
    pub fn submit(&self, order: JobOrder) -> Result<Job, CoordinatorError> {
        let JobOrder { job_id, deadline, .. } = order;
        let (sender, events) = job_events::channel();
        let sender = self.sessions.add_job(job_id, sender).ok_or(CoordinatorError::NoAgent)?;
        let expires_at = Instant::now() + deadline + DEADLINE_GRACE;
        let job = Job {
            job_id,
            events,
            expires_at,
            arrived_at: Instant::now(),
            ended: false,
            sender,
            sessions: self.sessions.clone(),
        };
        job.sender.send(&order.frame()).map_err(CoordinatorError::Send)?;
        Ok(job)
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.sessions.close();
    }
}

/// A job in flight. Dropping it before its end cancels it.
pub struct Job {
    job_id: Uuid,
    events: Receiver,
    expires_at: Instant,
    arrived_at: Instant,
    ended: bool,
    sender: Sender,
    sessions: Arc<Sessions>,
}

impl Job {
    /// Waits up to `limit` for the next event; `None` without one, and after the end.
    pub fn wait(&mut self, limit: Duration) -> Option<JobEvent> {
        if self.ended {
            return None;
        }
        let until = self.expires_at.min(Instant::now() + limit);
        let event = match self.events.receive(until) {
            Ok((at, event)) => {
                self.arrived_at = at;
                event
            }
            Err(RecvTimeoutError::Timeout) if until < self.expires_at => return None,
            Err(RecvTimeoutError::Timeout) => {
                self.cancel();
                JobEvent::failed("backend_timeout", "the agent did not end the job by its deadline")
            }
            Err(RecvTimeoutError::Disconnected) => JobEvent::failed("internal", "the connection to the agent was lost"),
        };
        self.ended |= event.is_end();
        Some(event)
    }

    /// Whether the end was returned, or the job was cancelled.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// When the last returned event arrived from the agent.
    pub fn arrived_at(&self) -> Instant {
        self.arrived_at
    }

    /// Cancels the job. No event follows.
    pub fn cancel(&mut self) {
        self.ended = true;
        if !self.sessions.remove_job(self.job_id) {
            return; // the job has ended, or the agent has disconnected
        }
        if let Err(error) = self.sender.send(&cancel_frame(self.job_id)) {
            crate::debug!("failed to send the cancel of job {}: {error}", self.job_id);
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
