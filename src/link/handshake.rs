//! Authentication: receives the coordinator's challenge, signs it, and waits for `auth_ok`.

use std::time::{Duration, Instant};

use tungstenite::{Error as WsError, Message};

use super::close;
use super::protocol::{self, FrameError, Inbound};
use super::transport::ReadHalf;
use crate::instance::identity::Identity;
use crate::logging::sanitize_for_log;

/// Time limit for each frame of the handshake.
const AUTH_FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The coordinator refused the agent, for this reason.
    #[error("the coordinator rejected this agent: {0}")]
    Rejected(String),
    /// This frame did not arrive in time.
    #[error("no `{0}` from the coordinator within {limit} s", limit = AUTH_FRAME_TIMEOUT.as_secs())]
    TimedOut(&'static str),
    /// The coordinator sent a frame that cannot be read instead of this one.
    #[error("the coordinator sent an unreadable frame instead of `{0}`: {1}")]
    Unreadable(&'static str, FrameError),
    /// The coordinator sent a frame of the handshake out of order.
    #[error("the coordinator sent `{sent}` instead of `{expected}`")]
    NotDue {
        /// The frame that arrived.
        sent: &'static str,
        /// The frame that was due.
        expected: &'static str,
    },
    /// The coordinator sent a binary message.
    #[error("the coordinator sent a binary message during the handshake")]
    Binary,
    /// The connection failed or was closed.
    #[error("the connection ended during the handshake: {0}")]
    Connection(String),
}

/// Waits for the challenge and returns its nonce.
///
/// # Errors
/// No valid challenge arrived.
pub fn challenge(half: &mut ReadHalf) -> Result<Vec<u8>, HandshakeError> {
    expect(half, "auth_challenge", |frame| match frame {
        Inbound::AuthChallenge(nonce) => Some(nonce.clone()),
        _ => None,
    })
}

/// Waits for the challenge and answers it. Returns the provider id in `auth_ok`, if there is one.
///
/// # Errors
/// The coordinator does not admit the agent.
pub fn authenticate(
    half: &mut ReadHalf,
    identity: &Identity,
    enrollment_code: Option<&str>,
) -> Result<Option<String>, HandshakeError> {
    let nonce = challenge(half)?;
    // An agent that has a provider id is already enrolled.
    let code = enrollment_code.filter(|_| identity.provider_id().is_none());
    let response = protocol::auth_response(identity.public_key(), &identity.sign(&nonce), code);
    half.send(response).map_err(|e| HandshakeError::Connection(e.to_string()))?;
    expect(half, "auth_ok", |frame| match frame {
        Inbound::AuthOk(provider_id) => Some(provider_id.clone()),
        _ => None,
    })
}

/// Reads frames until `wanted` returns a value. Frames that are not part of the handshake are ignored, as in a session. A frame with
/// which the handshake cannot succeed ends the attempt at once.
fn expect<T>(
    half: &mut ReadHalf,
    name: &'static str,
    wanted: impl Fn(&Inbound) -> Option<T>,
) -> Result<T, HandshakeError> {
    let connection = |e: &dyn std::fmt::Display| HandshakeError::Connection(e.to_string());
    half.set_deadline(Some(Instant::now() + AUTH_FRAME_TIMEOUT)).map_err(|e| connection(&e))?;
    loop {
        match half.read() {
            Ok(Message::Text(text)) => match protocol::parse(&text) {
                Ok(frame) => match (wanted(&frame), frame) {
                    (Some(found), _) => return Ok(found),
                    (None, Inbound::AuthFailed(reason)) => {
                        return Err(HandshakeError::Rejected(sanitize_for_log(&reason)));
                    }
                    (None, Inbound::AuthChallenge(_)) => {
                        return Err(HandshakeError::NotDue { sent: "auth_challenge", expected: name });
                    }
                    (None, Inbound::AuthOk(_)) => {
                        return Err(HandshakeError::NotDue { sent: "auth_ok", expected: name });
                    }
                    (None, _) => crate::debug!("ignored a frame during the handshake: not `{name}`"),
                },
                Err(e) => return Err(HandshakeError::Unreadable(name, e)),
            },
            Ok(Message::Binary(_)) => return Err(HandshakeError::Binary),
            Ok(Message::Close(frame)) => {
                half.flush();
                return Err(HandshakeError::Connection(frame.map_or_else(|| "closed".into(), |f| close::describe(&f))));
            }
            Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
            Err(WsError::Io(e)) if e.kind() == std::io::ErrorKind::TimedOut => {
                return Err(HandshakeError::TimedOut(name));
            }
            Err(e) => return Err(connection(&e)),
        }
    }
}
