//! What TLS computes with, for the coordinator and the hosted backends alike: ring's algorithms.
//!
//! Invariant: no code that signs with a certificate's key is linked, for the agent never shows one. It proves who it is by its
//! identity, inside the connection.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, KeyProvider};
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::SigningKey;

/// To be given wherever a TLS configuration is made; there is no default.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider { key_provider: &NoKeys, ..rustls::crypto::ring::default_provider() })
}

#[derive(Debug)]
struct NoKeys;

impl KeyProvider for NoKeys {
    fn load_private_key(&self, _: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, rustls::Error> {
        Err(rustls::Error::General("this client has no certificate".into()))
    }
}
