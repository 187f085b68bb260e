//! The agent, as started by `run`: connects to the coordinator, serves a session, waits, and reconnects until it is stopped.
//!
//! No network failure ends the agent: it retries indefinitely, with the delays of [`backoff`].

pub mod backoff;
mod drain;
mod early_jobs;
mod housekeeping;
pub mod session;
pub mod shutdown;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;

use crate::agent::backoff::{AttemptEnd, Backoff};
use crate::agent::housekeeping::InstanceFiles;
use crate::agent::session::SessionEnd;
use crate::agent::shutdown::{ActiveState, Stop};
use crate::config::CoordinatorConfig;
use crate::discovery::{BackendOffer, OfferFeed, OfferTerms, Prober};
use crate::instance::identity::Identity;
use crate::instance::wake_socket::WakeSocket;
use crate::instance::{AgentPaths, InstanceLock};
use crate::job_executor::stats::JobStats;
use crate::job_executor::token_limit::TokenLimit;
use crate::link::Dialer;
use crate::link::handshake::{self, HandshakeError};
use crate::link::protocol::OfferLimits;
use crate::link::writer::HEARTBEAT_INTERVAL;
use crate::logging::sanitize_for_log;
use crate::observe::{Connection, LiveState, Sources, StateFileWriter};
use crate::sys::{jitter, sd_notify};

/// How long a stopping agent waits for its last state to be written: the disk may hang.
const LAST_WRITE_TIMEOUT: Duration = Duration::from_secs(1);

/// An agent, ready to run.
pub struct Agent {
    /// The coordinator to connect to.
    pub coordinator: CoordinatorConfig,
    /// The key and the provider id.
    pub identity: Identity,
    /// The backends to offer.
    pub backends: Vec<BackendOffer>,
    /// The prices and the limit on concurrent jobs.
    pub terms: OfferTerms,
    /// The token limit: jobs are rejected while the last minute's tokens exceed it.
    pub max_tokens_per_minute: Option<u64>,
    /// How long jobs in flight may take when the agent stops.
    pub drain: Duration,
    /// The files through which other processes observe and control the agent; `None` for an agent without files.
    pub instance: Option<InstanceHandle>,
}

/// An agent's claim on its identity.
pub struct InstanceHandle {
    /// The files beside the identity.
    pub paths: AgentPaths,
    /// The lock, held by this process.
    pub lock: InstanceLock,
}

/// How one connection ended.
enum Attempt {
    /// Before `auth_ok`. The duration is the minimum delay before the next attempt, if the server requested one.
    Failed(Connection, Option<Duration>),
    /// After `auth_ok`; how long the session lasted.
    Served(SessionEnd, Duration),
}

impl Attempt {
    /// The minimum delay before the next attempt.
    fn retry_after(&self) -> Duration {
        match self {
            Attempt::Failed(_, retry_after) => retry_after.unwrap_or_default(),
            Attempt::Served(..) => Duration::ZERO,
        }
    }
}

