//! A datagram socket that wakes the housekeeping thread, from any thread of this process and from other processes of this user, and
//! answers one query: the agent's last sign of life. This needs neither another thread nor a writable disk.
//!
//! Invariants: waking never blocks, and an answer waits at most `REPLY_TIMEOUT`. Every wake-up is followed by a return from
//! [`WakeSocket::wait`]; several wake-ups may share one return. A datagram can only wake the agent or query it, so a process
//! that can send one can do no harm.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::AT_FDCWD;
use nix::sys::socket::sockopt::PassCred;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};

use crate::sys::files;

/// The datagram that another process sends; this process sends an empty one.
const EXTERNAL_WAKE: &[u8] = b"!";
/// The datagram with which another process asks for an answer.
const QUESTION: &[u8] = b"?";
/// How long [`ask_process`] waits for the answer, which takes milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the answer may wait for a process whose queue is full.
const REPLY_TIMEOUT: Duration = Duration::from_millis(10);
/// Maximum length of a socket's path, in bytes: `sun_path` without the final zero.
const ADDRESS_BYTES_MAX: usize = 107;
/// Maximum size of an answer, in bytes.
const ANSWER_BYTES_MAX: usize = 256;

/// The receiving end.
pub struct WakeSocket {
    socket: UnixDatagram,
    waker: Waker,
    path: Option<PathBuf>,
}

/// Wakes the socket from within the process.
#[derive(Clone)]
pub struct Waker(Arc<UnixDatagram>);

/// Why a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wakeup {
    /// A [`Waker`] was used.
    Internal,
    /// Another process called [`wake_process`] or [`ask_process`].
    External,
    /// The deadline passed, or the wait was interrupted.
    Timeout,
}

impl WakeSocket {
    /// Creates a socket that other processes of this user can wake, at a path that only this process uses.
    ///
    /// # Errors
    /// The name is longer than about 80 bytes, or its folder is not writable.
    pub fn at(path: &Path) -> io::Result<WakeSocket> {
        // A killed agent leaves its socket behind.
        files::remove_marker(path)?;
        let socket = with_short_path(path, |short| UnixDatagram::bind(short))?;
        // Not through a symlink that may have replaced the socket.
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        fchmodat(AT_FDCWD, path, mode, FchmodatFlags::NoFollowSymlink)?;
        let waker = UnixDatagram::unbound()?;
        with_short_path(path, |short| waker.connect(short))?;
        WakeSocket::new(socket, waker, Some(path.to_owned()))
    }

    /// Creates a socket that only this process can wake.
    ///
    /// # Errors
    /// The system refused a socket.
    pub fn private() -> io::Result<WakeSocket> {
        let (socket, waker) = UnixDatagram::pair()?;
        WakeSocket::new(socket, waker, None)
    }

    fn new(socket: UnixDatagram, waker: UnixDatagram, path: Option<PathBuf>) -> io::Result<WakeSocket> {
        waker.set_nonblocking(true)?;
        socket.set_write_timeout(Some(REPLY_TIMEOUT))?;
        Ok(WakeSocket { socket, waker: Waker(Arc::new(waker)), path })
    }

    /// A handle that wakes this socket.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Blocks until the next wake-up or `deadline`. Returns at once if there was a wake-up since the last wait. Another process that
    /// asks gets the text that `answer` returns.
    pub fn wait(&self, deadline: Option<Instant>, answer: impl FnOnce() -> String) -> Wakeup {
        // The system refuses a timeout of zero.
        let timeout = deadline.map(|at| at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
        if self.socket.set_read_timeout(timeout).is_err() {
            return Wakeup::Timeout;
        }
        let mut datagram = [0];
        match self.socket.recv_from(&mut datagram) {
            Ok((0, _)) => Wakeup::Internal,
            Ok((_, from)) => {
                if datagram == QUESTION {
                    // The asking process may have ended.
                    let _ = self.socket.send_to_addr(answer().as_bytes(), &from);
                }
                Wakeup::External
            }
            Err(_) => Wakeup::Timeout,
        }
    }
}

impl Drop for WakeSocket {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Waker {
    /// Ends the current or the next wait. If the socket is full, enough wake-ups are already pending.
    pub fn wake(&self) {
        let _ = self.0.send(&[]);
    }
}

/// Calls `action` with a path to the same file that is short enough for a socket's address: the folder is opened and named by its
/// descriptor. The action must not keep the path.
fn with_short_path<T>(path: &Path, action: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return action(path) };
    if path.as_os_str().len() <= ADDRESS_BYTES_MAX {
        return action(path);
    }
    let folder = File::open(folder)?;
    action(&Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name))
}

