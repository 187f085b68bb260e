//! An agent's session with the local coordinator, from the WebSocket upgrade to the end of the connection.
//!
//! Runs on the connection's thread, which reads the agent's frames. Jobs are sent from other threads.

use std::io::BufReader;
use std::net::TcpStream;
use std::time::Instant;

use super::agent_protocol::{self, Frame, HandshakeError, OfferedModel, cancel_frame};
use super::agent_sessions::{Offer, Sessions, Stages};
use super::websocket::{self, Reader, Sender};
use crate::logging::sanitize_for_log;

/// Accepts the upgrade with this `Sec-WebSocket-Key`, and serves the connection to its end.
pub(super) fn run(key: &str, input: &BufReader<TcpStream>, sessions: &Sessions) {
    let connection = sessions.connect();
    let end = serve(key, input, connection, sessions).unwrap_or_else(|error| error.to_string());
    sessions.leave(connection, &end);
    log::info!("agent connection {connection} ended: {end}");
}

/// Serves one connection, and returns how it ended.
fn serve(
    key: &str,
    input: &BufReader<TcpStream>,
    connection: u64,
    sessions: &Sessions,
) -> Result<String, HandshakeError> {
    let connected_at = Instant::now();
    let (mut reader, sender) = websocket::accept(key, input)?;
    let verified = agent_protocol::authenticate(&mut reader, &sender)?;
    let authenticated_at = Instant::now();
    log::info!("agent connection {connection} is {} ({})", verified.provider_id, verified.agent_version);
    sessions.enter(connection, sender.clone());
    let connect = sessions.expected_for(connected_at);
    let auth = authenticated_at - connected_at;
    let offer = |models| {
        let stages = Stages { connect, auth, discovery: authenticated_at.elapsed() };
        let (agent_version, provider_id) = (verified.agent_version.clone(), verified.provider_id.clone());
        Offer { models, stages, agent_version, provider_id }
    };
    Ok(read_frames(&mut reader, connection, sessions, &sender, offer))
}

fn read_frames(
    reader: &mut Reader,
    connection: u64,
    sessions: &Sessions,
    sender: &Sender,
    offer: impl Fn(Vec<OfferedModel>) -> Offer,
) -> String {
    loop {
        let text = match reader.next_text() {
            Ok(Some(text)) => text,
            Ok(None) => return "the agent closed the connection".to_owned(),
            Err(error) => return format!("the connection broke: {error}"),
        };
        match agent_protocol::parse_frame(&text) {
            Ok(Frame::Job { job_id, event }) => {
                if !sessions.deliver(connection, job_id, event) {
                    let _ = sender.send(&cancel_frame(job_id));
                }
            }
            Ok(Frame::Capabilities(models)) => sessions.offered(connection, offer(models)),
            Ok(Frame::Other(kind)) => crate::debug!("`{}` frame of the agent", sanitize_for_log(&kind)),
            Err(error) => crate::log_repeatable!(log::Level::Warn, "the agent sent an invalid frame: {error}"),
        }
    }
}
