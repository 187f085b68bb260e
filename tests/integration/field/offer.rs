//! Listings and probes of real servers.
