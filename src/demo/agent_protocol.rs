//! The coordinator's side of the protocol: the handshake with an agent, and the agent's frames.
//!
//! The module shares no code with the agent's side, so that the demo detects mistakes there.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, UnparsedPublicKey};
use serde_json::{Value, json};
use thiserror::Error;
use uuid::Uuid;

use super::job_events::{JobEnd, JobEvent};
use super::websocket::{Reader, Sender};

/// Time limit for each step of the handshake; the agent has the same.
pub(super) const HANDSHAKE_STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// Length of the nonce.
const NONCE_BYTES: usize = 32;

/// Why the handshake with an agent failed.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// The WebSocket upgrade failed, or the connection broke.
    #[error("the connection failed: {0}")]
    Connection(#[from] std::io::Error),
    /// The agent sent no valid `auth_response`.
    #[error("the agent sent no valid response to the challenge: {0}")]
    Protocol(String),
    /// The key or the signature is invalid.
    #[error("the agent's signature is not valid: {0}")]
    Signature(&'static str),
}

/// What the handshake established about the agent.
pub(super) struct Verified {
    pub(super) agent_version: String,
    pub(super) provider_id: String,
}

/// Challenges the agent, and sends `auth_ok` or `auth_failed`.
pub(super) fn authenticate(reader: &mut Reader, sender: &Sender) -> Result<Verified, HandshakeError> {
    let mut nonce = [0_u8; NONCE_BYTES];
    SystemRandom::new().fill(&mut nonce).map_err(|_| std::io::Error::other("the system has no random numbers"))?;
    reader.set_timeout(Some(HANDSHAKE_STEP_TIMEOUT))?;
    let say = |kind: &str, key: &str, value: &str| sender.send(&json!({"type": kind, key: value}).to_string());
    say("auth_challenge", "nonce", &STANDARD.encode(nonce))?;
    match read_auth_response(reader).and_then(|response| verify(&nonce, &response)) {
        Ok(verified) => {
            say("auth_ok", "provider_id", &verified.provider_id)?;
            reader.set_timeout(None)?; // from here on, the agent may be silent
            Ok(verified)
        }
        Err(error) => {
            say("auth_failed", "reason", &error.to_string())?;
            Err(error)
        }
    }
}

struct AuthResponse {
    pubkey: String,
    signature: String,
    agent_version: String,
}

fn read_auth_response(reader: &mut Reader) -> Result<AuthResponse, HandshakeError> {
    let Some(text) = reader.next_text()? else {
        return Err(HandshakeError::Protocol("it closed the connection".to_owned()));
    };
    let frame = parse_json(&text).map_err(HandshakeError::Protocol)?;
    if frame["type"] != "auth_response" {
        return Err(HandshakeError::Protocol("the first frame is not an `auth_response`".to_owned()));
    }
    // Missing fields become empty, and `verify` rejects them.
    let field = |key: &str| frame[key].as_str().unwrap_or_default().to_owned();
    Ok(AuthResponse { pubkey: field("pubkey"), signature: field("signature"), agent_version: field("agent_version") })
}

fn verify(nonce: &[u8], response: &AuthResponse) -> Result<Verified, HandshakeError> {
    let key = STANDARD.decode(&response.pubkey).map_err(|_| HandshakeError::Signature("`pubkey` is not base64"))?;
    let signature =
        STANDARD.decode(&response.signature).map_err(|_| HandshakeError::Signature("`signature` is not base64"))?;
    if key.len() != 32 || signature.len() != 64 {
        return Err(HandshakeError::Signature("the key or the signature has the wrong length"));
    }
    UnparsedPublicKey::new(&ED25519, &key)
        .verify(nonce, &signature)
        .map_err(|_| HandshakeError::Signature("it does not match the key and the nonce"))?;
    Ok(Verified { agent_version: response.agent_version.clone(), provider_id: provider_id(&key) })
}

/// The provider id for a public key.
pub(super) fn provider_id(key: &[u8]) -> String {
    let id: String = key.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("demo-{id}")
}

/// The frame that cancels a job.
pub(super) fn cancel_frame(job_id: Uuid) -> String {
    json!({"type": "job_cancel", "job_id": job_id.to_string()}).to_string()
}

/// A model that an agent offers.
#[derive(Debug, Clone, PartialEq)]
pub struct OfferedModel {
    /// The id that jobs request.
    pub model_id: String,
    /// The kind of the model's backend.
    pub backend: String,
    /// The context window in tokens, if known.
    pub context_window: Option<u64>,
    /// Limit of concurrent jobs.
    pub max_concurrent: u64,
}

/// A frame from the agent, after the handshake.
#[derive(Debug, PartialEq)]
pub(super) enum Frame {
    Capabilities(Vec<OfferedModel>),
    Job {
        job_id: Uuid,
        event: JobEvent,
    },
    /// A heartbeat, or a type that only a newer agent sends.
    Other(String),
}

/// Parses a frame. The error never contains its content.
pub(super) fn parse_frame(text: &str) -> Result<Frame, String> {
    let frame = parse_json(text)?;
    let kind = frame["type"].as_str().ok_or("it has no string `type`")?;
    let malformed = |key: &str| format!("malformed `{kind}`: `{key}` is missing or wrong");
    let string = |key: &str| frame[key].as_str().ok_or_else(|| malformed(key));
    let event = match kind {
        "capabilities" => {
            let models = frame["models"].as_array().ok_or_else(|| malformed("models"))?;
            let models: Option<_> = models.iter().map(offered_model).collect();
            return Ok(Frame::Capabilities(models.ok_or_else(|| malformed("models"))?));
        }
        "job_chunk" => JobEvent::Chunk(STANDARD.decode(string("data")?).map_err(|_| malformed("data"))?),
        "job_done" => {
            let tokens = |long: &str, short: &str| frame["tokens"][long].as_u64().or(frame["tokens"][short].as_u64());
            let (input_tokens, output_tokens) = (tokens("input_tokens", "input"), tokens("output_tokens", "output"));
            JobEvent::Done(JobEnd { input_tokens, output_tokens })
        }
        "job_error" => JobEvent::failed(string("error_code")?, string("message")?),
        _ => return Ok(Frame::Other(kind.to_owned())),
    };
    let job_id = Uuid::parse_str(string("job_id")?).map_err(|_| malformed("job_id"))?;
    Ok(Frame::Job { job_id, event })
}

fn offered_model(model: &Value) -> Option<OfferedModel> {
    let backend = model["backend"].as_str().unwrap_or_default().to_owned();
    let context_window = model["context_window"].as_u64();
    let max_concurrent = model["max_concurrent"].as_u64().unwrap_or(1);
    Some(OfferedModel { model_id: model["model_id"].as_str()?.to_owned(), backend, context_window, max_concurrent })
}

fn parse_json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|_| "it is not JSON".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "00000000-0000-4000-8000-000000000001";

    #[test]
    fn parse_frame_reads_the_frames_of_a_job() {
        let job_id = Uuid::parse_str(ID).unwrap();
        let chunk = json!({"type":"job_chunk","job_id":ID,"data":"aGVsbG8g"}).to_string();
        assert_eq!(parse_frame(&chunk), Ok(Frame::Job { job_id, event: JobEvent::Chunk(b"hello ".to_vec()) }));
        let done = json!({"type":"job_done","job_id":ID,"tokens":{"input":7,"output":13},"duration_ms":42}).to_string();
        let end = JobEvent::Done(JobEnd { input_tokens: Some(7), output_tokens: Some(13) });
        assert_eq!(parse_frame(&done), Ok(Frame::Job { job_id, event: end }));
        let error = json!({"type":"job_error","job_id":ID,"error_code":"internal","message":"m"}).to_string();
        assert_eq!(parse_frame(&error), Ok(Frame::Job { job_id, event: JobEvent::failed("internal", "m") }));
        assert_eq!(parse_frame("{\"type\":\"new\"}"), Ok(Frame::Other("new".to_owned())));
    }

    #[test]
    fn parse_frame_rejects_invalid_frames_without_showing_their_content() {
        for bad in ["", "[]", "{}", "{\"type\":1}", "{\"type\":\"job_chunk\"}"] {
            assert!(parse_frame(bad).is_err(), "{bad}");
        }
        let chunk = json!({"type":"job_chunk","job_id":ID,"data":"*secret*"}).to_string();
        assert!(!parse_frame(&chunk).unwrap_err().contains("secret"));
    }

    #[test]
    fn verify_rejects_a_wrong_signature() {
        let response = AuthResponse {
            pubkey: STANDARD.encode([1_u8; 32]),
            signature: STANDARD.encode([2_u8; 64]),
            agent_version: String::new(),
        };
        assert!(matches!(verify(b"nonce", &response), Err(HandshakeError::Signature(_))));
    }
}
