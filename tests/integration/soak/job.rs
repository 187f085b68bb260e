//! One job, as the coordinator makes it up and remembers it.

use std::time::Duration;

use serde_json::{Value, json};
use uuid::Uuid;

use super::fleet::BACKENDS;
use super::link_faults::{Moment, Weather};
use super::play_log::Play;
use super::rng::Rng;
use super::script::{LARGE_SEEDS, PLAIN_SEEDS, RANDOM_SEEDS, Script, Verdict, refusal_at};
use super::stream::Format;
use crate::support::{ms, secs};

/// A model that nobody lists.
pub const NOBODYS: &str = "nobody's";
/// Asked for as often as they stand here.
const MODELS: [&str; 12] =
    ["shared", "shared", "shared", "pair", "pair", "wide", "wide", "own-0", "own-1", "own-2", "own-3", "own-3"];
/// No job takes so long by itself.
pub const LONG_DEADLINE: std::ops::Range<u64> = 8000..12_000;
/// A duplicate right behind a job finds it in flight when a backend is at it for so long.
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
    /// How often it was sent.
    pub copies: usize,
    /// How many of them have been answered.
    pub answered: usize,
    /// Bytes of the present answer.
    pub got: usize,
    /// The ping behind its cancel.
    pub cancelled: Option<u64>,
    /// When its pong came: the agent had read the cancel.
    pub cancel_read: Option<Moment>,
    /// Something came behind that pong.
    pub late: bool,
}

impl Job {
    pub fn random(rng: &mut Rng, weather: &Weather, offered: impl Fn(&str) -> bool) -> Self {
        let mut model = *rng.pick(&MODELS);
        // A coordinator may not have heard yet that a model is gone.
        while !offered(model) && rng.per_mille(900) {
            model = *rng.pick(&MODELS);
        }
        if rng.per_mille(15) {
            model = NOBODYS;
        }
        let seed = rng.within(RANDOM_SEEDS);
        let mut job = Self::new(rng, weather, seed, model);
        job.deadline = match rng.within(0..100) {
            _ if job.script.verdict == Verdict::Never => rng.time(100..3000),
            0 => ms(rng.within(0..3)),
            1..8 => rng.time(50..2000),
            _ => rng.time(LONG_DEADLINE),
        };
        job
    }

    /// A job whose answer fills what is between its backend and a coordinator that does not read.
    pub fn large(rng: &mut Rng, weather: &Weather) -> Self {
        let (seed, model) = (rng.within(LARGE_SEEDS), *rng.pick(&MODELS));
        Self::new(rng, weather, seed, model)
    }

    /// A job that is served at once by the backend whose own this model is.
    pub fn plain(rng: &mut Rng, weather: &Weather, backend: usize) -> Self {
        let seed = rng.within(PLAIN_SEEDS);
        Self::new(rng, weather, seed, BACKENDS[backend].1[BACKENDS[backend].1.len() - 1])
    }

    /// A job that this backend serves well, and takes more than a second for.
    pub fn slow(rng: &mut Rng, weather: &Weather, backend: usize) -> Self {
        loop {
            let job = Self { seed: rng.within(RANDOM_SEEDS), ..Self::plain(rng, weather, backend) };
            let job = Self { script: Script::of(job.seed, job.format), ..job };
            let is_slow = job.script.verdict == Verdict::Done && job.script.time() > secs(1);
            if is_slow && refusal_at(job.seed, backend).is_none() {
                return job;
            }
        }
    }

    fn new(rng: &mut Rng, weather: &Weather, seed: u64, model: &'static str) -> Self {
        let format = if rng.per_mille(300) { Format::Anthropic } else { Format::Openai };
        Self {
            id: Uuid::from_u64_pair(rng.next(), rng.next()).to_string(),
            seed,
            model,
            format,
            deadline: secs(10),
            script: Script::of(seed, format),
            sent: Moment::now(weather),
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

    /// Whether no copy of it can be in flight any more, now that one has been answered.
    pub fn is_over(&self, plays: &[Play], weather: &Weather) -> bool {
        let was_long = plays.iter().any(|play| play.time() >= DUPLICATE_READ);
        self.answered == self.copies || was_long && self.sent.trouble(weather).is_zero()
    }

    /// Whether a frame may still come although the agent has read the cancel: when all of the answer was on its way by
    /// then, which is when no backend lost its connection over the cancel.
    pub fn may_be_late(&self, plays: &[Play]) -> bool {
        let had_timed_out = self.cancel_read.is_some_and(|read| read.at >= self.sent.at + self.deadline);
        had_timed_out || plays.last().is_none_or(|play| !play.hung_up)
    }

    /// Whether it should have been answered long ago.
    pub fn is_overdue(&self, weather: &Weather) -> bool {
        self.sent.fair_time(weather) > self.deadline + secs(10)
    }
}

/// What is asked in the job of this seed.
pub fn messages(seed: u64) -> Value {
    let rng = &mut Rng::of(seed, "messages");
    let words = if rng.per_mille(20) { rng.within(100..4000) } else { rng.within(1..20) };
    let content: Vec<_> = (0..words).map(|_| format!("{:x}", rng.next())).collect();
    json!([{"role": "user", "content": content.join(" ")}])
}
