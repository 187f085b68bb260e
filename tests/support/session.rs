//! One connection of the agent, from the coordinator's side. A thread reads; its events are kept until the test waits for them,
//! in any order, so that a heartbeat in between does not matter.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use ring::signature::{ED25519, UnparsedPublicKey};
use serde_json::{Value, json};
use uuid::Uuid;

use super::connection::Connection;
use super::websocket::{CLOSE, CONTINUATION, Frame, PING, PONG, READ_BYTES, TEXT, WebSocket, close_payload, encode};
use super::{SOON, base64, secs, unbase64};

#[derive(Clone, Debug)]
pub enum Event {
    Frame(Value),
    Ping,
    Pong(Vec<u8>),
    Close(Option<(u16, String)>),
    /// The agent broke the protocol.
    Violation(String),
}

/// What the visitor of [`Session::each`] did with an event.
pub enum Take {
    /// Nothing: it is kept for a later wait.
    Leave,
    Eat,
    /// Consumed it, and needs no more.
    Stop,
}

pub struct Session {
    /// When the agent's connection was accepted.
    pub dialled_at: Instant,
    /// The first `capabilities`; null before the end of the handshake.
    pub capabilities: Value,
    connection: Arc<Connection>,
    control: Arc<Control>,
    events: Receiver<Event>,
    kept: RefCell<VecDeque<Event>>,
}

/// Is shown each text message before it is parsed; true if the message needs no further handling.
type Tap = Box<dyn FnMut(&[u8]) -> bool + Send>;

/// The test's instructions to the reader.
struct Control {
    answers_pings: AtomicBool,
    /// The coordinator sent the first Close; the agent's is the answer.
    closing: AtomicBool,
    /// The reader is to end without reading on.
    leaving: AtomicBool,
    reads_slowly: AtomicBool,
    paused: Mutex<bool>,
    resumed: Condvar,
    tap: Mutex<Tap>,
}

impl Session {
    pub fn new(socket: WebSocket, dialled_at: Instant) -> Self {
        let connection = Arc::clone(&socket.connection);
        connection.stream.set_read_timeout(None).expect("no read timeout");
        let control = Arc::new(Control {
            answers_pings: AtomicBool::new(true),
            closing: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            reads_slowly: AtomicBool::new(false),
            paused: Mutex::new(false),
            resumed: Condvar::new(),
            tap: Mutex::new(Box::new(|_| false)),
        });
        let (sender, events) = unbounded();
        let reader = Reader { socket, control: Arc::clone(&control), events: sender };
        std::thread::spawn(move || reader.run());
        Self { dialled_at, capabilities: Value::Null, connection, control, events, kept: RefCell::default() }
    }

    /// Performs the handshake and checks the agent's signature.
    pub fn authenticate(mut self, provider_id: Option<&str>) -> Self {
        let nonce: Vec<u8> = Uuid::new_v4().as_bytes().repeat(2);
        verify_auth(&self.challenge(&nonce), &nonce);
        match provider_id {
            Some(id) => self.send(&json!({"type": "auth_ok", "provider_id": id})),
            None => self.send(&json!({"type": "auth_ok"})),
        }
        self.capabilities = self.frame("capabilities", SOON);
        self
    }

    /// Sends the challenge, returns the `auth_response`.
    pub fn challenge(&self, nonce: &[u8]) -> Value {
        self.send(&json!({"type": "auth_challenge", "nonce": base64(nonce)}));
        self.frame("auth_response", SOON)
    }

    pub fn send(&self, frame: &Value) {
        self.send_text(&frame.to_string());
    }

    pub fn send_text(&self, text: &str) {
        self.send_frame(TEXT, text.as_bytes());
    }

    pub fn send_frame(&self, opcode: u8, payload: &[u8]) {
        self.send_raw(&encode(opcode, true, payload));
    }

    /// Sends raw bytes; a closed connection is ignored.
    pub fn send_raw(&self, bytes: &[u8]) {
        let _ = self.connection.write(bytes);
    }

    /// Sends a Close frame; the agent is to end the connection.
    pub fn close(&self, code: u16, reason: &str) {
        self.close_with(&close_payload(code, reason));
    }

    pub fn close_with(&self, payload: &[u8]) {
        self.control.closing.store(true, Ordering::SeqCst);
        self.send_frame(CLOSE, payload);
    }

