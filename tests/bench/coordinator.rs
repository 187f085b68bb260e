//! The coordinator: takes an agent's connection, orders streams through it and counts what comes.
//!
//! One thread for ever accepts connections; one for each session reads. Orders are written by the thread that runs the
//! workloads, pongs by the reader.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
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
use tungstenite::handshake::derive_accept_key;

use crate::Result;
use crate::client::{Count, Customer, Seen};
use crate::event::{Receipt, Tally};
use crate::job::{Order, Script};
use crate::process::now_ns;
use crate::websocket::{self, Frames, push_frame};
use crate::wire::Wire;

/// For each step of an agent's start.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// What one read of the socket may bring.
const READ_BYTES: usize = 256 << 10;

pub struct Coordinator {
    address: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
    connections: Receiver<TcpStream>,
}

impl Coordinator {
    pub fn new(tls: Option<Arc<ServerConfig>>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (sender, connections) = mpsc::channel();
        thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                if sender.send(socket).is_err() {
                    return;
                }
            }
        });
        Ok(Self { address, tls, connections })
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Where an agent is to dial.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "wss" } else { "ws" };
        format!("{scheme}://{}/provider/connect", self.address)
    }

    /// Forgets connections of subjects that have ended.
    pub fn forget(&self) {
        while self.connections.try_recv().is_ok() {}
    }

    /// Waits for the agent that was just started, until it has sent its `capabilities`.
    pub fn accept(&self) -> Result<Session> {
        let socket = self.connections.recv_timeout(HANDSHAKE_TIMEOUT).map_err(|_| "it did not connect within 10 s")?;
        let wire = Wire::new(socket, self.tls.as_ref())?;
        wire.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
        let mut input = Input { wire: Arc::new(wire), frames: Frames::default(), scratch: vec![0; READ_BYTES] };
        input.upgrade()?;
        input.send(&json!({"type": "auth_challenge", "nonce": BASE64_STANDARD.encode([7; 32])}))?;
        let auth = input.expect("auth_response")?;
        input.send(&json!({"type": "auth_ok", "provider_id": "prov_bench"}))?;
        while input.expect("capabilities")?["models"].as_array().is_none_or(Vec::is_empty) {}
        let ready_ns = now_ns();
        input.wire.set_read_timeout(None)?;

        let wire = Arc::clone(&input.wire);
        let tally = Arc::new(Tally::default());
        let reads_events = Arc::new(AtomicBool::new(true));
        let (sender, seen) = mpsc::channel();
        let reader = Reader {
            input,
            streams: HashMap::new(),
            body: Vec::new(),
            tally: Arc::clone(&tally),
            reads_events: Arc::clone(&reads_events),
            seen: sender,
        };
        thread::Builder::new().name("coordinator".into()).spawn(move || reader.run())?;
        let version = auth["agent_version"].as_str().unwrap_or("unknown").to_owned();
        Ok(Session { wire, tally, reads_events, seen, version, ready_ns, frame: Vec::new() })
    }
}

/// The customer's side of an agent's connection, which ends with it.
pub struct Session {
    wire: Arc<Wire>,
    tally: Arc<Tally>,
    /// Off for floods, whose events are counted by their bytes.
    reads_events: Arc<AtomicBool>,
    seen: Receiver<Seen>,
    frame: Vec<u8>,
    /// The agent's.
    pub version: String,
    /// When `capabilities` came.
    pub ready_ns: u64,
}

impl Session {
    fn send(&mut self, text: &str) -> Result<u64> {
        self.frame.clear();
        push_frame(&mut self.frame, websocket::TEXT, None, &[text.as_bytes()]);
        let sent_ns = now_ns();
        self.wire.write(&self.frame)?;
        Ok(sent_ns)
    }
}

impl Customer for Session {
    fn order(&mut self, order: Order) -> Result<u64> {
        self.reads_events.store(!matches!(order.script, Script::Flood { .. }), Relaxed);
        // The request comes last: the floor takes all that follows it for the request.
        self.send(&format!(
            r#"{{"type":"job","job_id":"{}","model_id":"m","format":"openai","deadline_ms":120000,"request":{}}}"#,
            job_id(order.seq),
            order.request()
        ))
    }

