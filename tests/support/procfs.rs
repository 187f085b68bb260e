//! What `/proc` says about a process.

use std::fs;
use std::io;

/// The number after `key` in the text of a file, as in `VmRSS:      1234 kB`.
pub fn number(text: &str, key: &str) -> io::Result<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)).and_then(|rest| rest.split_whitespace().next());
    value
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no number after {key}")))
}

/// A file of each thread of a process, such as `status` or `comm`; the main thread's first.
pub fn read_each_thread(pid: u32, file: &str) -> io::Result<Vec<String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?;
    let mut ids: Vec<u32> = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok()).collect();
    ids.sort_unstable();
    // A thread may end between the listing and the reading.
    Ok(ids.into_iter().filter_map(|id| fs::read_to_string(format!("/proc/{pid}/task/{id}/{file}")).ok()).collect())
}
