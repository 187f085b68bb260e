//! The floor: the least that a relay can do. A thread and a backend connection per job, one frame and one write per read; no
//! JSON, signature, timeout or usage. It ends with its coordinator.
//!
//! It keeps neither threads nor connections for the next job, so an agent that does may be faster with short jobs.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::Result;
use crate::http_client::Response;
use crate::support::websocket::{FrameDecoder, TEXT, push_frame};

/// Need not be random: there is no proxy in between that a client could attack by its payloads.
const MASK: Option<[u8; 4]> = Some([0x37, 0xfa, 0x21, 0x3d]);

const STACK_BYTES: usize = 64 << 10;

pub fn run(coordinator_port: u16, backend_port: u16) -> Result<()> {
    let mut socket = TcpStream::connect(("127.0.0.1", coordinator_port))?;
    socket.set_nodelay(true)?;
    socket.write_all(
        b"GET /provider/connect HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
          Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    )?;
    let output = Arc::new(Mutex::new(socket.try_clone()?));
    let mut frames = FrameDecoder::default();
    let mut is_upgraded = false;
    let mut buffer = vec![0; 16 << 10];
    loop {
        let n = socket.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        frames.buffer().extend_from_slice(&buffer[..n]);
        is_upgraded = is_upgraded || frames.next_head().is_some();
        while is_upgraded && let Some(frame) = frames.next_frame()? {
            handle_message(std::str::from_utf8(frame.payload)?, &output, backend_port)?;
        }
    }
}

fn handle_message(message: &str, output: &Arc<Mutex<TcpStream>>, backend_port: u16) -> Result<()> {
    if message.contains(r#""auth_challenge""#) {
        return send(output, &[br#"{"type":"auth_response","pubkey":"","signature":"","agent_version":"floor"}"#]);
    }
    if message.contains(r#""auth_ok""#) {
        return send(output, &[br#"{"type":"capabilities","models":[{"model_id":"m"}],"limits":{},"metadata":{}}"#]);
    }
    let (_, id) = message.split_once(r#""job_id":""#).ok_or("no job_id")?;
    let id = id.get(..36).ok_or("a short job_id")?.to_owned();
    let (_, request) = message.split_once(r#""request":"#).ok_or("no request")?;
    let request = request.strip_suffix('}').ok_or("no end of the message")?.to_owned();
    let output = Arc::clone(output);
    thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(move || relay(&id, request.as_bytes(), &output, backend_port))?;
    Ok(())
}

/// After an error no terminal frame follows, and the client waits until its deadline.
fn relay(id: &str, request: &[u8], output: &Mutex<TcpStream>, backend_port: u16) -> Result<()> {
    let mut response = Response::to(request, backend_port)?;
    let mut data = String::new();
    while let Some(body) = response.next()? {
        data.clear();
        BASE64_STANDARD.encode_string(body, &mut data);
        send(
            output,
            &[br#"{"type":"job_chunk","job_id":""#, id.as_bytes(), br#"","data":""#, data.as_bytes(), br#""}"#],
        )?;
    }
    let tokens = br#"","tokens":{"input":0,"output":0,"input_tokens":0,"output_tokens":0},"duration_ms":0}"#;
    send(output, &[br#"{"type":"job_done","job_id":""#, id.as_bytes(), tokens])
}

fn send(output: &Mutex<TcpStream>, text: &[&[u8]]) -> Result<()> {
    let mut frame = Vec::with_capacity(1 << 10);
    push_frame(&mut frame, TEXT, true, MASK, text);
    Ok(output.lock().unwrap_or_else(PoisonError::into_inner).write_all(&frame)?)
}
