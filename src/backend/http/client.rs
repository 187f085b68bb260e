//! HTTP to one backend: ureq agents, leased for one exchange at a time.
//!
//! An agent carries at most one kept-alive connection. It is leased by one thread, its clone ([`Interrupt`]) can end
//! that thread's blocking call from another, and an agent that was interrupted is never leased again.

use std::fmt;
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ureq::config::Config;
use ureq::http::uri::Scheme;
use ureq::http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, header};
use ureq::{Agent, AsSendBody, Body};

use super::api_key::ApiKey;
use super::monitor::{ConnectionMonitor, MonitoredConnector, SharedConnector, connector, plain_connector};
use super::resolver::LocalFirstResolver;
use crate::backend::{BackendError, BackendResult};
use crate::net::proxy;
use crate::net::tls::ExtraRoots;

/// Agents kept for the next request, each with at most one open connection and its buffers.
const IDLE_AGENTS_MAX: usize = 8;
/// Local servers close an idle connection after 5 s (llama.cpp, uvicorn).
const IDLE_AGE_LOCAL: Duration = Duration::from_secs(4);
/// Hosted ones keep it longer, and a TLS handshake costs more.
const IDLE_AGE_HOSTED: Duration = Duration::from_secs(15);
/// Time to connect within one's own network.
const CONNECT_TIMEOUT_LOCAL: Duration = Duration::from_secs(5);
/// Time to connect over the internet, name and TLS included.
const CONNECT_TIMEOUT_HOSTED: Duration = Duration::from_secs(10);
/// Of a TLS session, each way; ureq's default of 128 KiB would be 64 MiB for 256 jobs.
const BUFFER_BYTES: usize = 16 << 10;

/// The means to end a blocking call of another thread: sockets, handshakes and bodies wake at once. Without effect once
/// the exchange is over, for the connection may serve another job by then.
#[derive(Clone)]
pub struct Interrupt(Arc<Mutex<Option<Agent>>>);

impl Interrupt {
    /// Closes whatever the exchange has open. The agent is never leased again.
    pub fn interrupt(self) {
        // Closed under the lock, so that the exchange cannot end, and its agent be leased again, in between.
        if let Some(agent) = self.agent().take() {
            agent.shutdown();
        }
    }

    fn was_used(&self) -> bool {
        self.agent().is_none()
    }

    /// The agent, unless it was interrupted.
    fn take(&self) -> Option<Agent> {
        self.agent().take()
    }

    fn agent(&self) -> MutexGuard<'_, Option<Agent>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Interrupt")
    }
}

/// The agents for one backend.
#[derive(Debug)]
pub struct Client {
    config: Config,
    connector: SharedConnector,
    key: ApiKey,
    idle_age: Duration,
    idle: Mutex<Vec<Idle>>,
}

#[derive(Debug)]
struct Idle {
    agent: Agent,
    wire: Arc<ConnectionMonitor>,
    since: Instant,
}

impl Client {
    /// For a backend at `url`, on the operator's own machines, or a `hosted` one; only the latter may go through a proxy.
    pub fn new(url: &str, hosted: bool, key: ApiKey) -> Client {
        let is_plain = !hosted && Uri::try_from(url).is_ok_and(|url| url.scheme() == Some(&Scheme::HTTP));
        let connector = if is_plain { plain_connector() } else { connector(ExtraRoots::default()) };
        Client::over(connector, hosted, key)
    }

    /// A hosted server that needs no key, and whose certificate one of these authorities may have signed, too.
    pub fn trusting(roots: &ExtraRoots) -> Client {
        Client::over(connector(roots.clone()), true, ApiKey::NotNeeded)
    }

    fn over(connector: SharedConnector, hosted: bool, key: ApiKey) -> Client {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // A redirect would carry the prompt to an address that the operator never named.
            .max_redirects(0)
            .proxy(if hosted { proxy::from_env() } else { None })
            .timeout_connect(Some(if hosted { CONNECT_TIMEOUT_HOSTED } else { CONNECT_TIMEOUT_LOCAL }))
            .input_buffer_size(BUFFER_BYTES)
            .output_buffer_size(BUFFER_BYTES)
            .max_idle_connections(1)
            .max_idle_connections_per_host(1)
            .max_idle_age(if hosted { IDLE_AGE_HOSTED } else { IDLE_AGE_LOCAL })
            .user_agent(concat!("usepod-agent/", env!("CARGO_PKG_VERSION")))
            // Bodies are relayed verbatim, so they had better not be compressed.
            .accept_encoding("identity")
            .build();
        let idle_age = config.max_idle_age();
        Client { config, connector, key, idle_age, idle: Mutex::default() }
    }

    /// Why no request can succeed.
    ///
    /// # Errors
    /// The variable that should hold the key does not.
    pub fn ready(&self) -> BackendResult<()> {
        match &self.key {
            ApiKey::Missing { variable } => Err(BackendError::MissingKey(variable.clone())),
            ApiKey::NotNeeded | ApiKey::Bearer(_) => Ok(()),
        }
    }

