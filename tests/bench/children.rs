//! The children that run. None outlives the bench, whether it comes to its end, fails, or gets SIGINT, SIGTERM or SIGHUP: an
//! agent that lost its coordinator would dial for ever.
//!
//! Who runs here: the thread of the workloads, and that of the signals, which kills under the lock under which children are
//! started, and never gives it back.

use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Result;

static CHILDREN: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// What a shell shows of a program that was interrupted.
const INTERRUPTED: i32 = 130;

/// From now on a signal ends all children and removes the `scratch` folder before it ends the bench.
pub fn end_on_signal(scratch: PathBuf) -> Result<()> {
    let end = move || {
        let mut children = lock();
        children.iter_mut().for_each(end_child);
        let _ = std::fs::remove_dir_all(&scratch);
        std::process::exit(INTERRUPTED);
    };
    Ok(ctrlc::set_handler(end)?)
}

/// Starts a child; its process number.
pub fn start(command: &mut Command) -> io::Result<u32> {
    let mut children = lock();
    let child = command.spawn()?;
    let pid = child.id();
    children.push(child);
    Ok(pid)
}

/// What `wanted` makes of a child; nothing when it is none.
pub fn with<T>(pid: u32, wanted: impl FnOnce(&mut Child) -> Option<T>) -> Option<T> {
    lock().iter_mut().find(|child| child.id() == pid).and_then(wanted)
}

/// How a child ended, if it did.
pub fn status(pid: u32) -> Option<ExitStatus> {
    with(pid, |child| child.try_wait().ok().flatten())
}

/// Kills a child and forgets it.
pub fn end(pid: u32) {
    lock().extract_if(.., |child| child.id() == pid).for_each(|mut child| end_child(&mut child));
}

fn end_child(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn lock() -> MutexGuard<'static, Vec<Child>> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}
