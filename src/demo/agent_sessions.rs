//! The state that the coordinator's connections share: the current agent, its offer, and its jobs in flight.
//!
//! Invariant: the lock is not held across I/O.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::agent_protocol::OfferedModel;
use super::job_events::{self, JobEvent};
use super::websocket::Sender;

/// Durations of the stages up to the first offer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stages {
    /// From [`expect_agent`](super::coordinator::Coordinator::expect_agent) to the connection.
    pub connect: Duration,
    /// From the connection to the verified signature.
    pub auth: Duration,
    /// From `auth_ok` to `capabilities`.
    pub discovery: Duration,
}

/// The offer of the current agent.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    /// The models, in the order of the agent.
    pub models: Vec<OfferedModel>,
    /// The stages up to the first offer.
    pub stages: Stages,
    /// The agent's version.
    pub agent_version: String,
    /// The agent's provider id.
    pub provider_id: String,
}

/// The agents' sessions. One agent is current: the one that authenticated last.
pub(super) struct Sessions {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    expected_at: Instant,
    connections: u64,
    agent: Option<Agent>,
    offer: Option<Offer>,
    last_seen: String,
    jobs: Vec<JobEntry>,
}

struct Agent {
    connection: u64,
    sender: Sender,
}

struct JobEntry {
    job_id: Uuid,
    connection: u64,
    events: job_events::Sender,
}

impl State {
    /// Removes a job. The list is never longer than the agent's `max_concurrent`.
    fn take(&mut self, job_id: Uuid) -> Option<JobEntry> {
        let index = self.jobs.iter().position(|job| job.job_id == job_id)?;
        Some(self.jobs.swap_remove(index))
    }
}

/// A job's receiver has let too many bytes pile up.
pub(super) struct TooSlow;

impl Default for Sessions {
    fn default() -> Self {
        let state = State {
            expected_at: Instant::now(),
            connections: 0,
            agent: None,
            offer: None,
            last_seen: "it did not connect".to_owned(),
            jobs: Vec::new(),
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last thing seen of an agent, for people.
    pub(super) fn last_seen(&self) -> String {
        self.lock().last_seen.clone()
    }

    /// Starts the clock of the connect stage.
    pub(super) fn expect_agent(&self) {
        self.lock().expected_at = Instant::now();
    }

    /// Time from [`Sessions::expect_agent`] to `at`.
    pub(super) fn expected_for(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.lock().expected_at)
    }

    /// The current agent's offer.
    pub(super) fn offer(&self) -> Option<Offer> {
        self.lock().offer.clone()
    }

    /// Waits for an offer that is `wanted`; fails with the last thing seen of an agent.
    pub(super) fn wait_for_offer(&self, limit: Duration, wanted: fn(&Offer) -> bool) -> Result<Offer, String> {
        let is_missing = |state: &mut State| !state.offer.as_ref().is_some_and(wanted);
        let waited = self.changed.wait_timeout_while(self.lock(), limit, is_missing);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.offer.clone().filter(wanted).ok_or_else(|| state.last_seen.clone())
    }

    /// Numbers a new connection.
    pub(super) fn connect(&self) -> u64 {
        let mut state = self.lock();
        state.connections += 1;
        state.connections
    }

    /// Makes the connection the current one, and closes the one before.
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

    /// Takes the offer of the current connection.
    pub(super) fn offered(&self, connection: u64, mut offer: Offer) {
        let mut state = self.lock();
        if state.agent.as_ref().is_some_and(|agent| agent.connection == connection) {
            if let Some(earlier) = &state.offer {
                offer.stages = earlier.stages; // the stages are those of the first offer
            }
            state.offer = Some(offer);
            self.changed.notify_all();
        }
    }

    /// Ends a connection: its jobs are lost, its offer is withdrawn.
    pub(super) fn leave(&self, connection: u64, end: &str) {
        let mut state = self.lock();
        state.jobs.retain(|job| job.connection != connection);
        end.clone_into(&mut state.last_seen);
        if state.agent.as_ref().is_some_and(|agent| agent.connection == connection) {
            state.agent = None;
            state.offer = None;
        }
        self.changed.notify_all();
    }

    /// Closes the current agent's connection.
    pub(super) fn close(&self) {
        let agent = self.lock().agent.take();
        if let Some(agent) = agent {
            agent.sender.close();
        }
    }

    /// Registers a job with the current agent, and returns the way to it; `None` without an agent.
    pub(super) fn add_job(&self, job_id: Uuid, events: job_events::Sender) -> Option<Sender> {
        let mut state = self.lock();
        let agent = state.agent.as_ref()?;
        let (connection, sender) = (agent.connection, agent.sender.clone());
        state.jobs.push(JobEntry { job_id, connection, events });
        Some(sender)
    }

    /// Removes a job; `false` if it has ended.
    pub(super) fn remove_job(&self, job_id: Uuid) -> bool {
        self.lock().take(job_id).is_some()
    }

    /// Passes a chunk on to its job; a job whose receiver is too slow fails.
    pub(super) fn deliver_chunk(&self, job_id: Uuid, bytes: Vec<u8>) -> Result<(), TooSlow> {
        let mut state = self.lock();
        let Some(job) = state.jobs.iter().find(|job| job.job_id == job_id) else {
            crate::debug!("a chunk of the unknown job {job_id}");
            return Ok(());
        };
        if job.events.send(JobEvent::Chunk(bytes)) {
            return Ok(());
        }
        job.events.send(JobEvent::failed("internal", "the client reads too slowly"));
        drop(state.take(job_id));
        Err(TooSlow)
    }

    /// Ends a job.
    pub(super) fn deliver_end(&self, job_id: Uuid, end: JobEvent) {
        match self.lock().take(job_id) {
            Some(job) => {
                job.events.send(end);
            }
            None => crate::debug!("the end of the unknown job {job_id}"),
        }
    }
}
