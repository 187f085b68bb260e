//! The response of a job: relayed as it arrives, and scanned for usage, errors and the end marker.

mod bounded_json;
mod event;
mod relay;
mod sse;
mod usage;

pub use relay::relay;
