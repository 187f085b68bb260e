//! Connect, serve, wait, and again, until told to stop. Runs in the caller's thread.
//!
//! Nothing that the network does ends it: a connection that cannot be made is tried again for ever, with the delays of
//! [`crate::agent::backoff`].

pub mod backoff;
pub mod session;
pub mod shutdown;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::agent::backoff::{Backoff, Ended};
use crate::agent::session::{HandshakeError, SessionEnd};
use crate::agent::shutdown::{Live, Stop};
use crate::backend;
use crate::config::CoordinatorConfig;
use crate::discovery;
use crate::discovery::{Housekeeping, OfferedBackend, Offers, Prober, Terms};
use crate::instance::identity::Identity;
use crate::instance::wake_socket::Bell;
use crate::instance::{InstanceLock, Places};
use crate::job_executor::stats::Statistics;
use crate::job_executor::token_limit::TokenLimit;
use crate::link::Dialer;
use crate::link::protocol::OfferLimits;
use crate::logging::shown;
use crate::observe::{self, Board, Connection, Recorder, Tally, Told};

/// Everything that an agent is made of.
pub struct Agent {
    /// Where it dials.
    pub coordinator: CoordinatorConfig,
    /// Whether `HTTPS_PROXY` is heeded on the way there.
    pub use_proxy: bool,
    /// Who it is.
    pub identity: Identity,
    /// What it may offer.
    pub backends: Vec<OfferedBackend>,
    /// At which prices, and how much at a time.
    pub terms: Terms,
    /// Jobs are refused while so many were used in the last minute.
    pub max_tokens_per_minute: Option<u64>,
    /// For jobs in flight when it stops.
    pub drain: Duration,
    /// What other processes may know and do; `None` for an agent that is nobody else's business.
    pub presence: Option<Presence>,
}

/// An agent as other processes see it.
pub struct Presence {
    /// The files beside the identity.
    pub places: Places,
    /// Held by this process.
    pub lock: InstanceLock,
}

/// How one connection ended.
enum Attempt {
    /// Before `auth_ok`.
    Failed(Connection),
    /// After it, having lasted so long.
    Served(SessionEnd, Duration),
}

impl Agent {
    /// Serves until `stop` is requested and the jobs in flight are done.
    ///
    /// # Errors
    /// The system refused a thread at the start.
    pub fn run(mut self, stop: &Arc<Stop>) -> std::io::Result<()> {
        let offers = Arc::new(Offers::default());
        let statistics = Arc::new(Statistics::default());
        let token_limit = Arc::new(TokenLimit::new(self.max_tokens_per_minute));
        let tally = Arc::new(Tally::default());
        let bell = self.bell()?;
        let board = Arc::new(Board::new(self.identity.provider_id(), bell.ringer()));
        let mut _held = None;
        let housekeeping: Housekeeping = match self.presence.take() {
            None => Box::new(|_, _| ()),
            Some(Presence { places, lock }) => {
                // Also here: should a bug end the housekeeping, the agent is one that hangs, and no second one comes beside it.
                let lock = Arc::new(lock);
                _held = Some(lock.clone());
                let mut recorder = Recorder {
                    places,
                    lock,
                    fixed: observe::fixed(&self.identity, self.coordinator.address()),
                    board: board.clone(),
                    offers: offers.clone(),
                    statistics: statistics.clone(),
                    tally: tally.clone(),
                    token_limit: token_limit.clone(),
                    told: Told::default(),
                };
                // Before the first offer.
                recorder.heed_pause();
                Box::new(move |asked, backends| recorder.look(asked, backends))
            }
        };
        let backends = std::mem::take(&mut self.backends);
        let prober = Prober::spawn(backends, self.terms.clone(), offers.clone(), bell, housekeeping)?;
        let proxy = if self.use_proxy { backend::proxy_from_env() } else { None };
        let dialer = Dialer::new(self.coordinator.url.clone(), self.coordinator.roots.clone(), proxy);
        let limits = OfferLimits {
            max_concurrent_total: self.terms.max_concurrent,
            max_tokens_per_minute: self.max_tokens_per_minute,
        };
        let context = session::Context {
            offers: &offers,
            prober: &prober,
            statistics: &statistics,
            token_limit: &token_limit,
            tally: &tally,
            board: &board,
            limits,
            drain: self.drain,
            stop,
        };
        let mut backoff = Backoff::default();
        while !stop.is_requested() {
            let attempt = self.connect_and_serve(&dialer, &context);
            stop.set_live(Live::Nothing);
            if stop.is_requested() {
                break;
            }
            let ended = report(&attempt, &board);
            let delay = backoff.delay_after(ended, discovery::dice());
            log::info!("connecting again in {} ms", delay.as_millis());
            let _ = stop.signal().recv_timeout(delay);
        }
        log::info!("stopped");
        Ok(())
    }

