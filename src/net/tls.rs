//! TLS configuration for the coordinator and the hosted backends: ring's algorithms, the public web roots, and the operator's own
//! roots. The agent has no client certificate: it authenticates with its identity, inside the connection.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use crate::sys::files;

/// Size limit of a file of extra roots, in bytes; the bundle of a Linux distribution has a quarter of this size.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// The crypto provider for every TLS configuration; no default provider is installed.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Certificates to trust in addition to the public web roots, such as the operator's own authority.
#[derive(Debug, Clone, Default)]
pub struct ExtraRoots(Vec<CertificateDer<'static>>);

impl ExtraRoots {
    /// Reads a PEM file.
    ///
    /// # Errors
    /// The reason why the file cannot be used.
    pub fn from_file(path: &Path) -> Result<ExtraRoots, String> {
        let pem = files::read_bounded(path, PEM_BYTES_MAX).map_err(|e| format!("failed to read it: {e}"))?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let certificates = certificates.map_err(|e| format!("it is not a PEM file: {e}"))?;
        let mut store = RootCertStore::empty();
        for certificate in &certificates {
            store
                .add(certificate.clone())
                .map_err(|e| format!("it contains a certificate that cannot be a root: {e}"))?;
        }
        if certificates.is_empty() { Err("it contains no certificate".into()) } else { Ok(ExtraRoots(certificates)) }
    }
}

#[cfg(test)]
impl From<CertificateDer<'static>> for ExtraRoots {
    fn from(certificate: CertificateDer<'static>) -> ExtraRoots {
        ExtraRoots(vec![certificate])
    }
}

/// A configuration that is built when it is first used, and shared from then on.
#[derive(Debug)]
pub struct LazyClientConfig {
    roots: ExtraRoots,
    config: OnceLock<Arc<ClientConfig>>,
}

impl LazyClientConfig {
    /// Trusts `roots` as well as the public web roots.
    pub fn new(roots: ExtraRoots) -> LazyClientConfig {
        LazyClientConfig { roots, config: OnceLock::new() }
    }

    /// The configuration.
    ///
    /// # Errors
    /// A certificate in the extra roots cannot be used as a root.
    pub fn get(&self) -> Result<Arc<ClientConfig>, rustls::Error> {
        if let Some(config) = self.config.get() {
            return Ok(config.clone());
        }
        let config = client_config(&self.roots)?;
        Ok(self.config.get_or_init(|| config).clone())
    }
}

/// A configuration for TLS 1.2 and 1.3 that trusts the public web roots and `extra`.
fn client_config(extra: &ExtraRoots) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    for certificate in &extra.0 {
        roots.add(certificate.clone())?;
    }
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}
