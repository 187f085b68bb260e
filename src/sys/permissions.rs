//! Checks who can change a file, as ssh does before it trusts one: by the owners and modes of the file, of each folder above it, and
//! of the symlinks that lead to it. Access control lists are not examined.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group, Uid, User};

use super::shell_quote::shell_quote;
use super::{files, user};

/// Maximum size of the user database that is read, in bytes.
const PASSWD_BYTES_MAX: u64 = 1 << 20;
const STICKY: u32 = 0o1000;

/// Why a user other than the expected one and root can change a file.
#[derive(Debug, thiserror::Error)]
pub enum Exposure {
    /// The file, or a folder or symlink on its path, belongs to another user.
    #[error("`{}` belongs to {}", path.display(), user::name_of(*owner))]
    Owner {
        /// What belongs to the other user.
        path: PathBuf,
        /// The other user.
        owner: u32,
        /// The expected user.
        uid: u32,
    },
    /// The file, or a folder on its path, is writable by its group or by everybody.
    #[error("other users can write to `{}` (mode {mode:04o})", path.display())]
    Mode {
        /// What they can write to.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It cannot be examined.
    #[error("`{}` cannot be examined: {error}", path.display())]
    Unknown {
        /// What cannot be examined.
        path: PathBuf,
        /// The system's reason.
        error: io::Error,
    },
}

impl Exposure {
    /// The command that removes the exposure.
    pub fn fix(&self) -> String {
        let quoted = |path: &Path| shell_quote(&path.to_string_lossy());
        match self {
            Exposure::Owner { path, uid, .. } => format!("chown -h {} {}", user::name_of(*uid), quoted(path)),
            Exposure::Mode { path, .. } => format!("chmod go-w {}", quoted(path)),
            Exposure::Unknown { path, .. } => format!("check the permissions of {}", quoted(path)),
        }
    }
}

/// Checks that only `uid` and root can change or replace the file or folder at `path`, which need not exist.
///
/// # Errors
/// The first exposure, from the file upwards.
pub fn check_path(path: &Path, uid: Uid) -> Result<(), Exposure> {
    for part in parts(path) {
        check(&part, uid, true)?;
    }
    Ok(())
}

/// Checks the owner and the mode of a file alone, and of the symlink that leads to it.
///
/// # Errors
/// The first exposure.
pub fn check_file(path: &Path, uid: Uid) -> Result<(), Exposure> {
    check(path, uid, true)?;
    fs::canonicalize(path).map_or(Ok(()), |target| check(&target, uid, true))
}

/// Checks that only `uid` and root can create files in `folder`, or in its nearest ancestor that exists.
///
/// # Errors
/// The first exposure, from the folder upwards.
pub fn check_folder(folder: &Path, uid: Uid) -> Result<(), Exposure> {
    // In a folder with the sticky bit others cannot replace files, but they can create them.
    if let Some(existing) = folder.ancestors().find(|folder| folder.exists()) {
        check(&fs::canonicalize(existing).unwrap_or_else(|_| existing.to_owned()), uid, false)?;
    }
    check_path(folder, uid)
}

/// The path and its ancestors, as named and with the symlinks resolved.
fn parts(path: &Path) -> Vec<PathBuf> {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let resolved = path.ancestors().find_map(|ancestor| fs::canonicalize(ancestor).ok());
    let named = path.ancestors().map(Path::to_owned);
    let resolved = resolved.iter().flat_map(|path| path.ancestors()).map(Path::to_owned);
    named.chain(resolved).collect()
}

fn check(path: &Path, uid: Uid, sticky_is_safe: bool) -> Result<(), Exposure> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Exposure::Unknown { path: path.to_owned(), error }),
    };
    let is_trusted = |owner: u32| owner == uid.as_raw() || owner == 0;
    if !is_trusted(found.uid()) {
        return Err(Exposure::Owner { path: path.to_owned(), owner: found.uid(), uid: uid.as_raw() });
    }
    let mode = found.mode() & 0o7777;
    let is_safe = found.is_symlink() || (found.is_dir() && mode & STICKY != 0 && sticky_is_safe);
    let is_writable = mode & 0o002 != 0 || (mode & 0o020 != 0 && !is_private_group(Gid::from_raw(found.gid()), uid));
    if is_writable && !is_safe { Err(Exposure::Mode { path: path.to_owned(), mode }) } else { Ok(()) }
}

/// Whether the group contains only `uid` and root. Many distributions give each user such a group, and a umask of 002.
fn is_private_group(gid: Gid, uid: Uid) -> bool {
    let is_trusted = |uid_of_member: u32| uid_of_member == uid.as_raw() || uid_of_member == 0;
    let uid_of = |name: &String| User::from_name(name).ok().flatten().map(|user| user.uid.as_raw());
    let members = Group::from_gid(gid).ok().flatten().map_or_else(Vec::new, |group| group.mem);
    let passwd = files::read_bounded(Path::new("/etc/passwd"), PASSWD_BYTES_MAX).unwrap_or_default();
    let passwd = String::from_utf8_lossy(&passwd);
    // name:password:uid:gid:…
    let mut with_primary_group = passwd.lines().filter_map(|line| {
        let mut fields = line.split(':').skip(2);
        let (uid, primary) = (fields.next()?.parse().ok()?, fields.next()?.parse::<u32>().ok()?);
        (primary == gid.as_raw()).then_some(uid)
    });
    members.iter().all(|name| uid_of(name).is_some_and(is_trusted)) && with_primary_group.all(is_trusted)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn folder_is_exposed_by_its_mode_and_by_those_above_it() {
        let root = std::env::temp_dir().join(format!("usepod-permissions-{}", std::process::id()));
        let inner = root.join("outer/inner");
        fs::create_dir_all(&inner).expect("folders");
        let uid = Uid::effective();
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
        let (file, link) = (inner.join("file"), root.join("link"));
        symlink(&inner, &link).expect("a link");
        for (outer, of_inner, file_is_safe, folder_is_safe) in [
            (0o755, 0o700, true, true),
            (0o755, 0o1777, true, false),
            (0o755, 0o777, false, false),
            (0o777, 0o700, false, false),
            (0o1777, 0o700, true, true),
        ] {
            set(&root.join("outer"), outer);
            set(&inner, of_inner);
            let modes = format!("{outer:o} {of_inner:o}");
            assert_eq!(check_path(&file, uid).is_ok(), file_is_safe, "{modes}");
            assert_eq!(check_path(&link.join("file"), uid).is_ok(), file_is_safe, "{modes}");
            assert_eq!(check_folder(&inner, uid).is_ok(), folder_is_safe, "{modes}");
            assert_eq!(check_folder(&link.join("missing"), uid).is_ok(), folder_is_safe, "{modes}");
        }
        fs::remove_dir_all(root).expect("removed");
    }
}
