//! `cargo bench`: what the agent costs.
//!
//! The bench plays the coordinator and the backend on loopback and starts the release binary as a child, as an operator would.
//! Beside it, turn about in every round, it measures the *floor*, a bare relay; *direct*, a customer without any agent; and a
//! *peer*, another agent that reads the same `agent.toml`, when one is named. Linux only.
//!
//! What the figures rest on:
//! - CPU is that of the child, by its own clock. On loopback the sender of a packet pays for its delivery, so it holds the
//!   kernel's work for what the child sends.
//! - CPU per event and per MB are of a window in which all streams flow: none begins or ends in it.
//! - Every event carries the time at which it was sent: a latency is a time taken by the receiver less that one, by one clock.
//!   It holds the wake-ups of the bench itself; the floor has them too.
//! - Every workload has a fresh process of a fresh copy of its subject's program.
//! - A stream of which a byte is lost, or a job whose backend was left before it was cancelled, ends the workload with an error.

#[path = "../support/process.rs"]
mod process;
mod children;
mod job;
mod event;
mod client;
#[path = "../support/websocket.rs"]
mod websocket;
mod http_client;
#[path = "../support/connection.rs"]
mod wire;
mod coordinator;
mod backend;
mod floor;
mod direct;
mod subject;
mod harness;
mod workloads;
mod report;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use argh::FromArgs;
use serde_json::{Map, Value};

use crate::harness::Rig;
use crate::process::Machine;
use crate::report::Sheet;
use crate::subject::Subject;
use crate::workloads::{Effort, GROUPS, Workload};

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// What cargo adds to the arguments.
const BY_CARGO_BENCH: &str = "--bench";

/// Measures what the agent costs: `cargo bench -- OPTIONS`.
#[derive(FromArgs)]
struct Args {
    /// another agent's program, not a script around it, to measure beside this one; the ratios are against it
    #[argh(option, arg_name = "path")]
    peer: Option<PathBuf>,
    /// the binary to measure (default: the one that cargo just built)
    #[argh(option, arg_name = "path")]
    agent: Option<PathBuf>,
    /// how often everything is measured (default: 3; 2 with --quick)
    #[argh(option, arg_name = "n")]
    rounds: Option<usize>,
    /// about a minute instead of ten: fewer stream counts and short windows; only large differences mean something
    #[argh(switch)]
    quick: bool,
    /// workloads, by comma: size,start,idle,job,churn,lockstep,streams,flood,cancel (default: all)
    #[argh(option, arg_name = "list")]
    only: Option<String>,
    /// where the values of every round go (default: bench.json in the target folder)
    #[argh(option, arg_name = "file")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let mut words: Vec<_> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        // The bench's own children.
        ["floor", coordinator, backend] => port(coordinator).and_then(|it| floor::run(it, port(backend)?)),
        ["direct", backend] => port(backend).and_then(direct::run),
        // `cargo test --all-targets` runs benches too.
        _ if !words.contains(&BY_CARGO_BENCH) => {
            say("bench: nothing to test; measures when run by `cargo bench`");
            Ok(())
        }
        _ => {
            words.retain(|word| *word != BY_CARGO_BENCH);
            match Args::from_args(&["cargo bench --"], &words) {
                Ok(args) => bench(&args, &words),
                Err(exit) => {
                    say(exit.output.trim_end());
                    return if exit.status.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
                }
            }
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("bench: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn port(word: &str) -> Result<u16> {
    Ok(word.parse().map_err(|error| format!("`{word}` is no port: {error}"))?)
}

/// Progress and errors; the table alone is on stdout.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn bench(args: &Args, words: &[&str]) -> Result<()> {
    let mut effort = if args.quick { Effort::QUICK } else { Effort::FULL };
    effort.rounds = args.rounds.unwrap_or(effort.rounds).max(1);
    let workloads = args.workloads(&effort)?;
    let json = args.json.clone().unwrap_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench.json"));
    let unwritable = |error| format!("failed to write `{}`: {error}", json.display());
    // Known now, not when everything is measured; what an earlier run wrote stays until then.
    File::options().append(true).create(true).open(&json).map_err(unwritable)?;
    let agent = args.agent.as_deref().unwrap_or(Path::new(env!("CARGO_BIN_EXE_usepod-agent")));
    let rig = Rig::new(absolute(agent)?, args.peer.as_deref().map(absolute).transpose()?)?;
    let mut subjects = vec![Subject::Ours, Subject::Peer, Subject::Floor, Subject::Direct, Subject::Wss];
    subjects.retain(|subject| *subject != Subject::Peer || args.peer.is_some());

    let versions = first_starts(&rig, &subjects)?;
    let (mut sheet, mut faults) = (Sheet::default(), Vec::new());
    for round in 1..=effort.rounds {
        for workload in &workloads {
            say(&format!("round {round} of {}: {workload}", effort.rounds));
            let suited: Vec<_> = subjects.iter().copied().filter(|subject| workload.suits(*subject)).collect();
            // All subjects or none: ratios are of one round.
            match workload.run(&rig, &effort, &suited) {
                Ok(figures) => std::iter::zip(suited, figures)
                    .for_each(|(subject, figures)| sheet.add(&workload.to_string(), subject, figures)),
                Err(error) => faults.push(format!("round {round}: {error}")),
            }
        }
    }

    let machine = Machine::this();
    let reference = if args.peer.is_some() { Subject::Peer } else { Subject::Direct };
    // First, since nobody may be left to read the table.
    let document = report::document(&sheet, &machine, &without_folders(words), &versions);
    let written = fs::write(&json, format!("{document:#}\n")).map_err(unwritable);
    let mut stdout = std::io::stdout().lock();
    writeln!(
        stdout,
        "{}, {} CPUs, Linux {}; medians, rounds: {}\n",
        machine.cpu, machine.cpus, machine.kernel, effort.rounds
    )?;
    writeln!(stdout, "{}\n{}", sheet.table(reference), sheet.tls_table())?;
    written?;
    writeln!(stdout, "the values of every round: {}", json.display())?;
    match faults.len() {
        0 => Ok(()),
        n => Err(format!("{n} workloads failed\n{}", faults.join("\n")).into()),
    }
}

impl Args {
    fn workloads(&self, effort: &Effort) -> Result<Vec<Workload>> {
        let mut workloads = Workload::all(effort);
        if let Some(only) = &self.only {
            let only: Vec<_> = only.split(',').collect();
            if let Some(unknown) = only.iter().find(|group| !GROUPS.contains(group)) {
                return Err(format!("no workload is called `{unknown}`; there are {}", GROUPS.join(", ")).into());
            }
            workloads.retain(|workload| only.contains(&workload.group()));
        }
        Ok(workloads)
    }
}

fn absolute(program: &Path) -> Result<PathBuf> {
    Ok(fs::canonicalize(program).map_err(|error| format!("failed to find `{}`: {error}", program.display()))?)
}

/// Starts each agent once, unmeasured: it makes its identity, and says its version.
fn first_starts(rig: &Rig, subjects: &[Subject]) -> Result<Map<String, Value>> {
    let agents = subjects.iter().filter(|subject| subject.is_agent());
    let version = |subject: &Subject| match rig.start(*subject) {
        Ok(run) => Ok((subject.name().to_owned(), run.version.into())),
        Err(error) => Err(format!("the first start of {subject}: {error}").into()),
    };
    agents.map(version).collect()
}

/// The arguments as a document may show them: where a file lies on this machine is nobody's business.
fn without_folders(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| word.rsplit('/').next().unwrap_or(word).to_owned()).collect()
}
