//! Other programs, found on the PATH.
//!
//! `std::process::Command` would do all of this; this does what is needed of it in a tenth of its 26 KB of the binary.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawnp};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What a program left behind.
pub struct Output {
    /// How it ended; `None` when it succeeded.
    pub failure: Option<String>,
    /// What it wrote.
    pub stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Output {
    /// What it had to say about its failure.
    pub fn error_text(&self) -> String {
        match (String::from_utf8_lossy(&self.stderr).trim(), &self.failure) {
            ("", Some(failure)) => failure.clone(),
            (said, _) => said.to_owned(),
        }
    }
}

/// A program that runs. Nobody ends it when this is dropped.
pub struct Child(Pid);

impl Child {
    /// How it ended, if it has: empty when it succeeded.
    pub fn ended(&self) -> Option<String> {
        match waitpid(self.0, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => None,
            status => Some(failure_of(status).unwrap_or_default()),
        }
    }
}

/// Runs a program to its end, in our environment but with messages in English.
///
/// # Errors
/// It cannot be started: `NotFound` when there is none of that name.
pub fn output(words: &[&str], input: &[u8]) -> io::Result<Output> {
    let (stdin, mut to_child) = pipe()?;
    let (mut stdout, out) = pipe()?;
    let (mut stderr, err) = pipe()?;
    // What a pipe does not hold of its complaints is lost, so that neither waits for the other.
    fcntl(&err, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let pid =
        spawn(words, &our_environment(), &[(stdin.as_raw_fd(), 0), (out.as_raw_fd(), 1), (err.as_raw_fd(), 2)], false)?;
    drop((stdin, out, err));
    // One that does not read on says why at its end.
    let _ = to_child.write_all(input);
    drop::<PipeWriter>(to_child);
    let (mut written, mut said) = (Vec::new(), Vec::new());
    stdout.read_to_end(&mut written)?;
    stderr.read_to_end(&mut said)?;
    Ok(Output { failure: failure_of(waitpid(pid, None)), stdout: written, stderr: said })
}

/// Has a program take over the terminal until its end. How it failed, if it did.
///
/// # Errors
/// It cannot be started.
pub fn run_foreground(words: &[&str]) -> io::Result<Option<String>> {
    let pid = spawn(words, &our_environment(), &[], false)?;
    Ok(failure_of(waitpid(pid, None)))
}

/// Starts a program with this environment alone, without any input or output, in a process group of its own, which a closed
/// terminal does not touch.
///
/// # Errors
/// It cannot be started.
pub fn start_detached(words: &[&str], environment: &[(String, String)]) -> io::Result<Child> {
    let variables: Vec<CString> =
        environment.iter().filter_map(|(name, value)| CString::new(format!("{name}={value}")).ok()).collect();
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    let fd = nothing.as_raw_fd();
    spawn(words, &variables, &[(fd, 0), (fd, 1), (fd, 2)], true).map(Child)
}

/// With these descriptors of ours as those of the program.
fn spawn(
    words: &[&str],
    environment: &[CString],
    descriptors: &[(RawFd, RawFd)],
    is_detached: bool,
) -> io::Result<Pid> {
    let words: Vec<CString> = words.iter().map(|word| CString::new(*word)).collect::<Result<_, _>>()?;
    let program: &CStr = words.first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut actions = PosixSpawnFileActions::init()?;
    for (ours, theirs) in descriptors {
        actions.add_dup2(*ours, *theirs)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    let mut flags = PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF;
    // Rust's programs ignore it, and children would, too.
    attributes.set_sigdefault(&SigSet::from(Signal::SIGPIPE))?;
    if is_detached {
        flags |= PosixSpawnFlags::POSIX_SPAWN_SETPGROUP;
        attributes.set_pgroup(Pid::from_raw(0))?;
    }
    attributes.set_flags(flags)?;
    Ok(posix_spawnp(program, &actions, &attributes, &words, environment)?)
}

fn our_environment() -> Vec<CString> {
    let pair = |name: &OsStr, value: &OsStr| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok();
    let ours = std::env::vars_os().filter(|(name, _)| name != "LC_ALL");
    ours.filter_map(|(name, value)| pair(&name, &value)).chain([c"LC_ALL=C".to_owned()]).collect()
}

fn failure_of(status: Result<WaitStatus, Errno>) -> Option<String> {
    match status {
        Ok(WaitStatus::Exited(_, 0)) => None,
        Ok(WaitStatus::Exited(_, code)) => Some(format!("exit code {code}")),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(signal.as_str().to_owned()),
        _ => Some("its end was missed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_complains_at_length_comes_to_an_end() {
        let output =
            output(&["sh", "-c", "cat; head -c 300000 /dev/zero >&2; echo out; exit 3"], b"in ").expect("a shell");
        assert_eq!((&output.stdout[..], output.failure.as_deref()), (&b"in out\n"[..], Some("exit code 3")));
        assert!(output.stderr.len() < 300_000);
    }
}
