//! A relay with nothing in it: a thread and a backend connection a job, one frame and one write a read. No JSON, no
//! signature, no timeouts, no usage; it ends with its coordinator. Nor are threads and connections kept for the next job, so
//! that an agent that keeps them may be the faster one in a job that is over at once.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::Result;
use crate::http_client::Answer;
use crate::websocket::{Frames, TEXT, push_frame};

/// A mask is to be random for the sake of proxies in between; here are none.
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
    let mut frames = Frames::default();
    let mut is_upgraded = false;
    let mut buffer = vec![0; 16 << 10];
    loop {
        let n = socket.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        frames.buffer().extend_from_slice(&buffer[..n]);
        is_upgraded = is_upgraded || frames.next_head().is_some();
        while is_upgraded && let Some((_, payload)) = frames.next()? {
            answer(std::str::from_utf8(payload)?, &output, backend_port)?;
        }
    }
}

fn answer(message: &str, output: &Arc<Mutex<TcpStream>>, backend_port: u16) -> Result<()> {
    if message.contains(r#""auth_challenge""#) {
        return send(output, &[br#"{"type":"auth_response","pubkey":"","signature":"","agent_version":"floor"}"#]);
    }
    if message.contains(r#""auth_ok""#) {
        return send(output, &[br#"{"type":"capabilities","models":[{"model_id":"m"}],"limits":{},"metadata":{}}"#]);
    }
    let (_, id) = message.split_once(r#""job_id":""#).ok_or("no job_id")?;
    let id = id.get(..36).ok_or("a short job_id")?.to_owned();
    let (_, request) = message.split_once(r#""request":"#).ok_or("no request")?;
    let request = request.strip_suffix('}').ok_or("no end")?.to_owned();
    let output = Arc::clone(output);
    thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(move || relay(&id, request.as_bytes(), &output, backend_port))?;
    Ok(())
}

/// An error here ends the thread without an end of the job, which the coordinator waits for.
fn relay(id: &str, request: &[u8], output: &Mutex<TcpStream>, backend_port: u16) -> Result<()> {
    let mut answer = Answer::to(request, backend_port)?;
    let mut data = String::new();
    while let Some(body) = answer.next()? {
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
    push_frame(&mut frame, TEXT, MASK, text);
    Ok(output.lock().unwrap_or_else(PoisonError::into_inner).write_all(&frame)?)
}
