//! Reads files up to a limit, and replaces them atomically.
//!
//! Invariant: nothing is written through a symlink that belongs to a user other than this one or root: in a folder that others can
//! write to, it may have been planted.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Uid;

use super::user;

/// Time limit for a pipe to be written and closed.
const PIPE_TIMEOUT: Duration = Duration::from_secs(5);
/// The time between two reads of a pipe that is empty.
const PIPE_POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Maximum number of symlinks that are followed, as in the kernel.
const LINKS_MAX: usize = 40;
/// Minimum age of a temporary file that counts as left behind by a crash; writing one takes milliseconds.
const LEFTOVER_AGE: Duration = Duration::from_secs(60);

/// Opens a regular file for reading. Does not block on anything else, such as a FIFO without a writer, but fails.
///
/// # Errors
/// The file cannot be opened, or is not a regular file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    require_regular(open_nonblocking(path)?)
}

/// Returns the file if it is a regular one.
///
/// # Errors
/// It is a folder, a FIFO, a device or a socket.
pub fn require_regular(file: File) -> io::Result<File> {
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"))
}

/// Reads a regular file of at most `bytes_max` bytes.
///
/// # Errors
/// The file cannot be read, is not a regular file, or is too large (`FileTooLarge`).
pub fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    open_regular(path)?.take(bytes_max + 1).read_to_end(&mut content)?;
    if content.len() as u64 > bytes_max { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(content) }
}

/// Reads a file of at most `bytes_max` bytes that may also be a pipe, such as `/dev/stdin` or the `<(…)` of a shell.
///
/// # Errors
/// The file cannot be read, is too large (`FileTooLarge`), or has not ended within `PIPE_TIMEOUT` (`TimedOut`).
pub fn read_bounded_or_pipe(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let (mut file, mut content) = (open_nonblocking(path)?, Vec::new());
    let deadline = Instant::now() + PIPE_TIMEOUT;
    loop {
        let room = bytes_max + 1 - content.len() as u64;
        match Read::by_ref(&mut file).take(room).read_to_end(&mut content) {
            Ok(_) if content.len() as u64 > bytes_max => return Err(io::ErrorKind::FileTooLarge.into()),
            Ok(_) => return Ok(content),
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
            Err(_) if Instant::now() >= deadline => return Err(io::ErrorKind::TimedOut.into()),
            Err(_) => std::thread::sleep(PIPE_POLL_INTERVAL),
        }
    }
}

