//! `cargo bench`: what the agent costs.
//!
//! The bench plays the coordinator and the backend on loopback, and starts the release binary as a child, as an operator would.
//! In each round it also measures, in alternation, the *floor* (a minimal relay), *direct* (a client without an agent) and, if
//! one is named, a *peer* (another agent that reads the same `agent.toml`). Linux only.
//!
//! What the figures mean:
//! - CPU is that of the child, by its own clock. On loopback the sender of a packet pays for its delivery, so it includes the
//!   kernel's work for what the child sends.
//! - CPU per event and per MB is measured in a window in which all streams flow: none starts or ends in it.
//! - Every event carries its send time. A latency is the receive time minus the send time, both by the same clock. It includes
//!   the wake-ups of the bench itself, as does the floor's.
//! - Every workload starts a fresh process from a fresh copy of its subject's program.
//! - A workload fails if a stream loses a byte, or if a job's backend connection closes before the job is cancelled.

mod workloads;
mod report;
mod harness;
mod subject;
mod child;
mod process;
mod client;
mod agent_client;
mod direct;
mod received;
mod backend;
mod job;
mod event;
mod floor;
mod http_client;
#[path = "../support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the integration tests use the rest of it")]
mod support;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use argh::FromArgs;
use serde_json::{Map, Value};

use crate::harness::Harness;
use crate::report::{Machine, Results};
use crate::subject::Subject;
use crate::workloads::{Effort, GROUPS, Workload};

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// `cargo bench` adds it to the arguments.
const BY_CARGO_BENCH: &str = "--bench";

