//! The coordinator: takes the agent through its sessions, each of which it fills with jobs, cancels and nonsense, and
//! rests now and then to weigh the agent.

use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use serde_json::json;

use super::World;
use super::coordinator_actions::{Whim, Whims};
use super::fleet::BACKENDS;
use super::job::Job;
use super::ledger::Ledger;
use super::link_faults::Moment;
use super::rng::Rng;
use super::totals::Tally;
use crate::support::*;

/// Between two looks at what is to be done.
const TICK: Duration = ms(10);
/// The agent dials again within a minute, whatever happened before, and a dial takes 15 s at the most.
const DIAL_MAX: Duration = secs(90);
/// Workers leave after 10 s.
const REST: Duration = secs(12);
/// For the jobs in flight to end, and for the offer to be whole again: the prober looks every 30 s or so.
const REST_BEGINS: Duration = secs(60);

/// The session is over.
pub struct Ended;

pub struct Coordinator<'a> {
    pub world: &'a World,
    pub agent: Agent,
    pub door: crate::support::Coordinator,
    pub tally: Tally,
    pub rng: Rng,
    pub timetable: Timetable,
}

/// What is due when.
pub struct Timetable {
    /// The last rest, and the end.
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

    /// Whether it is time for the thing that was due `at`; it is due again `every` so often.
    fn is_due(at: &mut Instant, every: Duration) -> bool {
        let due = Instant::now() >= *at;
        if due {
            *at = Instant::now() + every;
        }
        due
    }
}

