//! `usepod-agent demo`: the real agent between a local coordinator and a backend, all in one process, over real sockets.
//!
//! Who runs here: the caller's thread orchestrates and prints; `agent` runs the very supervisor that `run` would; the
//! coordinator, the front door and the echo backend have their own threads (see there). Nothing of this exists unless
//! [`run`] is called.
//!
//! Invariant: the exit code is the verdict. [`run`] returns `Ok` only if the bytes that reached the coordinator are the
//! bytes that the backend gave, and, for the built-in echo, the bytes that it must give.

mod sample_request;
mod assemble;
pub mod await_agent;
mod backends;
mod bench;
pub mod coordinator;
mod echo;
pub mod front_door;
mod job_events;
mod agent_protocol;
mod agent_sessions;
mod overhead;
mod output;
mod pairing;
mod session;
mod sse;
mod timed_response;
mod websocket;
mod recording_backend;

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;
use thiserror::Error;

use crate::agent::Agent;
use crate::agent::shutdown::Stop;
use crate::backend::Backend;
use crate::config::{Config, CoordinatorConfig, Limits, MAX_CONCURRENT_DEFAULT, Price, Pricing};
use crate::discovery::OfferTerms;
use crate::instance::identity::{Identity, IdentityError};
use crate::sys::shell_quote;
use crate::sys::threads;

use agent_sessions::Offer;
use backends::Chosen;
use coordinator::{Coordinator, CoordinatorError};
use front_door::FrontDoor;
use output::{Output, ms};
use overhead::{OverheadMeter, Through};
use recording_backend::Seen;
use timed_response::{Timed, percentile};

pub use agent_protocol::{HandshakeError, JobEnd, OfferedModel};

/// Where the front door is when nobody says otherwise and the port is free.
pub const DEFAULT_PORT: u16 = 8788;

/// How long the agent may take to its first offer: the bounds of its own handshake and of its probes, and a little.
const OFFER_WAIT: Duration = Duration::from_secs(20);

/// How long the demo waits for a backend that is loading its model.
const LOADING_WAIT: Duration = Duration::from_secs(300);

/// How often a wait looks whether the demo is to stop.
const STOP_POLL: Duration = Duration::from_millis(50);

/// What a real model is asked.
const PROMPT: &str = "Say hello to the operator of this machine, in one short sentence.";

/// What the echo is asked to repeat.
const ECHO_PROMPT: &str = "Every word of this went from the coordinator through the agent to the backend and back.";

/// Requests of each sort behind the overhead that is shown.
const OVERHEAD_PAIRS: usize = 5;

/// Prices of the demo when there is no config, in millionths of a dollar; nobody pays them.
const DEMO_PRICE_PER_1M: u64 = 100_000;

/// How long jobs in flight may go on after Ctrl-C when there is no config.
const DRAIN: Duration = Duration::from_secs(5);

/// What the operator asked for.
#[derive(Default)]
pub struct Options {
    /// The front door's port; `None`: [`DEFAULT_PORT`], or any other when that is taken.
    pub port: Option<u16>,
    /// What to ask.
    pub prompt: Option<String>,
    /// Whether to leave after the first answer.
    pub once: bool,
    /// Whether to measure, after the first answer, what the agent adds to such ones; then it leaves as well.
    pub bench: bool,
    /// Backends, prices and limits; its coordinator and its identity are not used.
    pub config: Option<Config>,
}

