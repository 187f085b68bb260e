//! `usepod-agent demo`: runs the agent with a local coordinator and a backend, in one process and over real sockets.
//!
//! Threads: the caller's thread controls the demo and prints; `agent` runs the same [`Agent`] as `usepod-agent run`; the coordinator,
//! the front door and the echo backend have threads of their own.
//!
//! Invariant: [`run`] returns `Ok` only if the coordinator received exactly the bytes that the backend sent and, for the built-in
//! echo backend, exactly the expected bytes.

mod sample_request;
mod assemble;
pub mod await_agent;
mod backends;
mod bench;
pub mod coordinator;
mod echo;
mod front_door;
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
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
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
use crate::http_server;
use crate::instance::identity::{Identity, IdentityError};
use crate::sys::shell_quote;
use crate::sys::threads;

use agent_sessions::Offer;
use backends::Chosen;
use coordinator::{Coordinator, CoordinatorError};
use output::{Output, ms};
use overhead::{OverheadMeter, Through};
use recording_backend::Recorded;
use timed_response::{Timed, percentile};

pub use agent_protocol::{HandshakeError, OfferedModel};
pub use job_events::JobEnd;

/// Default port of the front door; if it is in use, any free port.
pub const DEFAULT_PORT: u16 = 8788;

/// Time limit for the agent's first offer: the handshake, the probes and a margin.
const OFFER_WAIT: Duration = Duration::from_secs(20);

/// Time limit for a backend that is loading its model.
const LOADING_WAIT: Duration = Duration::from_secs(300);

/// Interval at which waits check for a stop of the demo.
const STOP_POLL: Duration = Duration::from_millis(50);

/// The default prompt for a real model.
const PROMPT: &str = "Say hello to the operator of this machine, in one short sentence.";

/// The default prompt for the echo backend.
const ECHO_PROMPT: &str = "Every word of this went from the coordinator through the agent to the backend and back.";

/// Number of request pairs for the overhead figure.
const OVERHEAD_PAIRS: usize = 5;

/// Price per million tokens without a config, in USDC micro-units. Nothing is charged.
const DEMO_PRICE_PER_1M: u64 = 100_000;

/// Drain time after Ctrl-C without a config.
const DRAIN: Duration = Duration::from_secs(5);

/// The options of the demo.
#[derive(Default)]
pub struct Options {
    /// The front door's port; `None` for [`DEFAULT_PORT`], or any free port if that is in use.
    pub port: Option<u16>,
    /// The prompt.
    pub prompt: Option<String>,
    /// Whether to exit after the first response.
    pub once: bool,
    /// Whether to measure the agent's overhead after the first response, and then exit.
    pub bench: bool,
    /// Backends, prices and limits. The coordinator and identity of the config are not used.
    pub config: Option<Config>,
}

/// Why the demo failed.
#[derive(Debug, Error)]
pub enum DemoError {
    /// The local coordinator failed, or the agent did not connect to it.
    #[error(transparent)]
    Coordinator(#[from] CoordinatorError),
    /// A requested address is not available.
    #[error("failed to listen on {address}: {source}; choose another `{option}`, or omit it")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The option that sets it.
        option: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A thread or socket could not be created.
    #[error("failed to start the demo: {0}")]
    Start(#[from] io::Error),
    /// The agent ended unexpectedly.
    #[error("the agent ended unexpectedly; see its log on stderr")]
    AgentEnded,
    /// The agent's key could not be created.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// No model is offered.
    #[error("the agent offers no models:{}", .0.iter().map(|why| format!("\n  {why}")).collect::<String>())]
    NoModels(Vec<String>),
    /// The request failed.
    #[error("the request failed with `{code}`: {message}")]
    JobFailed {
        /// The protocol's error code.
        code: String,
        /// The agent's message.
        message: String,
    },
    /// A request that bypasses the agent failed.
    #[error("the backend failed a direct request: {0}")]
    Direct(String),
    /// The bytes differ.
    #[error("the bytes through the agent are wrong: {0}")]
    WrongBytes(String),
    /// The bench would cost the operator money.
    #[error(
        "--bench would send requests to a hosted backend, and each costs money; remove that backend from the config, or omit --bench"
    )]
    Hosted,
    /// The demo was stopped before its last response.
    #[error("stopped before the responses were complete")]
    Stopped,
}