    fn cancel(&mut self, seq: u64) -> Result<u64> {
        self.send(&format!(r#"{{"type":"job_cancel","job_id":"{}"}}"#, job_id(seq)))
    }

    fn seen(&self) -> &Receiver<Seen> {
        &self.seen
    }

    fn count(&mut self) -> Result<Count> {
        Ok(Count { events: self.tally.events.load(Relaxed), bytes: self.tally.bytes.load(Relaxed) })
    }

    fn record(&mut self) -> Result<()> {
        self.tally.record();
        Ok(())
    }

    fn latencies_us(&mut self) -> Result<Vec<f64>> {
        Ok(self.tally.take_latencies_us())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.wire.close();
    }
}

fn job_id(seq: u64) -> String {
    format!("00000000-0000-4000-8000-{seq:012x}")
}

fn seq(job_id: &str) -> Option<u64> {
    u64::from_str_radix(job_id.get(24..)?, 16).ok()
}

/// What comes from the agent.
struct Input {
    wire: Arc<Wire>,
    frames: Frames,
    scratch: Vec<u8>,
}

impl Input {
    fn fill(&mut self) -> Result<()> {
        match self.wire.read(&mut self.scratch, self.frames.buffer())? {
            0 => Err("it closed the connection".into()),
            _ => Ok(()),
        }
    }

    fn upgrade(&mut self) -> Result<()> {
        let head = loop {
            self.fill()?;
            if let Some(head) = self.frames.next_head() {
                break head;
            }
        };
        let mut headers = head.lines().filter_map(|line| line.split_once(':'));
        let key = headers.find(|(name, _)| name.eq_ignore_ascii_case("sec-websocket-key")).map(|(_, key)| key.trim());
        let accept = derive_accept_key(key.ok_or("no Sec-WebSocket-Key")?.as_bytes());
        let response = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
        );
        Ok(self.wire.write(response.as_bytes())?)
    }

    fn send(&self, message: &Value) -> Result<()> {
        let mut frame = Vec::new();
        push_frame(&mut frame, websocket::TEXT, None, &[message.to_string().as_bytes()]);
        Ok(self.wire.write(&frame)?)
    }

    /// Waits for a message of this type; others are skipped.
    fn expect(&mut self, kind: &str) -> Result<Value> {
        loop {
            while let Some((opcode, payload)) = self.frames.next()? {
                if opcode == websocket::TEXT {
                    let message: Value = serde_json::from_slice(payload)?;
                    if message["type"] == kind {
                        return Ok(message);
                    }
                }
            }
            self.fill().map_err(|error| format!("no {kind}: {error}"))?;
        }
    }
}

/// The thread that reads a session.
struct Reader {
    input: Input,
    streams: HashMap<u64, Receipt>,
    /// Of one chunk, decoded.
    body: Vec<u8>,
    tally: Arc<Tally>,
    reads_events: Arc<AtomicBool>,
    seen: Sender<Seen>,
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

impl Reader {
    /// Until the connection ends, which is how every session does.
    fn run(mut self) {
        while self.input.fill().is_ok() {
            if let Err(error) = self.take_frames(now_ns()) {
                let _ = self.seen.send(Seen::Failed(error.to_string()));
                break;
            }
        }
        let _ = self.seen.send(Seen::Gone);
    }

    fn take_frames(&mut self, at_ns: u64) -> Result<()> {
        let Self { input, streams, body, tally, reads_events, seen } = self;
        while let Some((opcode, payload)) = input.frames.next()? {
            match opcode {
                websocket::TEXT => {}
                websocket::PING => {
                    let mut pong = Vec::new();
                    push_frame(&mut pong, websocket::PONG, None, &[payload]);
                    input.wire.write(&pong)?;
                    continue;
                }
                websocket::CLOSE => return Err("it said goodbye".into()),
                _ => continue,
            }
            let message: Message = serde_json::from_slice(payload)?;
            if !message.kind.starts_with("job_") {
                continue;
            }
            let seq = seq(message.job_id).ok_or("a message for a job that was never ordered")?;
            match message.kind {
                "job_chunk" => {
                    let receipt = streams.entry(seq).or_default();
                    if receipt.bytes == 0 {
                        let _ = seen.send(Seen::First { seq, at_ns, began_ns: None });
                    }
                    if reads_events.load(Relaxed) {
                        body.clear();
                        BASE64_STANDARD.decode_vec(message.data, body)?;
                        receipt.take(body, at_ns, tally);
                    } else {
                        receipt.count(decoded_length(message.data), tally);
                    }
                }
                "job_done" => {
                    let bytes = streams.remove(&seq).unwrap_or_default().bytes;
                    let _ = seen.send(Seen::Done { seq, at_ns, bytes });
                }
                _ => {
                    let _ = seen.send(Seen::Failed(format!("{}: {}", message.kind, message.message)));
                }
            }
        }
        Ok(())
    }
}

fn decoded_length(base64: &str) -> usize {
    base64.len() / 4 * 3 - base64.bytes().rev().take_while(|byte| *byte == b'=').count()
}
