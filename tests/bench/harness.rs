//! What every workload needs: one backend, two coordinators, and a subject that runs between them.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::ServerConfig;

use crate::Result;
use crate::agent_client::AgentClient;
use crate::backend::{Backend, BackendEvent};
use crate::child::{ChildProcess, clean_up_on_signal};
use crate::client::{Client, ClientEvent};
use crate::direct::DirectClient;
use crate::job::{Job, Script};
use crate::process::{Memory, Threads};
use crate::received::Totals;
use crate::subject::Subject;
use crate::support::{Authority, Coordinator, Flaw, Setup};

/// For what takes milliseconds on a healthy machine.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// For the end of the streams: the kernel buffers megabytes of each flood, which a slow subject has yet to relay.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Streams that are started at once: below the backlog of the backend's listener, which is 128.
const BATCH: usize = 32;

/// What all runs share.
pub struct Harness {
    backend: Backend,
    plain: Coordinator,
    wss: Coordinator,
    tls: Arc<ServerConfig>,
    /// A folder, and the `agent.toml` of an agent. Each keeps its identity between runs.
    setups: BTreeMap<Subject, Setup>,
    agent: PathBuf,
    peer: Option<PathBuf>,
    next_job_id: Cell<u64>,
}

impl Harness {
    pub fn new(agent: PathBuf, peer: Option<PathBuf>) -> Result<Self> {
        let (backend, plain, wss) = (Backend::new()?, Coordinator::new(), Coordinator::new());
        let authority = Authority::new();
        let setup = |subject| {
            let setup = if subject == Subject::Wss {
                let setup = Setup::new(&wss.url().replacen("ws:", "wss:", 1));
                let ca_file = authority.write(&setup.scratch);
                setup.coordinator(&format!("ca_file = {ca_file:?}"))
            } else {
                Setup::new(&plain.url())
            };
            (subject, setup.backend(backend.toml()).limits("max_concurrent = 256"))
        };
        let setups = BTreeMap::from(Subject::ALL.map(setup));
        clean_up_on_signal(setups.values().map(|setup| setup.scratch.path().to_owned()).collect())?;
        let tls = authority.server_config(Flaw::None);
        Ok(Self { backend, plain, wss, tls, setups, agent, peer, next_job_id: Cell::new(1) })
    }

    /// A folder for the subject's files.
    pub fn folder(&self, subject: Subject) -> &Path {
        self.setups[&subject].scratch.path()
    }

    /// The program that a subject runs. The bench itself is the floor and the direct client.
    pub fn program(&self, subject: Subject) -> Result<PathBuf> {
        match subject {
            Subject::Ours | Subject::Wss => Ok(self.agent.clone()),
            Subject::Peer => Ok(self.peer.clone().ok_or("no peer was named")?),
            Subject::Floor | Subject::Direct => Ok(std::env::current_exe()?),
        }
    }

    fn arguments(&self, subject: Subject) -> Vec<String> {
        let (coordinator_port, backend_port) =
            (self.plain.address().port().to_string(), self.backend.port().to_string());
        match subject {
            Subject::Floor => vec!["floor".into(), coordinator_port, backend_port],
            Subject::Direct => vec!["direct".into(), backend_port],
            Subject::Ours | Subject::Peer | Subject::Wss => {
                let config = self.setups[&subject].write().display().to_string();
                ["--config", &config, "--allow-insecure", "--log-level", "warn", "run"].map(str::to_owned).to_vec()
            }
        }
    }

    /// Starts a subject and waits until it is ready for jobs.
    pub fn start(&self, subject: Subject) -> Result<Run<'_>> {
        self.backend.end_streams(false);
        let coordinator = if subject == Subject::Wss { &self.wss } else { &self.plain };
        // Connections of agents that have ended.
        while coordinator.try_dialled(Duration::ZERO).is_some() {}
        let is_direct = subject == Subject::Direct;
        let process =
            ChildProcess::start(&self.program(subject)?, &self.arguments(subject), self.folder(subject), is_direct)?;
        if is_direct {
            let (input, output) = process.take_pipes().ok_or("it has no pipes")?;
            let client = Box::new(DirectClient::new(input, output)?);
            return Ok(Run { harness: self, process, client, start_ms: 0.0, version: String::new() });
        }
        let tls = (subject == Subject::Wss).then_some(&self.tls);
        let client = AgentClient::accept(coordinator, tls).map_err(|error| format!("{error}; {}", process.state()))?;
        let start_ms = (client.ready_ns - process.spawned_ns) as f64 / 1e6;
        let version = client.version.clone();
        Ok(Run { harness: self, process, client: Box::new(client), start_ms, version })
    }
}

