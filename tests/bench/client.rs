//! Who orders streams and receives them: the coordinator through an agent, or a child that asks the backend itself.

use std::sync::mpsc::Receiver;

use crate::Result;
use crate::job::Order;

/// All times are of [`crate::process::now_ns`].
pub trait Customer {
    /// Returns when the order was sent.
    fn order(&mut self, order: Order) -> Result<u64>;

    /// Returns when the cancel was sent.
    fn cancel(&mut self, seq: u64) -> Result<u64>;

    fn seen(&self) -> &Receiver<Seen>;

    fn count(&mut self) -> Result<Count>;

    /// Starts to keep latencies.
    fn record(&mut self) -> Result<()>;

    /// Stops keeping them; in microseconds, in no order.
    fn latencies_us(&mut self) -> Result<Vec<f64>>;
}

#[derive(Debug)]
pub enum Seen {
    First {
        seq: u64,
        at_ns: u64,
        /// When the customer turned to the backend, where it did so by itself.
        began_ns: Option<u64>,
    },
    /// The stream ended as it should, after so many bytes.
    Done { seq: u64, at_ns: u64, bytes: u64 },
    /// It ended in another way; or the subject did something that it must not.
    Failed(String),
    /// Nothing more will come.
    Gone,
}

/// What has come of all streams together.
#[derive(Clone, Copy)]
pub struct Count {
    pub events: u64,
    pub bytes: u64,
}
