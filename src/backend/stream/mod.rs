//! The response of a job: relayed as it arrives, and read on the side for its usage and its end.

mod bounded_json;
mod event;
mod relay;
mod sse;
mod usage;

pub use relay::relay;
