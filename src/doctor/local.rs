//! Checks the layers of this machine: the configuration, the identity, the lock, the disk.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::Uid;

use super::report::Report;
use crate::config::{Config, PartialConfig};
use crate::instance::identity::{
    IDENTITY_LOST_FIX, Identity, IdentityError, UNEXPECTED_PROVIDER_ID_FIX, unexpected_provider_id,
};
use crate::instance::{AgentPaths, LockError, running_agent};
use crate::sys::{files, permissions};

/// The minimum of free disk space, in bytes: more than identity, lock, state and log need.
const FREE_BYTES_MIN: u64 = 16 << 20;
/// The size of the test file, in bytes.
const TEST_FILE_BYTES: usize = 4 << 10;

/// Finds and reads `agent.toml`. `None` if no part of it can be used.
pub fn config(report: &mut Report<'_>, named: Option<&Path>, allow_insecure: bool) -> Option<PartialConfig> {
    let config = match Config::find(named).and_then(|path| PartialConfig::load(&path, allow_insecure)) {
        Ok(read) => read,
        Err(e) => {
            report.fail("config", e.fault(), e.fix());
            return None;
        }
    };
    let path = &config.path;
    let errors = config.errors();
    for e in &errors {
        report.fail("config", e.fault(), e.fix());
    }
    if config.backends.is_empty() {
        let what = format_args!("`{}` has no [[backends]], so there is nothing to offer", path.display());
        report.fail("config", what, "add your server: run `usepod-agent setup`, or see the example in the README");
    } else if errors.is_empty() {
        report.pass("config", format_args!("`{}`, {} backend(s)", path.display(), config.backends.len()));
    }
    for warning in &config.warnings {
        report.warn("config", warning.fault(), warning.fix());
    }
    Some(config)
}

/// Checks that the key exists, is readable only by its owner, and is known to the coordinator.
pub fn identity(report: &mut Report<'_>, path: &Path, config: &PartialConfig) {
    let shown_path = path.display();
    if let Err(e) = Identity::check_not_lost(path, config.paired_provider_id()) {
        return report.fail("identity", e.fault(), IDENTITY_LOST_FIX);
    }
    match fs::metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let what = format_args!("`{shown_path}` does not exist; the first start creates it");
            report.warn(
                "identity",
                what,
                "usepod-agent setup creates and pairs it; if it was lost, restore it from your backup",
            );
        }
        Err(e) => {
            let fix = format_args!("give it and its folder to the user that runs the agent: chown USER '{shown_path}'");
            report.fail("identity", format_args!("failed to read `{shown_path}`: {e}"), fix);
        }
        Ok(metadata) => {
            if let Some(mode) = files::open_to_others(&metadata) {
                let what = format_args!("`{shown_path}` has mode {mode:04o}, so other users can use your key");
                report.fail("identity", what, format_args!("chmod 600 '{shown_path}'"));
            } else if let Err(exposure) = permissions::check_file(path, agents_user(config)) {
                report.fail("identity", format_args!("{exposure}, and can replace your key"), exposure.fix());
            }
            enrollment(report, path, config, files::open_to_others(&metadata).is_none());
        }
    }
}

/// Checks that no other user can create files beside the identity, such as a lock that keeps the agent from starting.
pub fn folder(report: &mut Report<'_>, key_path: &Path, config: &PartialConfig) {
    // If the identity is a symlink, the files are beside its target.
    let target = fs::canonicalize(key_path).unwrap_or_else(|_| key_path.to_owned());
    let uid = agents_user(config);
    let check = |file: &Path| permissions::check_folder(file.parent().unwrap_or(Path::new("/")), uid);
    if let Err(exposure) = check(key_path).and_then(|()| check(&target)) {
        let what = format_args!("{exposure}, so they can plant files beside your identity");
        let fix = format_args!("{}; or set [identity] key_path to a folder of your own", exposure.fix());
        report.fail("folder", what, fix);
    }
}

/// The user that runs the agent: this one, or for root the owner of the configuration, as under a system unit.
fn agents_user(config: &PartialConfig) -> Uid {
    let owner = fs::metadata(&config.path).ok().map(|found| Uid::from_raw(found.uid()));
    Some(Uid::effective()).filter(|uid| !uid.is_root()).or(owner).unwrap_or(Uid::effective())
}

