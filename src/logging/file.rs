//! A log file of limited size that tolerates a failing disk.
//!
//! Invariants: the file and its rotated predecessor, `NAME.1`, contain at most [`FILE_BYTES_MAX`] each. Every log line starts on a
//! new line. Lines that cannot be written are dropped and counted, and the count is logged as soon as writing succeeds.
//!
//! The file may be renamed, deleted or truncated at any time, for example by logrotate: each line is written to the file that
//! currently has the name. Two agents that share a log file lose no lines, but if both rotate it at the same time, older lines are
//! dropped early.

use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::sys::files;
use crate::sys::printable::one_line;

/// Maximum size of a log file, in bytes; with its predecessor, 16 MB.
pub const FILE_BYTES_MAX: u64 = 8_000_000;

/// A log file.
pub struct LogFile {
    path: PathBuf,
    bytes_max: u64,
    /// The open file; `None` before the first line and after a failed write.
    open: Option<Open>,
    dropped: DroppedLines,
}

/// An open file, and the properties it had when it was opened.
struct Open {
    file: File,
    /// The device and inode, which identify the file.
    id: (u64, u64),
    /// Whether the last line has no line end.
    ends_mid_line: bool,
}

/// The lines that were dropped since the last successful write.
#[derive(Default)]
struct DroppedLines {
    lines: u64,
    why: String,
    warned: bool,
}

impl LogFile {
    /// Creates a log for the file at `path`, which is not opened or created yet.
    pub fn new(path: PathBuf) -> LogFile {
        LogFile { path, bytes_max: FILE_BYTES_MAX, open: None, dropped: DroppedLines::default() }
    }

    /// Appends a line, which includes its line end. The first dropped line is reported on stderr.
    pub fn write(&mut self, line: &[u8]) {
        let Err(e) = self.try_write(line) else {
            self.dropped.lines = 0;
            return;
        };
        // Part of the line may have been written, so the file is reopened and inspected.
        self.open = None;
        self.dropped.lines += 1;
        self.dropped.why = e.to_string();
        if !std::mem::replace(&mut self.dropped.warned, true) {
            let path = self.path.display().to_string();
            let path = one_line(&path);
            let _ = writeln!(io::stderr(), "warning: log lines are lost: `{path}` cannot be written: {e}");
        }
    }

    fn try_write(&mut self, line: &[u8]) -> io::Result<()> {
        let mut open = match self.open.take() {
            Some(open) if is_at(&open, &self.path)? => open,
            _ => self.open()?,
        };
        let mut text = Vec::with_capacity(line.len());
        if open.ends_mid_line {
            text.push(b'\n');
        }
        if self.dropped.lines > 0 {
            writeln!(text, "[{} log lines were lost: {}]", self.dropped.lines, self.dropped.why)?;
        }
        text.extend_from_slice(line);
        let length = open.file.metadata()?.len();
        if length > 0 && length + text.len() as u64 > self.bytes_max {
            open = self.rotate(open)?;
        }
        open.file.write_all(&text)?;
        open.ends_mid_line = false;
        self.open = Some(open);
        Ok(())
    }

    fn open(&self) -> io::Result<Open> {
        match fs::metadata(&self.path) {
            // Opening a named pipe would block until it has a reader.
            Ok(found) => refuse_other_than_files(&found)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => files::create_folder_of(&self.path)?,
            Err(e) => return Err(e),
        }
        let file = files::open_for_append(&self.path)?;
        let found = file.metadata()?;
        refuse_other_than_files(&found)?;
        let mut last = [b'\n'];
        if let Some(at) = found.len().checked_sub(1) {
            file.read_at(&mut last, at)?;
        }
        Ok(Open { file, id: id(&found), ends_mid_line: last != *b"\n" })
    }

    /// Renames the file to its rotated name and creates a new one. If it cannot be renamed, it is emptied, so that the size limit
    /// holds.
    fn rotate(&self, full: Open) -> io::Result<Open> {
        // The target of a symlink is renamed, not the symlink.
        let path = fs::canonicalize(&self.path)?;
        match fs::rename(&path, rotated_path(&path)) {
            Ok(()) => self.open(),
            Err(e) => {
                full.file.set_len(0)?;
                writeln!(&full.file, "[the lines before were dropped: the file cannot be renamed to its .1: {e}]")?;
                Ok(Open { ends_mid_line: false, ..full })
            }
        }
    }
}

/// The path of a log file after rotation.
pub fn rotated_path(log: &Path) -> PathBuf {
    files::with_suffix(log, ".1")
}