/// Runs the demo until its responses are complete (`once`, `bench`), or until `stop`. Prints to `out`.
///
/// # Errors
/// A response is missing, or its bytes are wrong.
pub fn run(mut options: Options, stop: &Arc<Stop>, out: &mut dyn Write) -> Result<(), DemoError> {
    let mut output = Output::new(out);
    output.line(format_args!(
        "usepod-agent {} demo: coordinator, agent and backend on this machine",
        env!("CARGO_PKG_VERSION")
    ));
    output.line(format_args!(""));
    let chosen = backends::choose(options.config.as_ref())?;
    let coordinator = Arc::new(Coordinator::start()?);
    let door = front_door::start(bind_door(options.port)?, coordinator.clone())?;
    let note =
        if chosen.echo.is_some() { " (built-in echo: no server responded on the default local ports)" } else { "" };
    for offered in &chosen.backends {
        output.line(format_args!("  backend      {}{note}", offered.backend.id()));
    }
    output.line(format_args!("  coordinator  {}", coordinator.url()));
    output.line(format_args!("  front door   http://{}/v1", door.address));
    let agent = start_agent(&coordinator, &chosen, options.config.take(), stop)?;
    let result = answers(&coordinator, &chosen, &agent, &options, stop, &mut output).and_then(|model_id| {
        if options.once || options.bench {
            return Ok(());
        }
        output.line(format_args!(""));
        output.line(format_args!("Try it, in another terminal:"));
        output.line(format_args!("  {}", curl(door.address, &model_id)));
        output.line(format_args!(""));
        output.line(format_args!("Ctrl-C ends the demo."));
        wait_until_stopped(&agent, stop)
    });
    stop_agent(agent, stop);
    result
}

fn bind_door(port: Option<u16>) -> Result<TcpListener, DemoError> {
    match port {
        Some(port) => http_server::bind(port).map_err(|source| DemoError::Listen {
            address: (Ipv4Addr::LOCALHOST, port).into(),
            option: "--port",
            source,
        }),
        None => Ok(http_server::bind(DEFAULT_PORT).or_else(|_| http_server::bind(0))?),
    }
}

/// Waits for the agent's offer, sends a request, and shows its stages and the agent's overhead. Returns the model.
fn answers(
    coordinator: &Coordinator,
    chosen: &Chosen,
    agent: &JoinHandle<()>,
    options: &Options,
    stop: &Stop,
    output: &mut Output<'_>,
) -> Result<String, DemoError> {
    let mut offer = wait_for_offer(coordinator, OFFER_WAIT, |_| true, agent, stop)?;
    if offer.models.is_empty() {
        let loading = backends::loading(&chosen.backends);
        if loading.is_empty() {
            return Err(DemoError::NoModels(backends::diagnose(&chosen.backends)));
        }
        output.line(format_args!("  waiting      {} is still loading its model", loading.join(", ")));
        offer = wait_for_offer(coordinator, LOADING_WAIT, |offer| !offer.models.is_empty(), agent, stop)?;
    }
    let Some(model) = model_to_ask(&offer) else {
        return Err(DemoError::NoModels(backends::diagnose(&chosen.backends)));
    };
    let model_id = model.model_id.clone();
    output.line(format_args!("  model        {model_id}"));
    let is_echo = backends::is_echo(chosen, &model_id);
    let prompt = options.prompt.as_deref().unwrap_or(if is_echo { ECHO_PROMPT } else { PROMPT });
    output.line(format_args!(""));
    output.line(format_args!("> {prompt}"));
    output.line(format_args!(""));
    let (record, backends) = (&*chosen.record, &*chosen.backends);
    let meter = OverheadMeter { coordinator, record, backends, model_id, is_echo, stop };
    let request = sample_request::request(&meter.model_id, prompt, sample_request::RESPONSE_TOKENS_MAX);
    let expected = is_echo.then(|| echo::exact_response(&request, coordinator::Format::Openai));
    let mut through = meter.send(request)?;
    let end = sample_request::print(&meter, &mut through, output)?;
    output.line(format_args!(""));
    let Through { job_id, arrived, .. } = through;
    show_stages(&offer, &arrived, &end, output);
    let Recorded { backend, given } = chosen.record.take(job_id)?;
    let verdict = compare(&arrived.bytes, &given.bytes, expected.as_deref());
    if !options.bench {
        show_overhead(&meter, backend.as_ref(), output);
    }
    let against = if is_echo { "as sent, and as expected" } else { "as sent by the backend" };
    match &verdict {
        Ok(()) => output.row("bytes", "ok", &format!("{} bytes, {against}", arrived.bytes.len())),
        Err(_) => output.row("bytes", "WRONG", "see the error"),
    }
    verdict?;
    if options.bench {
        bench::run(&meter, backend.as_ref(), options.prompt.as_deref(), model.max_concurrent, output)?;
    }
    Ok(meter.model_id)
}

fn wait_for_offer(
    coordinator: &Coordinator,
    limit: Duration,
    wanted: fn(&Offer) -> bool,
    agent: &JoinHandle<()>,
    stop: &Stop,
) -> Result<Offer, DemoError> {
    let give_up = Instant::now() + limit;
    loop {
        match coordinator.wait_for_offer(STOP_POLL, wanted) {
            Ok(offer) => return Ok(offer),
            Err(_) if stop.is_requested() => return Err(DemoError::Stopped),
            Err(_) if agent.is_finished() => return Err(DemoError::AgentEnded),
            Err(CoordinatorError::NoOffer(_, seen)) if Instant::now() >= give_up => {
                return Err(CoordinatorError::NoOffer(limit, seen).into());
            }
            Err(_) => {}
        }
    }
}