fn enrollment(report: &mut Report<'_>, path: &Path, config: &PartialConfig, is_private: bool) {
    let (path, identity) = (path.display(), Identity::load(path));
    let identity = match identity {
        Ok(identity) => identity,
        Err(IdentityError::Invalid { reason, .. }) => {
            let fix = "restore it from a backup, or move it away to start as a new agent";
            report.fail("identity", format_args!("`{path}` is invalid: {reason}"), fix);
            return;
        }
        Err(e) => {
            report.fail("identity", e, format_args!("give it to the user that runs the agent: chown USER '{path}'"));
            return;
        }
    };
    if is_private {
        report.pass("identity", format_args!("`{path}`, public key {}", identity.public_key_base64()));
    }
    if let Some(what) = unexpected_provider_id(identity.provider_id(), config.recorded_provider_id.as_deref()) {
        return report.warn("enrollment", what, UNEXPECTED_PROVIDER_ID_FIX);
    }
    let code = config.coordinator.as_ref().ok().and_then(|coordinator| coordinator.enrollment_code.as_ref());
    match (identity.provider_id(), code) {
        (Some(id), _) => report.pass("enrollment", format_args!("enrolled as {}", id)),
        (None, Some(_)) => {
            report.pass("enrollment", "pending: the first connection sends the enrollment code of the configuration")
        }
        (None, None) => report.warn(
            "enrollment",
            "no provider id yet and no enrollment code: only a coordinator that knows the public key accepts the agent",
            "usepod-agent setup; if the agent is paired already, the first connection brings the id",
        ),
    }
}

/// Checks the agent that runs with this identity. Returns whether there is one.
pub fn lock(report: &mut Report<'_>, paths: &AgentPaths) -> bool {
    let owner = match running_agent(paths) {
        Ok(Some(owner)) => owner,
        Ok(None) => {
            report.pass("lock", "free: no agent is running with this identity");
            return false;
        }
        Err(e @ LockError::HeldElsewhere(_)) => {
            report.warn("lock", e.fault(), e.fix());
            return true;
        }
        Err(e) => {
            report.fail("lock", e.fault(), e.fix());
            return false;
        }
    };
    let (pid, silence) = (owner.pid, owner.since_last_liveness());
    let held = format!("held by the running agent (pid {pid}), last sign of life {} s ago", silence.as_secs());
    if owner.is_unresponsive() {
        let what = format_args!("the agent (pid {pid}) hangs: no sign of life for {} min", silence.as_secs() / 60);
        report.fail("lock", what, format_args!("kill -KILL {pid}; cron replaces it within a minute"));
    } else if !owner.is_recorded {
        let what = format!("{held}, which it cannot write to `{}`", paths.lock().display());
        report.fail("lock", what, "see the check of the disk below, and dmesg; the agent serves meanwhile");
    } else {
        report.pass("lock", held);
    }
    true
}

/// Checks whether the agent can write beside its identity.
pub fn disk(report: &mut Report<'_>, key_path: &Path) {
    let Some(folder) = existing_folder(key_path) else {
        report.fail("disk", "the identity has no folder", "set [identity] key_path to an absolute path");
        return;
    };
    let path = folder.display();
    let free = statvfs(&folder).ok();
    let read_only = free.is_some_and(|disk| disk.flags().contains(FsFlags::ST_RDONLY));
    // The width of block counts depends on the platform.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    let free = free.map(|disk| (disk.blocks_available() as u64).saturating_mul(disk.fragment_size() as u64));
    if read_only {
        report.fail("disk", format_args!("`{path}` is mounted read-only"), READ_ONLY_FIX);
    } else if let Err(e) = files::check_folder_writable(&folder, &[b'\n'; TEST_FILE_BYTES]) {
        report.fail("disk", format_args!("failed to write to `{path}`: {e}"), write_fix(&e, &folder));
    } else if let Some(free) = free.filter(|free| *free < FREE_BYTES_MIN) {
        let what = format_args!("{} MiB free at `{path}`, too little for the state file and the log", free >> 20);
        report.fail("disk", what, FULL_FIX);
    } else {
        // `None` only if the system does not report the free space.
        let free = free.unwrap_or(0) >> 20;
        report.pass("disk", format_args!("`{path}` is writable, {free} MiB free"));
    }
}

const READ_ONLY_FIX: &str =
    "remount it read-write (a disk with errors is mounted read-only: see dmesg), or move [identity] key_path";
const FULL_FIX: &str = "free some space: `df -h` shows which disk is full, `du -xh | sort -h` what is on it";

fn write_fix(e: &io::Error, folder: &Path) -> String {
    match e.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => FULL_FIX.into(),
        ErrorKind::ReadOnlyFilesystem => READ_ONLY_FIX.into(),
        _ => format!("give it to the user that runs the agent: chown USER '{}'", folder.display()),
    }
}

/// The folder of a file, or its nearest ancestor that exists: the agent creates the missing ones.
fn existing_folder(file: &Path) -> Option<PathBuf> {
    let file = fs::canonicalize(file).or_else(|_| std::path::absolute(file)).ok()?;
    file.ancestors().skip(1).find(|folder| folder.is_dir()).map(Path::to_owned)
}
