//! Other processes: their owner, and signals that reach no process but the intended one.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The user whose permissions the process has; `None` if it cannot be seen.
pub fn user_of(pid: u32) -> Option<u32> {
    // The owner of the folder in /proc may be root, for a process that cannot be dumped.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    uids.split_whitespace().nth(1)?.parse().ok()
}

/// Sends a signal to the process `pid` if `is_intended` confirms that it is the intended one. The pid cannot pass to another
/// process in between, where the kernel has pidfds (Linux 5.3). A process that has ended needs no signal.
///
/// # Errors
/// The process belongs to another user.
pub fn signal(pid: u32, signal: Signal, is_intended: impl FnOnce() -> bool) -> io::Result<()> {
    // Larger pids do not exist.
    let Ok(pid) = i32::try_from(pid) else { return Ok(()) };
    let process = match open_pidfd(pid) {
        Ok(process) => Some(process),
        Err(Errno::ESRCH) => return Ok(()),
        // An older kernel, or a sandbox without these calls.
        Err(_) => None,
    };
    if !is_intended() {
        return Ok(());
    }
    let sent = match &process {
        Some(process) => signal_pidfd(process.as_raw_fd(), signal),
        None => kill(Pid::from_raw(pid), signal),
    };
    match sent {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        // A sandbox may allow the one call and not the other.
        Err(Errno::ENOSYS) => kill(Pid::from_raw(pid), signal).map_err(io::Error::from),
        Err(e) => Err(e.into()),
    }
}

fn open_pidfd(pid: i32) -> Result<OwnedFd, Errno> {
    #[expect(unsafe_code, reason = "neither std nor nix has the call")]
    // SAFETY: pidfd_open takes two integers and accesses no memory of this process.
    let result = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let descriptor = RawFd::try_from(result).map_err(|_| Errno::EBADF)?;
    #[expect(unsafe_code, reason = "the descriptor comes from a raw call")]
    // SAFETY: the call returned a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn signal_pidfd(process: RawFd, signal: Signal) -> Result<(), Errno> {
    let no_info: *const libc::siginfo_t = std::ptr::null();
    #[expect(unsafe_code, reason = "neither std nor nix has the call")]
    // SAFETY: without a siginfo, the call accesses no memory of this process.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process, signal as i32, no_info, 0) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn signal_reaches_the_intended_process_only() {
        let mut child = Command::new("sleep").arg("600").spawn().expect("a child");
        assert_eq!(user_of(child.id()), user_of(std::process::id()));
        signal(child.id(), Signal::SIGKILL, || false).expect("nothing sent");
        assert!(child.try_wait().expect("its state").is_none());
        signal(child.id(), Signal::SIGTERM, || true).expect("sent");
        assert_eq!(child.wait().expect("its end").signal(), Some(Signal::SIGTERM as i32));
        signal(child.id(), Signal::SIGTERM, || true).expect("nobody is there");
        signal(u32::MAX, Signal::SIGTERM, || true).expect("no such pid");
        assert_eq!(user_of(u32::MAX), None);
    }
}