fn open_nonblocking(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Replaces the content of `path` atomically and durably: the content is synced to the disk. The file gets mode 0600; a symlink of
/// this user or root is followed, not replaced.
///
/// # Errors
/// The first operation that failed; `path` is unchanged, and no temporary file is left.
pub fn write_atomic(path: &Path, content: &[u8]) -> io::Result<()> {
    write_via_temporary(path, content, |temporary, target| fs::rename(temporary, target))
}

/// Replaces the content of `path` atomically, without waiting for the disk: after a power failure the content may be lost. For files
/// with a single writer; a symlink is replaced.
///
/// # Errors
/// The first operation that failed; `path` is unchanged.
pub fn replace_without_fsync(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = with_suffix(path, ".new");
    // Left behind by a crash, or planted.
    remove_marker(&temporary)?;
    let mut file = owner_only(OpenOptions::new().write(true).create_new(true)).open(&temporary)?;
    let written = file.write_all(content).and_then(|()| fs::rename(&temporary, path));
    written.inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Creates the file `path` with its whole content, unless it exists.
///
/// # Errors
/// `AlreadyExists`, or the first operation that failed; no temporary file is left.
pub fn create_atomic(path: &Path, content: &[u8]) -> io::Result<()> {
    write_via_temporary(path, content, |temporary, target| match fs::hard_link(temporary, target) {
        Ok(()) => {
            // The file exists; if the temporary name remains, `remove_leftovers` removes it.
            let _ = fs::remove_file(temporary);
            Ok(())
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(e),
        // A file system without hard links: check first, then rename.
        Err(_) if target.exists() => Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => fs::rename(temporary, target),
    })
}

/// Creates an empty file and its folder, unless they exist. Works on a full disk; a symlink at `path` is replaced.
///
/// # Errors
/// The file cannot be created.
pub fn create_marker(path: &Path) -> io::Result<()> {
    create_folder_of(path)?;
    // Without a target, it would not count as a marker.
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()) {
        remove_marker(path)?;
    }
    match owner_only(OpenOptions::new().write(true).create_new(true)).open(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    }
}

/// Removes a file that [`create_marker`] created, if it exists.
///
/// # Errors
/// The file cannot be removed.
pub fn remove_marker(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// `path` with `suffix` appended to the file name.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn write_via_temporary(
    path: &Path,
    content: &[u8],
    install: impl Fn(&Path, &Path) -> io::Result<()>,
) -> io::Result<()> {
    let (target, prefix) = target_and_prefix(path)?;
    // The name is unique, so that two writers do not share a temporary file.
    let temporary = target.with_file_name(format!("{prefix}{}", uuid::Uuid::new_v4().simple()));
    let written = write_new(&temporary, content).and_then(|()| install(&temporary, &target));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
        return written;
    }
    // The rename is durable only once the folder is synced. Some file systems cannot sync folders; the content is synced anyway.
    if let Some(folder) = target.parent().and_then(|folder| File::open(folder).ok()) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// Checks whether [`write_atomic`] would succeed.
///
/// # Errors
/// The reason why it would fail.
pub fn check_writable(path: &Path) -> io::Result<()> {
    write_via_temporary(path, b"", |temporary, _| fs::remove_file(temporary))
}

/// Checks whether files of this size can be created in `folder`.
///
/// # Errors
/// The reason why not.
pub fn check_folder_writable(folder: &Path, content: &[u8]) -> io::Result<()> {
    let path = folder.join(format!(".usepod-agent.new-{}", uuid::Uuid::new_v4().simple()));
    let written = write_new(&path, content);
    let removed = match &written {
        // It is the file of another process.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        _ => remove_marker(&path),
    };
    written.and(removed)
}

/// Removes the temporary files of `path` that crashes have left behind, but none that may still be in use.
pub fn remove_leftovers(path: &Path) {
    let Ok((target, prefix)) = target_and_prefix(path) else { return };
    let entries = target.parent().and_then(|folder| fs::read_dir(folder).ok());
    for entry in entries.into_iter().flatten().flatten() {
        let age = || entry.metadata().and_then(|m| m.modified()).ok().and_then(|at| at.elapsed().ok());
        let is_ours = entry.file_name().to_string_lossy().starts_with(&prefix);
        if is_ours && age().is_some_and(|age| age >= LEFTOVER_AGE) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The file that `path` refers to, and the prefix of the names of its temporary files.
fn target_and_prefix(path: &Path) -> io::Result<(PathBuf, String)> {
    let target = match fs::canonicalize(path) {
        Ok(target) => {
            check_links(path)?;
            target
        }
        Err(_) => std::path::absolute(path)?,
    };
    let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let prefix = format!(".{name}.new-");
    Ok((target, prefix))
}

/// Opens a regular file for reading, or for reading and writing, and then creates it if it does not exist. A symlink is refused.
///
/// # Errors
/// The file can be neither opened nor created, or is not a regular file.
pub fn open_no_follow(path: &Path, writable: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    owner_only(options.read(true).write(writable).create(writable).truncate(false));
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path).map_err(explain_link).and_then(require_regular)
}

/// Opens a file for appending, and creates it if it does not exist. A symlink of this user or root is followed.
///
/// # Errors
/// The file can be neither opened nor created, or is a symlink of another user.
pub fn open_for_append(path: &Path) -> io::Result<File> {
    let flags = if check_links(path)? { 0 } else { libc::O_NOFOLLOW };
    let mut options = OpenOptions::new();
    owner_only(options.read(true).append(true).create(true)).custom_flags(flags).open(path).map_err(explain_link)
}

/// Follows the symlinks at `path`, each of which must belong to this user or root. Returns whether there is one.
fn check_links(path: &Path) -> io::Result<bool> {
    let mut path = std::path::absolute(path)?;
    for followed in 0..LINKS_MAX {
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_symlink() && ![0, Uid::effective().as_raw()].contains(&found.uid()) => {
                let what = format!("`{}` is a symlink of another user, {}", path.display(), user::name_of(found.uid()));
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
            }
            Ok(found) if found.is_symlink() => {
                let target = fs::read_link(&path)?;
                path.pop();
                path.push(target);
            }
            _ => return Ok(followed > 0),
        }
    }
    Err(Errno::ELOOP.into())
}

/// Explains the error of a failed `O_NOFOLLOW`, which the system reports as a loop.
fn explain_link(e: io::Error) -> io::Error {
    match e.raw_os_error() {
        Some(libc::ELOOP) => io::Error::new(io::ErrorKind::InvalidInput, "it is a symlink"),
        _ => e,
    }
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = owner_only(OpenOptions::new().write(true).create_new(true)).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Sets mode 0600 for files that are created with these options.
pub fn owner_only(options: &mut OpenOptions) -> &mut OpenOptions {
    options.mode(0o600)
}

/// The mode of a file, if it grants anything to others than the owner.
pub fn open_to_others(metadata: &Metadata) -> Option<u32> {
    let mode = metadata.permissions().mode() & 0o777;
    (mode & 0o077 != 0).then_some(mode)
}

/// Blocks SIGXFSZ in this thread and in the threads that it starts later: a write beyond the file size limit (`ulimit -f`) then
/// fails instead of killing the process.
pub fn block_sigxfsz() {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGXFSZ);
    let _ = signals.thread_block();
}

/// Creates the folder of `path` with mode 0700, unless it exists.
///
/// # Errors
/// The folder cannot be created.
pub fn create_folder_of(path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) else { return Ok(()) };
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}
