//! The client behind an agent: submits jobs as the coordinator does, and counts what the agent sends.
//!
//! Who runs here: the thread of the workloads writes jobs; one thread per connection reads, and answers pings.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rustls::ServerConfig;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Result;
use crate::client::{Client, ClientEvent};
use crate::job::{Job, Script};
use crate::process::now_ns;
use crate::received::{Received, ReceivedStream, Totals};
use crate::support::Coordinator;
use crate::support::connection::Connection;
use crate::support::websocket::{CLOSE, PING, PONG, READ_BYTES, TEXT, WebSocket, encode, push_frame};

/// For each step of an agent's start.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

pub struct AgentClient {
    connection: Arc<Connection>,
    received: Arc<Received>,
    /// Off for floods, whose bytes are counted only.
    parses_events: Arc<AtomicBool>,
    events: Receiver<ClientEvent>,
    frame: Vec<u8>,
    /// As the agent states it.
    pub version: String,
    /// When `capabilities` was received.
    pub ready_ns: u64,
}

impl AgentClient {
    /// Waits for the agent that was just started, until it has sent its `capabilities`.
    pub fn accept(coordinator: &Coordinator, tls: Option<&Arc<ServerConfig>>) -> Result<Self> {
        let dialled = coordinator.try_dialled(HANDSHAKE_TIMEOUT).ok_or("it did not connect within 10 s")?;
        let connection = Connection::new(dialled.stream, tls)?;
        connection.stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
        let mut socket = WebSocket::accept(connection, b"")?;
        let connection = Arc::clone(&socket.connection);
        let send = |message: Value| connection.write(&encode(TEXT, true, message.to_string().as_bytes()));
        send(json!({"type": "auth_challenge", "nonce": BASE64_STANDARD.encode([7; 32])}))?;
        let auth = wait_message(&mut socket, "auth_response")?;
        send(json!({"type": "auth_ok", "provider_id": "prov_bench"}))?;
        while wait_message(&mut socket, "capabilities")?["models"].as_array().is_none_or(Vec::is_empty) {}
        let ready_ns = now_ns();
        connection.stream.set_read_timeout(None)?;

        let received = Arc::new(Received::default());
        let parses_events = Arc::new(AtomicBool::new(true));
        let (sender, events) = mpsc::channel();
        let jobs = Jobs {
            streams: HashMap::new(),
            body: Vec::new(),
            received: Arc::clone(&received),
            parses_events: Arc::clone(&parses_events),
            events: sender,
        };
        let reader = Reader { socket, jobs };
        thread::Builder::new().name("coordinator".into()).spawn(move || reader.run())?;
        let version = auth["agent_version"].as_str().unwrap_or("unknown").to_owned();
        Ok(Self { connection, received, parses_events, events, version, ready_ns, frame: Vec::new() })
    }

    fn send(&mut self, text: &str) -> Result<u64> {
        self.frame.clear();
        push_frame(&mut self.frame, TEXT, true, None, &[text.as_bytes()]);
        let sent_ns = now_ns();
        self.connection.write(&self.frame)?;
        Ok(sent_ns)
    }
}

/// Waits for a message of this type and skips others.
fn wait_message(socket: &mut WebSocket, kind: &str) -> Result<Value> {
    loop {
        while let Some(frame) = socket.next_frame()? {
            if frame.opcode() == TEXT {
                let message: Value = serde_json::from_slice(frame.payload)?;
                if message["type"] == kind {
                    return Ok(message);
                }
            }
        }
        socket.fill(READ_BYTES).map_err(|error| format!("no {kind}: {error}"))?;
    }
}

impl Client for AgentClient {
    fn submit(&mut self, job: Job) -> Result<u64> {
        self.parses_events.store(!matches!(job.script, Script::Flood { .. }), Relaxed);
        // The request comes last: the floor takes all that follows for the request.
        self.send(&format!(
            r#"{{"type":"job","job_id":"{}","model_id":"m","format":"openai","deadline_ms":120000,"request":{}}}"#,
            to_uuid(job.id),
            job.request()
        ))
    }

