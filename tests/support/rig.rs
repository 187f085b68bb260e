//! One coordinator, one agent, one session.

use super::{Agent, Backend, Coordinator, Session, Setup};

pub struct Rig {
    pub session: Session,
    pub agent: Agent,
    pub setup: Setup,
    pub coordinator: Coordinator,
}

impl Rig {
    /// An agent in session with this backend.
    pub fn new(backend: &Backend) -> Self {
        Self::with(|setup| setup.backend(backend.toml()))
    }

    /// An agent in session, configured by `configure`.
    pub fn with(configure: impl FnOnce(Setup) -> Setup) -> Self {
        let coordinator = Coordinator::new();
        let setup = configure(Setup::new(&coordinator.url()));
        let agent = setup.start();
        let session = coordinator.session();
        Self { session, agent, setup, coordinator }
    }
}
