//! TCP and TLS, for the coordinator and the backends alike.

pub mod connect;
pub mod proxy;
pub mod tls;