    fn cancel(&mut self, job_id: u64) -> Result<u64> {
        self.send(&format!(r#"{{"type":"job_cancel","job_id":"{}"}}"#, to_uuid(job_id)))
    }

    fn events(&self) -> &Receiver<ClientEvent> {
        &self.events
    }

    fn totals(&mut self) -> Result<Totals> {
        Ok(self.received.totals())
    }

    fn start_recording(&mut self) -> Result<()> {
        self.received.start_recording();
        Ok(())
    }

    fn take_latencies_us(&mut self) -> Result<Vec<f64>> {
        Ok(self.received.take_latencies_us())
    }
}

impl Drop for AgentClient {
    fn drop(&mut self) {
        self.connection.close();
    }
}

fn to_uuid(job_id: u64) -> String {
    format!("00000000-0000-4000-8000-{job_id:012x}")
}

fn from_uuid(uuid: &str) -> Option<u64> {
    u64::from_str_radix(uuid.get(24..)?, 16).ok()
}

/// The thread that reads.
struct Reader {
    socket: WebSocket,
    jobs: Jobs,
}

impl Reader {
    /// Until the connection ends.
    fn run(mut self) {
        while self.socket.fill(READ_BYTES).is_ok() {
            if let Err(error) = self.handle_frames(now_ns()) {
                self.jobs.report(ClientEvent::Failed(error.to_string()));
                break;
            }
        }
        self.jobs.report(ClientEvent::Closed);
    }

    fn handle_frames(&mut self, at_ns: u64) -> Result<()> {
        let connection = Arc::clone(&self.socket.connection);
        while let Some(frame) = self.socket.next_frame()? {
            match frame.opcode() {
                TEXT if frame.header.is_final => self.jobs.handle_message(frame.payload, at_ns)?,
                PING => connection.write(&encode(PONG, true, frame.payload))?,
                CLOSE => return Err("it sent a Close frame".into()),
                _ => return Err(format!("it sent a frame that the bench cannot read: {:?}", frame.header).into()),
            }
        }
        Ok(())
    }
}

/// The jobs in flight.
struct Jobs {
    streams: HashMap<u64, ReceivedStream>,
    /// One decoded chunk.
    body: Vec<u8>,
    received: Arc<Received>,
    parses_events: Arc<AtomicBool>,
    events: Sender<ClientEvent>,
}

/// Borrowed from the frame, so that a chunk costs no allocation.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(default)]
    job_id: &'a str,
    #[serde(default)]
    data: &'a str,
    #[serde(default, borrow)]
    message: Cow<'a, str>,
}

impl Jobs {
    fn handle_message(&mut self, text: &[u8], at_ns: u64) -> Result<()> {
        let message: Message = serde_json::from_slice(text)?;
        if !message.kind.starts_with("job_") {
            return Ok(());
        }
        let job_id = from_uuid(message.job_id).ok_or("a message for a job that was never submitted")?;
        match message.kind {
            "job_chunk" => {
                let stream = self.streams.entry(job_id).or_default();
                if stream.bytes == 0 {
                    let _ = self.events.send(ClientEvent::First { job_id, at_ns, began_ns: None });
                }
                if self.parses_events.load(Relaxed) {
                    self.body.clear();
                    BASE64_STANDARD.decode_vec(message.data, &mut self.body)?;
                    stream.parse(&self.body, at_ns, &self.received);
                } else {
                    stream.count(decoded_length(message.data), &self.received);
                }
            }
            "job_done" => {
                let bytes = self.streams.remove(&job_id).unwrap_or_default().bytes;
                self.report(ClientEvent::Done { job_id, at_ns, bytes });
            }
            kind => self.report(ClientEvent::Failed(format!("{kind}: {}", message.message))),
        }
        Ok(())
    }

    fn report(&self, event: ClientEvent) {
        // Without a receiver the run has ended.
        let _ = self.events.send(event);
    }
}

fn decoded_length(base64: &str) -> usize {
    base64.len() / 4 * 3 - base64.bytes().rev().take_while(|byte| *byte == b'=').count()
}
