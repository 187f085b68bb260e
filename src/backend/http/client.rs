//! The HTTP client of one backend: a pool of `ureq` agents, each leased for one exchange at a time.
//!
//! An agent holds at most one kept-alive connection. While one thread leases it, another can end that thread's blocking
//! call through an [`Interrupt`]. An interrupted agent is never leased again.

use std::fmt;
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ureq::config::Config;
use ureq::http::uri::Scheme;
use ureq::http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, header};
use ureq::{Agent, AsSendBody, Body, Proxy, SendBody};

use super::api_key::ApiKey;
use super::body::RequestBody;
use super::monitor::{ConnectionMonitor, MonitoredConnector, SharedConnector, connector, plain_connector};
use super::resolver::SharedResolver;
use crate::backend::{BackendError, BackendResult};
use crate::net::proxy;
use crate::net::tls::ExtraRoots;

/// Idle agents kept for later requests, each with at most one open connection and its buffers.
const IDLE_AGENTS_MAX: usize = 8;
/// Age limit of idle connections. Below the 5 s after which local servers (llama.cpp, uvicorn) close them, so that hardly any
/// request meets a connection that is being closed.
const IDLE_AGE_LOCAL: Duration = Duration::from_secs(4);
/// The same for hosted servers: they keep connections open longer, and a TLS handshake costs more.
const IDLE_AGE_HOSTED: Duration = Duration::from_secs(15);
/// Time limit for connecting within the local network.
const CONNECT_TIMEOUT_LOCAL: Duration = Duration::from_secs(5);
/// Time limit for connecting over the internet, including name lookup and TLS.
const CONNECT_TIMEOUT_HOSTED: Duration = Duration::from_secs(10);
/// Buffer of a TLS session in each direction; ureq's default of 128 KiB would add up to 64 MiB for 256 jobs.
const BUFFER_BYTES: usize = 16 << 10;

/// Ends the blocking calls of an exchange from another thread: connects, handshakes, reads and writes fail at once. Has
/// no effect after the exchange, because its connection may be serving another job by then.
#[derive(Clone)]
pub struct Interrupt(Arc<Mutex<Option<Agent>>>);

impl Interrupt {
    /// Closes the connection of the exchange.
    pub fn interrupt(self) {
        // Under the lock, so that the agent cannot be given back and leased again in between.
        if let Some(agent) = self.agent().take() {
            agent.shutdown();
        }
    }

    /// Whether [`Interrupt::interrupt`] was called.
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

/// The HTTP client of one backend.
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
    monitor: Arc<ConnectionMonitor>,
    since: Instant,
}

impl Client {
    /// A client for the backend at `url`. Only `hosted` backends are reached through a proxy.
    pub fn new(url: &str, hosted: bool, key: ApiKey) -> Client {
        let is_plain = !hosted && Uri::try_from(url).is_ok_and(|url| url.scheme() == Some(&Scheme::HTTP));
        let connector = if is_plain { plain_connector() } else { connector(ExtraRoots::default()) };
        Client::over(connector, url, hosted, key)
    }

    /// A client for the hosted server at `url`, which needs no API key; trusts these authorities as well.
    pub fn trusting(url: &str, roots: &ExtraRoots) -> Client {
        Client::over(connector(roots.clone()), url, true, ApiKey::NotNeeded)
    }

    fn over(connector: SharedConnector, url: &str, hosted: bool, key: ApiKey) -> Client {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // A redirect would send the prompt to an address that the operator did not configure.
            .max_redirects(0)
            .proxy(if hosted { proxy_for(url) } else { None })
            .timeout_connect(Some(if hosted { CONNECT_TIMEOUT_HOSTED } else { CONNECT_TIMEOUT_LOCAL }))
            .input_buffer_size(BUFFER_BYTES)
            .output_buffer_size(BUFFER_BYTES)
            .max_idle_connections(1)
            .max_idle_connections_per_host(1)
            .max_idle_age(if hosted { IDLE_AGE_HOSTED } else { IDLE_AGE_LOCAL })
            .user_agent(concat!("usepod-agent/", env!("CARGO_PKG_VERSION")))
            // Bodies are relayed verbatim, so they must not be compressed.
            .accept_encoding("identity")
            .build();
        let idle_age = config.max_idle_age();
        Client { config, connector, key, idle_age, idle: Mutex::default() }
    }

    /// Checks that requests can succeed at all.
    ///
    /// # Errors
    /// The environment variable for the API key contains no usable key.
    pub fn ready(&self) -> BackendResult<()> {
        match &self.key {
            ApiKey::Missing { variable } => Err(BackendError::MissingKey(variable.clone())),
            ApiKey::NotNeeded | ApiKey::Bearer(_) => Ok(()),
        }
    }

    /// The error for an HTTP status. Removes the API key, which some gateways repeat when they reject it.
    pub fn status_error(&self, status: u16, body: &[u8]) -> BackendError {
        match &self.key {
            ApiKey::Bearer(header) => {
                let key = header.trim_start_matches("Bearer ");
                BackendError::from_status(status, without_key(body, key).as_bytes())
            }
            ApiKey::NotNeeded | ApiKey::Missing { .. } => BackendError::from_status(status, body),
        }
    }

