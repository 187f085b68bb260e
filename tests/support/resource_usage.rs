//! The resource usage of a running agent, so that a test can show that a fault leaks nothing.

use std::time::Instant;

use super::{Agent, Backend, Rig, Session, Setup, ms, secs};

/// By how many KiB the memory may exceed the earlier value: what the allocator retains for the next job.
const MEMORY_SLACK_KIB: u64 = 8 << 10;

/// Measured right after a job, when there are one worker and one kept-alive connection.
#[derive(Clone, Copy, Debug)]
pub struct ResourceUsage {
    /// Without the log thread, which comes and goes.
    pub threads: usize,
    pub descriptors: usize,
    pub resident_kib: u64,
}

impl ResourceUsage {
    /// Has the agent serve one job for `m` at `backend`, which holds jobs, and measures it.
    pub fn after_a_job(agent: &Agent, session: &Session, backend: &Backend) -> Self {
        let id = session.job("m", serde_json::json!({}));
        backend.next().finish();
        session.outcome(&id).done();
        Self::of(agent)
    }

    pub fn of(agent: &Agent) -> Self {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).expect("the agent's descriptors");
        Self {
            threads: agent.threads().iter().filter(|name| *name != "log").count(),
            descriptors: descriptors.count(),
            resident_kib: agent.status_kib("VmRSS"),
        }
    }

    /// Waits until the agent's usage is back at this level, and has it serve one more job. Idle workers end after 10 s.
    pub fn assert_no_leak(&self, agent: &Agent, session: &Session, backend: &Backend) {
        let began = Instant::now();
        // The memory of a cancelled job is freed when its worker notices.
        let is_back =
            |now: Self| now.threads <= self.threads && now.resident_kib <= self.resident_kib + MEMORY_SLACK_KIB;
        while !is_back(Self::of(agent)) {
            let now = Self::of(agent);
            assert!(began.elapsed() < secs(25), "before: {self:?}, now: {now:?}, {:?}", agent.threads());
            std::thread::sleep(ms(50));
        }
        // Kept-alive connections that are too old are closed by the next exchange.
        let mut now = Self::after_a_job(agent, session, backend);
        while now.threads > self.threads || now.descriptors > self.descriptors {
            assert!(began.elapsed() < secs(40), "before: {self:?}, now: {now:?}, {:?}", agent.threads());
            std::thread::sleep(ms(100));
            now = Self::after_a_job(agent, session, backend);
        }
        assert!(now.resident_kib <= self.resident_kib + MEMORY_SLACK_KIB, "before: {self:?}, now: {now:?}");
    }
}

/// An agent in session, measured before a fault.
pub struct MeasuredAgent {
    pub rig: Rig,
    pub backend: Backend,
    pub before: ResourceUsage,
}

impl MeasuredAgent {
    pub fn new() -> Self {
        Self::with(|setup| setup)
    }

    pub fn with(configure: impl FnOnce(Setup) -> Setup) -> Self {
        Self::beside(Backend::vllm(&["m"]), configure)
    }

    /// With this backend, which lists `m` and holds jobs.
    pub fn beside(backend: Backend, configure: impl FnOnce(Setup) -> Setup) -> Self {
        let rig = Rig::with(|setup| configure(setup.backend(backend.toml())));
        let before = ResourceUsage::after_a_job(&rig.agent, &rig.session, &backend);
        Self { rig, backend, before }
    }

    /// After a fault that leaves the session alive.
    pub fn assert_no_leak(&self) {
        self.before.assert_no_leak(&self.rig.agent, &self.rig.session, &self.backend);
    }

    /// After a fault that ends the session: the next one serves.
    pub fn assert_no_leak_after_reconnect(&self) {
        self.assert_no_leak_in(&self.rig.coordinator.session());
    }

    pub fn assert_no_leak_in(&self, session: &Session) {
        self.before.assert_no_leak(&self.rig.agent, session, &self.backend);
    }
}
