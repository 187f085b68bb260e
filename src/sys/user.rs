//! The user who runs this process, from the environment and the system's user database.

use std::path::PathBuf;

use nix::unistd::{Uid, User};

/// The entry in the user database.
pub fn this_user() -> Option<User> {
    User::from_uid(Uid::effective()).ok().flatten()
}

/// The name, or the uid if the database has no entry.
pub fn name() -> String {
    this_user().map_or_else(|| Uid::effective().to_string(), |user| user.name)
}

/// The name of a user, or the uid of one without a name.
pub fn name_of(uid: u32) -> String {
    User::from_uid(Uid::from_raw(uid)).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

/// The home folder: `HOME`, or if that is not set, as in some containers and units, the one in the user database.
pub fn home() -> Option<PathBuf> {
    let set = std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    set.or_else(|| Some(this_user()?.dir))
}
