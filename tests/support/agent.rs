//! The real binary as a child process, with its own home and none of the test's environment.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::descriptors::opened;
use super::{Ran, SOON, Scratch, ms, procfs};

/// The binary under test; `AGENT` may name another one.
pub fn binary() -> OsString {
    std::env::var_os("AGENT").unwrap_or_else(|| env!("CARGO_BIN_EXE_usepod-agent").into())
}

/// The configuration of an agent. It outlives the agent, so that a second one can be started with the same files.
pub struct Setup {
    pub scratch: Arc<Scratch>,
    coordinator: String,
    top: String,
    pricing: String,
    limits: String,
    backends: Vec<String>,
    environment: Vec<(String, String)>,
    prelude: String,
}

impl Setup {
    pub fn new(coordinator_url: &str) -> Self {
        Self {
            scratch: Arc::new(Scratch::new()),
            coordinator: format!("url = \"{coordinator_url}\""),
            top: String::new(),
            pricing: "default_input_per_1m = 500_000\ndefault_output_per_1m = 750_000".to_owned(),
            limits: String::new(),
            backends: Vec::new(),
            environment: Vec::new(),
            prelude: String::new(),
        }
    }

    /// The lines of one `[[backends]]`.
    pub fn backend(mut self, toml: impl Into<String>) -> Self {
        self.backends.push(toml.into());
        self
    }

    /// Lines for `[limits]`.
    pub fn limits(mut self, toml: &str) -> Self {
        self.limits = toml.to_owned();
        self
    }

    /// Lines for `[pricing]`, after the defaults.
    pub fn pricing(mut self, toml: &str) -> Self {
        self.pricing = format!("{}\n{toml}", self.pricing);
        self
    }

    /// A line for `[coordinator]`, after the URL.
    pub fn coordinator(mut self, toml: &str) -> Self {
        self.coordinator = format!("{}\n{toml}", self.coordinator);
        self
    }

    /// Lines for the end of the file.
    pub fn more(mut self, toml: &str) -> Self {
        self.top = toml.to_owned();
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Shell commands that run before the agent in its process: limits, redirections.
    pub fn after(mut self, shell: &str) -> Self {
        self.prelude.push_str(shell);
        self.prelude.push('\n');
        self
    }

    /// Makes file permissions apply to the agent even if the tests run as root.
    pub fn bound_by_modes(self) -> Self {
        self.after(
            "[ \"$(id -u)\" != 0 ] || exec setpriv --inh-caps=-all \\
             --bounding-set=-dac_override,-dac_read_search,-fowner \"$0\" \"$@\"",
        )
    }

    pub fn toml(&self) -> String {
        let backends: String = self.backends.iter().map(|toml| format!("[[backends]]\n{toml}\n\n")).collect();
        format!(
            "[coordinator]\n{}\n\n[pricing]\n{}\n\n[limits]\n{}\n\n{backends}{}",
            self.coordinator, self.pricing, self.limits, self.top
        )
    }

    /// Writes the config file unless it is up to date, as another process may be reading it.
    pub fn write(&self) -> PathBuf {
        let path = self.scratch.join("agent.toml");
        if std::fs::read_to_string(&path).is_ok_and(|text| text == self.toml()) {
            return path;
        }
        self.scratch.write("agent.toml", self.toml())
    }

    pub fn identity(&self) -> PathBuf {
        self.scratch.join(".usepod-agent/identity.key")
    }

    pub fn start(&self) -> Agent {
        self.start_at_level(Some("debug"))
    }

    pub fn start_at_level(&self, level: Option<&str>) -> Agent {
        Agent::spawn(self.command(level), Some(Arc::clone(&self.scratch)))
    }

    /// Starts a command other than `run`, with the same files.
    pub fn start_command(&self, words: &[&str]) -> Agent {
        let mut command = self.command(None);
        command.args(words);
        Agent::spawn(command, Some(Arc::clone(&self.scratch)))
    }

    /// Starts it with pipes whose other end is closed.
    pub fn start_with_closed_outputs(&self) -> Agent {
        let mut child = spawn(self.command(None).stdout(Stdio::piped()).stderr(Stdio::piped()));
        drop((child.stdout.take(), child.stderr.take()));
        Agent { child, stdout: Log::closed(), stderr: Log::closed(), _scratch: Some(Arc::clone(&self.scratch)) }
    }

    /// Starts it with pipes that stay open and are never read: once they are full, writes block.
    pub fn start_with_unread_outputs(&self) -> Agent {
        let mut command = self.command(Some("debug"));
        let child = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        Agent { child, stdout: Log::closed(), stderr: Log::closed(), _scratch: Some(Arc::clone(&self.scratch)) }
    }

    /// Starts it as the crontab line does.
    pub fn start_by_cron(&self) -> Agent {
        let mut command = self.command(None);
        command.args(["run", "--cron"]);
        Agent::spawn(command, Some(Arc::clone(&self.scratch)))
    }

    /// The log file of an agent started by cron.
    pub fn log(&self) -> PathBuf {
        self.identity().with_file_name("agent.log")
    }

    fn command(&self, level: Option<&str>) -> Command {
        let mut command = command(self.scratch.path(), &self.prelude);
        command.arg("--config").arg(self.write()).arg("--allow-insecure");
        command.args(level.into_iter().flat_map(|level| ["--log-level", level]));
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }
}

fn command(home: &Path, prelude: &str) -> Command {
    let mut command = Command::new(if prelude.is_empty() { binary() } else { "/bin/sh".into() });
    if !prelude.is_empty() {
        command.arg("-c").arg(format!("{prelude}exec \"$0\" \"$@\"")).arg(binary());
    }
    command.env_clear().env("HOME", home).current_dir(home).stdin(Stdio::null());
    // Wide enough that no line is wrapped; tests of the layout set their own width.
    command.env("COLUMNS", "1000").env("LANG", "C.UTF-8");
    command
}

fn spawn(command: &mut Command) -> Child {
    opened(command.spawn(), &format!("failed to start {:?}", command.get_program()))
}

/// Runs the binary to its end, with `home` as home and working directory.
pub fn cli(home: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
    cli_within(SOON, home, arguments, environment)
}

/// Likewise, with this time limit.
pub fn cli_within(limit: Duration, home: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
    let mut agent = Agent::spawn_in(home, arguments, environment);
    let status = agent.wait(limit);
    Ran { code: status.code(), stdout: agent.stdout.whole(), stderr: agent.stderr.whole() }
}

/// A running agent; killed on drop, and its log is shown when the test fails.
pub struct Agent {
    child: Child,
    pub stdout: Log,
    pub stderr: Log,
    // Keeps the folder until the agent has ended.
    _scratch: Option<Arc<Scratch>>,
}

impl Agent {
    /// Starts the binary with these arguments, with `home` as home and working directory.
    pub fn run(home: &Path, arguments: &[&str]) -> Self {
        Self::spawn_in(home, arguments, &[])
    }