    /// Closes the TCP connection without a Close frame.
    pub fn cut(&self) {
        self.connection.close();
    }

    /// Resets the TCP connection, by closing the socket with unread bytes in it.
    pub fn reset(self) {
        self.control.leaving.store(true, Ordering::SeqCst);
        // The reader ends after the first pong; the second one stays unread.
        self.send_frame(PING, b"");
        assert!(self.ends_within(SOON), "the agent does not answer a ping");
        self.send_frame(PING, b"");
        self.connection.stream.set_read_timeout(Some(SOON)).expect("a read timeout");
        self.connection.stream.peek(&mut [0]).expect("the second pong");
    }

    /// Reads one byte a second from now on.
    pub fn read_slowly(&self) {
        self.control.reads_slowly.store(true, Ordering::SeqCst);
    }

    /// Stops answering the agent's pings.
    pub fn ignore_pings(&self) {
        self.control.answers_pings.store(false, Ordering::SeqCst);
    }

    /// Stops or resumes reading from the socket.
    pub fn pause(&self, paused: bool) {
        *self.control.paused.lock().expect("pause flag") = paused;
        self.control.resumed.notify_all();
    }

    /// Passes each text message to `tap` first; for more of them than an unoptimized test can parse.
    pub fn tap(&self, tap: impl FnMut(&[u8]) -> bool + Send + 'static) {
        *self.control.tap.lock().expect("the tap") = Box::new(tap);
    }

    /// Sends a job with a deadline of 30 s and returns its id.
    pub fn job(&self, model: &str, request: Value) -> String {
        let id = Uuid::new_v4().to_string();
        self.send(&job(&id, model, request));
        id
    }

    /// Sends a job with this deadline and returns its id.
    pub fn job_within(&self, time: Duration, model: &str, request: Value) -> String {
        let id = Uuid::new_v4().to_string();
        self.send(&job_within(time, &id, model, request));
        id
    }

    pub fn cancel(&self, id: &str) {
        self.send(&json!({"type": "job_cancel", "job_id": id}));
    }

    /// The next event, in order of arrival.
    pub fn next(&self, until: Instant) -> Result<Event, RecvTimeoutError> {
        self.events.recv_deadline(until)
    }

    /// Visits the events in order, those kept by earlier waits first, until `visit` stops.
    pub fn each(&self, what: &str, within: Duration, mut visit: impl FnMut(&Event) -> Take) {
        let deadline = Instant::now() + within;
        let mut earlier = std::mem::take(&mut *self.kept.borrow_mut());
        let mut left = VecDeque::new();
        loop {
            let event = match earlier.pop_front() {
                Some(event) => event,
                None => match self.events.recv_deadline(deadline) {
                    Ok(event) => event,
                    Err(RecvTimeoutError::Timeout) => {
                        panic!("no {what} within {within:?}; came instead: {}", brief(&left))
                    }
                    Err(RecvTimeoutError::Disconnected) => {
                        panic!("the agent's connection ended before {what}; came instead: {}", brief(&left))
                    }
                },
            };
            if let Event::Violation(text) = &event {
                panic!("while waiting for {what}: {text}");
            }
            match visit(&event) {
                Take::Leave => left.push_back(event),
                Take::Eat => {}
                Take::Stop => break,
            }
        }
        left.extend(earlier);
        *self.kept.borrow_mut() = left;
    }

    /// Waits for the first event that `pick` accepts.
    pub fn wait<T>(&self, what: &str, within: Duration, pick: impl Fn(&Event) -> Option<T>) -> T {
        let mut found = None;
        self.each(what, within, |event| {
            found = pick(event);
            if found.is_some() { Take::Stop } else { Take::Leave }
        });
        found.expect("the wait ended with a match")
    }

    /// Waits for the next frame of this type.
    pub fn frame(&self, kind: &str, within: Duration) -> Value {
        self.wait(kind, within, |event| match event {
            Event::Frame(frame) if frame["type"] == kind => Some(frame.clone()),
            _ => None,
        })
    }

    /// Waits for the end of a job; returns its chunks and its terminal frame.
    pub fn outcome(&self, id: &str) -> Outcome {
        self.outcome_within(id, 3 * SOON)
    }

