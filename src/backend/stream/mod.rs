//! The response of a job: relayed as it arrives, and scanned for usage, errors and the end marker.

mod relay;
mod completion;
mod answer;
mod sse;
mod event;
mod report;
mod usage;
mod bounded_json;

pub use relay::{Exchange, post};