impl Agent {
    /// Serves until `stop` is requested and the jobs in flight are done. Blocks the calling thread.
    ///
    /// # Errors
    /// The system refused a thread or a socket at the start.
    pub fn run(mut self, stop: &Arc<Stop>) -> std::io::Result<()> {
        let offers = Arc::new(OfferFeed::default());
        let stats = Arc::new(JobStats::default());
        let token_limit = Arc::new(TokenLimit::new(self.max_tokens_per_minute));
        let wake_socket = self.wake_socket()?;
        let live = Arc::new(LiveState::new(self.identity.provider_id(), wake_socket.waker()));
        // The lock is held here too: if a bug ends the housekeeping thread, the agent counts as unresponsive, but no second agent
        // starts beside it.
        let mut _lock = None;
        let files = self.instance.take().map(|InstanceHandle { paths, lock }| {
            let lock = Arc::new(lock);
            _lock = Some(lock.clone());
            let sources = Sources {
                live: live.clone(),
                offers: offers.clone(),
                stats: stats.clone(),
                token_limit: token_limit.clone(),
            };
            let state_file = StateFileWriter::new(paths.state(), &self.identity, self.coordinator.address(), sources);
            let files = InstanceFiles { paths, lock, state_file, live: live.clone(), offers: offers.clone() };
            // Before the first offer.
            files.apply_pause_marker();
            files
        });
        let backends = std::mem::take(&mut self.backends);
        let waker = wake_socket.waker();
        let (prober, rounds) = Prober::new(backends, self.terms.clone(), offers.clone(), move || waker.wake());
        let housekeeping_ended = housekeeping::spawn(wake_socket, rounds, files)?;
        let dialer = Dialer::new(self.coordinator.url.clone(), self.coordinator.roots.clone());
        let limits = OfferLimits {
            max_concurrent_total: self.terms.max_concurrent,
            max_tokens_per_minute: self.max_tokens_per_minute,
        };
        let context = session::Context {
            offers: &offers,
            prober: &prober,
            stats: &stats,
            token_limit: &token_limit,
            live: &live,
            limits,
            drain: self.drain,
            stop,
        };
        // Not only once it is connected: an agent whose coordinator is down runs too.
        sd_notify::notify(sd_notify::READY);
        let mut backoff = Backoff::default();
        while !stop.is_requested() {
            let attempt = self.connect_and_serve(&dialer, &context);
            stop.set_active(ActiveState::Nothing);
            if stop.is_requested() {
                break;
            }
            let ended = log_and_record_end(&attempt, &live);
            let delay = backoff.delay_after(ended, jitter::random()).max(attempt.retry_after());
            log::info!("reconnecting in {} ms", delay.as_millis());
            wait(delay, stop, &live);
        }
        live.not_connected(Connection::Connecting(None));
        drop(prober);
        if housekeeping_ended.recv_timeout(LAST_WRITE_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            log::warn!("the last state was not written within {} s", LAST_WRITE_TIMEOUT.as_secs());
        }
        log::info!("stopped");
        Ok(())
    }

    /// The socket that wakes the housekeeping thread; if possible, one that other processes can use.
    fn wake_socket(&self) -> std::io::Result<WakeSocket> {
        let Some(instance) = &self.instance else { return WakeSocket::private() };
        let path = instance.paths.wake();
        WakeSocket::at(&path).or_else(|e| {
            log::warn!(
                "`{}`: failed to create the wake socket: {e}; `pause` takes effect with a delay of up to 15 s",
                path.display()
            );
            WakeSocket::private()
        })
    }

    fn connect_and_serve(&mut self, dialer: &Dialer, context: &session::Context<'_>) -> Attempt {
        let stop = context.stop;
        context.live.mark_alive();
        // The backends are probed while the agent connects.
        let first_offer = context.prober.refresh();
        let opened = |tcp| stop.set_active(ActiveState::Handshake(tcp));
        let mut half = match dialer.dial(stop.signal(), opened) {
            Ok(half) => half,
            Err(e) => return Attempt::Failed(Connection::Connecting(Some(e.to_string())), e.retry_after()),
        };
        let code = self.coordinator.enrollment_code.as_deref();
        match handshake::authenticate(&mut half, &self.identity, code) {
            Ok(provider_id) => {
                if let Some(id) = provider_id {
                    self.identity.set_provider_id(id);
                }
            }
            Err(HandshakeError::Rejected(reason)) => return Attempt::Failed(Connection::Rejected(reason), None),
            Err(e) => return Attempt::Failed(Connection::Connecting(Some(e.to_string())), None),
        }
        context.live.connected(self.identity.provider_id());
        let id = self.identity.provider_id().map_or_else(|| "a provider without id".to_owned(), sanitize_for_log);
        log::info!("connected as {id}");
        let authenticated = Instant::now();
        let end = session::serve(half, &first_offer, context);
        Attempt::Served(end, authenticated.elapsed())
    }
}

/// Waits before the next attempt, at most until `stop` is requested. Shows signs of life meanwhile, because the delay may exceed
/// the liveness timeout.
fn wait(delay: Duration, stop: &Stop, live: &LiveState) {
    let until = Instant::now() + delay;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let waited = stop.signal().recv_timeout(left.min(HEARTBEAT_INTERVAL));
        if waited != Err(RecvTimeoutError::Timeout) || until <= Instant::now() {
            return;
        }
        live.mark_alive();
    }
}

