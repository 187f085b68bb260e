//! What a short run of the agent costs. A process that has ended shows its peak of memory to its parent alone.

use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use super::shim::compile;

/// Built once for all tests of a run.
static WEIGHER: LazyLock<PathBuf> = LazyLock::new(|| compile("weigh.c", "weigh", &["-O1"]));

/// What a process took from its start to its end.
#[derive(Debug)]
pub struct Weight {
    pub exit_code: i32,
    pub peak_bytes: u64,
    pub took: Duration,
}

/// Runs it, with its folder and environment, to the end.
pub fn weigh(command: &Command) -> Weight {
    let mut weigher = Command::new(&*WEIGHER);
    weigher.arg(command.get_program()).args(command.get_args()).env_clear();
    weigher.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    weigher.current_dir(command.get_current_dir().expect("a folder"));
    let output = weigher.output().expect("the weigher");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let numbers: Vec<u64> = text.split_whitespace().map(|word| word.parse().expect("a number")).collect();
    let [exit_code, peak_bytes, took] = numbers[..] else { panic!("the weigher said {text:?}") };
    let exit_code = i32::try_from(exit_code).expect("an exit code");
    Weight { exit_code, peak_bytes, took: Duration::from_nanos(took) }
}