impl Coordinator<'_> {
    /// Until the end; then the agent is stopped.
    pub fn run(&mut self) {
        while !self.tally.has_enough_faults() {
            let Some((session, began)) = self.next_session() else { continue };
            let mut ledger = Ledger::new(self.world, &session.capabilities);
            let finished = self.serve(&session, &mut ledger, &began).is_ok();
            if finished {
                self.stop(&session, &mut ledger);
                self.tally.session("stopped");
            }
            ledger.end(&mut self.tally);
            if finished {
                break;
            }
        }
    }

    /// The next connection that gets through the handshake.
    fn next_session(&mut self) -> Option<(Session, Moment)> {
        let waiting = Moment::now(&self.world.weather);
        let dialled = loop {
            if let Some(dialled) = self.door.try_dialled(TICK) {
                break dialled;
            }
            self.look_after(None);
            if waiting.fair_time(&self.world.weather) > DIAL_MAX {
                self.tally.fault("the agent does not dial".to_owned());
                return None;
            }
        };
        let (began, dialled_at) = (Moment::now(&self.world.weather), dialled.at);
        let session = self.handshake(dialled);
        let weather = &self.world.weather;
        // The agent's WebSocket library takes an upgrade that comes in more than 64 pieces for an attack.
        let excused = self.was_cut(dialled_at)
            || weather.has_trickled(began.at)
            || began.at - dialled_at > secs(5)
            || began.trouble(weather) > secs(5);
        match session {
            Ok(session) => return Some((session, began)),
            Err(_) if excused => self.tally.session("broken off in the handshake"),
            Err(what) => {
                let took = began.at.elapsed();
                self.tally.fault(format!("the handshake was broken off without a reason, after {took:?}: {what}"));
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
        self.world.weather.last_cut().is_some_and(|cut| cut >= since)
    }

    /// Fills a session until it ends, or until all is over.
    fn serve(&mut self, session: &Session, ledger: &mut Ledger, began: &Moment) -> Result<(), Ended> {
        let mut whims = Whims::new(&mut self.rng);
        let outcome = self.fill(session, ledger, &mut whims);
        if outcome.is_err() {
            let stalled = self.world.weather.last_long_stall().is_some_and(|stall| stall >= began.at);
            match ledger.closed.take() {
                _ if self.was_cut(began.at) => self.tally.session("cut"),
                _ if stalled => self.tally.session("stalled for more than 45 s"),
                _ if whims.has_closed() => self.tally.session("closed with drain:deploy"),
                close => self.tally.fault(format!("the agent ended the session by itself, Close: {close:?}")),
            }
        }
        outcome
    }

    fn fill(&mut self, session: &Session, ledger: &mut Ledger, whims: &mut Whims) -> Result<(), Ended> {
        while !self.tally.has_enough_faults() {
            if Instant::now() >= self.timetable.rest.min(self.timetable.ends) && !whims.has_closed() {
                whims.resume(session);
                self.rest(session, ledger)?;
                if Instant::now() >= self.timetable.ends {
                    return Ok(());
                }
                self.timetable.rest = Instant::now() + self.timetable.rest_every;
            }
            for whim in whims.next(session, &mut self.rng, &self.world.weather, ledger) {
                self.act(session, ledger, whim);
            }
            if whims.is_overdue(&self.world.weather) {
                self.tally.fault("the agent does not answer a Close".to_owned());
                session.cut();
            }
            self.listen(session, ledger, TICK)?;
        }
        Ok(())
    }

    fn act(&mut self, session: &Session, ledger: &mut Ledger, whim: Whim) {
        match whim {
            Whim::Job { job, cancelled } => {
                // In one write, so that they arrive together.
                let frame = encode(TEXT, true, job.frame().to_string().as_bytes());
                let (id, mut bytes) = (job.id.clone(), frame.repeat(job.copies));
                ledger.send(*job);
                if cancelled {
                    bytes.extend(cancel(ledger, &id));
                }
                session.send_raw(&bytes);
            }
            Whim::Cancel(id) => session.send_raw(&cancel(ledger, &id)),
            Whim::Ping => session.send_frame(PING, &ledger.ping()),
            Whim::Nonsense(text) => session.send_text(&text),
            Whim::Close => session.close(1001, "drain:deploy"),
        }
    }

    /// Takes what the agent sends, for so long.
    fn listen(&mut self, session: &Session, ledger: &mut Ledger, time: Duration) -> Result<(), Ended> {
        let until = Instant::now() + time;
        loop {
            match session.next(until) {
                Ok(event) => ledger.hear(event, &mut self.tally),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return Err(Ended),
            }
            if Instant::now() >= until {
                break;
            }
        }
        self.look_after(Some(ledger));
        Ok(())
    }

    /// What has to be looked after all the time.
    fn look_after(&mut self, ledger: Option<&mut Ledger>) {
        let in_flight = ledger.as_ref().map_or(0, |ledger| ledger.in_flight());
        if Timetable::is_due(&mut self.timetable.sweep, ms(500)) {
            for fault in self.world.board.sweep().into_iter().chain(self.world.fleet.faults()) {
                self.tally.fault(fault);
            }
            if let Some(ledger) = ledger {
                ledger.sweep(&mut self.tally);
            }
            self.agent.assert_running();
        }
        if Timetable::is_due(&mut self.timetable.sample, secs(5)) {
            self.tally.sample(&self.agent);
        }
        if Timetable::is_due(&mut self.timetable.progress, secs(30)) {
            self.tally.progress(in_flight);
        }
    }

    /// Lets everything come to rest, has each backend serve one job, and weighs the agent.
    fn rest(&mut self, session: &Session, ledger: &mut Ledger) -> Result<(), Ended> {
        self.world.weather.set_calm(true);
        let began = Instant::now();
        while !(ledger.is_idle() && BACKENDS.iter().flat_map(|(_, models)| *models).all(|m| ledger.offer.has(m))) {
            self.listen(session, ledger, TICK)?;
            if began.elapsed() > REST_BEGINS {
                self.tally.fault(format!("after {REST_BEGINS:?} of calm {} jobs are in flight", ledger.in_flight()));
                break;
            }
        }
        self.listen(session, ledger, REST)?;
        for backend in 0..BACKENDS.len() {
            let job = Job::plain(&mut self.rng, &self.world.weather, backend);
            self.act(session, ledger, Whim::Job { job: Box::new(job), cancelled: false });
            while !ledger.is_idle() {
                self.listen(session, ledger, TICK)?;
            }
        }
        self.listen(session, ledger, ms(500))?;
        self.tally.rest(ResourceUsage::of(&self.agent));
        self.world.weather.set_calm(false);
        Ok(())
    }

    /// A signal with jobs in flight: they are finished, then the agent leaves with 0.
    fn stop(&mut self, session: &Session, ledger: &mut Ledger) {
        self.world.weather.set_calm(true);
        for backend in 0..BACKENDS.len() {
            let job = Job::slow(&mut self.rng, &self.world.weather, backend);
            self.act(session, ledger, Whim::Job { job: Box::new(job), cancelled: false });
        }
        if self.listen(session, ledger, ms(500)).is_err() || ledger.in_flight() < BACKENDS.len() {
            self.tally.fault("slow jobs ended at once".to_owned());
        }
        self.agent.signal("TERM");
        let began = Instant::now();
        while let Ok(event) = session.next(began + super::DRAIN + secs(5)) {
            ledger.hear(event, &mut self.tally);
        }
        if !ledger.is_idle() {
            self.tally.fault("the agent left with jobs unanswered".to_owned());
        }
        let status = self.agent.wait(super::DRAIN + secs(5));
        if status.code() != Some(0) {
            self.tally.fault(format!("the agent ended with {status}"));
        }
    }
}

/// A cancel with the ping that shows when it was read.
fn cancel(ledger: &mut Ledger, id: &str) -> Vec<u8> {
    let ping = ledger.cancel(id);
    let frame = json!({"type": "job_cancel", "job_id": id}).to_string();
    [encode(TEXT, true, frame.as_bytes()), encode(PING, true, &ping)].concat()
}

/// The frame of this type that the handshake is waiting for.
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
