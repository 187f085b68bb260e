//! Which process the kernel ends when memory is short.

use std::fs;
use std::io;

const ADJUSTMENT_FILE: &str = "/proc/self/oom_score_adj";

/// The maximum adjustment, in thousandths of the memory. The kernel then ends the agent even before an inference server that uses
/// nearly all of it: the agent is back within a minute, while the server may take many to load its model.
const ADJUSTMENT: i32 = 1000;

/// Makes the kernel end this process before others. Child processes would inherit this; the agent starts none. Processes may raise their
/// adjustment without privileges, but not lower it.
///
/// # Errors
/// The kernel does not offer the file, or a sandbox denies the write.
pub fn end_this_process_first() -> io::Result<()> {
    fs::write(ADJUSTMENT_FILE, ADJUSTMENT.to_string())
}
