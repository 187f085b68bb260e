//! `demo --bench`: measures the latency that the agent adds to the first byte and to each event of a response.
//!
//! Invariant: figures are shown only if every response arrived through the agent complete and unchanged.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::output::{Output, millis};
use super::overhead::{OverheadMeter, Through};
use super::timed_response::{Timed, percentile};
use super::{DemoError, sample_request};
use crate::backend::Backend;

/// The prompt. A real model continues the text; for the echo, it has as many words as the token limit allows.
const PROMPT: &str = "Count on in words, as far as you get: one, two, three, four, five, six, seven, eight, \
     nine, ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty, \
     twenty-one, twenty-two, twenty-three, twenty-four";

/// Token limit of a response: some tens of events, and seconds on a slow backend.
const RESPONSE_TOKENS_MAX: u32 = 32;

/// Limits of the paired requests, by number and by time.
const PAIRS_MAX: usize = 20;
const PAIRS_TIME: Duration = Duration::from_secs(40);

/// Limits of the concurrent requests: how many at once, how many rounds, and their time.
const STREAMS_MAX: u64 = 8;
const ROUNDS_MAX: usize = 5;
const ROUNDS_TIME: Duration = Duration::from_secs(20);

/// A column of the table: the times of direct requests, of requests through the agent, or the difference.
#[derive(Default)]
pub(super) struct Column {
    pub(super) first_byte: Vec<Duration>,
    last_byte: Vec<Duration>,
    gaps: Vec<Duration>,
    delays: Vec<Duration>,
    /// Delays with concurrent streams.
    together: Vec<Duration>,
}

/// The measurements.
#[derive(Default)]
pub(super) struct Figures {
    pub(super) direct: Column,
    pub(super) through: Column,
    added: Column,
    /// Largest number of responses that the backend sent concurrently.
    most_concurrent: usize,
    /// Number of responses through the agent.
    responses: usize,
}

/// Measures, and shows the table. The agent runs up to `jobs_max` concurrent jobs.
///
/// # Errors
/// A hosted backend may get a request, a request failed, or a response did not arrive as the backend sent it.
pub(super) fn run(
    meter: &OverheadMeter<'_>,
    backend: &dyn Backend,
    prompt: Option<&str>,
    jobs_max: u64,
    output: &mut Output<'_>,
) -> Result<(), DemoError> {
    if meter.may_cost() {
        return Err(DemoError::Hosted);
    }
    let streams = usize::try_from(jobs_max.min(STREAMS_MAX)).unwrap_or(1);
    output.line(format_args!(
        "\nBench{}: responses of {RESPONSE_TOKENS_MAX} tokens, alternately direct and through the agent, then up to {STREAMS_MAX} \
         at once; takes about a minute\n\n{:13}{:>21}{:>21}{:>21}   ms: median (quartiles)",
        cpus(),
        "",
        "directly",
        "through",
        "agent adds"
    ));
    let mut request = sample_request::request(&meter.model_id, prompt.unwrap_or(PROMPT), RESPONSE_TOKENS_MAX);
    request["temperature"] = json!(0);
    let mut figures = pairs(meter, backend, &request, PAIRS_MAX)?;
    if streams > 1 {
        let started = Instant::now();
        for _ in 0..ROUNDS_MAX {
            figures.add_together(&meter.through(&request, streams)?);
            if started.elapsed() > ROUNDS_TIME {
                break;
            }
        }
    }
    figures.show(streams, output);
    Ok(())
}

/// Sends up to `pairs_max` requests directly, and as many through the agent.
///
/// # Errors
/// As [`run`].
pub(super) fn pairs(
    meter: &OverheadMeter<'_>,
    backend: &dyn Backend,
    request: &Value,
    pairs_max: usize,
) -> Result<Figures, DemoError> {
    let mut figures = Figures::default();
    meter.directly(backend, request)?; // fills the backend's prompt cache
    let started = Instant::now();
    for turn in 0..2 * pairs_max {
        // The first request of a pair may change the state of backend and machine, so the order is d, t, t, d, d, t, t, d.
        if matches!(turn % 4, 0 | 3) {
            figures.direct.add(&meter.directly(backend, request)?);
        } else {
            figures.add_alone(&meter.through(request, 1)?);
        }
        if turn % 2 == 1 && started.elapsed() > PAIRS_TIME {
            break;
        }
    }
    Ok(figures)
}

impl Column {
    fn add(&mut self, response: &Timed) {
        self.first_byte.push(response.first_byte());
        self.last_byte.push(response.total());
        response.gaps(&mut self.gaps);
    }
}