/// Logs how an attempt ended and records it in `live`.
fn log_and_record_end(attempt: &Attempt, live: &LiveState) -> AttemptEnd {
    match attempt {
        Attempt::Failed(connection, _) => {
            match connection {
                Connection::Rejected(reason) => {
                    log::warn!("not connected: the coordinator rejected this agent: {reason}");
                }
                Connection::Connecting(why) => log::warn!("not connected: {}", why.as_deref().unwrap_or_default()),
                Connection::Connected => {}
            }
            live.not_connected(connection.clone());
            AttemptEnd::BeforeAuth
        }
        Attempt::Served(end, lasted) => {
            let why = match end {
                SessionEnd::Planned(how) => {
                    log::info!("the coordinator ended the session: {how}");
                    Some(format!("the coordinator ended the session: {how}"))
                }
                SessionEnd::Unexpected(why) => {
                    log::warn!("the session ended after {} s: {why}", lasted.as_secs());
                    Some(format!("the session ended: {why}"))
                }
                SessionEnd::Stopped => None,
            };
            live.not_connected(Connection::Connecting(why));
            if matches!(end, SessionEnd::Planned(_)) { AttemptEnd::Planned } else { AttemptEnd::After(*lasted) }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::backend::{Backend, BackendHealth, BackendModel, BackendResult, Job, JobResult, JobSink};
    use crate::config::{Price, Pricing};
    use crate::instance::LockError;
    use crate::net::tls::ExtraRoots;

    /// Panics in the housekeeping thread, and signals that.
    #[derive(Default)]
    struct PanickingBackend(AtomicBool);

    impl Backend for PanickingBackend {
        fn kind(&self) -> &'static str {
            "vllm"
        }

        fn id(&self) -> &str {
            self.0.store(true, Ordering::SeqCst);
            panic!("a bug")
        }

        fn list_models(&self) -> BackendResult<Vec<BackendModel>> {
            Ok(Vec::new())
        }

        fn health(&self) -> BackendResult<BackendHealth> {
            Ok(BackendHealth::default())
        }

        fn execute(&self, _: &Job, _: &mut dyn JobSink) -> BackendResult<JobResult> {
            Ok(JobResult::default())
        }
    }

    #[test]
    fn lock_is_kept_when_the_housekeeping_thread_panics() {
        let folder = std::env::temp_dir().join(format!("usepod-supervisor-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let paths = AgentPaths::beside(&folder.join("identity.key"));
        let lock = InstanceLock::acquire(&paths).expect("the lock");
        let price = Price { input_per_1m: 1, output_per_1m: 1 };
        let backend = Arc::new(PanickingBackend::default());
        let agent = Agent {
            coordinator: CoordinatorConfig {
                url: "ws://127.0.0.72:9/".parse().expect("a URL"),
                enrollment_code: None,
                roots: ExtraRoots::default(),
            },
            identity: Identity::load_or_create(&folder.join("identity.key")).expect("an identity"),
            backends: vec![BackendOffer { backend: backend.clone(), allowed_models: None, max_concurrent: None }],
            terms: OfferTerms { pricing: Pricing { default: price, models: Default::default() }, max_concurrent: 1 },
            max_tokens_per_minute: None,
            drain: Duration::ZERO,
            instance: Some(InstanceHandle { paths: paths.clone(), lock }),
        };
        let stop = Arc::new(Stop::default());
        let running = std::thread::spawn({
            let stop = stop.clone();
            move || agent.run(&stop)
        });
        let wait_until = |what: &str, is_so: &dyn Fn() -> bool| {
            let until = Instant::now() + Duration::from_secs(10);
            while !is_so() {
                assert!(Instant::now() < until, "{what}");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        wait_until("the panic", &|| backend.0.load(Ordering::SeqCst));
        // Of the resources of the thread, only the lock is dropped after the socket.
        wait_until("the socket is removed", &|| !paths.wake().exists());
        let watched = Instant::now();
        while watched.elapsed() < Duration::from_millis(100) {
            assert!(matches!(InstanceLock::acquire(&paths), Err(LockError::Held(_))));
        }
        stop.request();
        running.join().expect("no panic").expect("no error");
        assert!(InstanceLock::acquire(&paths).is_ok());
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}
