//! Proxies, addresses, and coordinators that respond otherwise than expected.
