//! The connection to the coordinator: its frames, how it is dialled, and who writes to it.

pub mod close;
pub mod dial;
pub mod handshake;
pub mod peer_certificate;
pub mod protocol;
pub mod transport;
pub mod waking_channel;
pub mod writer;

pub use dial::{CONNECT_TIMEOUT, DialError, DialObserver, Dialer};
pub use transport::{Link, MESSAGE_BYTES_MAX, ReadHalf, STALL_TIMEOUT, WriteHalf};
