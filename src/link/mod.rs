//! The connection to the coordinator: the protocol's frames, dialing, and the lanes and the thread that write to the socket. The
//! module handles the frames of jobs, but runs no jobs.

pub mod close;
pub mod dial;
pub mod handshake;
pub mod write_queues;
pub mod peer_certificate;
pub mod protocol;
pub mod response;
pub mod transport;
mod upgrade;
pub mod waking_channel;
pub mod writer;

pub use dial::{CONNECT_TIMEOUT, DialError, DialObserver, Dialer};
pub use transport::{Link, MESSAGE_BYTES_MAX, ReadHalf, STALL_TIMEOUT, WriteHalf};
