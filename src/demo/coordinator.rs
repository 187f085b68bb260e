//! A coordinator for one machine: what the market's coordinator does with an agent, on loopback.
//!
//! Who runs here: `demo-accept` takes connections; each connection has a `demo-agent-N` thread that authenticates the
//! agent, then reads its frames. Whoever submits a job sends it on its own thread, and receives the job's events through
//! a channel. One agent is current: a newer one replaces it, and the jobs of the older one are lost.
//!
//! Invariants: no lock of the state is held across I/O. A job's events are its chunks in order, then exactly one end. A
//! [`Job`] that is dropped before its end cancels. The buffered bytes of a job are bounded by its inbox.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thiserror::Error;
use uuid::Uuid;

use super::inbox::{self, Inbox, Received};
use super::link::{self, Frame, HandshakeError, JobEnd, OfferedModel};
use super::websocket::{self, Reader, Sender};
use crate::threads::spawn;

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
}

/// Why the coordinator cannot do what was asked.
#[derive(Debug, Error)]
pub enum CoordinatorError {
    /// The listening socket or a thread could not be made.
    #[error("failed to start the local coordinator: {0}")]
    Start(#[from] io::Error),
    /// The agent did not get to its offer in time; the second part is the last thing seen.
    #[error("no agent has made an offer within {0:?} ({1})")]
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
    address: SocketAddr,
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stopping: AtomicBool,
}

struct State {
    expected_at: Instant,
    connections: u64,
    agent: Option<Agent>,
    offer: Option<Offer>,
    last_seen: String,
    jobs: Vec<Waiting>,
    threads: Vec<JoinHandle<()>>,
}

struct Agent {
    connection: u64,
    sender: Sender,
}

struct Waiting {
    job_id: Uuid,
    connection: u64,
    events: inbox::Sender,
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
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let state = State {
            expected_at: Instant::now(),
            connections: 0,
            agent: None,
            offer: None,
            last_seen: "it did not connect".to_owned(),
            jobs: Vec::new(),
            threads: Vec::new(),
        };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), stopping: AtomicBool::new(false) });
        let of_thread = shared.clone();
        let accept = move || accept_agents(&listener, &of_thread);
        let accept = spawn("demo-accept", accept)?;
        Ok(Self { address, shared, accept: Some(accept) })
    }

    /// Where agents connect to.
    pub fn url(&self) -> String {
        format!("ws://{}/provider/connect", self.address)
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
        let (events, inbox) = inbox::channel();
        let sender = {
            let mut state = self.shared.lock();
            let agent = state.agent.as_ref().ok_or(CoordinatorError::NoAgent)?;
            let (connection, sender) = (agent.connection, agent.sender.clone());
            state.jobs.push(Waiting { job_id, connection, events });
            sender
        };
        let frame = json!({
            "type": "job", "job_id": job_id.to_string(), "model_id": model_id, "request": request,
            "format": format.as_str(), "deadline_ms": u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
        });
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
        job.sender.send(&frame.to_string()).map_err(CoordinatorError::Send)?;
        Ok(job)
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let agent = self.shared.lock().agent.take();
        if let Some(agent) = agent {
            agent.sender.close();
        }
        let _ = TcpStream::connect(self.address); // wakes the accept thread
        let threads = std::mem::take(&mut self.shared.lock().threads);
        for thread in self.accept.take().into_iter().chain(threads) {
            if thread.join().is_err() {
                log::warn!("a thread of the local coordinator panicked");
            }
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

fn cancel_frame(job_id: Uuid) -> String {
    format!("{{\"type\":\"job_cancel\",\"job_id\":\"{job_id}\"}}")
}

fn failed(code: &str, message: &str) -> JobEvent {
    JobEvent::Failed { code: code.to_owned(), message: message.to_owned() }
}

fn accept_agents(listener: &TcpListener, shared: &Arc<Shared>) {
    for tcp in listener.incoming() {
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        let tcp = match tcp {
            Ok(tcp) => tcp,
            Err(error) => {
                log::warn!("failed to accept an agent: {error}");
                std::thread::sleep(Duration::from_millis(100)); // out of descriptors: do not spin
                continue;
            }
        };
        let connection = {
            let mut state = shared.lock();
            state.connections += 1;
            state.threads.retain(|thread| !thread.is_finished());
            state.connections
        };
        let of_thread = shared.clone();
        let serve = move || serve_agent(tcp, connection, &of_thread);
        match spawn(format!("demo-agent-{connection}"), serve) {
            Ok(thread) => shared.lock().threads.push(thread),
            Err(error) => log::warn!("failed to start a thread for an agent: {error}"),
        }
    }
}

fn serve_agent(tcp: TcpStream, connection: u64, shared: &Shared) {
    let end = talk(tcp, connection, shared);
    shared.leave(connection, &end);
    log::info!("agent connection {connection} ended: {end}");
}

/// Runs one connection to its end, and says how it ended.
fn talk(tcp: TcpStream, connection: u64, shared: &Shared) -> String {
    let connected_at = Instant::now();
    let authenticated = open(tcp).and_then(|(mut reader, sender)| {
        let verified = link::authenticate(&mut reader, &sender)?;
        Ok((reader, sender, verified))
    });
    let (mut reader, sender, verified) = match authenticated {
        Ok(authenticated) => authenticated,
        Err(error) => return error.to_string(),
    };
    let authenticated_at = Instant::now();
    log::info!("agent connection {connection} is {} ({})", verified.provider_id, verified.agent_version);
    if !shared.enter(connection, sender.clone()) {
        sender.close();
        return "the coordinator is stopping".to_owned();
    }
    let connect = connected_at.saturating_duration_since(shared.lock().expected_at);
    let auth = authenticated_at - connected_at;
    let offer = |models| {
        let stages = Stages { connect, auth, discovery: authenticated_at.elapsed() };
        Offer { models, stages, agent_version: verified.agent_version.clone() }
    };
    read_frames(&mut reader, connection, shared, &sender, offer)
}

fn open(tcp: TcpStream) -> Result<(Reader, Sender), HandshakeError> {
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(link::HANDSHAKE_STEP_TIMEOUT))?;
    Ok(websocket::accept(tcp)?)
}

fn read_frames(
    reader: &mut Reader,
    connection: u64,
    shared: &Shared,
    sender: &Sender,
    offer: impl Fn(Vec<OfferedModel>) -> Offer,
) -> String {
    loop {
        let text = match reader.next_text() {
            Ok(Some(text)) => text,
            Ok(None) => return "the agent closed the connection".to_owned(),
            Err(error) => return format!("the connection broke: {error}"),
        };
        match link::parse_frame(&text) {
            Ok(Frame::Capabilities(models)) => shared.offered(connection, offer(models)),
            Ok(Frame::Chunk { job_id, bytes }) => {
                if shared.deliver_chunk(job_id, bytes).is_err() {
                    let _ = sender.send(&cancel_frame(job_id));
                }
            }
            Ok(Frame::Done { job_id, end }) => shared.deliver_end(job_id, JobEvent::Done(end)),
            Ok(Frame::Error { job_id, code, message }) => {
                shared.deliver_end(job_id, JobEvent::Failed { code, message });
            }
            Ok(Frame::Heartbeat) => crate::debug!("heartbeat of the agent"),
            Ok(Frame::Other(kind)) => crate::debug!("unknown frame `{kind}` of the agent"),
            Err(error) => log::warn!("the agent sent a bad frame: {error}"),
        }
    }
}

/// The taker of a job has let too much pile up.
struct TooSlow;

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the connection the current one; `false` when the coordinator is stopping.
    fn enter(&self, connection: u64, sender: Sender) -> bool {
        let replaced = {
            let mut state = self.lock();
            if self.stopping.load(Ordering::SeqCst) {
                return false;
            }
            state.offer = None;
            state.last_seen = "it is authenticated, but sent no capabilities".to_owned();
            state.agent.replace(Agent { connection, sender })
        };
        if let Some(replaced) = replaced {
            replaced.sender.close();
        }
        true
    }

    fn offered(&self, connection: u64, mut offer: Offer) {
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
    fn leave(&self, connection: u64, end: &str) {
        let mut state = self.lock();
        state.jobs.retain(|waiting| waiting.connection != connection);
        end.clone_into(&mut state.last_seen);
        if state.agent.as_ref().is_some_and(|agent| agent.connection == connection) {
            state.agent = None;
            state.offer = None;
        }
        self.changed.notify_all();
    }

    fn deliver_chunk(&self, job_id: Uuid, bytes: Vec<u8>) -> Result<(), TooSlow> {
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

    fn deliver_end(&self, job_id: Uuid, end: JobEvent) {
        match self.lock().take(job_id) {
            Some(waiting) => {
                waiting.events.send(end);
            }
            None => crate::debug!("the end of the unknown job {job_id}"),
        }
    }
}