    /// Leases the most recently used agent whose connection may still be open, else a new agent.
    pub fn lease(&self) -> AgentLease<'_> {
        let idle = {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            // The list is ordered by age. Dropping the stale agents closes their connections.
            let stale = idle.iter().take_while(|i| i.since.elapsed() >= self.idle_age).count();
            let stale: Vec<Idle> = idle.drain(..stale).collect();
            let newest = idle.pop();
            drop(idle);
            drop(stale);
            newest
        };
        match idle {
            Some(Idle { agent, monitor, .. }) => {
                monitor.reset();
                AgentLease::new(self, agent, monitor)
            }
            None => {
                let monitor = Arc::new(ConnectionMonitor::default());
                let connector = MonitoredConnector::new(self.connector.clone(), monitor.clone());
                let agent = Agent::with_parts(self.config.clone(), connector, SharedResolver);
                AgentLease::new(self, agent, monitor)
            }
        }
    }
}

/// An agent leased for one exchange.
pub struct AgentLease<'a> {
    client: &'a Client,
    agent: Agent,
    monitor: Arc<ConnectionMonitor>,
    interrupt: Interrupt,
}

impl<'a> AgentLease<'a> {
    fn new(client: &'a Client, agent: Agent, monitor: Arc<ConnectionMonitor>) -> AgentLease<'a> {
        let interrupt = Interrupt(Arc::new(Mutex::new(Some(agent.clone()))));
        AgentLease { client, agent, monitor, interrupt }
    }

    /// A handle that ends this lease's blocking calls.
    pub fn interrupt(&self) -> Interrupt {
        self.interrupt.clone()
    }

    /// Sends a `GET`; `time` covers the whole exchange, including the response body.
    pub fn get(&self, url: &str, time: Duration) -> Result<Response<Body>, ureq::Error> {
        self.exchange(|| self.request(url, ()), time)
    }

    /// Sends a `POST` with a JSON body; `time` covers the whole exchange, including the response body.
    pub fn post(&self, url: &str, body: &RequestBody, time: Duration) -> Result<Response<Body>, ureq::Error> {
        let request = || {
            let mut request = self.request(url, SendBody::from_owned_reader(body.reader()))?;
            *request.method_mut() = Method::POST;
            request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            request.headers_mut().insert(header::CONTENT_LENGTH, body.content_length().into());
            Ok(request)
        };
        self.exchange(request, time)
    }

    fn request<B>(&self, url: &str, body: B) -> Result<Request<B>, ureq::http::Error> {
        let mut request = Request::new(body);
        *request.uri_mut() = url.parse()?;
        // The map lives as long as the response; by default it reserves space for six headers.
        *request.headers_mut() = HeaderMap::with_capacity(3);
        if let ApiKey::Bearer(key) = &self.client.key {
            request.headers_mut().insert(header::AUTHORIZATION, key.parse()?);
        }
        Ok(request)
    }

    /// Sends a request. Repeats it once, on a new connection, if the kept-alive connection ended at once and without a byte: the
    /// server has then closed it as idle, and has hardly received the request. The same [`Interrupt`] ends both connections.
    fn exchange<B: AsSendBody>(
        &self,
        request: impl Fn() -> Result<Request<B>, ureq::http::Error>,
        time: Duration,
    ) -> Result<Response<Body>, ureq::Error> {
        let started = Instant::now();
        let answer = self.run(request()?, time);
        let was_closed = matches!(answer, Err(ureq::Error::Io(_))) && self.monitor.reused_dead_connection();
        if !was_closed || self.interrupt.was_used() {
            return answer;
        }
        let left = time.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Err(ureq::Error::Timeout(ureq::Timeout::Global));
        }
        self.monitor.reset();
        self.run(request()?, left)
    }

    fn run(&self, request: Request<impl AsSendBody>, time: Duration) -> Result<Response<Body>, ureq::Error> {
        self.agent.run(self.agent.configure_request(request).timeout_global(Some(time)).build())
    }

    /// The monitor of the agent's connection.
    pub fn monitor(&self) -> &ConnectionMonitor {
        &self.monitor
    }

    /// Returns the agent to the pool unless it was interrupted. Call this only after reading the response to its end.
    pub fn give_back(self) {
        let Some(agent) = self.interrupt.take() else { return };
        let mut idle = self.client.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_AGENTS_MAX {
            idle.push(Idle { agent, monitor: self.monitor, since: Instant::now() });
        }
    }
}

fn proxy_for(url: &str) -> Option<Proxy> {
    let uri = Uri::try_from(url).ok()?;
    let port = uri.port_u16().unwrap_or(if uri.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 });
    proxy::from_env(uri.host()?, port)
}

/// Removes the key from a body, and a partial key from its end, where reading may have stopped.
fn without_key(body: &[u8], key: &str) -> String {
    let mut text = String::from_utf8_lossy(body).replace(key, "(the API key)");
    let cut = (1..key.len()).rev().find(|n| text.ends_with(&key[..*n])).unwrap_or(0);
    text.truncate(text.len() - cut);
    text
}

/// Reads at most `max` bytes of a body. Also returns how reading ended.
pub fn read_bounded(body: Body, max: usize) -> (Vec<u8>, std::io::Result<()>) {
    let mut bytes = Vec::new();
    let end = body.into_reader().take(max as u64).read_to_end(&mut bytes).map(drop);
    (bytes, end)
}
