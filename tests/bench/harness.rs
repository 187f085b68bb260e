//! The parts that a workload needs: one backend, two coordinators, and a subject that runs between them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Result;
use crate::backend::{Backend, Note};
use crate::children;
use crate::client::{Customer, Seen};
use crate::coordinator::Coordinator;
use crate::direct::Direct;
use crate::job::{Order, Script};
use crate::process::{Memory, Threads};
use crate::subject::{Places, Process, Subject};
use crate::wire::tls_server;

/// For what takes milliseconds on a healthy machine.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// For the end of streams: the kernel holds megabytes of each stream of a flood, which a slow subject has still to relay.
const DRAIN_PATIENCE: Duration = Duration::from_secs(60);

/// How many streams are begun at once: what the backend's listener holds, with room.
const BATCH: usize = 32;

/// What all runs share.
pub struct Rig {
    backend: Backend,
    plain: Coordinator,
    tls: Coordinator,
    ca_file: PathBuf,
    scratch: Scratch,
    agent: PathBuf,
    peer: Option<PathBuf>,
    next_seq: std::cell::Cell<u64>,
}

impl Rig {
    pub fn new(agent: PathBuf, peer: Option<PathBuf>) -> Result<Self> {
        let scratch = Scratch::new()?;
        children::end_on_signal(scratch.0.clone())?;
        let ca_file = scratch.0.join("ca.pem");
        let tls = Coordinator::new(Some(tls_server(&ca_file)?))?;
        let (backend, plain) = (Backend::new()?, Coordinator::new(None)?);
        Ok(Self { backend, plain, tls, ca_file, scratch, agent, peer, next_seq: std::cell::Cell::new(1) })
    }

    pub fn scratch(&self) -> &Path {
        &self.scratch.0
    }

    /// The program that a subject runs: our own one plays the floor and the customer.
    pub fn program(&self, subject: Subject) -> Result<PathBuf> {
        match subject {
            Subject::Ours | Subject::Wss => Ok(self.agent.clone()),
            Subject::Peer => Ok(self.peer.clone().ok_or("no peer was named")?),
            Subject::Floor | Subject::Direct => Ok(std::env::current_exe()?),
        }
    }

    fn order(&self, script: Script) -> Order {
        Order { seq: self.next_seq.replace(self.next_seq.get() + 1), script }
    }

    /// Starts a subject and waits until it is ready for orders.
    pub fn start(&self, subject: Subject) -> Result<Run<'_>> {
        self.backend.stop(false);
        let coordinator = if subject == Subject::Wss { &self.tls } else { &self.plain };
        coordinator.forget();
        let places = Places {
            coordinator_url: coordinator.url(),
            coordinator_port: coordinator.port(),
            ca_file: (subject == Subject::Wss).then_some(&*self.ca_file),
            backend_port: self.backend.port(),
        };
        let home = self.scratch().join(subject.name());
        let program = self.program(subject)?;
        let process = Process::start(subject, &program, &home, &places)?;
        if subject == Subject::Direct {
            let pipes = children::with(process.pid, |child| child.stdin.take().zip(child.stdout.take()));
            let (input, output) = pipes.ok_or("it has no pipes")?;
            let customer = Direct::new(input, output)?;
            return Ok(Run { rig: self, process, customer: Box::new(customer), start_ms: 0.0, version: String::new() });
        }
        let session = coordinator.accept().map_err(|error| format!("{error}; {}", process.last_words()))?;
        let start_ms = (session.ready_ns - process.spawned_ns) as f64 / 1e6;
        let version = session.version.clone();
        Ok(Run { rig: self, process, customer: Box::new(session), start_ms, version })
    }
}

/// A subject at work. The process ends before its customer does: it has no occasion to connect again.
pub struct Run<'a> {
    pub rig: &'a Rig,
    pub process: Process,
    pub customer: Box<dyn Customer>,
    /// From the start of the process to its `capabilities`.
    pub start_ms: f64,
    /// As the agent names it.
    pub version: String,
}

/// The state at one end of a window.
#[derive(Clone, Copy)]
pub struct Mark {
    pub cpu_ns: u64,
    pub events: u64,
    pub bytes: u64,
}

