//! What is measured, and its child process.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Result;
use crate::children;
use crate::process::{CpuClock, now_ns};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// This agent.
    Ours,
    /// Another agent that understands the same `agent.toml`.
    Peer,
    /// The bare relay of [`crate::floor`].
    Floor,
    /// No agent: [`crate::direct`].
    Direct,
    /// This agent, over TLS.
    Wss,
}

impl Subject {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Peer => "peer",
            Self::Floor => "floor",
            Self::Direct => "direct",
            Self::Wss => "wss",
        }
    }

    pub fn is_agent(self) -> bool {
        matches!(self, Self::Ours | Self::Peer | Self::Wss)
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where a subject dials.
pub struct Places<'a> {
    pub coordinator_url: String,
    pub coordinator_port: u16,
    pub ca_file: Option<&'a Path>,
    pub backend_port: u16,
}

impl Places<'_> {
    fn agent_toml(&self) -> String {
        let Self { coordinator_url, ca_file, backend_port, .. } = self;
        let ca_file = ca_file.map_or(String::new(), |path| format!("ca_file = {path:?}\n"));
        format!(
            r#"[coordinator]
url = "{coordinator_url}"
{ca_file}[identity]
key_path = "~/identity.key"
[[backends]]
kind = "vllm"
url = "http://127.0.0.1:{backend_port}"
[pricing]
default_input_per_1m = 500_000
default_output_per_1m = 750_000
[limits]
max_concurrent = 256
"#
        )
    }
}

/// Of a person's environment, what would change what an agent does.
const FOREIGN_VARIABLES: [&str; 8] =
    ["XDG_CONFIG_HOME", "RUST_LOG", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];

/// Of a log, in an error.
const LAST_LINES: usize = 8;

/// A running child; killed when dropped.
pub struct Process {
    pub pid: u32,
    pub cpu: CpuClock,
    /// Just before it was started.
    pub spawned_ns: u64,
    log: PathBuf,
}

impl Process {
    /// Starts a subject from a fresh copy of its program: no other process shares its pages, so that the proportional set is
    /// its own. `home` keeps its identity between starts.
    pub fn start(subject: Subject, program: &Path, home: &Path, places: &Places) -> Result<Self> {
        fs::create_dir_all(home)?;
        let copy = home.join("program");
        match fs::remove_file(&copy) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        fs::copy(program, &copy).map_err(|error| format!("failed to copy `{}`: {error}", program.display()))?;
        // Pages that are not yet written back would be dirty memory of the process that maps them.
        File::open(&copy)?.sync_all()?;
        let log = home.join("log");
        fs::write(&log, "")?;
        let log_file = OpenOptions::new().append(true).open(&log)?;
        let mut command = Command::new(&copy);
        match subject {
            Subject::Ours | Subject::Peer | Subject::Wss => {
                let config = home.join("agent.toml");
                fs::write(&config, places.agent_toml())?;
                command.arg("--config").arg(config).args(["--allow-insecure", "--log-level", "warn", "run"]);
            }
            Subject::Floor => {
                command.args(["floor", &places.coordinator_port.to_string(), &places.backend_port.to_string()]);
            }
            Subject::Direct => {
                command.args(["direct", &places.backend_port.to_string()]);
            }
        }
        if subject == Subject::Direct {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        } else {
            command.stdin(Stdio::null()).stdout(log_file.try_clone()?);
        }
        command.env("HOME", home).current_dir(home).stderr(log_file);
        for variable in FOREIGN_VARIABLES {
            command.env_remove(variable);
        }
        let spawned_ns = now_ns();
        let pid = children::start(&mut command)?;
        let cpu = CpuClock::of(pid).inspect_err(|_| children::end(pid))?;
        Ok(Self { pid, cpu, spawned_ns, log })
    }

    /// For an error: how it ended, if it did, and the last lines that it logged.
    pub fn last_words(&self) -> String {
        let end = match children::status(self.pid) {
            Some(status) => format!("it ended with {status}"),
            None => "it still runs".to_owned(),
        };
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        format!("{end}, and said last:\n{}", lines[lines.len().saturating_sub(LAST_LINES)..].join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        children::end(self.pid);
    }
}