    pub fn outcome_within(&self, id: &str, within: Duration) -> Outcome {
        let mut outcome = Outcome { chunks: Vec::new(), end: Value::Null };
        self.each(&format!("terminal frame of {id}"), within, |event| match event {
            Event::Frame(frame) if frame["job_id"] == id => {
                if frame["type"] == "job_chunk" {
                    outcome.chunks.push(unbase64(frame["data"].as_str().expect("data of a job_chunk")));
                    return Take::Eat;
                }
                outcome.end = frame.clone();
                Take::Stop
            }
            _ => Take::Leave,
        });
        outcome
    }

    /// Waits for the next chunk of a job.
    pub fn chunk(&self, id: &str) -> Vec<u8> {
        self.wait(&format!("job_chunk of {id}"), SOON, |event| match event {
            Event::Frame(frame) if frame["job_id"] == id => {
                assert_eq!(frame["type"], "job_chunk", "a chunk was awaited: {frame}");
                Some(unbase64(frame["data"].as_str().expect("data of a job_chunk")))
            }
            _ => None,
        })
    }

    /// The frames, kept or received within `time`, that `is_it` accepts. They are kept for a later wait.
    pub fn frames(&self, time: Duration, is_it: impl Fn(&Value) -> bool) -> Vec<Value> {
        let deadline = Instant::now() + time;
        let mut kept = self.kept.borrow_mut();
        while let Ok(event) = self.events.recv_deadline(deadline) {
            kept.push_back(event);
        }
        let known = |event: &Event| match event {
            Event::Frame(frame) if is_it(frame) => Some(frame.clone()),
            _ => None,
        };
        kept.iter().filter_map(known).collect()
    }

    /// Panics if a frame that `is_it` accepts is kept, or comes within `time`.
    pub fn assert_no_frame(&self, what: &str, time: Duration, is_it: impl Fn(&Value) -> bool) {
        if let Some(frame) = self.frames(time, is_it).first() {
            panic!("{what} must not come: {frame}");
        }
    }

    /// Panics if any frame comes for a job.
    pub fn assert_quiet(&self, id: &str) {
        self.assert_no_frame(&format!("a frame of {id}"), super::QUIET, |frame| frame["job_id"] == id);
    }

    /// Waits for the end of the TCP connection; returns the agent's Close frame, if it sent one.
    pub fn ended(&self, within: Duration) -> Option<(u16, String)> {
        assert!(self.ends_within(within), "the agent did not end the connection within {within:?}");
        self.kept.borrow().iter().find_map(|event| match event {
            Event::Close(close) => close.clone(),
            _ => None,
        })
    }

