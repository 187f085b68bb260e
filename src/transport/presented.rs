//! What a server presented as its certificate, kept also when it is refused: for `doctor`, which tells the operator who answered.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};

/// The last certificate that a dial was shown.
#[derive(Debug, Clone, Default)]
pub struct Presented(Arc<Mutex<Option<Certificate>>>);

/// A server's own certificate.
#[derive(Debug, Clone)]
pub struct Certificate {
    /// As it came, DER.
    pub der: Vec<u8>,
    /// Why it is not believed.
    pub fault: Option<CertificateError>,
}

impl Presented {
    /// The certificate, once there was one.
    pub fn certificate(&self) -> Option<Certificate> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Certificate>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Verifies as `inner` does, to the letter, and takes note.
#[derive(Debug)]
pub struct Recorder {
    /// What decides.
    pub inner: Arc<WebPkiServerVerifier>,
    /// Where the notes go.
    pub presented: Presented,
}

impl ServerCertVerifier for Recorder {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verdict = self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        let fault = match &verdict {
            Ok(_) => None,
            Err(Error::InvalidCertificate(fault)) => Some(fault.clone()),
            Err(_) => Some(CertificateError::BadEncoding),
        };
        *self.presented.lock() = Some(Certificate { der: end_entity.to_vec(), fault });
        verdict
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