    fn spawn_in(home: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = command(home, "");
        command.args(arguments).envs(environment.iter().copied());
        Self::spawn(command, None)
    }

    fn spawn(mut command: Command, scratch: Option<Arc<Scratch>>) -> Self {
        let mut child = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        let stdout = Log::follow(child.stdout.take().expect("a piped stdout"));
        let stderr = Log::follow(child.stderr.take().expect("a piped stderr"));
        Self { child, stdout, stderr, _scratch: scratch }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `TERM`, `INT`, `HUP`, …
    pub fn signal(&self, name: &str) {
        let status = Command::new("sh").arg("-c").arg(format!("kill -{name} {}", self.pid())).status();
        assert!(status.expect("a shell").success(), "kill -{name} failed: is the agent still running?");
    }

    /// Limits new descriptors to numbers below this; open ones stay open.
    pub fn limit_descriptors(&self, below: u32) {
        let limit = format!("--nofile={below}:");
        let status = Command::new("prlimit").args(["--pid", &self.pid().to_string(), &limit]).status();
        assert!(status.expect("prlimit, of util-linux").success(), "the limit of descriptors was not set");
    }

    /// Makes every further write to a file fail.
    pub fn limit_files(&self) {
        let status = Command::new("prlimit").args(["--pid", &self.pid().to_string(), "--fsize=0:"]).status();
        assert!(status.expect("prlimit, of util-linux").success(), "the limit of files was not set");
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().expect("the state of our own child") {
                return status;
            }
            assert!(Instant::now() < deadline, "the agent did not exit within {within:?}");
            std::thread::sleep(ms(5));
        }
    }

    /// Waits for the end of the process; returns its exit code and stdout.
    pub fn finish(&mut self, within: Duration) -> (Option<i32>, String) {
        let status = self.wait(within);
        (status.code(), self.stdout.whole())
    }

    /// The warnings logged so far.
    pub fn warnings(&self) -> Vec<String> {
        self.stderr.text().lines().filter(|line| line.contains("WARN")).map(str::to_owned).collect()
    }

    /// The number of warnings so far, those included that were only counted.
    pub fn warning_count(&self) -> usize {
        let count = |line: String| match line.rsplit_once(" more like this)") {
            Some((line, _)) => line.rsplit_once('(').and_then(|(_, count)| count.parse().ok()).expect("a count"),
            None => 1,
        };
        self.warnings().into_iter().map(count).sum()
    }

