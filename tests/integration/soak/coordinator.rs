//! The scripted coordinator: fills each session with jobs, cancels and invalid frames, and pauses regularly to measure the
//! agent at rest.

use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use serde_json::json;

use super::World;
use super::coordinator_actions::{Action, Actions};
use super::fleet::BACKENDS;
use super::job::Job;
use super::ledger::Ledger;
use super::link_faults::Moment;
use super::rng::Rng;
use super::totals::Totals;
use crate::support::*;

/// Between two checks of the timetable.
const TICK: Duration = ms(10);
/// The longest reconnect delay is a minute, and a dial times out after 15 s.
const DIAL_MAX: Duration = secs(90);
/// Idle workers end after 10 s.
const REST: Duration = secs(12);
/// Time for the jobs in flight to end and for the offer to be complete again; probes run about every 30 s.
const REST_BEGINS: Duration = secs(60);

/// The session has ended.
pub struct Ended;

pub struct Coordinator<'a> {
    pub world: &'a World,
    pub agent: Agent,
    pub listener: crate::support::Coordinator,
    pub totals: Totals,
    pub rng: Rng,
    pub timetable: Timetable,
}

/// When each periodic task is due.
pub struct Timetable {
    /// The last rest, after which the test ends.
    pub ends: Instant,
    pub rest: Instant,
    pub rest_every: Duration,
    pub sweep: Instant,
    pub sample: Instant,
    pub progress: Instant,
}

impl Timetable {
    pub fn new(minutes: u64) -> Self {
        let now = Instant::now();
        Self {
            ends: now + secs(60 * minutes),
            rest: now + secs(30),
            rest_every: if minutes < 10 { secs(100) } else { secs(240) },
            sweep: now,
            sample: now,
            progress: now + secs(30),
        }
    }

    /// Whether the task due `at` is due now; if so, it is due again after `every`.
    fn is_due(at: &mut Instant, every: Duration) -> bool {
        let due = Instant::now() >= *at;
        if due {
            *at = Instant::now() + every;
        }
        due
    }
}

