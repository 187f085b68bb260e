//! The jobs of one session: every frame of the agent's is held against what it may be at that moment.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::job::Job;
use super::link_faults::Moment;
use super::oracle::{Case, Offer};
use super::totals::Tally;
use super::{MAX_CONCURRENT, World};
use crate::support::*;

/// A refusal may overtake the offer that explains it by so much.
const OFFER_DELAY: Duration = secs(2);
/// The agent's heartbeat comes every 15 s.
const HEARTBEAT_MAX: Duration = secs(25);
/// A job is remembered for so long after its cancel was read.
const CANCEL_KEPT: Duration = secs(5);
/// Ended jobs that are remembered, to say what a frame too many came after.
const ENDED_KEPT: usize = 4096;

pub struct Ledger<'a> {
    world: &'a World,
    pub offer: Offer,
    jobs: HashMap<String, Job>,
    ended: VecDeque<(String, &'static str)>,
    pings: u64,
    /// The ping behind each cancel; they are answered in order.
    cancels: VecDeque<(u64, String)>,
    /// Jobs refused for a model that is on offer, as far as we know.
    unexplained: Vec<(Instant, &'static str, String)>,
    heartbeat: Moment,
    /// The agent's Close.
    pub closed: Option<Option<(u16, String)>>,
}

impl<'a> Ledger<'a> {
    pub fn new(world: &'a World, capabilities: &Value) -> Self {
        Self {
            world,
            offer: Offer::of(capabilities),
            jobs: HashMap::new(),
            ended: VecDeque::new(),
            pings: 0,
            cancels: VecDeque::new(),
            unexplained: Vec::new(),
            heartbeat: Moment::now(&world.weather),
            closed: None,
        }
    }

    /// Jobs that the agent may have in flight.
    pub fn in_flight(&self) -> usize {
        self.jobs.values().filter(|job| job.cancelled.is_none()).count()
    }

    pub fn is_idle(&self) -> bool {
        self.jobs.values().all(|job| job.cancel_read.is_some())
    }

    /// Notes a job that is about to be sent.
    pub fn send(&mut self, mut job: Job) {
        self.world.board.expect(job.seed);
        job.ahead = self.in_flight();
        job.sent = Moment::now(&self.world.weather);
        self.jobs.insert(job.id.clone(), job);
    }

    /// Notes a cancel that is about to be sent; returns the payload of the ping that must follow it.
    pub fn cancel(&mut self, id: &str) -> Vec<u8> {
        let ping = self.ping();
        if let Some(job) = self.jobs.get_mut(id) {
            job.cancelled = Some(self.pings);
            self.world.board.cancelled(job.seed);
            self.cancels.push_back((self.pings, id.to_owned()));
        }
        ping
    }

    /// The payload of the next ping.
    pub fn ping(&mut self) -> Vec<u8> {
        self.pings += 1;
        self.pings.to_be_bytes().to_vec()
    }

    pub fn hear(&mut self, event: Event, tally: &mut Tally) {
        match event {
            Event::Frame(frame) => self.frame(&frame, tally),
            Event::Pong(payload) => self.pong(&payload, tally),
            Event::Ping => {}
            Event::Close(close) => self.closed = Some(close),
            Event::Violation(text) => tally.fault(text),
        }
    }

    fn frame(&mut self, frame: &Value, tally: &mut Tally) {
        match frame["type"].as_str() {
            Some("capabilities") => self.offered(frame),
            Some("heartbeat") => self.heartbeat(frame, tally),
            Some("job_chunk") => self.chunk(frame, tally),
            Some("job_done" | "job_error") => self.terminal(frame, tally),
            _ => tally.fault(format!("a frame of no known type: {frame}")),
        }
    }

    fn offered(&mut self, frame: &Value) {
        self.offer.update(frame);
        let offer = &self.offer;
        self.unexplained.retain(|(_, model, _)| offer.has(model));
    }

    fn heartbeat(&mut self, frame: &Value, tally: &mut Tally) {
        self.heartbeat = Moment::now(&self.world.weather);
        let rate = frame["error_rate_60s"].as_f64().unwrap_or(-1.0);
        let depth = frame["queue_depth"].as_u64().unwrap_or(u64::MAX);
        if !(0.0..=1.0).contains(&rate) || depth > MAX_CONCURRENT as u64 {
            tally.fault(format!("a heartbeat that cannot be true: {frame}"));
        }
    }

    fn chunk(&mut self, frame: &Value, tally: &mut Tally) {
        let Some(job) = self.job_of(frame, tally) else { return };
        job.late |= job.cancel_read.is_some();
        let bytes = unbase64(frame["data"].as_str().unwrap_or_default());
        let expected = job.script.body.get(job.got..job.got + bytes.len());
        if expected != Some(&bytes[..]) {
            let fault = format!("job {}: {} bytes from {} on are not those sent", job.seed, bytes.len(), job.got);
            return tally.fault(fault);
        }
        job.got += bytes.len();
        tally.bytes += bytes.len() as u64;
    }

    fn terminal(&mut self, frame: &Value, tally: &mut Tally) {
        let Some(id) = self.job_of(frame, tally).map(|job| job.id.clone()) else { return };
        let job = &self.jobs[&id];
        let plays = self.world.board.plays(job.seed);
        let offered = self.offer.had(job.model, job.sent.at);
        let judge = |offered| Case { world: self.world, job, plays: &plays, offered }.judge(frame);
        if let Err(fault) = judge(offered) {
            let fault = describe(job, &plays, frame, &fault);
            if offered && judge(false).is_ok() {
                self.unexplained.push((Instant::now(), job.model, fault));
            } else {
                tally.fault(fault);
            }
        }
        if job.cancel_read.is_some() {
            tally.count("of them cancelled when they had ended");
            if !job.may_be_late(&plays) {
                tally.fault(describe(job, &plays, frame, "a terminal frame after its cancel"));
            }
        }
        tally.ended(job, &plays, frame);
        let job = self.jobs.get_mut(&id).expect("it was there");
        job.answered += 1;
        job.got = 0;
        if job.is_over(&plays, &self.world.weather) {
            self.retire(&id, "its terminal frame");
        }
    }

    /// The job that a frame belongs to.
    fn job_of(&mut self, frame: &Value, tally: &mut Tally) -> Option<&mut Job> {
        let id = frame["job_id"].as_str().unwrap_or_default();
        if !self.jobs.contains_key(id) {
            let after = self.ended.iter().rev().find(|(ended, _)| ended == id);
            let what = after.map_or("of no job of this session", |(_, how)| how);
            tally.fault(format!("a {} after {what}, job {id}", frame["type"]));
        }
        self.jobs.get_mut(id)
    }

    /// Control overtakes data, and what is left of a cancelled job is dropped before it is written: behind the pong that
    /// answers the ping behind the cancel nothing of it may come. But a job whose last frame was queued when the cancel was
    /// read has ended before it, and then all of its frames come.
    fn pong(&mut self, payload: &[u8], tally: &mut Tally) {
        let Ok(number) = payload.try_into().map(u64::from_be_bytes) else {
            return tally.fault(format!("a pong that nobody asked for: {payload:?}"));
        };
        while self.cancels.front().is_some_and(|(ping, _)| *ping <= number) {
            let Some((_, id)) = self.cancels.pop_front() else { return };
            if let Some(job) = self.jobs.get_mut(&id) {
                job.cancel_read = Some(Moment::now(&self.world.weather));
                self.world.board.over(job.seed);
            }
        }
    }

    fn retire(&mut self, id: &str, how: &'static str) {
        let Some(job) = self.jobs.remove(id) else { return };
        if job.cancel_read.is_none() {
            self.world.board.over(job.seed);
        }
        self.ended.push_back((job.id, how));
        if self.ended.len() > ENDED_KEPT {
            self.ended.pop_front();
        }
    }

    /// What should have come long ago.
    pub fn sweep(&mut self, tally: &mut Tally) {
        let weather = &self.world.weather;
        let is_old = |job: &&Job| match job.cancel_read {
            Some(read) => read.fair_time(weather) > CANCEL_KEPT,
            None => job.is_overdue(weather),
        };
        let old: Vec<_> = self.jobs.values().filter(is_old).map(|job| job.id.clone()).collect();
        for id in old {
            let job = &self.jobs[&id];
            let plays = self.world.board.plays(job.seed);
            match job.cancel_read {
                Some(_) if job.late => tally.fault(describe(job, &plays, &Value::Null, "a chunk after its cancel")),
                Some(_) => tally.count("cancelled"),
                None if job.answered > 0 => {}
                None => tally.fault(describe(job, &plays, &Value::Null, "no answer long after its deadline")),
            }
            self.retire(&id, if job.cancel_read.is_some() { "its cancel" } else { "being given up" });
        }
        if self.heartbeat.fair_time(weather) > HEARTBEAT_MAX {
            tally.fault("no heartbeat".to_owned());
            self.heartbeat = Moment::now(weather);
        }
        self.unexplained.retain(|(at, _, fault)| {
            let is_old = at.elapsed() > OFFER_DELAY;
            if is_old {
                tally.fault(fault.clone());
            }
            !is_old
        });
    }

    /// The session is over, and with it its jobs.
    pub fn end(mut self, tally: &mut Tally) {
        for (_, job) in self.jobs.drain() {
            match job.cancel_read {
                Some(_) if !job.late => tally.count("cancelled"),
                _ if job.answered == 0 => tally.count("ended with its session"),
                _ => {}
            }
            self.world.board.over(job.seed);
        }
    }
}

fn describe(job: &Job, plays: &[super::play_log::Play], frame: &Value, fault: &str) -> String {
    let took = job.sent.at.elapsed();
    let plays: Vec<_> = plays.iter().map(|play| (play.backend, play.refusal.map(|refusal| &refusal.answer))).collect();
    let job = json!({
        "id": job.id, "seed": job.seed, "model": job.model, "format": format!("{:?}", job.format), "copies": job.copies,
        "deadline": job.deadline.as_millis() as u64, "ahead": job.ahead, "cancelled": job.cancelled.is_some(),
        "script": format!("{:?}, {:?}, {:?}", job.script.verdict, job.script.ending, job.script.framing),
        "got": job.got, "of": job.script.body.len(),
    });
    format!("{fault}: {frame} after {took:?}; {job}; backends: {plays:?}")
}
