//! TCP, TLS and the HTTP proxy, shared by the connections to the coordinator and to the backends.

pub mod connect;
pub mod proxy;
pub mod tls;
