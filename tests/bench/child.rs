//! The child processes: the subjects at work. None outlives the bench, whether it finishes, fails, or gets SIGINT, SIGTERM or
//! SIGHUP: an agent without its coordinator would keep dialling.
//!
//! Who runs here: the thread of the workloads, and that of the signals, which kills the children under the lock under which they
//! are started, and never releases it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Result;
use crate::process::{CpuClock, now_ns};

static CHILDREN: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// The exit code of a program that was interrupted, as a shell shows it.
const INTERRUPTED: i32 = 130;

/// Lines of a log that an error quotes.
const LAST_LINES: usize = 8;

/// From now on a signal kills all children and removes `folders` before it ends the bench.
pub fn clean_up_on_signal(folders: Vec<PathBuf>) -> Result<()> {
    let clean_up = move || {
        let mut children = lock();
        children.iter_mut().for_each(kill);
        for folder in &folders {
            let _ = fs::remove_dir_all(folder);
        }
        std::process::exit(INTERRUPTED);
    };
    Ok(ctrlc::set_handler(clean_up)?)
}

/// A running child; killed when dropped.
pub struct ChildProcess {
    pub pid: u32,
    pub cpu: CpuClock,
    /// Just before it was started.
    pub spawned_ns: u64,
    log: PathBuf,
}

impl ChildProcess {
    /// Starts a fresh copy of the program, with `home` as home and working folder. No other process shares the copy's pages, so
    /// that the proportional memory is the child's own. With `is_piped` its stdin and stdout are pipes.
    pub fn start(program: &Path, arguments: &[String], home: &Path, is_piped: bool) -> Result<Self> {
        let copy = home.join("program");
        match fs::remove_file(&copy) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        fs::copy(program, &copy).map_err(|error| format!("failed to copy `{}`: {error}", program.display()))?;
        // Pages that are not written back yet would count as dirty memory of the process that maps them.
        File::open(&copy)?.sync_all()?;
        let log = home.join("log");
        fs::write(&log, "")?;
        let log_file = OpenOptions::new().append(true).open(&log)?;
        let mut command = Command::new(&copy);
        command.args(arguments).env_clear().env("HOME", home).current_dir(home);
        if is_piped {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        } else {
            command.stdin(Stdio::null()).stdout(log_file.try_clone()?);
        }
        command.stderr(log_file);
        let spawned_ns = now_ns();
        let pid = spawn(&mut command)?;
        let cpu = CpuClock::of(pid).inspect_err(|_| end(pid))?;
        Ok(Self { pid, cpu, spawned_ns, log })
    }

    /// Our ends of its stdin and stdout, once.
    pub fn take_pipes(&self) -> Option<(ChildStdin, ChildStdout)> {
        let mut children = lock();
        let child = children.iter_mut().find(|child| child.id() == self.pid)?;
        child.stdin.take().zip(child.stdout.take())
    }

    /// For an error: whether and how it ended, and the last lines of its log.
    pub fn state(&self) -> String {
        let mut children = lock();
        let child = children.iter_mut().find(|child| child.id() == self.pid);
        let end = match child.and_then(|child| child.try_wait().ok().flatten()) {
            Some(status) => format!("it ended with {status}"),
            None => "it is still running".to_owned(),
        };
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        format!("{end}; the last lines of its log:\n{}", lines[lines.len().saturating_sub(LAST_LINES)..].join("\n"))
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        end(self.pid);
    }
}

fn spawn(command: &mut Command) -> io::Result<u32> {
    let mut children = lock();
    let child = command.spawn()?;
    let pid = child.id();
    children.push(child);
    Ok(pid)
}

fn end(pid: u32) {
    lock().extract_if(.., |child| child.id() == pid).for_each(|mut child| kill(&mut child));
}

fn kill(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn lock() -> MutexGuard<'static, Vec<Child>> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}
