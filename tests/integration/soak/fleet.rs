//! Four scripted backends, each of which is at times away, fails its health check, or hangs in it.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use serde_json::{Value, json};

use super::link_faults::LinkFaults;
use super::play_log::PlayLog;
use super::rng::Rng;
use super::script::{self, Ending, Framing, Refusal, Script, refusal_at};
use super::stream::Format;
use crate::support::*;

/// Kind and models of each backend: some models are its own, some shared, so that jobs fail over.
pub const BACKENDS: [(&str, &[&str]); 4] = [
    ("vllm", &["shared", "pair", "own-0"]),
    ("vllm", &["shared", "pair", "own-1"]),
    ("openai", &["shared", "wide", "own-2"]),
    ("llamacpp", &["wide", "own-3"]),
];

/// Longer than any job: a connection that stays open and silent for this long is an orphan.
const SILENCE: Duration = secs(120);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Behavior {
    Normal,
    Away,
    Unhealthy,
    Hanging,
}

pub struct Fleet {
    addresses: Vec<String>,
    play_log: Arc<PlayLog>,
    link_faults: Arc<LinkFaults>,
    states: Mutex<[State; BACKENDS.len()]>,
    faults: Mutex<Vec<String>>,
}

#[derive(Clone, Copy)]
struct State {
    behavior: Behavior,
    went_away: Option<Instant>,
    came_back: Option<Instant>,
}

impl Fleet {
    pub fn new(play_log: Arc<PlayLog>, link_faults: Arc<LinkFaults>) -> Arc<Self> {
        // Loopback addresses of their own, so that nothing else takes their ports while they are away.
        let addresses = (0..BACKENDS.len()).map(|n| nobody_at(&format!("127.0.0.{}", 40 + n))).collect();
        let normal = State { behavior: Behavior::Normal, went_away: None, came_back: None };
        Arc::new(Self {
            addresses,
            play_log,
            link_faults,
            states: Mutex::new([normal; BACKENDS.len()]),
            faults: Mutex::default(),
        })
    }

    /// The `[[backends]]` of the whole fleet.
    pub fn configure(&self, setup: Setup) -> Setup {
        self.addresses.iter().zip(BACKENDS).fold(setup, |setup, (address, (kind, _))| {
            setup.backend(format!("kind = \"{kind}\"\nurl = \"http://{address}\""))
        })
    }

    /// Whether any backend that lists `model` has been away since then.
    pub fn some_away(&self, model: &str, since: Instant) -> bool {
        (0..BACKENDS.len()).any(|n| BACKENDS[n].1.contains(&model) && self.was_away(n, since))
    }

    /// Whether this backend has been away since then.
    pub fn was_away(&self, backend: usize, since: Instant) -> bool {
        let state = self.states.lock().expect("states")[backend];
        state.behavior == Behavior::Away
            || [state.went_away, state.came_back].into_iter().flatten().any(|at| at >= since)
    }

    /// The faults that the backends have found.
    pub fn faults(&self) -> Vec<String> {
        std::mem::take(&mut *self.faults.lock().expect("faults"))
    }

    /// Runs the backends until the test stops; `started` gets a message once they listen.
    pub fn run(self: &Arc<Self>, mut rng: Rng, started: Sender<()>) {
        let mut backends: Vec<_> = (0..BACKENDS.len()).map(|n| Some(self.start(n))).collect();
        started.send(()).expect("the test");
        let mut due: Vec<_> = backends.iter().map(|_| Instant::now() + rng.time(2000..20_000)).collect();
        while !self.link_faults.is_stopped() {
            let paused = self.link_faults.is_paused();
            for (n, backend) in backends.iter_mut().enumerate() {
                let behavior = self.states.lock().expect("states")[n].behavior;
                let next = match behavior {
                    Behavior::Normal if !paused && Instant::now() >= due[n] => {
                        due[n] = Instant::now() + rng.time(500..6000);
                        *rng.pick(&[Behavior::Away, Behavior::Away, Behavior::Unhealthy, Behavior::Hanging])
                    }
                    Behavior::Away | Behavior::Unhealthy | Behavior::Hanging if paused || Instant::now() >= due[n] => {
                        due[n] = Instant::now() + rng.time(5000..40_000);
                        Behavior::Normal
                    }
                    _ => continue,
                };
                self.change(n, next, backend);
            }
            std::thread::sleep(ms(50));
        }
    }

    fn change(self: &Arc<Self>, n: usize, behavior: Behavior, backend: &mut Option<Backend>) {
        let note = |change: &dyn Fn(&mut State)| change(&mut self.states.lock().expect("states")[n]);
        // Away begins before the first connection breaks, and ends after the backend listens again.
        if behavior == Behavior::Away {
            note(&|state| (state.behavior, state.went_away) = (behavior, Some(Instant::now())));
            *backend = None;
        } else if backend.is_none() {
            *backend = Some(self.start(n));
            note(&|state| (state.behavior, state.came_back) = (behavior, Some(Instant::now())));
        } else {
            note(&|state| state.behavior = behavior);
        }
    }

    fn start(self: &Arc<Self>, n: usize) -> Backend {
        let fleet = Arc::clone(self);
        let backend = Backend::on(&self.addresses[n], move |request| fleet.answer(n, request));
        backend.forget();
        // The last byte of each request stays unread, so that closing the connection resets it; other scripts read it.
        backend.leave_unread(1);
        backend
    }

