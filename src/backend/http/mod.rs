//! HTTP to one backend, over `ureq`: agents that serve one exchange at a time, and their transport.

mod api_key;
mod body;
mod client;
mod error;
mod monitor;
mod resolver;
mod tcp;
mod tls;

pub use api_key::ApiKey;
pub use body::{BodyBuilder, RequestBody};
pub use client::{AgentLease, Client, Interrupt, read_bounded};
pub use error::connect_error;