impl Figures {
    fn add_alone(&mut self, responses: &[Through]) {
        self.responses += responses.len();
        for Through { given, arrived, .. } in responses {
            self.through.add(arrived);
            self.added.first_byte.push(arrived.first_byte().saturating_sub(given.first_byte()));
            self.added.last_byte.push(arrived.total().saturating_sub(given.total()));
            arrived.delays(given, &mut self.added.delays);
        }
    }

    fn add_together(&mut self, responses: &[Through]) {
        self.responses += responses.len();
        for Through { given, arrived, .. } in responses {
            arrived.delays(given, &mut self.added.together);
            let concurrent = responses.iter().filter(|other| other.given.overlaps(given)).count();
            self.most_concurrent = self.most_concurrent.max(concurrent);
        }
    }

    fn show(&self, streams: usize, output: &mut Output<'_>) {
        let pairs = format!("{} pairs", self.direct.first_byte.len());
        let gap = figure(percentile(&self.direct.gaps, 99));
        let gap_through = figure(percentile(&self.through.gaps, 99));
        self.row(output, "first byte", |column| &column.first_byte, &pairs);
        self.row(output, "last byte", |column| &column.last_byte, &pairs);
        self.row(output, "gap", |column| &column.gaps, &format!("p99 {gap} and {gap_through}"));
        self.row(output, "each event", |column| &column.delays, &events(&self.added.delays));
        if streams > 1 {
            let note = format!("{}, at most {} answers at a time", events(&self.added.together), self.most_concurrent);
            self.row(output, &format!("{streams} at once"), |column| &column.together, &note);
        }
        output.line(format_args!("\n  {}", verdict(&self.direct.first_byte, &self.through.first_byte)));
        let events = self.added.delays.len() + self.added.together.len();
        let note = format!("{} through the agent, {events} events, as sent by the backend", self.responses);
        output.row("answers", "ok", &note);
    }

    fn row(&self, output: &mut Output<'_>, name: &str, of: fn(&Column) -> &Vec<Duration>, note: &str) {
        let mut line = String::new();
        for column in [&self.direct, &self.through, &self.added] {
            line += &format!("{:>21}", spread(of(column)));
        }
        output.line(format_args!("  {name:<11}{line}   {note}"));
    }
}

fn events(delays: &[Duration]) -> String {
    format!("p99 {}; {} events", figure(percentile(delays, 99)), delays.len())
}

/// The number of CPUs, if known.
fn cpus() -> String {
    std::thread::available_parallelism().map_or_else(|_| String::new(), |cpus| format!(" (CPUs: {cpus})"))
}

/// Whether the medians differ by more than the backend's own variation.
fn verdict(direct: &[Duration], through: &[Duration]) -> String {
    let (median, with_agent) = (percentile(direct, 50), percentile(through, 50));
    let sign = if with_agent < median { "-" } else { "" };
    let (apart, own) = (with_agent.abs_diff(median), percentile(direct, 75) - percentile(direct, 25));
    let than = if apart > own { "more than" } else { "within" };
    let (apart, own) = (figure(apart), figure(own));
    format!("The medians of the first byte differ by {sign}{apart} ms, {than} the backend's own variation of {own} ms.")
}

/// The median and the quartiles.
fn spread(times: &[Duration]) -> String {
    if times.is_empty() {
        return "-".to_owned();
    }
    let quartile = |percent| figure(percentile(times, percent));
    format!("{} ({}-{})", quartile(50), quartile(25), quartile(75))
}

/// Milliseconds with about three significant digits.
fn figure(time: Duration) -> String {
    let digits = match time.as_millis() {
        0 => 3,
        1..10 => 2,
        10..100 => 1,
        _ => 0,
    };
    millis(time, digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn figures_have_three_significant_digits() {
        let figures = [61, 1_234, 12_345, 123_456].map(|us| figure(Duration::from_micros(us)));
        assert_eq!(figures, ["0.061", "1.23", "12.3", "123"]);
        assert_eq!(spread(&[MS, MS * 2, MS * 3, MS * 4]), "3.00 (2.00-4.00)");
        assert_eq!(spread(&[]), "-");
    }

    #[test]
    fn verdict_separates_noise_from_a_difference() {
        let steady = [MS * 10, MS * 10, MS * 11];
        let noisy = [MS * 5, MS * 10, MS * 50];
        let slower = [MS * 15, MS * 15, MS * 15];
        assert!(verdict(&steady, &slower).contains(" 5.00 ms, more than"));
        assert!(verdict(&noisy, &slower).contains(" 5.00 ms, within"));
        assert!(verdict(&slower, &steady).contains(" -5.00 ms, more than"));
    }
}