    fn answer(self: &Arc<Self>, n: usize, request: &Request) -> Answer {
        let behavior = self.states.lock().expect("states")[n].behavior;
        match request.line().as_str() {
            "POST /v1/chat/completions" => self.job(n, Format::Openai, request),
            "POST /v1/messages" => self.job(n, Format::Anthropic, request),
            _ if behavior == Behavior::Unhealthy => Answer::Raw(response(500, "text/plain", "not normal")),
            _ if behavior == Behavior::Hanging => Answer::Play(Box::new(|line| pause(line, secs(4)).map(|()| false))),
            "GET /v1/models" => {
                let models: Vec<_> = BACKENDS[n].1.iter().map(|id| json!({ "id": id })).collect();
                Answer::Json(200, json!({ "data": models }))
            }
            "GET /props" => Answer::Json(200, json!({"default_generation_settings": {"n_ctx": 4096}})),
            _ => Answer::Raw(response(200, "text/plain", "")),
        }
    }

    fn job(self: &Arc<Self>, n: usize, format: Format, request: &Request) -> Answer {
        if is_trial(request) {
            return Answer::Json(200, json!({"choices": [{"message": {"content": "a"}, "finish_reason": "length"}]}));
        }
        let seed = match read(format, request) {
            Ok(seed) => seed,
            Err(fault) => {
                self.faults.lock().expect("faults").push(format!("backend {n} got a request that {fault}"));
                return Answer::RawThenClose(Vec::new());
            }
        };
        let refusal = refusal_at(seed, n);
        let play_log = Arc::clone(&self.play_log);
        let play_number = play_log.begin(seed, n, refusal);
        Answer::Play(Box::new(move |line| {
            let outcome = match refusal {
                Some(refusal) => refuse(line, refusal),
                None => play(line, &Script::of(seed, format)),
            };
            play_log.end(seed, play_number, outcome.is_err());
            outcome
        }))
    }
}

/// Whether the agent tries a model that failed several jobs.
fn is_trial(request: &Request) -> bool {
    let body: Option<Value> = serde_json::from_slice(&[&request.body[..], b"}"].concat()).ok();
    body.is_some_and(|body| body["seed"].is_null() && body["max_tokens"] == 1)
}

/// The seed of a request that arrived unchanged, or what was changed.
fn read(format: Format, request: &Request) -> Result<u64, String> {
    let whole = [&request.body[..], b"}"].concat();
    let body: Value = serde_json::from_slice(&whole).map_err(|e| format!("is not JSON: {e}"))?;
    let seed = body["seed"].as_u64().ok_or("has no seed")?;
    let options = &body["stream_options"]["include_usage"];
    let as_sent = body["messages"] == super::job::messages(seed)
        && body["stream"] == true
        && body["model"].is_string()
        && (format == Format::Anthropic || *options == true);
    if as_sent { Ok(seed) } else { Err(format!("was changed on its way, job {seed}")) }
}

fn refuse(mut line: &TcpStream, refusal: &Refusal) -> io::Result<bool> {
    if !matches!(refusal.answer, script::Answer::Reset) {
        line.read_exact(&mut [0])?;
    }
    match refusal.answer {
        script::Answer::Status(status, text) => {
            line.write_all(&response(status, "text/plain", text))?;
            Ok(true)
        }
        script::Answer::Bytes(bytes) => line.write_all(bytes.as_bytes()).map(|()| false),
        script::Answer::Reset => Ok(false),
    }
}

/// Plays a script; an error means that the agent hung up.
fn play(mut line: &TcpStream, script: &Script) -> io::Result<bool> {
    if script.ending != Ending::Reset {
        line.read_exact(&mut [0])?;
    }
    pause(line, script.wait)?;
    if script.ending == Ending::NoHead {
        return pause(line, SILENCE).map(|()| false);
    }
    line.write_all(&head(script))?;
    let mut rest = &script.body[..];
    for size in &script.pieces {
        let (piece, after) = rest.split_at(*size);
        rest = after;
        match script.framing {
            Framing::Chunked => {
                line.write_all(&[format!("{size:x}\r\n").as_bytes(), piece, b"\r\n"].concat())?;
            }
            Framing::Length | Framing::UntilClose => line.write_all(piece)?,
        }
        pause(line, script.pause)?;
    }
    match script.ending {
        Ending::Whole { keeps } => {
            if script.framing == Framing::Chunked {
                line.write_all(b"0\r\n\r\n")?;
            }
            Ok(keeps && script.framing != Framing::UntilClose)
        }
        Ending::BadChunk => line.write_all(b"zz\r\n").map(|()| false),
        Ending::Silence => pause(line, SILENCE).map(|()| false),
        Ending::Open => {
            // The agent is expected to hang up.
            let _ = pause(line, SILENCE);
            Ok(false)
        }
        Ending::Closed | Ending::Reset | Ending::NoHead => Ok(false),
    }
}

fn head(script: &Script) -> Vec<u8> {
    let promised = script.body.len() + if matches!(script.ending, Ending::Whole { .. }) { 0 } else { 1000 };
    let framing = match script.framing {
        Framing::Chunked => "Transfer-Encoding: chunked\r\n".to_owned(),
        Framing::Length => format!("Content-Length: {promised}\r\n"),
        Framing::UntilClose => String::new(),
    };
    let content_type = script.content_type.map(|value| format!("Content-Type: {value}\r\n")).unwrap_or_default();
    format!("HTTP/1.1 200 OK\r\n{content_type}{framing}\r\n").into_bytes()
}

/// Waits for this time; fails as soon as the agent hangs up.
fn pause(mut line: &TcpStream, time: Duration) -> io::Result<()> {
    if time.is_zero() {
        return Ok(());
    }
    line.set_read_timeout(Some(time))?;
    let read = line.read(&mut [0]);
    line.set_read_timeout(None)?;
    match read {
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(()),
        Err(e) => Err(e),
        Ok(0) => Err(io::ErrorKind::ConnectionAborted.into()),
        Ok(_) => Err(io::Error::other("the agent speaks out of turn")),
    }
}
