//! Counts outcomes, faults and resource usage, and prints the report.
#![expect(clippy::print_stdout, reason = "who soaks the agent watches it")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::job::Job;
use super::play_log::{Play, PlayLog};
use crate::support::*;

/// The test ends after this many faults; more would only repeat them.
const FAULTS_MAX: usize = 10;
/// How much more an agent may use at the end than after the warm-up: the log thread comes and goes, and so does a kept-alive
/// connection to each backend.
const THREADS_SLACK: usize = 1;
const DESCRIPTORS_SLACK: usize = super::fleet::BACKENDS.len();
const MEMORY_SLACK_KIB: u64 = 8 << 10;

pub struct Totals {
    began: Instant,
    pub bytes: u64,
    jobs: BTreeMap<String, u64>,
    sessions: BTreeMap<&'static str, u64>,
    fail_overs: u64,
    faults: Vec<String>,
    /// Taken every few seconds while it works.
    samples: Vec<ResourceUsage>,
    /// Taken at rest, with the time since the start.
    rests: Vec<(Duration, ResourceUsage)>,
}

impl Totals {
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            bytes: 0,
            jobs: BTreeMap::new(),
            sessions: BTreeMap::new(),
            fail_overs: 0,
            faults: Vec::new(),
            samples: Vec::new(),
            rests: Vec::new(),
        }
    }

    /// Records a violated expectation.
    pub fn fault(&mut self, text: String) {
        println!("FAULT at {:.1} s: {text}", self.began.elapsed().as_secs_f64());
        self.faults.push(text);
    }

    pub fn has_enough_faults(&self) -> bool {
        self.faults.len() >= FAULTS_MAX
    }

    pub fn count(&mut self, outcome: &str) {
        *self.jobs.entry(outcome.to_owned()).or_default() += 1;
    }

    pub fn session(&mut self, end: &'static str) {
        *self.sessions.entry(end).or_default() += 1;
    }

    /// A job's terminal frame has come.
    pub fn ended(&mut self, job: &Job, plays: &[Play], frame: &Value) {
        match frame["error_code"].as_str() {
            Some(code) if plays.is_empty() => self.count(&format!("{code} without a backend")),
            Some(code) => self.count(code),
            None => self.count("done"),
        }
        if job.answered > 0 {
            self.count("of them duplicates that came too late to be one");
        }
        if plays.first().map(|play| play.backend) != plays.last().map(|play| play.backend)
            && frame["type"] == "job_done"
        {
            self.fail_overs += 1;
        }
    }

    pub fn sample(&mut self, agent: &Agent) {
        self.samples.push(ResourceUsage::of(agent));
    }

    pub fn rest(&mut self, usage: ResourceUsage) {
        self.rests.push((self.began.elapsed(), usage));
        println!("at rest: {}", summary_of(&usage));
    }

    pub fn progress(&self, in_flight: usize) {
        let jobs: u64 = self.jobs.values().sum();
        println!(
            "{:5.0} s: {} sessions, {jobs} jobs, {in_flight} in flight, {} MB, {} faults; {}",
            self.began.elapsed().as_secs_f64(),
            self.sessions.values().sum::<u64>() + 1,
            self.bytes >> 20,
            self.faults.len(),
            self.samples.last().map(summary_of).unwrap_or_default(),
        );
    }

    /// Checks that the agent uses no more at the end than after the warm-up.
    pub fn check_leaks(&mut self) {
        let (Some((_, warm)), Some((_, end))) = (self.rests.first().copied(), self.rests.last().copied()) else {
            return self.fault("the agent was never measured".to_owned());
        };
        if end.threads > warm.threads + THREADS_SLACK
            || end.descriptors > warm.descriptors + DESCRIPTORS_SLACK
            || end.resident_kib > warm.resident_kib + MEMORY_SLACK_KIB
        {
            self.fault(format!("the agent has grown: warm {}, at the end {}", summary_of(&warm), summary_of(&end)));
        }
    }

    /// The trend of the memory at rest in KiB per hour, by least squares.
    fn slope(&self) -> f64 {
        let points: Vec<_> =
            self.rests.iter().map(|(at, v)| (at.as_secs_f64() / 3600.0, v.resident_kib as f64)).collect();
        let mean = |of: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / points.len() as f64;
        let (x, y) = (mean(&|p| p.0), mean(&|p| p.1));
        let spread = mean(&|p| (p.0 - x).powi(2));
        if spread > 0.0 { mean(&|p| (p.0 - x) * (p.1 - y)) / spread } else { 0.0 }
    }

    /// Prints the report; panics if there was a fault.
    pub fn conclude(&self, seed: u64, play_log: &PlayLog) {
        let summary = play_log.summary();
        let most = |of: fn(&ResourceUsage) -> u64| self.samples.iter().map(of).max().unwrap_or(0);
        let listed = |counts: Vec<(&str, u64)>| {
            counts.iter().map(|(what, count)| format!("{count} {what}")).collect::<Vec<_>>().join(", ")
        };
        let percentile = |percent: usize| {
            let at = (summary.cancel_times.len() * percent / 100).min(summary.cancel_times.len().saturating_sub(1));
            summary.cancel_times.get(at).map_or(0.0, |micros| f64::from(*micros) / 1000.0)
        };
        let elapsed = self.began.elapsed().as_secs_f64();
        println!("soak: {:.1} minutes, seed {seed}", elapsed / 60.0);
        println!("  sessions   {}", listed(self.sessions.iter().map(|(end, n)| (*end, *n)).collect()));
        println!("  jobs       {}", listed(self.jobs.iter().map(|(end, n)| (end.as_str(), *n)).collect()));
        println!("  bytes      {:.1} MB checked", self.bytes as f64 / 1e6);
        println!("  fail-over  {} jobs done by another backend than the first", self.fail_overs);
        println!(
            "  cancel     to closed backend: p50 {:.2} ms, p99 {:.2} ms, {} of them; {} orphans; {} at backends at most",
            percentile(50),
            percentile(99),
            summary.cancel_times.len(),
            summary.orphans,
            summary.working_most,
        );
        for (at, usage) in &self.rests {
            println!("  at rest    {:5.0} s: {}", at.as_secs_f64(), summary_of(usage));
        }
        println!("  memory     {:+.0} KiB an hour at rest", self.slope());
        println!(
            "  at work    at most {} threads, {} descriptors, {} KiB",
            most(|v| v.threads as u64),
            most(|v| v.descriptors as u64),
            most(|v| v.resident_kib)
        );
        println!("  verdict    {}", if self.faults.is_empty() { "good" } else { "BAD" });
        assert!(self.faults.is_empty(), "{} faults, seed {seed}: {:#?}", self.faults.len(), self.faults);
    }
}

fn summary_of(usage: &ResourceUsage) -> String {
    format!("{} threads, {} descriptors, {} KiB", usage.threads, usage.descriptors, usage.resident_kib)
}
