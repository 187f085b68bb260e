//! The jobs of one session: checks that each of the agent's frames is allowed at that moment.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::job::Job;
use super::link_faults::Moment;
use super::oracle::{Case, Offer};
use super::totals::Totals;
use super::{MAX_CONCURRENT, World};
use crate::support::*;

/// How much earlier than the offer that explains it a refusal may arrive.
const OFFER_DELAY: Duration = secs(2);
/// The agent's heartbeat comes every 15 s.
const HEARTBEAT_MAX: Duration = secs(25);
/// How long a job is kept after its cancel was read.
const CANCEL_KEPT: Duration = secs(5);
/// How many ended jobs are kept, to report what an extra frame came after.
const ENDED_KEPT: usize = 4096;

pub struct Ledger<'a> {
    world: &'a World,
    pub offer: Offer,
    jobs: HashMap<String, Job>,
    ended: VecDeque<(String, &'static str)>,
    pings: u64,
    /// The ping behind each cancel; they are answered in order.
    cancels: VecDeque<(u64, String)>,
    /// Jobs refused for a model that is offered as far as the coordinator knows.
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
            heartbeat: Moment::now(&world.link_faults),
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

    /// Records a job before it is sent.
    pub fn send(&mut self, mut job: Job) {
        self.world.play_log.expect(job.seed);
        job.ahead = self.in_flight();
        job.sent = Moment::now(&self.world.link_faults);
        self.jobs.insert(job.id.clone(), job);
    }

    /// Records a cancel before it is sent; returns the payload of the ping that must follow it.
    pub fn cancel(&mut self, id: &str) -> Vec<u8> {
        let ping = self.ping();
        if let Some(job) = self.jobs.get_mut(id) {
            job.cancelled = Some(self.pings);
            self.world.play_log.cancelled(job.seed);
            self.cancels.push_back((self.pings, id.to_owned()));
        }
        ping
    }

    /// The payload of the next ping.
    pub fn ping(&mut self) -> Vec<u8> {
        self.pings += 1;
        self.pings.to_be_bytes().to_vec()
    }

    pub fn take(&mut self, event: Event, totals: &mut Totals) {
        match event {
            Event::Frame(frame) => self.frame(&frame, totals),
            Event::Pong(payload) => self.pong(&payload, totals),
            Event::Ping => {}
            Event::Close(close) => self.closed = Some(close),
            Event::Violation(text) => totals.fault(text),
        }
    }

    fn frame(&mut self, frame: &Value, totals: &mut Totals) {
        match frame["type"].as_str() {
            Some("capabilities") => self.offered(frame),
            Some("heartbeat") => self.heartbeat(frame, totals),
            Some("job_chunk") => self.chunk(frame, totals),
            Some("job_done" | "job_error") => self.terminal(frame, totals),
            _ => totals.fault(format!("a frame of no known type: {frame}")),
        }
    }

    fn offered(&mut self, frame: &Value) {
        self.offer.update(frame);
        let offer = &self.offer;
        self.unexplained.retain(|(_, model, _)| offer.has(model));
    }

    fn heartbeat(&mut self, frame: &Value, totals: &mut Totals) {
        self.heartbeat = Moment::now(&self.world.link_faults);
        let rate = frame["error_rate_60s"].as_f64().unwrap_or(-1.0);
        let depth = frame["queue_depth"].as_u64().unwrap_or(u64::MAX);
        if !(0.0..=1.0).contains(&rate) || depth > MAX_CONCURRENT as u64 {
            totals.fault(format!("a heartbeat that cannot be true: {frame}"));
        }
    }

    fn chunk(&mut self, frame: &Value, totals: &mut Totals) {
        let Some(job) = self.job_of(frame, totals) else { return };
        job.late |= job.cancel_read.is_some();
        let bytes = unbase64(frame["data"].as_str().unwrap_or_default());
        let expected = job.script.body.get(job.got..job.got + bytes.len());
        if expected != Some(&bytes[..]) {
            let fault = format!("job {}: {} bytes from {} on are not those sent", job.seed, bytes.len(), job.got);
            return totals.fault(fault);
        }
        job.got += bytes.len();
        totals.bytes += bytes.len() as u64;
    }

    fn terminal(&mut self, frame: &Value, totals: &mut Totals) {
        let Some(id) = self.job_of(frame, totals).map(|job| job.id.clone()) else { return };
        let job = &self.jobs[&id];
        let plays = self.world.play_log.plays(job.seed);
        let offered = self.offer.had(job.model, job.sent.at);
        let judge = |offered| Case { world: self.world, job, plays: &plays, offered }.judge(frame);
        if let Err(fault) = judge(offered) {
            let fault = describe(job, &plays, frame, &fault);
            if offered && judge(false).is_ok() {
                self.unexplained.push((Instant::now(), job.model, fault));
            } else {
                totals.fault(fault);
            }
        }
        if job.cancel_read.is_some() {
            totals.count("of them cancelled when they had ended");
            if !job.may_be_late(&plays) {
                totals.fault(describe(job, &plays, frame, "a terminal frame after its cancel"));
            }
        }
        totals.ended(job, &plays, frame);
        let job = self.jobs.get_mut(&id).expect("it was there");
        job.answered += 1;
        job.got = 0;
        if job.is_over(&plays, &self.world.link_faults) {
            self.retire(&id, "its terminal frame");
        }
    }

    /// The job that a frame belongs to.
    fn job_of(&mut self, frame: &Value, totals: &mut Totals) -> Option<&mut Job> {
        let id = frame["job_id"].as_str().unwrap_or_default();
        if !self.jobs.contains_key(id) {
            let after = self.ended.iter().rev().find(|(ended, _)| ended == id);
            let what = after.map_or("of no job of this session", |(_, how)| how);
            totals.fault(format!("a {} after {what}, job {id}", frame["type"]));
        }
        self.jobs.get_mut(id)
    }

    /// Control overtakes data, and what is left of a cancelled job is dropped before it is written: behind the pong that
    /// answers the ping behind the cancel nothing of it may come. But a job whose last frame was queued when the cancel was
    /// read has ended before it, and then all of its frames come.
    fn pong(&mut self, payload: &[u8], totals: &mut Totals) {
        let Ok(number) = payload.try_into().map(u64::from_be_bytes) else {
            return totals.fault(format!("a pong that nobody asked for: {payload:?}"));
        };
        while self.cancels.front().is_some_and(|(ping, _)| *ping <= number) {
            let Some((_, id)) = self.cancels.pop_front() else { return };
            if let Some(job) = self.jobs.get_mut(&id) {
                job.cancel_read = Some(Moment::now(&self.world.link_faults));
                self.world.play_log.over(job.seed);
            }
        }
    }

    fn retire(&mut self, id: &str, how: &'static str) {
        let Some(job) = self.jobs.remove(id) else { return };
        if job.cancel_read.is_none() {
            self.world.play_log.over(job.seed);
        }
        self.ended.push_back((job.id, how));
        if self.ended.len() > ENDED_KEPT {
            self.ended.pop_front();
        }
    }

    /// Reports what is overdue.
    pub fn sweep(&mut self, totals: &mut Totals) {
        let link_faults = &self.world.link_faults;
        let is_old = |job: &&Job| match job.cancel_read {
            Some(read) => read.fair_time(link_faults) > CANCEL_KEPT,
            None => job.is_overdue(link_faults),
        };
        let old: Vec<_> = self.jobs.values().filter(is_old).map(|job| job.id.clone()).collect();
        for id in old {
            let job = &self.jobs[&id];
            let plays = self.world.play_log.plays(job.seed);
            match job.cancel_read {
                Some(_) if job.late => totals.fault(describe(job, &plays, &Value::Null, "a chunk after its cancel")),
                Some(_) => totals.count("cancelled"),
                None if job.answered > 0 => {}
                None => totals.fault(describe(job, &plays, &Value::Null, "no answer long after its deadline")),
            }
            self.retire(&id, if job.cancel_read.is_some() { "its cancel" } else { "being given up" });
        }
        if self.heartbeat.fair_time(link_faults) > HEARTBEAT_MAX {
            totals.fault("no heartbeat".to_owned());
            self.heartbeat = Moment::now(link_faults);
        }
        self.unexplained.retain(|(at, _, fault)| {
            let is_old = at.elapsed() > OFFER_DELAY;
            if is_old {
                totals.fault(fault.clone());
            }
            !is_old
        });
    }

    /// Records the end of the session, and with it of its jobs.
    pub fn end(mut self, totals: &mut Totals) {
        for (_, job) in self.jobs.drain() {
            match job.cancel_read {
                Some(_) if !job.late => totals.count("cancelled"),
                _ if job.answered == 0 => totals.count("ended with its session"),
                _ => {}
            }
            self.world.play_log.over(job.seed);
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
