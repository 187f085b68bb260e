//! Connect, serve, wait, and again, until told to stop. Runs in the caller's thread.
//!
//! Nothing that the network does ends it: a connection that cannot be made is tried again for ever, with the delays of
//! [`crate::backoff`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backoff::{Backoff, Ended};
use crate::config::CoordinatorConfig;
use crate::discovery::{OfferedBackend, Offers, Prober, Terms};
use crate::heartbeat::Statistics;
use crate::identity::Identity;
use crate::logging::shown;
use crate::protocol::OfferLimits;
use crate::session::{self, SessionEnd};
use crate::shutdown::{Live, Stop};
use crate::token_limit::TokenLimit;
use crate::transport::Dialer;
use crate::{backend, discovery};

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
}

/// How one connection ended.
enum Attempt {
    /// Before `auth_ok`.
    Failed(String),
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
        let prober = Prober::spawn(std::mem::take(&mut self.backends), self.terms.clone(), offers.clone())?;
        let statistics = Arc::new(Statistics::default());
        let token_limit = Arc::new(TokenLimit::new(self.max_tokens_per_minute));
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
            let ended = report(&attempt);
            let delay = backoff.delay_after(ended, discovery::dice());
            log::info!("connecting again in {:.1} s", delay.as_secs_f64());
            let _ = stop.signal().recv_timeout(delay);
        }
        log::info!("stopped");
        Ok(())
    }

    fn connect_and_serve(&mut self, dialer: &Dialer, context: &session::Context<'_>) -> Attempt {
        let stop = context.stop;
        // Probes and the dial go side by side.
        let settled = context.prober.refresh();
        let opened = |tcp| stop.set_live(Live::Handshake(tcp));
        let mut half = match dialer.dial(stop.signal(), opened) {
            Ok(half) => half,
            Err(e) => return Attempt::Failed(e.to_string()),
        };
        let code = self.coordinator.enrollment_code.as_deref();
        match session::authenticate(&mut half, &self.identity, code) {
            Ok(provider_id) => {
                if let Some(id) = provider_id {
                    self.identity.set_provider_id(id);
                }
            }
            Err(e) => return Attempt::Failed(e.to_string()),
        }
        let id = self.identity.provider_id().map_or_else(|| "a provider without an id".to_owned(), shown);
        log::info!("connected as {id}");
        let authenticated = Instant::now();
        let end = session::serve(half, &settled, context);
        Attempt::Served(end, authenticated.elapsed())
    }
}

fn report(attempt: &Attempt) -> Ended {
    match attempt {
        Attempt::Failed(why) => {
            log::warn!("not connected: {why}");
            Ended::BeforeAuth
        }
        Attempt::Served(SessionEnd::Planned(how), _) => {
            log::info!("the coordinator ended the session: {how}");
            Ended::Planned
        }
        Attempt::Served(SessionEnd::Unexpected(why), lasted) => {
            log::warn!("the session ended after {:.0} s: {why}", lasted.as_secs_f64());
            Ended::After(*lasted)
        }
        Attempt::Served(SessionEnd::Stopped, lasted) => Ended::After(*lasted),
    }
}