/// Whether the open file is still the one at `path`.
fn is_at(open: &Open, path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(found) => Ok(id(&found) == open.id),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

fn id(found: &Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

fn refuse_other_than_files(found: &Metadata) -> io::Result<()> {
    if found.is_file() { Ok(()) } else { Err(io::Error::other("it is not a regular file")) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A folder for one test, removed at its end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(test: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("usepod-log-{test}-{}", std::process::id()));
            fs::create_dir_all(&path).expect("a folder");
            Folder(path)
        }

        fn log(&self, bytes_max: u64) -> LogFile {
            LogFile { bytes_max, ..LogFile::new(self.0.join("agent.log")) }
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.0.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn rotation_keeps_both_files_within_the_limit() {
        let folder = Folder::new("cap");
        let mut log = folder.log(20);
        for n in 0..10 {
            log.write(format!("line {n}\n").as_bytes());
            for entry in fs::read_dir(&folder.0).expect("the folder") {
                assert!(entry.expect("an entry").metadata().expect("its size").len() <= 20);
            }
        }
        assert_eq!(
            (folder.read("agent.log.1").as_str(), folder.read("agent.log").as_str()),
            ("line 6\nline 7\n", "line 8\nline 9\n")
        );
        assert_eq!(fs::read_dir(&folder.0).expect("the folder").count(), 2);
        // A line above the limit gets a file of its own.
        log.write(&[b'x'; 30]);
        assert_eq!((folder.read("agent.log.1").as_str(), folder.read("agent.log").len()), ("line 8\nline 9\n", 30));
    }

    #[test]
    fn new_files_are_private_and_their_folder_is_created() {
        let folder = Folder::new("mode");
        let path = folder.0.join("deeper/still/agent.log");
        LogFile::new(path.clone()).write(b"a\n");
        let mode = |path: &Path| fs::metadata(path).expect("it").permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().expect("a folder"))), (0o600, 0o700));
    }

    #[test]
    fn line_goes_to_the_file_that_has_the_name() {
        let folder = Folder::new("name");
        let mut log = folder.log(1000);
        log.write(b"1\n");
        fs::rename(folder.0.join("agent.log"), folder.0.join("moved")).expect("renamed");
        log.write(b"2\n");
        assert_eq!((folder.read("moved").as_str(), folder.read("agent.log").as_str()), ("1\n", "2\n"));
        fs::remove_file(folder.0.join("agent.log")).expect("removed");
        log.write(b"3\n");
        assert_eq!(folder.read("agent.log"), "3\n");
        // Like logrotate's `copytruncate`.
        fs::write(folder.0.join("agent.log"), "").expect("truncated");
        log.write(b"4\n");
        assert_eq!(folder.read("agent.log"), "4\n");
    }

    #[test]
    fn dropped_lines_are_reported_once_writing_succeeds() {
        let folder = Folder::new("lost");
        let mut log = folder.log(1000);
        log.write(b"1\n");
        fs::remove_file(folder.0.join("agent.log")).expect("removed");
        fs::create_dir(folder.0.join("agent.log")).expect("a folder in its place");
        log.write(b"2\n");
        log.write(b"3\n");
        fs::remove_dir(folder.0.join("agent.log")).expect("removed");
        log.write(b"4\n");
        log.write(b"5\n");
        assert_eq!(folder.read("agent.log"), "[2 log lines were lost: it is not a regular file]\n4\n5\n");
    }

    #[test]
    fn line_does_not_continue_an_unfinished_one() {
        let folder = Folder::new("torn");
        fs::write(folder.0.join("agent.log"), "half a li").expect("written");
        let mut log = folder.log(1000);
        log.write(b"1\n");
        log.write(b"2\n");
        assert_eq!(folder.read("agent.log"), "half a li\n1\n2\n");
    }

    #[test]
    fn symlink_is_followed_when_it_dangles_and_when_the_file_is_full() {
        let folder = Folder::new("link");
        std::os::unix::fs::symlink("real", folder.0.join("agent.log")).expect("a link");
        let mut log = folder.log(3);
        log.write(b"1\n");
        log.write(b"2\n");
        assert_eq!((folder.read("real.1").as_str(), folder.read("real").as_str()), ("1\n", "2\n"));
        assert!(folder.0.join("agent.log").is_symlink());
    }

    #[test]
    fn file_that_cannot_be_renamed_is_emptied() {
        let folder = Folder::new("stuck");
        fs::create_dir_all(folder.0.join("agent.log.1/full")).expect("a folder in the way");
        let mut log = folder.log(100);
        let line = [&[b'x'; 60][..], b"\n"].concat();
        log.write(&line);
        log.write(b"1\n");
        log.write(&line);
        let text = folder.read("agent.log");
        assert!(text.starts_with("[the lines before were dropped: ") && text.ends_with("x\n"), "{text}");
        assert_eq!(text.lines().count(), 2, "{text}");
    }
}