/// Wakes another process; false if it has no socket.
pub fn wake_process(path: &Path) -> bool {
    let send = || {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        with_short_path(path, |short| socket.send_to(EXTERNAL_WAKE, short))
    };
    match send() {
        Ok(_) => true,
        Err(e) => e.kind() == io::ErrorKind::WouldBlock,
    }
}

/// The answer of another process.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// The pid of the process that sent it, as the kernel states it.
    pub from: u32,
}

/// Queries another process, and returns its answer; `None` if it has no socket or does not answer within a second. Needs no writable
/// disk: the answer is sent to an address that is not a file.
pub fn ask_process(path: &Path) -> Option<Answer> {
    let ask = || {
        let name = format!("usepod-agent-{}", uuid::Uuid::new_v4().simple());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
        socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        setsockopt(&socket, PassCred, &true)?;
        // A connected socket receives only from its peer.
        with_short_path(path, |short| socket.connect(short))?;
        socket.send(QUESTION)?;
        receive_answer(&socket)
    };
    ask().ok().flatten()
}

fn receive_answer(socket: &UnixDatagram) -> io::Result<Option<Answer>> {
    let mut text = vec![0; ANSWER_BYTES_MAX];
    let mut control = nix::cmsg_space!(UnixCredentials);
    let mut buffers = [IoSliceMut::new(&mut text)];
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut control), MsgFlags::empty())?;
    let (length, mut messages) = (received.bytes, received.cmsgs()?);
    let from = messages.find_map(|message| match message {
        ControlMessageOwned::ScmCredentials(sender) => u32::try_from(sender.pid()).ok(),
        _ => None,
    });
    text.truncate(length);
    Ok(from.and_then(|from| Some(Answer { text: String::from_utf8(text).ok()?, from })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_ends_for_both_sides_even_if_the_socket_is_full() {
        let path = std::env::temp_dir().join(format!("usepod-wake-{}", std::process::id()));
        assert!(!wake_process(&path));
        std::fs::write(&path, "left behind").expect("a file");
        let wake_socket = WakeSocket::at(&path).expect("a socket");
        assert!(wake_process(&path));
        assert_eq!(wake_socket.wait(None, String::new), Wakeup::External);
        wake_socket.waker().wake();
        assert_eq!(wake_socket.wait(None, String::new), Wakeup::Internal);
        assert_eq!(wake_socket.wait(Some(Instant::now()), String::new), Wakeup::Timeout);
        (0..5000).for_each(|_| wake_socket.waker().wake());
        assert!(wake_process(&path) && wake_socket.wait(None, String::new) == Wakeup::Internal);
        drop(wake_socket);
        assert!(!path.exists() && !wake_process(&path));
    }

    #[test]
    fn at_fails_for_a_path_that_is_too_long() {
        assert!(WakeSocket::at(&std::env::temp_dir().join("x".repeat(200))).is_err());
        let wake_socket = WakeSocket::private().expect("sockets");
        wake_socket.waker().wake();
        assert_eq!(wake_socket.wait(None, String::new), Wakeup::Internal);
    }

    #[test]
    fn socket_in_a_folder_with_a_long_path_is_reached() {
        let top = std::env::temp_dir().join(format!("usepod-long-{}", std::process::id()));
        let folder = top.join("x".repeat(120));
        std::fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("identity.key.wake");
        assert!(!wake_process(&path));
        let wake_socket = WakeSocket::at(&path).expect("a socket");
        assert!(path.exists() && wake_process(&path));
        assert_eq!(wake_socket.wait(None, String::new), Wakeup::External);
        wake_socket.waker().wake();
        assert_eq!(wake_socket.wait(None, String::new), Wakeup::Internal);
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| ask_process(&path));
            assert_eq!(wake_socket.wait(None, || "well".to_owned()), Wakeup::External);
            assert_eq!(asking.join().expect("no panic").map(|answer| answer.text).as_deref(), Some("well"));
        });
        drop(wake_socket);
        assert!(!path.exists());
        std::fs::remove_dir_all(top).expect("removed");
    }

    #[test]
    fn question_is_answered_and_wakes_too() {
        let path = std::env::temp_dir().join(format!("usepod-ask-{}", std::process::id()));
        assert_eq!(ask_process(&path), None);
        let wake_socket = WakeSocket::at(&path).expect("a socket");
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| ask_process(&path));
            assert_eq!(wake_socket.wait(None, || "well".to_owned()), Wakeup::External);
            let answer = Answer { text: "well".to_owned(), from: std::process::id() };
            assert_eq!(asking.join().expect("no panic"), Some(answer));
        });
    }
}
