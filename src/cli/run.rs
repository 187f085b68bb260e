//! `run`: serve until a signal.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::args::Globals;
use super::{Failure, backends_of, load_config, terms_of};
use crate::files;
use crate::identity::{Identity, IdentityError};
use crate::instance::{InstanceLock, LockError, Places};
use crate::memory;
use crate::protocol::AGENT_VERSION;
use crate::shutdown::Stop;
use crate::supervisor::{Agent, Presence};

/// So many signals mean that even the flush is not to be waited for.
const SIGNALS_TO_EXIT: u32 = 3;

/// Becomes the agent.
pub fn run(globals: &Globals) -> Result<(), Failure> {
    memory::keep_little();
    let config = load_config(globals)?;
    let create = |error| IdentityError::Io { action: "make the folder of", path: config.key_path.clone(), error };
    files::create_folder_of(&config.key_path).map_err(create)?;
    let places = Places::beside(&config.key_path);
    let lock = match InstanceLock::acquire(&places) {
        Ok(lock) => {
            files::remove_leftovers(&config.key_path);
            files::remove_leftovers(&places.state());
            lock
        }
        Err(LockError::Held(pid)) => return Err(Failure::AlreadyRunning { pid }),
        Err(LockError::Io(path, e)) => {
            log::warn!("`{}` cannot be locked ({e}); see to it that only one agent runs", path.display());
            InstanceLock::none()
        }
    };
    let identity = Identity::load_or_create(&config.key_path)?;
    if config.backends.is_empty() {
        log::warn!("no [[backends]] in the configuration: there is nothing to offer");
    }
    let stop = Arc::new(Stop::default());
    heed_signals(&stop)?;
    log::info!(
        "usepod-agent {AGENT_VERSION}, {} backend(s), public key {}",
        config.backends.len(),
        identity.public_key_base64()
    );
    let agent = Agent {
        backends: backends_of(&config),
        terms: terms_of(&config),
        max_tokens_per_minute: config.limits.max_tokens_per_minute,
        drain: config.limits.drain,
        coordinator: config.coordinator,
        use_proxy: true,
        identity,
        presence: Some(Presence { places, lock }),
    };
    agent.run(&stop).map_err(|e| Failure::Runtime(format!("failed to start a thread: {e}")))
}

/// SIGTERM, SIGINT and SIGHUP: once to drain, twice to stop now, thrice to be gone.
pub(super) fn heed_signals(stop: &Arc<Stop>) -> Result<(), Failure> {
    let stop = stop.clone();
    let signals = AtomicU32::new(0);
    ctrlc::set_handler(move || {
        if signals.fetch_add(1, Ordering::SeqCst) + 1 >= SIGNALS_TO_EXIT {
            std::process::exit(1);
        }
        stop.request();
    })
    .map_err(|e| {
        // Its own words for an error of the system do not say which.
        let why = match e {
            ctrlc::Error::System(e) => e.to_string(),
            other => other.to_string(),
        };
        Failure::Runtime(format!("failed to install the signal handler: {why}"))
    })
}
