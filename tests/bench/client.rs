//! Who submits jobs and receives the streams: the coordinator behind an agent ([`crate::agent_client`]), or a process that calls
//! the backend itself ([`crate::direct`]).

use std::sync::mpsc::Receiver;

use crate::Result;
use crate::job::Job;
use crate::received::Totals;

/// All times are those of [`crate::process::now_ns`].
pub trait Client {
    /// Submits a job and returns when it was sent.
    fn submit(&mut self, job: Job) -> Result<u64>;

    /// Cancels a job and returns when the cancel was sent.
    fn cancel(&mut self, job_id: u64) -> Result<u64>;

    fn events(&self) -> &Receiver<ClientEvent>;

    /// What was received of all streams so far.
    fn totals(&mut self) -> Result<Totals>;

    /// Starts to record latencies.
    fn start_recording(&mut self) -> Result<()>;

    /// Stops recording; the latencies are in microseconds, unsorted.
    fn take_latencies_us(&mut self) -> Result<Vec<f64>>;
}

#[derive(Debug)]
pub enum ClientEvent {
    /// The first bytes of a stream were received.
    First {
        job_id: u64,
        at_ns: u64,
        /// When the client connected to the backend, if it did so itself.
        began_ns: Option<u64>,
    },
    /// A stream ended properly, after `bytes` of body.
    Done { job_id: u64, at_ns: u64, bytes: u64 },
    /// A job failed, or the subject broke the protocol.
    Failed(String),
    /// The subject closed the connection. No event follows.
    Closed,
}