    /// One that other processes can ring, where there can be such a one.
    fn bell(&self) -> std::io::Result<Bell> {
        let Some(presence) = &self.presence else { return Bell::private() };
        let path = presence.places.wake();
        Bell::at(&path).or_else(|e| {
            log::warn!("`{}`: failed to make a socket ({e}), so `pause` takes effect up to 15 s late", path.display());
            Bell::private()
        })
    }

    fn connect_and_serve(&mut self, dialer: &Dialer, context: &session::Context<'_>) -> Attempt {
        let stop = context.stop;
        context.board.shows_life();
        // Probes and the dial go side by side.
        let settled = context.prober.refresh();
        let opened = |tcp| stop.set_live(Live::Handshake(tcp));
        let mut half = match dialer.dial(stop.signal(), opened) {
            Ok(half) => half,
            Err(e) => return Attempt::Failed(Connection::Connecting(Some(e.to_string()))),
        };
        let code = self.coordinator.enrollment_code.as_deref();
        match session::authenticate(&mut half, &self.identity, code) {
            Ok(provider_id) => {
                if let Some(id) = provider_id {
                    self.identity.set_provider_id(id);
                }
            }
            Err(HandshakeError::Rejected(reason)) => return Attempt::Failed(Connection::Rejected(reason)),
            Err(e) => return Attempt::Failed(Connection::Connecting(Some(e.to_string()))),
        }
        context.board.connected(self.identity.provider_id());
        let id = self.identity.provider_id().map_or_else(|| "a provider without an id".to_owned(), shown);
        log::info!("connected as {id}");
        let authenticated = Instant::now();
        let end = session::serve(half, &settled, context);
        Attempt::Served(end, authenticated.elapsed())
    }
}

/// Tells how an attempt ended.
fn report(attempt: &Attempt, board: &Board) -> Ended {
    match attempt {
        Attempt::Failed(connection) => {
            match connection {
                Connection::Rejected(reason) => {
                    log::warn!("not connected: the coordinator rejected this agent: {reason}");
                }
                Connection::Connecting(why) => log::warn!("not connected: {}", why.as_deref().unwrap_or_default()),
                Connection::Connected => {}
            }
            board.not_connected(connection.clone());
            Ended::BeforeAuth
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
            board.not_connected(Connection::Connecting(why));
            if matches!(end, SessionEnd::Planned(_)) { Ended::Planned } else { Ended::After(*lasted) }
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

    /// Has a bug that the housekeeping meets, and says when.
    #[derive(Default)]
    struct Nameless(AtomicBool);

    impl Backend for Nameless {
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
    fn an_agent_whose_housekeeping_has_ended_keeps_its_lock() {
        let folder = std::env::temp_dir().join(format!("usepod-supervisor-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let places = Places::beside(&folder.join("identity.key"));
        let lock = InstanceLock::acquire(&places).expect("the lock");
        let price = Price { input_per_1m: 1, output_per_1m: 1 };
        let backend = Arc::new(Nameless::default());
        let agent = Agent {
            coordinator: CoordinatorConfig {
                url: "ws://127.0.0.72:9/".parse().expect("a URL"),
                enrollment_code: None,
                roots: ExtraRoots::default(),
            },
            use_proxy: false,
            identity: Identity::load_or_create(&folder.join("identity.key")).expect("an identity"),
            backends: vec![OfferedBackend { backend: backend.clone(), allowed_models: None, max_concurrent: None }],
            terms: Terms { pricing: Pricing { default: price, models: Default::default() }, max_concurrent: 1 },
            max_tokens_per_minute: None,
            drain: Duration::ZERO,
            presence: Some(Presence { places: places.clone(), lock }),
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
        wait_until("the bug is met", &|| backend.0.load(Ordering::SeqCst));
        // It goes last but for the lock.
        wait_until("the socket goes", &|| !places.wake().exists());
        let watched = Instant::now();
        while watched.elapsed() < Duration::from_millis(100) {
            assert!(matches!(InstanceLock::acquire(&places), Err(LockError::Held(_))));
        }
        stop.request();
        running.join().expect("no panic").expect("no error");
        assert!(InstanceLock::acquire(&places).is_ok());
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}
