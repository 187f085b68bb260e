//! The state that the coordinator's connections share: the current agent, its offer, and its jobs in flight.
//!
//! Invariant: the lock is not held across I/O.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
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
    last_seen: String,
}

struct Agent {
    connection: u64,
    sender: Sender,
    offer: Option<Offer>,
    jobs: HashMap<Uuid, job_events::Sender>,
}

impl State {
    fn agent(&mut self, connection: u64) -> Option<&mut Agent> {
        self.agent.as_mut().filter(|agent| agent.connection == connection)
    }

    fn offer(&self) -> Option<&Offer> {
        self.agent.as_ref()?.offer.as_ref()
    }
}

impl Default for Sessions {
    fn default() -> Self {
        let state = State {
            expected_at: Instant::now(),
            connections: 0,
            agent: None,
            last_seen: "it did not connect".to_owned(),
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
        self.lock().offer().cloned()
    }

    /// Waits for an offer that is `wanted`; fails with the last thing seen of an agent.
    pub(super) fn wait_for_offer(&self, limit: Duration, wanted: fn(&Offer) -> bool) -> Result<Offer, String> {
        let is_missing = |state: &mut State| !state.offer().is_some_and(wanted);
        let waited = self.changed.wait_timeout_while(self.lock(), limit, is_missing);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.offer().filter(|offer| wanted(offer)).cloned().ok_or_else(|| state.last_seen.clone())
    }

    /// Numbers a new connection.
    pub(super) fn connect(&self) -> u64 {
        let mut state = self.lock();
        state.connections += 1;
        state.connections
    }

    /// Makes the connection the current one, and closes the previous one, whose jobs are lost.
    pub(super) fn enter(&self, connection: u64, sender: Sender) {
        let replaced = {
            let mut state = self.lock();
            "it is authenticated, but sent no capabilities".clone_into(&mut state.last_seen);
            state.agent.replace(Agent { connection, sender, offer: None, jobs: HashMap::new() })
        };
        if let Some(replaced) = replaced {
            replaced.sender.close();
        }
    }

    /// Stores the offer of the current connection.
    pub(super) fn offered(&self, connection: u64, mut offer: Offer) {
        if let Some(agent) = self.lock().agent(connection) {
            if let Some(earlier) = &agent.offer {
                offer.stages = earlier.stages; // the stages are those of the first offer
            }
            agent.offer = Some(offer);
            self.changed.notify_all();
        }
    }

    /// Ends a connection: its jobs are lost, and its offer is withdrawn. The end of another connection than that of the current agent
    /// says nothing about the agent.
    pub(super) fn leave(&self, connection: u64, end: &str) {
        let mut state = self.lock();
        if state.agent.as_ref().is_none_or(|agent| agent.connection == connection) {
            end.clone_into(&mut state.last_seen);
        }
        state.agent.take_if(|agent| agent.connection == connection);
        self.changed.notify_all();
    }

    /// Closes the current agent's connection.
    pub(super) fn close(&self) {
        let agent = self.lock().agent.take();
        if let Some(agent) = agent {
            agent.sender.close();
        }
    }

    /// Registers a job with the current agent, and returns the agent's sender; `None` without an agent.
    pub(super) fn add_job(&self, job_id: Uuid, events: job_events::Sender) -> Option<Sender> {
        let mut state = self.lock();
        let agent = state.agent.as_mut()?;
        agent.jobs.insert(job_id, events);
        Some(agent.sender.clone())
    }

    /// Removes a job; `false` if it has ended.
    pub(super) fn remove_job(&self, job_id: Uuid) -> bool {
        self.lock().agent.as_mut().is_some_and(|agent| agent.jobs.remove(&job_id).is_some())
    }

    /// Passes an event on to its job. `false` if the job's receiver reads too slowly: the job has failed, and the agent has to
    /// cancel it.
    pub(super) fn deliver(&self, connection: u64, job_id: Uuid, event: JobEvent) -> bool {
        let mut state = self.lock();
        let Some(Entry::Occupied(job)) = state.agent(connection).map(|agent| agent.jobs.entry(job_id)) else {
            crate::debug!("an event of an unknown job {job_id}");
            return true;
        };
        let is_end = event.is_end();
        let accepted = job.get().send(event);
        if !accepted {
            job.get().send(JobEvent::failed("internal", "the client reads too slowly"));
        }
        if is_end || !accepted {
            job.remove();
        }
        accepted
    }
}
