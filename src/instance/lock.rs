//! The lock that ensures that only one agent runs per identity.
//!
//! Invariants: the lock file is never deleted; otherwise, two processes could each lock a file of that name. Only the lock itself
//! shows that no agent is running: the content of the file names its owner, which may be in another container, on another host, or
//! unable to write.

use std::fs::{File, Permissions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::AgentPaths;
use super::liveness::{LockOwner, TEXT_BYTES, start_of};
use crate::sys::shell_quote::shell_quote;
use crate::sys::{files, user};

/// How long a lock that is held may lack an owner that can be seen: [`running_agent`] holds it for an instant, and a new owner
/// needs a moment to write its name.
const OWNER_TIMEOUT: Duration = Duration::from_millis(200);
/// The time between two attempts within [`OWNER_TIMEOUT`].
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The lock of an identity, held while this process is its agent. The kernel releases it when the process ends, however it ends.
#[derive(Debug)]
pub struct InstanceLock {
    file: Option<File>,
    /// This process and its last sign of life, whether or not the file could be written.
    owner: Mutex<LockOwner>,
}

/// Why the lock could not be acquired.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent holds the lock.
    #[error("an agent with this identity is already running as pid {}; stop that one first", .0.pid)]
    Held(LockOwner),
    /// A process that cannot be seen from here holds the lock.
    #[error("{}; {}", self.fault(), self.fix())]
    HeldElsewhere(PathBuf),
    /// There is no lock file, and none can be created.
    #[error("`{}` cannot be locked, because it cannot be created: {why}", path.display())]
    Missing {
        /// The lock file.
        path: PathBuf,
        /// The system's reason.
        why: io::Error,
    },
    /// The lock file cannot be opened or locked.
    #[error("{}; {}", self.fault(), self.fix())]
    Unusable {
        /// The lock file.
        path: PathBuf,
        /// The system's reason.
        why: io::Error,
    },
}

impl LockError {
    /// What is wrong, without the fix.
    pub fn fault(&self) -> String {
        match self {
            LockError::Unusable { path, why } => {
                format!("`{}` cannot be locked ({why}), so it is unknown whether an agent is running", path.display())
            }
            LockError::HeldElsewhere(path) => format!(
                "an agent with this identity runs in another container or on another host; no process here holds `{}`",
                path.display()
            ),
            other => other.to_string(),
        }
    }

    /// What the operator can do about it.
    pub fn fix(&self) -> String {
        match self {
            LockError::Unusable { path, why } => {
                // Without access to its folder, the file is not visible.
                let (recursive, path) = match path.parent() {
                    Some(folder) if path.symlink_metadata().is_err() => ("-R ", folder),
                    _ => ("", &**path),
                };
                let quoted = shell_quote(&path.to_string_lossy());
                let chown = format!("chown {recursive}{} {quoted}", user::name());
                // A symlink or a FIFO, for example.
                if why.kind() == ErrorKind::InvalidInput {
                    return format!("remove it: rm {quoted}; `usepod-agent doctor` shows who else can write there");
                }
                if is_permission(why) {
                    return format!("as root, give it to the user that runs the agent: {chown}");
                }
                format!(
                    "set [identity] key_path to a file system that supports locking (NFS: one whose server runs a lock manager); \
                     if it belongs to another user, as root: {chown}"
                )
            }
            _ => {
                "use the same command where that agent runs, or give each agent its own [identity] key_path".to_owned()
            }
        }
    }
}

/// The agent that is running with this identity, if any.
///
/// # Errors
/// The agent runs where this process cannot see it, or the lock cannot be tried.
pub fn running_agent(paths: &AgentPaths) -> Result<Option<LockOwner>, LockError> {
    if let Some(owner) = LockOwner::running(paths) {
        return Ok(Some(owner.up_to_date(paths)));
    }
    let path = paths.lock();
    let file = match files::open_no_follow(&path, false) {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(why) => return Err(LockError::Unusable { path, why }),
    };
    // Shared, so that two calls do not disturb each other. Closing the file releases the lock.
    match take(&file, File::try_lock_shared, paths) {
        Ok(()) => Ok(None),
        Err(LockError::Held(owner)) => Ok(Some(owner.up_to_date(paths))),
        Err(e) => Err(e),
    }
}

/// Takes the lock. If it is held, finds out by whom.
fn take(file: &File, lock: fn(&File) -> Result<(), TryLockError>, paths: &AgentPaths) -> Result<(), LockError> {
    let deadline = Instant::now() + OWNER_TIMEOUT;
    loop {
        match lock(file) {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(why)) => return Err(LockError::Unusable { path: paths.lock(), why }),
        }
        if let Some(owner) = LockOwner::running(paths) {
            return Err(LockError::Held(owner));
        }
        if Instant::now() >= deadline {
            // The content of the file is lost if the disk was full or failed.
            return Err(LockOwner::ask(paths).map_or_else(|| LockError::HeldElsewhere(paths.lock()), LockError::Held));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

fn open(path: &Path) -> Result<File, LockError> {
    let writable = files::open_no_follow(path, true);
    // Locking needs no write permission; only writing the content does.
    let file =
        writable.or_else(|e| files::open_no_follow(path, false).map_err(|now| if is_missing(&now) { e } else { now }));
    file.map_err(|why| match path.symlink_metadata() {
        Err(e) if is_missing(&e) => LockError::Missing { path: path.to_owned(), why },
        _ => LockError::Unusable { path: path.to_owned(), why },
    })
}

impl InstanceLock {
    /// Locks the file and writes its owner into it.
    ///
    /// # Errors
    /// Another agent holds the lock, or the file cannot be locked.
    pub fn acquire(paths: &AgentPaths) -> Result<InstanceLock, LockError> {
        let file = open(&paths.lock())?;
        take(&file, File::try_lock, paths)?;
        // The lock file of an older version may be longer, and one that others can write to could name any process.
        let _ = file.set_permissions(Permissions::from_mode(0o600));
        let _ = file.set_len(TEXT_BYTES);
        let lock = InstanceLock { file: Some(file), owner: Mutex::new(this_process()) };
        lock.record_liveness();
        Ok(lock)
    }

    /// Returns an empty lock, for an agent whose lock file cannot be created.
    pub fn none() -> InstanceLock {
        InstanceLock { file: None, owner: Mutex::new(this_process()) }
    }

    /// Whether the lock excludes other agents.
    pub fn is_exclusive(&self) -> bool {
        self.file.is_some()
    }

    /// Records a sign of life. If writing fails (on a full disk with a copy-on-write file system), the file is truncated: an
    /// outdated time would be misleading. [`InstanceLock::answer`] is up to date in any case.
    pub fn record_liveness(&self) {
        let text = {
            let mut owner = self.owner.lock().unwrap_or_else(PoisonError::into_inner);
            owner.show_life();
            owner.to_text()
        };
        let Some(file) = &self.file else { return };
        if file.write_all_at(text.as_bytes(), 0).is_err() {
            let _ = file.set_len(0);
        }
    }

    /// The answer to a query over the wake socket.
    pub fn answer(&self) -> String {
        self.owner.lock().unwrap_or_else(PoisonError::into_inner).to_answer()
    }
}

fn this_process() -> LockOwner {
    LockOwner::alive_now(std::process::id(), start_of("self").unwrap_or(0))
}

fn is_missing(e: &io::Error) -> bool {
    e.kind() == ErrorKind::NotFound
}

fn is_permission(e: &io::Error) -> bool {
    e.kind() == ErrorKind::PermissionDenied
}