impl Run<'_> {
    /// Orders a stream; returns its number and when it was sent.
    pub fn order(&mut self, script: Script) -> Result<(u64, u64)> {
        let order = self.rig.order(script);
        Ok((order.seq, self.customer.order(order)?))
    }

    /// Begins streams, a few at a time, and waits until each has shown its first bytes.
    pub fn begin(&mut self, scripts: impl IntoIterator<Item = Script>) -> Result<()> {
        let scripts: Vec<_> = scripts.into_iter().collect();
        for batch in scripts.chunks(BATCH) {
            for script in batch {
                self.order(*script)?;
            }
            self.wait_first(batch.len())?;
        }
        Ok(())
    }

    pub fn wait_first(&mut self, streams: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut waiting = streams;
        while waiting > 0 {
            if let Seen::First { .. } =
                self.next(deadline)?.ok_or_else(|| format!("{waiting} streams did not begin"))?
            {
                waiting -= 1;
            }
        }
        Ok(())
    }

    /// Waits for what `wanted` makes of a note of the backend; nothing when it does not come in time.
    pub fn note<T>(&self, patience: Duration, wanted: impl Fn(Note) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(found) = wanted(self.rig.backend.notes().recv_timeout(left).ok()?) {
                return Some(found);
            }
        }
    }

    /// What the customer sees next; nothing at the deadline.
    pub fn next(&mut self, deadline: Instant) -> Result<Option<Seen>> {
        match self.customer.seen().recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Seen::Failed(reason)) => Err(reason.into()),
            Ok(Seen::Gone) => Err("it ended the session".into()),
            Ok(seen) => Ok(Some(seen)),
            Err(_) => Ok(None),
        }
    }

    /// The next stream that ends, and its bytes; nothing when none does until the deadline.
    pub fn wait_done(&mut self, deadline: Instant) -> Result<Option<(u64, u64)>> {
        while let Some(seen) = self.next(deadline)? {
            if let Seen::Done { seq, bytes, .. } = seen {
                return Ok(Some((seq, bytes)));
            }
        }
        Ok(None)
    }

    pub fn mark(&mut self) -> Result<Mark> {
        let count = self.customer.count()?;
        Ok(Mark { cpu_ns: self.process.cpu.read_ns()?, events: count.events, bytes: count.bytes })
    }

    /// What happened since `begin`: CPU in nanoseconds, events, bytes. Errors when nothing came.
    pub fn since(&mut self, begin: Mark) -> Result<Mark> {
        // The clock first: counting is work for the child that asks the backend itself.
        let cpu_ns = self.process.cpu.read_ns()?;
        let count = self.customer.count()?;
        if count.bytes == begin.bytes {
            return Err("nothing came".into());
        }
        Ok(Mark {
            cpu_ns: cpu_ns - begin.cpu_ns,
            events: count.events - begin.events,
            bytes: count.bytes - begin.bytes,
        })
    }

    pub fn memory(&self) -> Result<Memory> {
        Ok(Memory::of(self.process.pid)?)
    }

    pub fn threads(&self) -> Result<Threads> {
        Ok(Threads::of(self.process.pid)?)
    }

    /// Has the `count` streams that are open end, and compares byte counts: a subject that loses some is not to be measured.
    pub fn finish(&mut self, count: usize) -> Result<()> {
        self.rig.backend.stop(true);
        let deadline = Instant::now() + DRAIN_PATIENCE;
        let mut arrived = Vec::new();
        while arrived.len() < count {
            let left = count - arrived.len();
            arrived.push(self.wait_done(deadline)?.ok_or_else(|| format!("{left} streams did not end"))?);
        }
        let sent: HashMap<_, _> = self.rig.backend.notes().try_iter().filter_map(Note::ended).collect();
        match arrived.iter().find(|(seq, bytes)| sent.get(seq) != Some(bytes)) {
            Some((seq, bytes)) => Err(format!("{bytes} bytes came of a stream of {:?}", sent.get(seq)).into()),
            None => Ok(()),
        }
    }
}

/// A folder of the bench's own, removed on drop.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("bench-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