    /// Whether the TCP connection ends within `time`.
    pub fn ends_within(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        loop {
            match self.events.recv_deadline(deadline) {
                Ok(event) => self.kept.borrow_mut().push_back(event),
                Err(error) => return error == RecvTimeoutError::Disconnected,
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.pause(false);
        self.control.reads_slowly.store(false, Ordering::SeqCst);
        // After a reset the connection is closed.
        if !self.control.leaving.load(Ordering::SeqCst) {
            self.cut();
        }
    }
}

/// Whether a frame is an offer.
pub fn is_offer(frame: &Value) -> bool {
    frame["type"] == "capabilities"
}

/// A `job` frame with a deadline of 30 s.
pub fn job(id: &str, model: &str, request: Value) -> Value {
    json!({"type": "job", "job_id": id, "model_id": model, "request": request, "format": "openai", "deadline_ms": 30_000})
}

/// A `job` frame with this deadline.
pub fn job_within(time: Duration, id: &str, model: &str, request: Value) -> Value {
    let mut frame = job(id, model, request);
    frame["deadline_ms"] = json!(u64::try_from(time.as_millis()).expect("a deadline of milliseconds"));
    frame
}

/// The chunks and the end of a job.
#[derive(Debug)]
pub struct Outcome {
    pub chunks: Vec<Vec<u8>>,
    /// The terminal frame.
    pub end: Value,
}

impl Outcome {
    pub fn body(&self) -> Vec<u8> {
        self.chunks.concat()
    }

    /// The `job_done`.
    pub fn done(&self) -> &Value {
        assert_eq!(self.end["type"], "job_done", "the job should be done: {}", self.end);
        &self.end
    }

    /// The code of the `job_error`.
    pub fn error(&self) -> &str {
        assert_eq!(self.end["type"], "job_error", "the job should fail: {}", self.end);
        self.end["error_code"].as_str().expect("an error_code")
    }

    pub fn message(&self) -> &str {
        self.end["message"].as_str().expect("a message")
    }
}

fn brief(events: &VecDeque<Event>) -> String {
    let last = events.iter().rev().take(8).rev();
    let texts: Vec<String> = last.map(|event| format!("{event:?}").chars().take(300).collect()).collect();
    format!("{} events, the last: {texts:#?}", events.len())
}

/// Panics unless `auth` is signed over the bytes of the nonce.
pub fn verify_auth(auth: &Value, nonce: &[u8]) {
    let field = |name: &str| unbase64(auth[name].as_str().unwrap_or_else(|| panic!("no {name} in {auth}")));
    let (key, signature) = (field("pubkey"), field("signature"));
    assert_eq!((key.len(), signature.len()), (32, 64), "lengths of key and signature in {auth}");
    UnparsedPublicKey::new(&ED25519, key)
        .verify(nonce, &signature)
        .unwrap_or_else(|_| panic!("the signature does not verify over the {} nonce bytes: {auth}", nonce.len()));
}

struct Reader {
    /// Declared before `events`: whoever sees their end is the last owner of the socket.
    socket: WebSocket,
    control: Arc<Control>,
    events: Sender<Event>,
}

impl Reader {
    fn run(mut self) {
        let mut message = Vec::new();
        loop {
            self.control.wait_until_resumed();
            let limit = if self.control.reads_slowly.load(Ordering::SeqCst) {
                std::thread::sleep(secs(1));
                1
            } else {
                READ_BYTES
            };
            if self.socket.fill(limit).is_err() || !self.handle_frames(&mut message) {
                return;
            }
        }
    }

    /// Handles the complete frames received so far; false to stop reading.
    fn handle_frames(&mut self, message: &mut Vec<u8>) -> bool {
        let Self { socket, control, events } = self;
        let connection = Arc::clone(&socket.connection);
        loop {
            let frame = match socket.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => return true,
                Err(e) => {
                    let _ = events.send(Event::Violation(e.to_string()));
                    return false;
                }
            };
            let Some(event) = control.event(&frame, message, &connection) else { continue };
            let is_close = matches!(event, Event::Close(_));
            if events.send(event).is_err() || control.leaving.load(Ordering::SeqCst) {
                return false;
            }
            // After the exchange of Close frames the server closes the connection (RFC 6455, 7.1.1).
            if is_close {
                if !control.closing.load(Ordering::SeqCst) {
                    let _ = connection.write(&encode(CLOSE, true, &close_payload(1000, "")));
                }
                let _ = connection.stream.shutdown(Shutdown::Write);
            }
        }
    }
}

impl Control {
    fn wait_until_resumed(&self) {
        let paused = self.paused.lock().expect("pause flag");
        drop(self.resumed.wait_while(paused, |paused| *paused).expect("pause flag"));
    }

    /// What a frame means to the test. `message` holds the fragments of an incomplete message.
    fn event(&self, frame: &Frame, message: &mut Vec<u8>, connection: &Connection) -> Option<Event> {
        match frame.opcode() {
            TEXT | CONTINUATION => {
                message.extend_from_slice(frame.payload);
                if !frame.header.is_final {
                    return None;
                }
                let text = std::mem::take(message);
                if (self.tap.lock().expect("the tap"))(&text) {
                    return None;
                }
                Some(match serde_json::from_slice(&text) {
                    Ok(value) => Event::Frame(value),
                    Err(e) => Event::Violation(format!("a frame of the agent's is not JSON: {e}")),
                })
            }
            PING => {
                if self.answers_pings.load(Ordering::SeqCst) {
                    let _ = connection.write(&encode(PONG, true, frame.payload));
                }
                Some(Event::Ping)
            }
            PONG => Some(Event::Pong(frame.payload.to_vec())),
            CLOSE => Some(Event::Close(
                frame
                    .payload
                    .split_first_chunk()
                    .map(|(code, reason)| (u16::from_be_bytes(*code), String::from_utf8_lossy(reason).into_owned())),
            )),
            other => Some(Event::Violation(format!("the agent sent a frame with opcode {other}"))),
        }
    }
}
