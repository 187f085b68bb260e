//! Looks at a server's certificate and goes away: for `doctor`, which tells the operator who answers in the place of the server
//! that was meant.
//!
//! Invariant: no handshake comes to its end by it.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

use crate::net::tls;

/// Takes note of the certificate, and refuses it.
#[derive(Debug, Default)]
pub struct CapturingVerifier(Mutex<Vec<u8>>);

impl CapturingVerifier {
    /// The certificate that it was shown, DER; empty before.
    pub fn captured(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What TLS is to do for it.
    ///
    /// # Errors
    /// The cryptography has no such TLS.
    pub fn config(self: Arc<Self>) -> Result<Arc<ClientConfig>, Error> {
        let builder = ClientConfig::builder_with_provider(tls::provider());
        let builder = builder.with_safe_default_protocol_versions()?.dangerous();
        Ok(Arc::new(builder.with_custom_certificate_verifier(self).with_no_client_auth()))
    }
}

const REFUSED: Error = Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);

impl ServerCertVerifier for CapturingVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = end_entity.to_vec();
        Err(REFUSED)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(REFUSED)
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(REFUSED)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        tls::provider().signature_verification_algorithms.supported_schemes()
    }
}
