//! Which process the kernel ends when memory is short.

use std::fs;
use std::io;

const ADJUSTMENT_FILE: &str = "/proc/self/oom_score_adj";

/// The largest adjustment, in thousandths of the memory. The agent is ended before an inference server that takes nearly all of it, and
/// is back within a minute; the server may need many to load its model.
const ADJUSTMENT: i32 = 1000;

/// Makes the kernel end this process before others. Child processes would inherit this; the agent starts none. Processes may raise their
/// adjustment without privileges, but not lower it.
///
/// # Errors
/// The kernel does not offer the file, or a sandbox denies the write.
pub fn end_this_process_first() -> io::Result<()> {
    fs::write(ADJUSTMENT_FILE, ADJUSTMENT.to_string())
}
