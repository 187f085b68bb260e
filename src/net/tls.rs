//! What TLS computes with and whom it trusts, for the coordinator and the hosted backends alike: ring's algorithms, the roots of
//! the web, and the operator's own. The agent shows no certificate of its own: it proves who it is by its identity, inside the
//! connection.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use crate::sys::files;

/// The largest file of extra roots, in bytes; a whole distribution's bundle has a quarter of it.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// To be given wherever a TLS configuration is made; there is no default.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Certificates that are trusted beside those of the web: an operator's own authority, for instance.
#[derive(Debug, Clone, Default)]
pub struct ExtraRoots(Vec<CertificateDer<'static>>);

impl ExtraRoots {
    /// Reads a PEM file.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn from_file(path: &Path) -> Result<ExtraRoots, String> {
        let pem = files::read_bounded(path, PEM_BYTES_MAX).map_err(|e| format!("failed to read it: {e}"))?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let certificates = certificates.map_err(|e| format!("it is not a PEM file: {e}"))?;
        let mut store = RootCertStore::empty();
        for certificate in &certificates {
            store.add(certificate.clone()).map_err(|e| format!("a certificate in it cannot be a root: {e}"))?;
        }
        if certificates.is_empty() { Err("no certificate is in it".into()) } else { Ok(ExtraRoots(certificates)) }
    }
}

#[cfg(test)]
impl From<CertificateDer<'static>> for ExtraRoots {
    fn from(certificate: CertificateDer<'static>) -> ExtraRoots {
        ExtraRoots(vec![certificate])
    }
}

/// Trusts the roots of the web and the operator's own; TLS 1.2 and 1.3.
///
/// # Errors
/// One of `extra` cannot be a root.
pub fn client_config(extra: &ExtraRoots) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    for certificate in &extra.0 {
        roots.add(certificate.clone())?;
    }
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}
