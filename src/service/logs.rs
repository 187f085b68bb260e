//! Reads the end of a log file, and follows the lines appended to it.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use crate::sys::files;

/// How often a followed file is checked for new text.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// Number of bytes per read, backwards from the end.
const STEP_BYTES: u64 = 64 << 10;

/// The last lines of `log`, preceded by lines of `older` if `log` has too few. A missing file counts as empty.
///
/// # Errors
/// A file cannot be read.
pub fn tail(log: &Path, older: &Path, lines: usize) -> io::Result<Vec<u8>> {
    let (mut text, count) = last_lines(log, lines)?;
    if count < lines {
        let (before, _) = last_lines(older, lines - count)?;
        text.splice(..0, before);
    }
    Ok(text)
}

/// The last lines of one file, and their number.
fn last_lines(path: &Path, lines: usize) -> io::Result<(Vec<u8>, usize)> {
    let mut file = match files::open_regular(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
        opened => opened?,
    };
    let mut start = file.seek(SeekFrom::End(0))?;
    let mut text: Vec<u8> = Vec::new();
    // The line end of the last line does not begin another line.
    let count =
        |text: &[u8]| text.iter().rev().skip(1).filter(|b| **b == b'\n').count() + usize::from(!text.is_empty());
    while start > 0 && count(&text) <= lines {
        let step = start.min(STEP_BYTES);
        start -= step;
        file.seek(SeekFrom::Start(start))?;
        let mut piece = Vec::new();
        (&mut file).take(step).read_to_end(&mut piece)?;
        piece.append(&mut text);
        text = piece;
    }
    let surplus = count(&text).saturating_sub(lines);
    let keep: usize = text.split_inclusive(|b| *b == b'\n').take(surplus).map(<[u8]>::len).sum();
    text.drain(..keep);
    let count = count(&text);
    Ok((text, count))
}

/// Prints the last lines, then all lines that are written later, also after a rotation, until `out` is closed.
///
/// # Errors
/// A file cannot be read.
pub fn follow(log: &Path, older: &Path, lines: usize, out: &mut impl Write) -> io::Result<()> {
    // Opened before the tail is read: text written in between may be printed twice, but is not missed.
    let mut file = files::open_regular(log).ok();
    if let Some(file) = &mut file {
        file.seek(SeekFrom::End(0))?;
    }
    let mut text = tail(log, older, lines)?;
    loop {
        if out.write_all(&text).and_then(|()| out.flush()).is_err() {
            return Ok(());
        }
        text.clear();
        let current = fs::metadata(log).ok();
        if let Some(open) = &mut file {
            let is_replaced = current.as_ref().is_some_and(|now| open.metadata().is_ok_and(|it| it.ino() != now.ino()));
            if current.is_some_and(|now| !is_replaced && now.len() < open.stream_position().unwrap_or(0)) {
                // The file was truncated, for example by logrotate's `copytruncate`.
                open.rewind()?;
            }
            open.read_to_end(&mut text)?;
            if is_replaced {
                file = None;
            }
        }
        if file.is_none()
            && let Ok(mut next) = files::open_regular(log)
        {
            next.read_to_end(&mut text)?;
            file = Some(next);
        }
        if text.is_empty() {
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_returns_the_last_lines_of_both_files() {
        let folder = std::env::temp_dir().join(format!("usepod-logs-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let (log, older) = (folder.join("log"), folder.join("older"));
        let numbered = |from: usize, to: usize| -> String { (from..=to).map(|n| format!("line {n}\n")).collect() };
        assert_eq!(tail(&log, &older, 5).expect("nothing"), b"");
        fs::write(&older, numbered(1, 20_000)).expect("written");
        fs::write(&log, numbered(20_001, 20_003)).expect("written");
        for (lines, from) in [(0, 20_004), (1, 20_003), (3, 20_001), (5, 19_999), (15_000, 5004), (30_000, 1)] {
            let text = String::from_utf8(tail(&log, &older, lines).expect("a tail")).expect("UTF-8");
            assert!(text == numbered(from, 20_003), "{lines} lines");
        }
        fs::write(&log, "line 20001\nunfinished").expect("written");
        assert_eq!(tail(&log, &older, 2).expect("a tail"), b"line 20001\nunfinished");
        fs::remove_dir_all(folder).expect("removed");
    }
}
