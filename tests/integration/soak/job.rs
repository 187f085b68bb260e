//! One job: how the scripted coordinator generates it, and what it records about it.

use std::time::Duration;

use serde_json::{Value, json};
use uuid::Uuid;

use super::fleet::BACKENDS;
use super::link_faults::{LinkFaults, Moment};
use super::play_log::Play;
use super::rng::Rng;
use super::script::{LARGE_SEEDS, PLAIN_SEEDS, RANDOM_SEEDS, Script, Verdict, refusal_at};
use super::stream::Format;
use crate::support::{ms, secs};

/// A model that no backend lists.
pub const NOBODYS: &str = "nobody's";
/// The models of random jobs; repeated entries are more likely.
const MODELS: [&str; 12] =
    ["shared", "shared", "shared", "pair", "pair", "wide", "wide", "own-0", "own-1", "own-2", "own-3", "own-3"];
/// Longer than any job takes by itself, in milliseconds.
pub const LONG_DEADLINE: std::ops::Range<u64> = 8000..12_000;
/// If a backend works on a job for this long, a duplicate sent right behind it finds it in flight.
const DUPLICATE_READ: Duration = ms(800);

pub struct Job {
    pub id: String,
    pub seed: u64,
    pub model: &'static str,
    pub format: Format,
    pub deadline: Duration,
    pub script: Script,
    pub sent: Moment,
    /// Jobs that the agent may have had in flight when this one was sent.
    pub ahead: usize,
    /// How many times it was sent.
    pub copies: usize,
    /// How many of these were answered.
    pub answered: usize,
    /// Bytes received of the current answer.
    pub got: usize,
    /// The ping behind its cancel.
    pub cancelled: Option<u64>,
    /// When its pong came: the agent had read the cancel.
    pub cancel_read: Option<Moment>,
    /// A frame of the job came behind that pong.
    pub late: bool,
}

impl Job {
    pub fn random(rng: &mut Rng, link_faults: &LinkFaults, offered: impl Fn(&str) -> bool) -> Self {
        let mut model = *rng.pick(&MODELS);
        // One in ten may be for a model that has just been withdrawn.
        while !offered(model) && rng.per_mille(900) {
            model = *rng.pick(&MODELS);
        }
        if rng.per_mille(15) {
            model = NOBODYS;
        }
        let seed = rng.within(RANDOM_SEEDS);
        let mut job = Self::new(rng, link_faults, seed, model);
        job.deadline = match rng.within(0..100) {
            _ if job.script.verdict == Verdict::Never => rng.time(100..3000),
            0 => ms(rng.within(0..3)),
            1..8 => rng.time(50..2000),
            _ => rng.time(LONG_DEADLINE),
        };
        job
    }

    /// A job whose answer fills every buffer between its backend and a coordinator that does not read.
    pub fn large(rng: &mut Rng, link_faults: &LinkFaults) -> Self {
        let (seed, model) = (rng.within(LARGE_SEEDS), *rng.pick(&MODELS));
        Self::new(rng, link_faults, seed, model)
    }

    /// A job for a model that only this backend lists, and which it serves at once.
    pub fn plain(rng: &mut Rng, link_faults: &LinkFaults, backend: usize) -> Self {
        let seed = rng.within(PLAIN_SEEDS);
        Self::new(rng, link_faults, seed, BACKENDS[backend].1[BACKENDS[backend].1.len() - 1])
    }

    /// A job that this backend completes, and that takes more than a second.
    pub fn slow(rng: &mut Rng, link_faults: &LinkFaults, backend: usize) -> Self {
        loop {
            let job = Self { seed: rng.within(RANDOM_SEEDS), ..Self::plain(rng, link_faults, backend) };
            let job = Self { script: Script::of(job.seed, job.format), ..job };
            let is_slow = job.script.verdict == Verdict::Done && job.script.time() > secs(1);
            if is_slow && refusal_at(job.seed, backend).is_none() {
                return job;
            }
        }
    }

    fn new(rng: &mut Rng, link_faults: &LinkFaults, seed: u64, model: &'static str) -> Self {
        let format = if rng.per_mille(300) { Format::Anthropic } else { Format::Openai };
        Self {
            id: Uuid::from_u64_pair(rng.next(), rng.next()).to_string(),
            seed,
            model,
            format,
            deadline: secs(10),
            script: Script::of(seed, format),
            sent: Moment::now(link_faults),
            ahead: 0,
            copies: 1,
            answered: 0,
            got: 0,
            cancelled: None,
            cancel_read: None,
            late: false,
        }
    }

    pub fn frame(&self) -> Value {
        let format = if self.format == Format::Anthropic { "anthropic" } else { "openai" };
        json!({
            "type": "job", "job_id": self.id, "model_id": self.model, "format": format,
            "deadline_ms": self.deadline.as_millis() as u64,
            "request": {"seed": self.seed, "messages": messages(self.seed), "stream": false},
        })
    }

    /// Whether no copy of it can still be in flight, now that one has been answered.
    pub fn is_over(&self, plays: &[Play], link_faults: &LinkFaults) -> bool {
        let was_long = plays.iter().any(|play| play.time() >= DUPLICATE_READ);
        self.answered == self.copies || was_long && self.sent.disturbance(link_faults).is_zero()
    }

    /// Whether a frame may still come although the agent has read the cancel: when all of the answer was on its way by
    /// then, which is when no backend lost its connection over the cancel.
    pub fn may_be_late(&self, plays: &[Play]) -> bool {
        let had_timed_out = self.cancel_read.is_some_and(|read| read.at >= self.sent.at + self.deadline);
        had_timed_out || plays.last().is_none_or(|play| !play.hung_up)
    }

    /// Whether it should have been answered by now.
    pub fn is_overdue(&self, link_faults: &LinkFaults) -> bool {
        self.sent.fair_time(link_faults) > self.deadline + secs(10)
    }
}

/// The messages of the job with this seed.
pub fn messages(seed: u64) -> Value {
    let rng = &mut Rng::of(seed, "messages");
    let words = if rng.per_mille(20) { rng.within(100..4000) } else { rng.within(1..20) };
    let content: Vec<_> = (0..words).map(|_| format!("{:x}", rng.next())).collect();
    json!([{"role": "user", "content": content.join(" ")}])
}