/// Measure what the agent costs: CPU time, memory and latency.
#[derive(FromArgs)]
struct Args {
    /// the program of another agent, to measure and compare this one with (the program itself, not a script that starts it)
    #[argh(option, arg_name = "path")]
    peer: Option<PathBuf>,
    /// the agent to measure (default: the one that cargo built)
    #[argh(option, arg_name = "path")]
    agent: Option<PathBuf>,
    /// number of measurements of each workload (default: 3, or 2 with --quick)
    #[argh(option, arg_name = "n")]
    rounds: Option<usize>,
    /// take about a minute instead of ten: fewer stream counts and shorter windows; only large differences are significant
    #[argh(switch)]
    quick: bool,
    /// workloads to run, separated by commas: size,start,idle,job,churn,lockstep,streams,flood,cancel (default: all)
    #[argh(option, arg_name = "list")]
    only: Option<String>,
    /// file for the values of every round (default: bench.json in the target directory)
    #[argh(option, arg_name = "file")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let mut words: Vec<_> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        // The bench starts itself as these subjects.
        ["floor", coordinator, backend] => port(coordinator).and_then(|it| floor::run(it, port(backend)?)),
        ["direct", backend] => port(backend).and_then(direct::run),
        // `cargo test --all-targets` runs benches, too.
        _ if !words.contains(&BY_CARGO_BENCH) => {
            log("bench: nothing to test; run `cargo bench` to measure");
            Ok(())
        }
        _ => {
            words.retain(|word| *word != BY_CARGO_BENCH);
            match Args::from_args(&["cargo bench --"], &words) {
                Ok(args) => bench(&args, &words),
                Err(exit) if exit.status.is_ok() => {
                    // argh's usage line is longer than 80 columns.
                    let (_, options) = exit.output.split_once('\n').unwrap_or_default();
                    let help = format!("Usage: cargo bench -- [OPTIONS]\n{}", options.trim_end());
                    writeln!(std::io::stdout(), "{help}").map_err(Into::into)
                }
                Err(exit) => Err(exit.output.trim_end().into()),
            }
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log(&format!("bench: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn port(word: &str) -> Result<u16> {
    Ok(word.parse().map_err(|error| format!("`{word}` is not a port: {error}"))?)
}

/// For progress and errors: stdout has the table alone.
fn log(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn bench(args: &Args, words: &[&str]) -> Result<()> {
    let mut effort = if args.quick { Effort::QUICK } else { Effort::FULL };
    effort.rounds = args.rounds.unwrap_or(effort.rounds).max(1);
    let workloads = args.workloads(&effort)?;
    let json = args.json.clone().unwrap_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench.json"));
    let unwritable = |error| format!("failed to write `{}`: {error}", json.display());
    // Fails now, not after everything was measured. The results of an earlier run stay until then.
    File::options().append(true).create(true).open(&json).map_err(unwritable)?;
    let agent = args.agent.as_deref().unwrap_or(Path::new(env!("CARGO_BIN_EXE_usepod-agent")));
    let harness = Harness::new(absolute(agent)?, args.peer.as_deref().map(absolute).transpose()?)?;
    let mut subjects = Subject::ALL.to_vec();
    subjects.retain(|subject| *subject != Subject::Peer || args.peer.is_some());

    let versions = first_starts(&harness, &subjects)?;
    let (mut results, mut failures) = (Results::default(), Vec::new());
    for round in 1..=effort.rounds {
        for workload in &workloads {
            log(&format!("round {round} of {}: {workload}", effort.rounds));
            let applicable: Vec<_> = subjects.iter().copied().filter(|subject| workload.applies_to(*subject)).collect();
            // All subjects or none: a ratio is computed within one round.
            match workload.run(&harness, &effort, &applicable) {
                Ok(figures) => std::iter::zip(applicable, figures)
                    .for_each(|(subject, figures)| results.add(&workload.to_string(), subject, figures)),
                Err(error) => failures.push(format!("round {round}: {error}")),
            }
        }
    }

    let machine = Machine::this();
    let reference = if args.peer.is_some() { Subject::Peer } else { Subject::Direct };
    // Before the table, which may fail if stdout is closed.
    let document = report::document(&results, &machine, &without_folders(words), &versions);
    let written = fs::write(&json, format!("{document:#}\n")).map_err(unwritable);
    let mut stdout = std::io::stdout().lock();
    writeln!(
        stdout,
        "{}, {} CPUs, Linux {}; medians, rounds: {}\n",
        machine.cpu, machine.cpus, machine.kernel, effort.rounds
    )?;
    writeln!(stdout, "{}\n{}", results.table(reference), results.tls_table())?;
    written?;
    writeln!(stdout, "values of every round: {}", json.display())?;
    match failures.len() {
        0 => Ok(()),
        n => Err(format!("{n} workloads failed:\n{}", failures.join("\n")).into()),
    }
}

impl Args {
    fn workloads(&self, effort: &Effort) -> Result<Vec<Workload>> {
        let mut workloads = Workload::all(effort);
        if let Some(only) = &self.only {
            let only: Vec<_> = only.split(',').collect();
            if let Some(unknown) = only.iter().find(|group| !GROUPS.contains(group)) {
                return Err(format!("unknown workload `{unknown}`; the workloads are {}", GROUPS.join(", ")).into());
            }
            workloads.retain(|workload| only.contains(&workload.group()));
        }
        Ok(workloads)
    }
}

fn absolute(program: &Path) -> Result<PathBuf> {
    Ok(fs::canonicalize(program).map_err(|error| format!("failed to find `{}`: {error}", program.display()))?)
}

/// Starts each agent once without measuring it, so that it creates its identity. Returns their versions.
fn first_starts(harness: &Harness, subjects: &[Subject]) -> Result<Map<String, Value>> {
    let agents = subjects.iter().filter(|subject| subject.is_agent());
    let version = |subject: &Subject| match harness.start(*subject) {
        Ok(run) => Ok((subject.name().to_owned(), run.version.into())),
        Err(error) => Err(format!("the first start of {subject}: {error}").into()),
    };
    agents.map(version).collect()
}

/// The arguments for the document, which may be published: without the directories of this machine.
fn without_folders(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| word.rsplit('/').next().unwrap_or(word).to_owned()).collect()
}