impl Coordinator<'_> {
    /// Runs sessions until the end of the test, then stops the agent.
    pub fn run(&mut self) {
        while !self.totals.has_enough_faults() {
            let Some((session, began)) = self.next_session() else { continue };
            let mut ledger = Ledger::new(self.world, &session.capabilities);
            let finished = self.serve(&session, &mut ledger, &began).is_ok();
            if finished {
                self.stop(&session, &mut ledger);
                self.totals.session("stopped");
            }
            ledger.end(&mut self.totals);
            if finished {
                break;
            }
        }
    }

    /// The next connection that gets through the handshake.
    fn next_session(&mut self) -> Option<(Session, Moment)> {
        let waiting = Moment::now(&self.world.link_faults);
        let dialled = loop {
            if let Some(dialled) = self.listener.try_dialled(TICK) {
                break dialled;
            }
            self.run_due_tasks(None);
            if waiting.fair_time(&self.world.link_faults) > DIAL_MAX {
                self.totals.fault("the agent does not dial".to_owned());
                return None;
            }
        };
        let (began, dialled_at) = (Moment::now(&self.world.link_faults), dialled.at);
        let session = self.handshake(dialled);
        let link_faults = &self.world.link_faults;
        // The agent's WebSocket library rejects an upgrade that arrives in more than 64 pieces.
        let excused = self.was_cut(dialled_at)
            || link_faults.has_trickled(began.at)
            || began.at - dialled_at > secs(5)
            || began.disturbance(link_faults) > secs(5);
        match session {
            Ok(session) => return Some((session, began)),
            Err(_) if excused => self.totals.session("broken off in the handshake"),
            Err(what) => {
                let took = began.at.elapsed();
                self.totals.fault(format!("the handshake was broken off without a reason, after {took:?}: {what}"));
            }
        }
        None
    }

    fn handshake(&mut self, dialled: Dialled) -> Result<Session, String> {
        let mut session = dialled.try_upgrade().map_err(|e| e.to_string())?;
        let nonce: Vec<u8> = (0..4).flat_map(|_| self.rng.next().to_be_bytes()).collect();
        session.send(&json!({"type": "auth_challenge", "nonce": base64(&nonce)}));
        verify_auth(&first(&session, "auth_response")?, &nonce);
        session.send(&json!({"type": "auth_ok", "provider_id": "prov_soak"}));
        session.capabilities = first(&session, "capabilities")?;
        Ok(session)
    }

    fn was_cut(&self, since: Instant) -> bool {
        self.world.link_faults.last_cut().is_some_and(|cut| cut >= since)
    }

    /// Serves a session until it ends, or until the end of the test.
    fn serve(&mut self, session: &Session, ledger: &mut Ledger, began: &Moment) -> Result<(), Ended> {
        let mut actions = Actions::new(&mut self.rng);
        let outcome = self.fill(session, ledger, &mut actions);
        if outcome.is_err() {
            let stalled = self.world.link_faults.last_long_stall().is_some_and(|stall| stall >= began.at);
            match ledger.closed.take() {
                _ if self.was_cut(began.at) => self.totals.session("cut"),
                _ if stalled => self.totals.session("stalled for more than 45 s"),
                _ if actions.has_closed() => self.totals.session("closed with drain:deploy"),
                close => self.totals.fault(format!("the agent ended the session by itself, Close: {close:?}")),
            }
        }
        outcome
    }

    fn fill(&mut self, session: &Session, ledger: &mut Ledger, actions: &mut Actions) -> Result<(), Ended> {
        while !self.totals.has_enough_faults() {
            if Instant::now() >= self.timetable.rest.min(self.timetable.ends) && !actions.has_closed() {
                actions.resume(session);
                self.rest(session, ledger)?;
                if Instant::now() >= self.timetable.ends {
                    return Ok(());
                }
                self.timetable.rest = Instant::now() + self.timetable.rest_every;
            }
            for action in actions.next(session, &mut self.rng, &self.world.link_faults, ledger) {
                self.act(session, ledger, action);
            }
            if actions.is_overdue(&self.world.link_faults) {
                self.totals.fault("the agent does not answer a Close".to_owned());
                session.cut();
            }
            self.listen(session, ledger, TICK)?;
        }
        Ok(())
    }

    fn act(&mut self, session: &Session, ledger: &mut Ledger, action: Action) {
        match action {
            Action::Job { job, cancelled } => {
                // In one write, so that they arrive together.
                let frame = encode(TEXT, true, job.frame().to_string().as_bytes());
                let (id, mut bytes) = (job.id.clone(), frame.repeat(job.copies));
                ledger.send(*job);
                if cancelled {
                    bytes.extend(cancel(ledger, &id));
                }
                session.send_raw(&bytes);
            }
            Action::Cancel(id) => session.send_raw(&cancel(ledger, &id)),
            Action::Ping => session.send_frame(PING, &ledger.ping()),
            Action::Nonsense(text) => session.send_text(&text),
            Action::Close => session.close(1001, "drain:deploy"),
        }
    }

    /// Handles the agent's events for this long.
    fn listen(&mut self, session: &Session, ledger: &mut Ledger, time: Duration) -> Result<(), Ended> {
        let until = Instant::now() + time;
        loop {
            match session.next(until) {
                Ok(event) => ledger.take(event, &mut self.totals),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return Err(Ended),
            }
            if Instant::now() >= until {
                break;
            }
        }
        self.run_due_tasks(Some(ledger));
        Ok(())
    }

    /// Runs the periodic tasks that are due.
    fn run_due_tasks(&mut self, ledger: Option<&mut Ledger>) {
        let in_flight = ledger.as_ref().map_or(0, |ledger| ledger.in_flight());
        if Timetable::is_due(&mut self.timetable.sweep, ms(500)) {
            for fault in self.world.play_log.sweep().into_iter().chain(self.world.fleet.faults()) {
                self.totals.fault(fault);
            }
            if let Some(ledger) = ledger {
                ledger.sweep(&mut self.totals);
            }
            self.agent.assert_running();
        }
        if Timetable::is_due(&mut self.timetable.sample, secs(5)) {
            self.totals.sample(&self.agent);
        }
        if Timetable::is_due(&mut self.timetable.progress, secs(30)) {
            self.totals.progress(in_flight);
        }
    }

    /// Pauses all faults, waits until nothing is in flight, has each backend serve one job, and measures the agent.
    fn rest(&mut self, session: &Session, ledger: &mut Ledger) -> Result<(), Ended> {
        self.world.link_faults.set_paused(true);
        let began = Instant::now();
        while !(ledger.is_idle() && BACKENDS.iter().flat_map(|(_, models)| *models).all(|m| ledger.offer.has(m))) {
            self.listen(session, ledger, TICK)?;
            if began.elapsed() > REST_BEGINS {
                self.totals.fault(format!("after {REST_BEGINS:?} of rest {} jobs are in flight", ledger.in_flight()));
                break;
            }
        }
        self.listen(session, ledger, REST)?;
        for backend in 0..BACKENDS.len() {
            let job = Job::plain(&mut self.rng, &self.world.link_faults, backend);
            self.act(session, ledger, Action::Job { job: Box::new(job), cancelled: false });
            while !ledger.is_idle() {
                self.listen(session, ledger, TICK)?;
            }
        }
        self.listen(session, ledger, ms(500))?;
        self.totals.rest(ResourceUsage::of(&self.agent));
        self.world.link_faults.set_paused(false);
        Ok(())
    }

    /// Sends SIGTERM with jobs in flight: the agent finishes them and exits with 0.
    fn stop(&mut self, session: &Session, ledger: &mut Ledger) {
        self.world.link_faults.set_paused(true);
        for backend in 0..BACKENDS.len() {
            let job = Job::slow(&mut self.rng, &self.world.link_faults, backend);
            self.act(session, ledger, Action::Job { job: Box::new(job), cancelled: false });
        }
        if self.listen(session, ledger, ms(500)).is_err() || ledger.in_flight() < BACKENDS.len() {
            self.totals.fault("slow jobs ended at once".to_owned());
        }
        self.agent.signal("TERM");
        let began = Instant::now();
        while let Ok(event) = session.next(began + super::DRAIN + secs(5)) {
            ledger.take(event, &mut self.totals);
        }
        if !ledger.is_idle() {
            self.totals.fault("the agent left with jobs unanswered".to_owned());
        }
        let status = self.agent.wait(super::DRAIN + secs(5));
        if status.code() != Some(0) {
            self.totals.fault(format!("the agent ended with {status}"));
        }
    }
}

/// A cancel, and the ping whose pong shows that the agent has read it.
fn cancel(ledger: &mut Ledger, id: &str) -> Vec<u8> {
    let ping = ledger.cancel(id);
    let frame = json!({"type": "job_cancel", "job_id": id}).to_string();
    [encode(TEXT, true, frame.as_bytes()), encode(PING, true, &ping)].concat()
}

/// Waits for a handshake frame of this type.
fn first(session: &Session, kind: &str) -> Result<serde_json::Value, String> {
    let until = Instant::now() + 3 * SOON;
    loop {
        match session.next(until) {
            Ok(Event::Frame(frame)) if frame["type"] == kind => return Ok(frame),
            Ok(Event::Frame(_) | Event::Ping | Event::Pong(_)) => {}
            other => return Err(format!("no {kind}: {other:?}")),
        }
    }
}
