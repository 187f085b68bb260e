//! Files that are read within bounds, and replaced as a whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

/// A file that was being written so long ago was left behind: writing one takes milliseconds.
const LEFTOVER_AGE: Duration = Duration::from_secs(60);

/// Reads a file of at most `bytes_max` bytes, whatever its size is said to be.
///
/// # Errors
/// It cannot be read, or is longer (`FileTooLarge`).
pub fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(bytes_max + 1).read_to_end(&mut content)?;
    if content.len() as u64 > bytes_max { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(content) }
}

/// Replaces the content of `path` as a whole, or leaves it as it was. The file is its owner's alone (0600); a symlink is
/// followed, not replaced.
///
/// # Errors
/// The first thing that failed; nothing is left behind.
pub fn write_atomic(path: &Path, content: &[u8]) -> io::Result<()> {
    put(path, content, |temporary, target| fs::rename(temporary, target))
}

/// Replaces the content of `path` as a whole, by what need not survive a power cut: it waits for no disk. For files of one
/// writer; a symlink is replaced.
///
/// # Errors
/// The first thing that failed; `path` is as it was.
pub fn replace_without_fsync(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = with_suffix(path, ".new");
    let written = owner_only(OpenOptions::new().write(true).create(true).truncate(true))
        .open(&temporary)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&temporary, path));
    written.inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Makes the file `path` with its whole content, unless there is one.
///
/// # Errors
/// `AlreadyExists`, or the first thing that failed; nothing is left behind.
pub fn create_atomic(path: &Path, content: &[u8]) -> io::Result<()> {
    put(path, content, |temporary, target| match fs::hard_link(temporary, target) {
        Ok(()) => {
            // What matters is there; the other name goes with the leftovers if it must.
            let _ = fs::remove_file(temporary);
            Ok(())
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(e),
        // A file system without links: what is left is to look first.
        Err(_) if target.exists() => Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => fs::rename(temporary, target),
    })
}

/// Makes an empty file, with its folder, unless there is one: a sign that a full disk has room for, too. Nothing is written
/// through a link that somebody else put there.
///
/// # Errors
/// It cannot be made.
pub fn create_marker(path: &Path) -> io::Result<()> {
    create_folder_of(path)?;
    match owner_only(OpenOptions::new().write(true).create_new(true)).open(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    }
}

/// Takes away what [`create_marker`] has made, if it is there.
///
/// # Errors
/// It cannot be removed.
pub fn remove_marker(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The file whose name is that of `path` and then `suffix`.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn put(path: &Path, content: &[u8], move_in: impl Fn(&Path, &Path) -> io::Result<()>) -> io::Result<()> {
    let (target, prefix) = places_of(path)?;
    // Unique, so that two writers cannot spoil each other's.
    let temporary = target.with_file_name(format!("{prefix}{}", uuid::Uuid::new_v4().simple()));
    let written = write_new(&temporary, content).and_then(|()| move_in(&temporary, &target));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
        return written;
    }
    // The new name is on the disk only once the folder is. Not every file system can do it; the content is there.
    if let Some(folder) = target.parent().and_then(|folder| File::open(folder).ok()) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// Whether [`write_atomic`] could do its work.
///
/// # Errors
/// Why it could not.
pub fn check_writable(path: &Path) -> io::Result<()> {
    put(path, b"", |temporary, _| fs::remove_file(temporary))
}

/// Removes what crashes in the middle of writing `path` left behind, but not what somebody may be writing right now.
pub fn remove_leftovers(path: &Path) {
    let Ok((target, prefix)) = places_of(path) else { return };
    let entries = target.parent().and_then(|folder| fs::read_dir(folder).ok());
    for entry in entries.into_iter().flatten().flatten() {
        let age = || entry.metadata().and_then(|m| m.modified()).ok().and_then(|at| at.elapsed().ok());
        let is_ours = entry.file_name().to_string_lossy().starts_with(&prefix);
        if is_ours && age().is_some_and(|age| age >= LEFTOVER_AGE) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The file that is meant, and how the names of those beside it begin that are to become it.
fn places_of(path: &Path) -> io::Result<(PathBuf, String)> {
    let target = fs::canonicalize(path).or_else(|_| std::path::absolute(path))?;
    let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let prefix = format!(".{name}.new-");
    Ok((target, prefix))
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = owner_only(OpenOptions::new().write(true).create_new(true)).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Files that are made with these options are their owner's alone (0600).
#[cfg(unix)]
pub fn owner_only(options: &mut OpenOptions) -> &mut OpenOptions {
    use std::os::unix::fs::OpenOptionsExt;
    options.mode(0o600)
}

/// As it is where files have no modes.
#[cfg(not(unix))]
pub fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    options
}

/// Has a limit on the size of files (`ulimit -f`) be an error of the write that meets it, instead of the end of the process:
/// in this thread, and those that it starts from now on.
pub fn block_sigxfsz() {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGXFSZ);
    let _ = signals.thread_block();
}

/// Makes the folder of `path`, its owner's alone, where it is missing.
///
/// # Errors
/// It cannot be made.
pub fn create_folder_of(path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) else { return Ok(()) };
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::DirBuilderExt;
        builder.mode(0o700);
    }
    builder.create(folder)
}
