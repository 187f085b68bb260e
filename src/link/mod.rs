//! The connection to the coordinator: the protocol's frames, dialling, and the lanes and the thread that write to it. Knows no
//! job beyond the data in a frame.

pub mod close;
pub mod dial;
pub mod handshake;
pub mod write_queues;
pub mod peer_certificate;
pub mod protocol;
pub mod transport;
pub mod waking_channel;
pub mod writer;

pub use dial::{CONNECT_TIMEOUT, DialError, DialObserver, Dialer};
pub use transport::{Link, MESSAGE_BYTES_MAX, ReadHalf, STALL_TIMEOUT, WriteHalf};