    /// The names of its threads, the main one first.
    pub fn threads(&self) -> Vec<String> {
        let names = procfs::read_each_thread(self.pid(), "comm").expect("the agent's threads");
        names.iter().map(|name| name.trim().to_owned()).collect()
    }

    /// The voluntary context switches of its current threads: one for each wake-up.
    pub fn wake_ups(&self) -> u64 {
        let statuses = procfs::read_each_thread(self.pid(), "status").expect("the agent's threads");
        let switches = |status: &String| procfs::number(status, "voluntary_ctxt_switches:").expect("a count");
        statuses.iter().map(switches).sum()
    }

    /// The peak of its resident memory.
    pub fn peak_kib(&self) -> u64 {
        self.status_kib("VmHWM")
    }

    /// A line of `/proc/PID/status`.
    pub fn status_kib(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the agent's status");
        procfs::number(&status, &format!("{name}:")).expect("the agent's status")
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the state of our own child").is_none()
    }

    pub fn assert_running(&mut self) {
        let status = self.child.try_wait().expect("the state of our own child");
        assert!(status.is_none(), "the agent should be running, but ended with {status:?}");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let killed = Instant::now();
        // A process that does not end after SIGKILL is left to the system.
        while matches!(self.child.try_wait(), Ok(None)) && killed.elapsed() < SOON {
            std::thread::sleep(ms(1));
        }
        let log = self.stderr.whole();
        if std::thread::panicking() {
            let lines: Vec<_> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(40)..];
            #[expect(clippy::print_stderr, reason = "the harness shows it with the failed test")]
            {
                eprintln!("--- the agent's stderr ends:\n{}\n---", tail.join("\n"));
            }
        } else {
            // In every test, no thread of the agent may have panicked.
            assert!(!self.stderr.has_panicked(), "the agent panicked:\n{log}");
        }
    }
}

/// How many bytes of an output are kept; of a longer one only the end.
const LOG_KEPT: usize = 16 << 20;

/// One output of a running process.
#[derive(Clone, Default)]
pub struct Log(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    text: String,
    panicked: bool,
    ended: bool,
}

impl State {
    fn push(&mut self, line: &str) {
        self.panicked |= line.contains("panicked at");
        if self.text.len() > LOG_KEPT {
            let half = self.text.as_bytes()[..LOG_KEPT / 2].iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
            self.text.drain(..half);
        }
        self.text.push_str(line);
    }
}

impl Log {
    fn follow(from: impl Read + Send + 'static) -> Self {
        let log = Self(Arc::default());
        let writer = log.clone();
        std::thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while matches!(from.read_until(b'\n', &mut line), Ok(1..)) {
                writer.update(|state| state.push(&String::from_utf8_lossy(&line)));
                line.clear();
            }
            writer.update(|state| state.ended = true);
        });
        log
    }

    /// The log of a pipe that is not read.
    fn closed() -> Self {
        let log = Self::default();
        log.update(|state| state.ended = true);
        log
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.0.lock().expect("log"));
        self.0.1.notify_all();
    }

    fn has_panicked(&self) -> bool {
        self.0.0.lock().expect("log").panicked
    }

    /// The output so far.
    pub fn text(&self) -> String {
        self.0.0.lock().expect("log").text.clone()
    }

    /// The complete output of a process that has ended.
    pub fn whole(&self) -> String {
        let state = self.0.0.lock().expect("log");
        let (state, _) = self.0.1.wait_timeout_while(state, SOON, |state| !state.ended).expect("log");
        state.text.clone()
    }

    /// Waits for the first line that contains all of `words`, ignoring case.
    pub fn wait_line(&self, words: &[&str]) -> String {
        self.find_line(words, SOON).unwrap_or_else(|text| {
            panic!("no line with {words:?} was written; all there is:\n{text}");
        })
    }

    /// Whether such a line is written within this time.
    pub fn has_line(&self, words: &[&str], within: Duration) -> bool {
        self.find_line(words, within).is_ok()
    }

    /// The line, or the whole output without it.
    fn find_line(&self, words: &[&str], within: Duration) -> Result<String, String> {
        let words: Vec<_> = words.iter().map(|word| word.to_lowercase()).collect();
        let find = |text: &str| {
            let has_all = |line: &&str| words.iter().all(|word| line.to_lowercase().contains(word));
            text.lines().find(has_all).map(str::to_owned)
        };
        let state = self.0.0.lock().expect("log");
        let waiting = |state: &mut State| find(&state.text).is_none() && !state.ended;
        let text = self.0.1.wait_timeout_while(state, within, waiting).expect("log").0.text.clone();
        find(&text).ok_or(text)
    }
}
