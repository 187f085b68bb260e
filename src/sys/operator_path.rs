//! Paths as the operator writes them.
//!
//! A symlink into the folder of a version stays valid when the version changes; the resolved path does not. A crontab or a unit
//! therefore contains the path that the operator used, as long as it leads to the same file.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The absolute path of this program: as it was called, if that leads to the same file, else resolved. The working folder must be
/// the one that the process was started in.
///
/// # Errors
/// The system does not know the file.
pub fn this_program() -> io::Result<PathBuf> {
    let called = std::env::args_os().next().and_then(|name| as_called(&name));
    let is_this = |path: &PathBuf| is_same_file(path, Path::new("/proc/self/exe"));
    called.filter(is_this).map_or_else(std::env::current_exe, Ok)
}

/// The absolute path. The working folder is the one that the shell shows, which may be behind symlinks.
///
/// # Errors
/// The working folder does not exist.
pub fn absolute(path: &Path) -> io::Result<PathBuf> {
    let shown = std::env::var_os("PWD").map(PathBuf::from);
    let shown = shown.filter(|shown| shown.is_absolute() && is_same_file(shown, Path::new(".")));
    std::path::absolute(shown.unwrap_or_default().join(path))
}

/// The path that the shell used for `name`, the first argument of the process.
fn as_called(name: &OsStr) -> Option<PathBuf> {
    if name.as_encoded_bytes().contains(&b'/') {
        return absolute(Path::new(name)).ok();
    }
    let folders = std::env::var_os("PATH")?;
    let is_program =
        |path: &PathBuf| fs::metadata(path).is_ok_and(|found| found.is_file() && found.mode() & 0o111 != 0);
    std::env::split_paths(&folders).filter_map(|folder| absolute(&folder.join(name)).ok()).find(is_program)
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    let id = |path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    matches!((id(a), id(b)), (Ok(a), Ok(b)) if a == b)
}