/// Why the demo failed.
#[derive(Debug, Error)]
pub enum DemoError {
    /// The local coordinator does not work, or the agent did not reach it.
    #[error(transparent)]
    Coordinator(#[from] CoordinatorError),
    /// The port that was asked for cannot be had.
    #[error("failed to listen on 127.0.0.1:{port}: {source}; choose another `--port`, or leave it out")]
    Port {
        /// The port.
        port: u16,
        /// Why not.
        source: io::Error,
    },
    /// The address for agents cannot be had.
    #[error("failed to listen on {address}: {source}; choose another `--listen`, or leave it out")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// A thread or socket of the demo could not be made.
    #[error("failed to start the demo: {0}")]
    Start(#[from] io::Error),
    /// The agent ended by itself.
    #[error("the agent ended before it was told to; its log on stderr says why")]
    AgentEnded,
    /// The agent got no key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// There is nothing to ask.
    #[error("the agent offers no models:{}", .0.iter().map(|why| format!("\n  {why}")).collect::<String>())]
    NoModels(Vec<String>),
    /// The request came back as an error.
    #[error("the request failed with `{code}`: {message}")]
    JobFailed {
        /// The protocol's error code.
        code: String,
        /// What the agent says.
        message: String,
    },
    /// The backend failed when asked without the agent.
    #[error("the backend failed when asked directly: {0}")]
    Direct(String),
    /// The bytes are not right.
    #[error("the bytes through the agent are wrong: {0}")]
    WrongBytes(String),
    /// The bench would cost the operator money.
    #[error("a hosted backend would get requests of the bench, and each costs money; leave it out, or `--bench`")]
    Hosted,
    /// A signal came before the last answer that the demo wanted.
    #[error("stopped before its requests were answered")]
    Stopped,
}

/// Runs the demo until its answers (`once`, `bench`) or until `stop`. Prints to `out`.
///
/// # Errors
/// When an answer is missing, or its bytes are not right.
pub fn run(options: Options, stop: &Arc<Stop>, out: &mut dyn Write) -> Result<(), DemoError> {
    let mut page = Output::new(out);
    page.line(format_args!(
        "usepod-agent {} demo: coordinator, agent and backend on this machine",
        env!("CARGO_PKG_VERSION")
    ));
    page.line(format_args!(""));
    let chosen = backends::choose(options.config.as_ref())?;
    let coordinator = Arc::new(Coordinator::start()?);
    let door = FrontDoor::start(bind_door(options.port)?, coordinator.clone())?;
    let note =
        if chosen.echo.is_some() { " (the built-in echo: no server answered on the usual local ports)" } else { "" };
    for offered in &chosen.backends {
        page.line(format_args!("  backend      {}{note}", offered.backend.id()));
    }
    page.line(format_args!("  coordinator  {}", coordinator.url()));
    page.line(format_args!("  front door   http://{}/v1", door.address()));
    let agent = RunningAgent::start(&coordinator, &chosen, options.config, stop)?;
    let asked = Asked { prompt: options.prompt, bench: options.bench };
    let result = answers(&coordinator, &chosen, &agent, asked, stop, &mut page).and_then(|model_id| {
        if options.once || options.bench {
            return Ok(());
        }
        page.line(format_args!(""));
        page.line(format_args!("Try it, in another terminal:"));
        page.line(format_args!("  {}", curl(&door, &model_id)));
        page.line(format_args!(""));
        page.line(format_args!("Ctrl-C ends the demo."));
        agent.wait_until_stopped(stop)
    });
    agent.stop(stop);
    result
}

fn bind_door(port: Option<u16>) -> Result<TcpListener, DemoError> {
    match port {
        Some(port) => front_door::bind(port).map_err(|source| DemoError::Port { port, source }),
        None => Ok(front_door::bind(DEFAULT_PORT).or_else(|_| front_door::bind(0))?),
    }
}

/// What the operator wants to be asked.
struct Asked {
    prompt: Option<String>,
    bench: bool,
}

/// Waits for the agent, asks it, and shows the stages and what the agent adds; the model that answered.
fn answers(
    coordinator: &Coordinator,
    chosen: &Chosen,
    agent: &RunningAgent,
    asked: Asked,
    stop: &Stop,
    page: &mut Output<'_>,
) -> Result<String, DemoError> {
    let mut offer = wait_for_offer(coordinator, OFFER_WAIT, |_| true, agent, stop)?;
    if offer.models.is_empty() {
        let loading = backends::loading(&chosen.backends);
        if loading.is_empty() {
            return Err(DemoError::NoModels(backends::diagnose(&chosen.backends)));
        }
        page.line(format_args!("  waiting      {} is still loading its model", loading.join(", ")));
        offer = wait_for_offer(coordinator, LOADING_WAIT, |offer| !offer.models.is_empty(), agent, stop)?;
    }
    let Some(model) = model_to_ask(&offer) else {
        return Err(DemoError::NoModels(backends::diagnose(&chosen.backends)));
    };
    let model_id = model.model_id.clone();
    page.line(format_args!("  model        {model_id}"));
    let is_echo = backends::is_echo(chosen, &model_id);
    let prompt = asked.prompt.as_deref().unwrap_or(if is_echo { ECHO_PROMPT } else { PROMPT });
    page.line(format_args!(""));
    page.line(format_args!("> {prompt}"));
    page.line(format_args!(""));
    let (record, backends) = (&*chosen.record, &*chosen.backends);
    let meter = OverheadMeter { coordinator, record, backends, model_id, is_echo, stop };
    let request = sample_request::request(&meter.model_id, prompt, sample_request::ANSWER_TOKENS_MAX);
    let expected = is_echo.then(|| echo::exact_answer(&request, coordinator::Format::Openai));
    let mut through = meter.send(request)?;
    let end = sample_request::print(&meter, &mut through, page)?;
    page.line(format_args!(""));
    let Through { job_id, arrived, .. } = through;
    show_stages(&offer, &arrived, &end, page);
    let Seen { backend, given } = chosen.record.take(job_id)?;
    let verdict = compare(&arrived.bytes, &given.bytes, expected.as_deref());
    if !asked.bench {
        show_overhead(&meter, backend.as_ref(), page);
    }
    let against = if is_echo { "the same as sent, and as expected" } else { "the same as the backend sent" };
    match &verdict {
        Ok(()) => page.row("bytes", "ok", &format!("{} bytes, {against}", arrived.bytes.len())),
        Err(_) => page.row("bytes", "WRONG", "see the error"),
    }
    verdict?;
    if asked.bench {
        bench::run(&meter, backend.as_ref(), asked.prompt.as_deref(), model.max_concurrent, page)?;
    }
    Ok(meter.model_id)
}

fn wait_for_offer(
    coordinator: &Coordinator,
    limit: Duration,
    wanted: fn(&Offer) -> bool,
    agent: &RunningAgent,
    stop: &Stop,
) -> Result<Offer, DemoError> {
    let give_up = Instant::now() + limit;
    loop {
        match coordinator.wait_for_offer(STOP_POLL, wanted) {
            Ok(offer) => return Ok(offer),
            Err(_) if stop.is_requested() => return Err(DemoError::Stopped),
            Err(_) if agent.has_ended() => return Err(DemoError::AgentEnded),
            Err(CoordinatorError::NoOffer(_, seen)) if Instant::now() >= give_up => {
                return Err(CoordinatorError::NoOffer(limit, seen).into());
            }
            Err(_) => {}
        }
    }
}

/// The model that is most likely to answer soon: one to chat with, by its name, and with a known window, which the ones
/// that are loaded have.
fn model_to_ask(offer: &Offer) -> Option<&OfferedModel> {
    let chats =
        |id: &str| !["embed", "rerank", "whisper", "tts"].iter().any(|other| id.to_ascii_lowercase().contains(other));
    let rank = |model: &&OfferedModel| (!chats(&model.model_id), model.context_window.is_none());
    offer.models.iter().min_by_key(rank)
}

fn show_stages(offer: &Offer, arrived: &Timed, end: &JobEnd, page: &mut Output<'_>) {
    let stages = offer.stages;
    page.row("connect", &ms(stages.connect), "agent started to WebSocket accepted");
    page.row("auth", &ms(stages.auth), "accepted to Ed25519 signature verified");
    let models = backends::counted(offer.models.len());
    page.row("discovery", &ms(stages.discovery), &format!("auth_ok to capabilities, {models}"));
    page.row("first byte", &ms(arrived.first_byte()), "job sent to first byte of the answer");
    let tokens = match (end.input_tokens, end.output_tokens) {
        (Some(input), Some(output)) => format!("{input} tokens in, {output} out"),
        _ => "the backend gave no token counts".to_owned(),
    };
    page.row("total", &ms(arrived.total()), &tokens);
}

fn show_overhead(meter: &OverheadMeter<'_>, backend: &dyn Backend, page: &mut Output<'_>) {
    if meter.may_cost() {
        return page.row("overhead", "-", "not measured: each request to a hosted backend costs money");
    }
    match bench::pairs(meter, backend, &sample_request::request(&meter.model_id, "Hi", 1), OVERHEAD_PAIRS) {
        Ok(figures) => {
            let [direct, through] =
                [&figures.direct, &figures.through].map(|column| percentile(&column.first_byte, 50));
            let sign = if through < direct { "-" } else { "" };
            let apart = output::millis(through.abs_diff(direct), 2);
            let note = format!(
                "first byte: {} through the agent, {} directly (medians of {OVERHEAD_PAIRS})",
                ms(through),
                ms(direct)
            );
            page.row("overhead", &format!("{sign}{apart} ms"), &note);
        }
        Err(error) => page.row("overhead", "-", &format!("not measured: {error}")),
    }
}

/// Whether what arrived is what the backend gave, and what it must have given.
fn compare(arrived: &[u8], given: &[u8], expected: Option<&[u8]>) -> Result<(), DemoError> {
    let differ = |other: &[u8], what: &str| {
        let place = arrived.iter().zip(other).position(|(a, b)| a != b).unwrap_or(arrived.len().min(other.len()));
        let (got, want) = (arrived.len(), other.len());
        Err(DemoError::WrongBytes(format!("{got} bytes arrived, {what} {want}; they differ from byte {place} on")))
    };
    if arrived.is_empty() {
        return Err(DemoError::WrongBytes("none arrived".to_owned()));
    }
    if arrived != given {
        return differ(given, "the backend gave");
    }
    match expected {
        Some(expected) if arrived != expected => differ(expected, "the echo should have sent"),
        _ => Ok(()),
    }
}

fn curl(door: &FrontDoor, model_id: &str) -> String {
    let messages = json!([{"role": "user", "content": "Hello, who are you?"}]);
    let request = json!({"model": model_id, "stream": true, "messages": messages});
    let data = shell_quote::shell_quote(&request.to_string());
    format!("curl -N http://{}/v1/chat/completions -H 'Content-Type: application/json' -d {data}", door.address())
}

/// The agent, on a thread of its own.
struct RunningAgent {
    thread: JoinHandle<()>,
}

impl RunningAgent {
    fn start(
        coordinator: &Coordinator,
        chosen: &Chosen,
        config: Option<Config>,
        stop: &Arc<Stop>,
    ) -> Result<Self, DemoError> {
        let (pricing, limits) = config.map_or_else(own_terms, |config| (config.pricing, config.limits));
        let url = coordinator.url().parse().map_err(io::Error::other)?;
        let agent = Agent {
            coordinator: CoordinatorConfig { url, enrollment_code: None, roots: Default::default() },
            use_proxy: false, // the coordinator is on this machine
            identity: Identity::ephemeral()?,
            backends: chosen.backends.clone(),
            terms: OfferTerms { pricing, max_concurrent: limits.max_concurrent },
            max_tokens_per_minute: limits.max_tokens_per_minute,
            drain: limits.drain,
            instance: None,
        };
        let stop = stop.clone();
        coordinator.expect_agent();
        let run = move || {
            if let Err(error) = agent.run(&stop) {
                log::error!("the agent cannot run: {error}");
            }
        };
        let thread = threads::spawn("agent", run)?;
        Ok(Self { thread })
    }

    fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    fn wait_until_stopped(&self, stop: &Stop) -> Result<(), DemoError> {
        while !stop.is_requested() {
            if self.has_ended() {
                return Err(DemoError::AgentEnded);
            }
            let _ = stop.signal().recv_timeout(STOP_POLL);
        }
        Ok(())
    }

    /// Lets the agent drain, as a signal would.
    fn stop(self, stop: &Arc<Stop>) {
        if !stop.is_requested() {
            stop.request(); // a second request would cut the drain short
        }
        if self.thread.join().is_err() {
            log::error!("the agent panicked");
        }
    }
}

/// Prices and limits without a config.
fn own_terms() -> (Pricing, Limits) {
    let default = Price { input_per_1m: DEMO_PRICE_PER_1M, output_per_1m: DEMO_PRICE_PER_1M };
    let limits = Limits { max_concurrent: MAX_CONCURRENT_DEFAULT, max_tokens_per_minute: None, drain: DRAIN };
    (Pricing { default, models: HashMap::new() }, limits)
}

#[cfg(test)]
mod tests;
