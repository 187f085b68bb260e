//! Access to files with the permissions of another user, which root can assume.

use std::ffi::CString;
use std::io;
use std::panic::resume_unwind;

use nix::unistd::{Uid, User, getgrouplist, setfsgid, setfsuid};

#[cfg(any(target_arch = "x86", target_arch = "arm"))]
const SETGROUPS: libc::c_long = libc::SYS_setgroups32;
#[cfg(not(any(target_arch = "x86", target_arch = "arm")))]
const SETGROUPS: libc::c_long = libc::SYS_setgroups;

/// Runs `action` with the file access of `user`: files that it creates belong to that user, and it fails where that user would. Only
/// this thread's access changes, and only during the action.
///
/// # Errors
/// This process may not assume the permissions.
pub fn with_access_of<T: Send>(user: &User, action: impl FnOnce() -> T + Send) -> io::Result<T> {
    if user.uid == Uid::effective() {
        return Ok(action());
    }
    // On a thread of its own, which ends with these permissions.
    let run = || assume(user).map(|()| action());
    std::thread::scope(|scope| scope.spawn(run).join().unwrap_or_else(|panic| resume_unwind(panic)))
}

/// Gives this thread the file access of `user`.
fn assume(user: &User) -> io::Result<()> {
    let name = CString::new(user.name.as_str())?;
    let groups: Vec<libc::gid_t> = getgrouplist(&name, user.gid)?.into_iter().map(|gid| gid.as_raw()).collect();
    #[expect(unsafe_code, reason = "the function of libc would change the groups of every thread")]
    // SAFETY: the kernel reads `groups.len()` group ids at the pointer, which `groups` holds.
    let result = unsafe { libc::syscall(SETGROUPS, groups.len(), groups.as_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    setfsgid(user.gid);
    setfsuid(user.uid);
    // The calls report no error, but return what was set before.
    let is_assumed = setfsgid(user.gid) == user.gid && setfsuid(user.uid) == user.uid;
    if is_assumed { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}
