//! The oracle: decides whether a job may end as it did, given what its backends did.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::MAX_CONCURRENT;
use super::World;
use super::job::{Job, NOBODYS};
use super::play_log::Play;
use super::script::{Ending, Framing, Verdict};
use crate::support::ms;

/// How far the clocks of both sides may differ; they count whole milliseconds.
const CLOCKS: Duration = ms(5);

/// What is known about how a job ended.
pub struct Case<'a> {
    pub world: &'a World,
    pub job: &'a Job,
    pub plays: &'a [Play],
    /// Whether its model was offered throughout, since it was sent.
    pub offered: bool,
}

impl Case<'_> {
    /// What is wrong with a terminal frame.
    pub fn judge(&self, frame: &Value) -> Result<(), String> {
        // The plays of a job that was sent twice cannot be told apart.
        if self.job.copies == 1 {
            self.check_fail_over()?;
        }
        match frame["type"].as_str() {
            Some("job_done") => self.judge_done(frame),
            Some("job_error") if self.job.got == 0 && frame["tokens_emitted"] != 0 => {
                Err("tokens were emitted, and not a byte came".to_owned())
            }
            Some("job_error") => self.judge_error(frame["error_code"].as_str().unwrap_or_default()),
            other => Err(format!("a frame of type {other:?}")),
        }
    }

    /// Only a backend that could not take the job may have been skipped.
    fn check_fail_over(&self) -> Result<(), String> {
        let earlier = &self.plays[..self.plays.len().saturating_sub(1)];
        match earlier.iter().find(|play| !self.may_be_passed_over(play)) {
            Some(play) => Err(format!("backend {} had answered, and another request followed", play.backend)),
            None => Ok(()),
        }
    }

    fn may_be_passed_over(&self, play: &Play) -> bool {
        let by_script = match play.refusal {
            Some(refusal) => refusal.may_fail_over,
            None => self.job.script.verdict == Verdict::Torn,
        };
        by_script || self.was_disturbed(play)
    }

    fn was_disturbed(&self, play: &Play) -> bool {
        self.world.fleet.was_away(play.backend, play.began)
    }

    fn judge_done(&self, frame: &Value) -> Result<(), String> {
        let (job, script) = (self.job, &self.job.script);
        if !self.plays.iter().any(|play| play.refusal.is_none()) {
            return Err("done, and no backend served it".to_owned());
        }
        if script.verdict != Verdict::Done {
            return Err("done, and the stream was not whole".to_owned());
        }
        if job.got != script.body.len() {
            // Only the end of the connection ends such a body, so that a missing part cannot be noticed.
            let ended_early = script.framing == Framing::UntilClose && self.plays.iter().any(|p| self.was_disturbed(p));
            // What follows an end marker may be missing where the backend leaves the body open, and at the deadline.
            let was_due = job.sent.at.elapsed() + CLOCKS >= job.deadline;
            let may_be_short = ended_early || script.ending == Ending::Open || was_due;
            let is_whole = may_be_short && script.has_end_mark(job.got);
            return if is_whole {
                Ok(())
            } else {
                Err(format!("done with {} of {} bytes", job.got, script.body.len()))
            };
        }
        let tokens = &frame["tokens"];
        for (name, count) in [
            ("input", script.usage.input),
            ("input_tokens", script.usage.input),
            ("output", script.usage.output),
            ("output_tokens", script.usage.output),
        ] {
            if tokens[name].as_u64() != Some(count) {
                return Err(format!("{name} should be {count}: {tokens}"));
            }
        }
        Ok(())
    }

    fn judge_error(&self, code: &str) -> Result<(), String> {
        let job = self.job;
        if code == "backend_timeout" {
            let took = job.sent.at.elapsed();
            let late = took + CLOCKS >= job.deadline;
            return if late { Ok(()) } else { Err(format!("timed out after {took:?} of {:?}", job.deadline)) };
        }
        if job.copies > 1 {
            let explained = self.plays.iter().any(|play| self.explains(play, code)) || self.explains_without(code);
            return if explained { Ok(()) } else { Err("a code that nothing explains".to_owned()) };
        }
        match self.plays.last() {
            _ if code == "backend_unreachable" && self.world.fleet.some_away(job.model, job.sent.at) => Ok(()),
            Some(play) if self.explains(play, code) => self.check_bytes(play),
            None if self.explains_without(code) => Ok(()),
            _ => Err("a code that nothing explains".to_owned()),
        }
    }

    /// Whether what the backend did leads to this code.
    fn explains(&self, play: &Play, code: &str) -> bool {
        let by_script = match (play.refusal, self.job.script.verdict) {
            (Some(refusal), _) => code == refusal.code,
            (None, Verdict::Broken) => code == "internal",
            (None, Verdict::Torn) => matches!(code, "internal" | "backend_unreachable"),
            (None, Verdict::Done | Verdict::Never) => false,
        };
        by_script || self.was_disturbed(play) && matches!(code, "internal" | "backend_unreachable")
    }

    /// Whether a job that no backend has seen may end with this code.
    fn explains_without(&self, code: &str) -> bool {
        match code {
            "out_of_capacity" => self.job.ahead >= MAX_CONCURRENT,
            "model_not_loaded" => self.job.model == NOBODYS || !self.offered,
            "backend_unreachable" => self.world.fleet.some_away(self.job.model, self.job.sent.at),
            _ => false,
        }
    }

    /// Checks that all bytes before a stream broke were relayed.
    fn check_bytes(&self, play: &Play) -> Result<(), String> {
        let (got, sent) = (self.job.got, self.job.script.body.len());
        let expected = match (play.refusal, self.job.script.verdict) {
            _ if self.was_disturbed(play) => return Ok(()),
            (Some(_), _) => 0,
            (None, Verdict::Broken) => sent,
            (None, _) => return Ok(()),
        };
        if got == expected { Ok(()) } else { Err(format!("{got} bytes where {expected} should have come")) }
    }
}

/// The models that the agent offers.
pub struct Offer {
    now: HashSet<String>,
    /// When each model was last added or removed.
    changed: HashMap<String, Instant>,
}

impl Offer {
    pub fn of(capabilities: &Value) -> Self {
        Self { now: names(capabilities), changed: HashMap::new() }
    }

    pub fn update(&mut self, capabilities: &Value) {
        let new = names(capabilities);
        for model in self.now.symmetric_difference(&new) {
            self.changed.insert(model.clone(), Instant::now());
        }
        self.now = new;
    }

    pub fn has(&self, model: &str) -> bool {
        self.now.contains(model)
    }

    /// Whether it was offered throughout, since then.
    pub fn had(&self, model: &str, since: Instant) -> bool {
        self.has(model) && self.changed.get(model).is_none_or(|at| *at < since)
    }
}

fn names(capabilities: &Value) -> HashSet<String> {
    let models = capabilities["models"].as_array().into_iter().flatten();
    models.filter_map(|model| model["model_id"].as_str()).map(str::to_owned).collect()
}