/// A subject at work. The process ends before its client does, so that it has no occasion to reconnect.
pub struct Run<'a> {
    harness: &'a Harness,
    pub process: ChildProcess,
    pub client: Box<dyn Client>,
    /// From the start of the process to its `capabilities`.
    pub start_ms: f64,
    /// As the agent states it.
    pub version: String,
}

/// The state at one end of a window, or the difference between both.
#[derive(Clone, Copy)]
pub struct Sample {
    pub cpu_ns: u64,
    pub events: u64,
    pub bytes: u64,
}

impl Run<'_> {
    /// Submits a job; its id, and when it was sent.
    pub fn submit(&mut self, script: Script) -> Result<(u64, u64)> {
        let id = self.harness.next_job_id.get();
        self.harness.next_job_id.set(id + 1);
        Ok((id, self.client.submit(Job { id, script })?))
    }

    /// Starts streams, in batches, and waits for the first bytes of each.
    pub fn start_streams(&mut self, scripts: impl IntoIterator<Item = Script>) -> Result<()> {
        let scripts: Vec<_> = scripts.into_iter().collect();
        for batch in scripts.chunks(BATCH) {
            for script in batch {
                self.submit(*script)?;
            }
            self.wait_first(batch.len())?;
        }
        Ok(())
    }

    /// Waits for the first bytes of this many streams.
    pub fn wait_first(&mut self, streams: usize) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        let mut missing = streams;
        while missing > 0 {
            let event = self.next_event(deadline)?.ok_or_else(|| format!("{missing} streams did not start"))?;
            missing -= usize::from(matches!(event, ClientEvent::First { .. }));
        }
        Ok(())
    }

    /// Waits for an event of the backend that `pick` accepts; `None` after `timeout`.
    pub fn wait_backend<T>(&self, timeout: Duration, pick: impl Fn(BackendEvent) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(found) = pick(self.harness.backend.events().recv_timeout(left).ok()?) {
                return Some(found);
            }
        }
    }

    /// The next event of the client; `None` at the deadline.
    pub fn next_event(&mut self, deadline: Instant) -> Result<Option<ClientEvent>> {
        match self.client.events().recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(ClientEvent::Failed(reason)) => Err(reason.into()),
            Ok(ClientEvent::Closed) => Err("it closed the connection".into()),
            Ok(event) => Ok(Some(event)),
            Err(_) => Ok(None),
        }
    }

    /// Waits for the next stream that ends: its job and its bytes; `None` at the deadline.
    pub fn wait_done(&mut self, deadline: Instant) -> Result<Option<(u64, u64)>> {
        while let Some(event) = self.next_event(deadline)? {
            if let ClientEvent::Done { job_id, bytes, .. } = event {
                return Ok(Some((job_id, bytes)));
            }
        }
        Ok(None)
    }

    /// The state at the beginning of a window. The clock is read last: for the direct client, the totals cost CPU time.
    pub fn begin_window(&mut self) -> Result<Sample> {
        let Totals { events, bytes } = self.client.totals()?;
        Ok(Sample { cpu_ns: self.process.cpu.read_ns()?, events, bytes })
    }

    /// What happened since `begin`; an error if nothing was received.
    pub fn since(&mut self, begin: Sample) -> Result<Sample> {
        // First, for the same reason.
        let cpu_ns = self.process.cpu.read_ns()? - begin.cpu_ns;
        let Totals { events, bytes } = self.client.totals()?;
        if bytes == begin.bytes {
            return Err("nothing was received".into());
        }
        Ok(Sample { cpu_ns, events: events - begin.events, bytes: bytes - begin.bytes })
    }

    pub fn memory(&self) -> Result<Memory> {
        Ok(Memory::of(self.process.pid)?)
    }

    pub fn threads(&self) -> Result<Threads> {
        Ok(Threads::of(self.process.pid)?)
    }

    /// Ends the `count` open streams and compares byte counts: the figures of a subject that loses bytes mean nothing.
    pub fn finish(&mut self, count: usize) -> Result<()> {
        let backend = &self.harness.backend;
        backend.end_streams(true);
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        let mut received = Vec::new();
        while received.len() < count {
            let left = count - received.len();
            received.push(self.wait_done(deadline)?.ok_or_else(|| format!("{left} streams did not end"))?);
        }
        let sent: HashMap<_, _> = backend
            .events()
            .try_iter()
            .filter_map(|event| match event {
                BackendEvent::Ended { job_id, bytes } => Some((job_id, bytes)),
                _ => None,
            })
            .collect();
        match received.iter().find(|(job_id, bytes)| sent.get(job_id) != Some(bytes)) {
            Some((job_id, bytes)) => {
                Err(format!("{bytes} bytes were received of a stream of {:?}", sent.get(job_id)).into())
            }
            None => Ok(()),
        }
    }
}