/// The model that is likely to respond first: a chat model, judging by its id, with a known context window, as loaded models have.
fn model_to_ask(offer: &Offer) -> Option<&OfferedModel> {
    let chats =
        |id: &str| !["embed", "rerank", "whisper", "tts"].iter().any(|other| id.to_ascii_lowercase().contains(other));
    let rank = |model: &&OfferedModel| (!chats(&model.model_id), model.context_window.is_none());
    offer.models.iter().min_by_key(rank)
}

fn show_stages(offer: &Offer, arrived: &Timed, end: &JobEnd, output: &mut Output<'_>) {
    let stages = offer.stages;
    output.row("connect", &ms(stages.connect), "agent started to WebSocket accepted");
    output.row("auth", &ms(stages.auth), "accepted to Ed25519 signature verified");
    let models = backends::counted(offer.models.len());
    output.row("discovery", &ms(stages.discovery), &format!("auth_ok to capabilities, {models}"));
    output.row("first byte", &ms(arrived.first_byte()), "job sent to first byte of the response");
    let tokens = match (end.input_tokens, end.output_tokens) {
        (Some(input), Some(output)) => format!("{input} tokens in, {output} out"),
        _ => "the backend reported no token counts".to_owned(),
    };
    output.row("total", &ms(arrived.total()), &tokens);
}

fn show_overhead(meter: &OverheadMeter<'_>, backend: &dyn Backend, output: &mut Output<'_>) {
    if meter.may_cost() {
        return output.row("overhead", "-", "not measured: each request to a hosted backend costs money");
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
            output.row("overhead", &format!("{sign}{apart} ms"), &note);
        }
        Err(error) => output.row("overhead", "-", &format!("not measured: {error}")),
    }
}

/// Compares the bytes that arrived with the bytes that the backend sent, and with the expected bytes.
fn compare(arrived: &[u8], given: &[u8], expected: Option<&[u8]>) -> Result<(), DemoError> {
    let differ = |other: &[u8], what: &str| {
        let position = arrived.iter().zip(other).position(|(a, b)| a != b).unwrap_or(arrived.len().min(other.len()));
        let (got, want) = (arrived.len(), other.len());
        Err(DemoError::WrongBytes(format!("{got} bytes arrived, {what} {want}; they differ from byte {position} on")))
    };
    if arrived.is_empty() {
        return Err(DemoError::WrongBytes("none arrived".to_owned()));
    }
    if arrived != given {
        return differ(given, "the backend sent");
    }
    match expected {
        Some(expected) if arrived != expected => differ(expected, "the echo should have sent"),
        _ => Ok(()),
    }
}

fn curl(door: SocketAddr, model_id: &str) -> String {
    let messages = json!([{"role": "user", "content": "Hello, who are you?"}]);
    let request = json!({"model": model_id, "stream": true, "messages": messages});
    let data = shell_quote::shell_quote(&request.to_string());
    format!("curl -N http://{door}/v1/chat/completions -H 'Content-Type: application/json' -d {data}")
}

/// Starts the agent on a separate thread.
fn start_agent(
    coordinator: &Coordinator,
    chosen: &Chosen,
    config: Option<Config>,
    stop: &Arc<Stop>,
) -> Result<JoinHandle<()>, DemoError> {
    let (pricing, limits) = config.map_or_else(own_terms, |config| (config.pricing, config.limits));
    let url = coordinator.url().parse().map_err(io::Error::other)?;
    let agent = Agent {
        coordinator: CoordinatorConfig { url, enrollment_code: None, roots: Default::default() },
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
            log::error!("failed to run the agent: {error}");
        }
    };
    Ok(threads::spawn("agent", run)?)
}

fn wait_until_stopped(agent: &JoinHandle<()>, stop: &Stop) -> Result<(), DemoError> {
    while !stop.is_requested() {
        if agent.is_finished() {
            return Err(DemoError::AgentEnded);
        }
        let _ = stop.signal().recv_timeout(STOP_POLL);
    }
    Ok(())
}

/// Drains the agent, as a signal would.
fn stop_agent(agent: JoinHandle<()>, stop: &Arc<Stop>) {
    if !stop.is_requested() {
        stop.request(); // a second request would abort the drain
    }
    if agent.join().is_err() {
        log::error!("the agent panicked");
    }
}

/// The prices and limits without a config.
fn own_terms() -> (Pricing, Limits) {
    let default = Price { input_per_1m: DEMO_PRICE_PER_1M, output_per_1m: DEMO_PRICE_PER_1M };
    let limits = Limits { max_concurrent: MAX_CONCURRENT_DEFAULT, max_tokens_per_minute: None, drain: DRAIN };
    (Pricing { default, models: HashMap::new() }, limits)
}

#[cfg(test)]
mod tests;