    /// The error that a status stands for. Some gateways repeat the key that they refuse: it goes no further.
    pub fn status_error(&self, status: u16, body: &[u8]) -> BackendError {
        match &self.key {
            ApiKey::Bearer(header) => {
                let key = header.trim_start_matches("Bearer ");
                BackendError::from_status(status, without_key(body, key).as_bytes())
            }
            ApiKey::NotNeeded | ApiKey::Missing { .. } => BackendError::from_status(status, body),
        }
    }

    /// An agent for one exchange: the one used last, if its connection may still be open, else a fresh one.
    pub fn lease(&self) -> AgentLease<'_> {
        let idle = {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            // The list is ordered by age: dropping the stale ones closes their connections.
            let stale = idle.iter().take_while(|i| i.since.elapsed() >= self.idle_age).count();
            let stale: Vec<Idle> = idle.drain(..stale).collect();
            let newest = idle.pop();
            drop(idle);
            drop(stale);
            newest
        };
        match idle {
            Some(Idle { agent, wire, .. }) => {
                wire.reset();
                AgentLease::new(self, agent, wire)
            }
            None => {
                let wire = Arc::new(ConnectionMonitor::default());
                let connector = MonitoredConnector::new(self.connector.clone(), wire.clone());
                let agent = Agent::with_parts(self.config.clone(), connector, LocalFirstResolver);
                AgentLease::new(self, agent, wire)
            }
        }
    }
}

/// One agent, for one exchange.
pub struct AgentLease<'a> {
    client: &'a Client,
    agent: Agent,
    wire: Arc<ConnectionMonitor>,
    interrupt: Interrupt,
}

impl<'a> AgentLease<'a> {
    fn new(client: &'a Client, agent: Agent, wire: Arc<ConnectionMonitor>) -> AgentLease<'a> {
        let interrupt = Interrupt(Arc::new(Mutex::new(Some(agent.clone()))));
        AgentLease { client, agent, wire, interrupt }
    }

    /// The means to end this lease's blocking calls.
    pub fn interrupt(&self) -> Interrupt {
        self.interrupt.clone()
    }

    /// Sends a `GET`; `time` covers the whole exchange, including the response body.
    pub fn get(&self, url: &str, time: Duration) -> Result<Response<Body>, ureq::Error> {
        self.exchange(|| self.request(url, ()), time)
    }

    /// Sends a `POST` with a JSON body; `time` covers the whole exchange, including the response body.
    pub fn post(&self, url: &str, body: &[u8], time: Duration) -> Result<Response<Body>, ureq::Error> {
        let request = || {
            let mut request = self.request(url, body)?;
            *request.method_mut() = Method::POST;
            request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            Ok(request)
        };
        self.exchange(request, time)
    }

    fn request<B>(&self, url: &str, body: B) -> Result<Request<B>, ureq::http::Error> {
        let mut request = Request::new(body);
        *request.uri_mut() = url.parse()?;
        // The map lives as long as the response; by default it reserves space for six headers.
        *request.headers_mut() = HeaderMap::with_capacity(2);
        if let ApiKey::Bearer(key) = &self.client.key {
            request.headers_mut().insert(header::AUTHORIZATION, key.parse()?);
        }
        Ok(request)
    }

    /// Sends a request. Sends it a second time if the server had closed the kept-alive connection, and so never saw it:
    /// the agent then opens a new connection, which the same [`Interrupt`] ends.
    fn exchange<B: AsSendBody>(
        &self,
        request: impl Fn() -> Result<Request<B>, ureq::http::Error>,
        time: Duration,
    ) -> Result<Response<Body>, ureq::Error> {
        let started = Instant::now();
        let answer = self.run(request()?, time);
        let never_arrived = matches!(answer, Err(ureq::Error::Io(_))) && self.wire.reused_dead_connection();
        if !never_arrived || self.interrupt.was_used() {
            return answer;
        }
        let left = time.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Err(ureq::Error::Timeout(ureq::Timeout::Global));
        }
        self.wire.reset();
        self.run(request()?, left)
    }

    fn run(&self, request: Request<impl AsSendBody>, time: Duration) -> Result<Response<Body>, ureq::Error> {
        self.agent.run(self.agent.configure_request(request).timeout_global(Some(time)).build())
    }

    /// What was seen on its connection.
    pub fn wire(&self) -> &ConnectionMonitor {
        &self.wire
    }

    /// Gives the agent back for the next exchange, when this one was read to its end and nobody interrupted it.
    pub fn give_back(self) {
        let Some(agent) = self.interrupt.take() else { return };
        let mut idle = self.client.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_AGENTS_MAX {
            idle.push(Idle { agent, wire: self.wire, since: Instant::now() });
        }
    }
}

/// A body without the key, and without the beginning of one at its end, where reading may have stopped.
fn without_key(body: &[u8], key: &str) -> String {
    let mut text = String::from_utf8_lossy(body).replace(key, "(the API key)");
    let cut = (1..key.len()).rev().find(|n| text.ends_with(&key[..*n])).unwrap_or(0);
    text.truncate(text.len() - cut);
    text
}

/// Reads at most `max` bytes of a body, and says how that ended; what comes after them is left unread.
pub fn read_bounded(body: Body, max: usize) -> (Vec<u8>, std::io::Result<()>) {
    let mut bytes = Vec::new();
    let end = body.into_reader().take(max as u64).read_to_end(&mut bytes).map(drop);
    (bytes, end)
}
