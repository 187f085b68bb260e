//! The layers of this box: the configuration, the identity, the lock, the disk.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use nix::sys::statvfs::{FsFlags, statvfs};

use super::report::Report;
use crate::config::Config;
use crate::instance::identity::{Identity, IdentityError};
use crate::instance::{AgentPaths, LockOwner};
use crate::sys::files;

/// Identity, lock, state and log want less.
const FREE_BYTES_MIN: u64 = 16 << 20;
/// What is written to see whether anything can be, in bytes.
const PROBE_BYTES: usize = 4 << 10;

/// Finds and reads `agent.toml`.
pub fn config(report: &mut Report<'_>, named: Option<&Path>, allow_insecure: bool) -> Option<Config> {
    let read = Config::find(named).and_then(|path| Ok((Config::load(&path, allow_insecure)?, path)));
    let (config, path) = match read {
        Ok(read) => read,
        Err(e) => {
            report.fail("config", format_args!("{}", e.fault()), format_args!("{}", e.fix()));
            return None;
        }
    };
    if config.backends.is_empty() {
        let what = format_args!("`{}` has no [[backends]]: there is nothing to offer", path.display());
        report.fail(
            "config",
            what,
            format_args!("add one for your server: usepod-agent setup, or the example in the README"),
        );
    } else {
        report.pass("config", format_args!("`{}`, {} backend(s)", path.display(), config.backends.len()));
    }
    for warning in &config.warnings {
        report.warn("config", format_args!("{}", warning.fault()), format_args!("{}", warning.fix()));
    }
    Some(config)
}

/// The key: there, its owner's alone, readable, and known to the coordinator.
pub fn identity(report: &mut Report<'_>, config: &Config) {
    let path = &config.key_path;
    let shown_path = path.display();
    match fs::metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let what = format_args!("`{shown_path}` does not exist: it is made at the first start");
            report.warn(
                "identity",
                what,
                format_args!("usepod-agent setup makes it and pairs it; a lost one comes from your backup"),
            );
        }
        Err(e) => {
            let fix =
                format_args!("let the user that the agent runs as own it and its folder: chown USER `{shown_path}`");
            report.fail("identity", format_args!("`{shown_path}` cannot be looked at: {e}"), fix);
        }
        Ok(metadata) => {
            if let Some(mode) = open_to_others(&metadata) {
                let what = format_args!("`{shown_path}` has mode {mode:04o}: others on this box can use your key");
                report.fail("identity", what, format_args!("chmod 600 '{shown_path}'"));
            }
            enrolment(report, config, Identity::load(path), open_to_others(&metadata).is_none());
        }
    }
}

fn enrolment(report: &mut Report<'_>, config: &Config, identity: Result<Identity, IdentityError>, is_private: bool) {
    let path = config.key_path.display();
    let identity = match identity {
        Ok(identity) => identity,
        Err(IdentityError::Invalid { reason, .. }) => {
            let fix = "restore it from a backup, or move it away to start as a new agent";
            report.fail("identity", format_args!("`{path}` is refused: {reason}"), format_args!("{fix}"));
            return;
        }
        Err(e) => {
            report.fail(
                "identity",
                format_args!("{e}"),
                format_args!("chown USER '{path}', the user that the agent runs as"),
            );
            return;
        }
    };
    if is_private {
        report.pass("identity", format_args!("`{path}`, public key {}", identity.public_key_base64()));
    }
    match (identity.provider_id(), &config.coordinator.enrollment_code) {
        (Some(id), _) => report.pass("enrolment", format_args!("enrolled as {}", id)),
        (None, Some(_)) => report
            .pass("enrolment", format_args!("with the enrollment code of the configuration, at the first connection")),
        (None, None) => report.warn(
            "enrolment",
            format_args!(
                "no provider id yet, and no enrollment code: only a coordinator that knows the public key lets it in"
            ),
            format_args!("usepod-agent setup, unless it is paired already: then the first connection brings the id"),
        ),
    }
}

/// The mode, where it gives anything to anybody but the owner.
#[cfg(unix)]
fn open_to_others(metadata: &fs::Metadata) -> Option<u32> {
    use std::os::unix::fs::PermissionsExt;
    let mode = metadata.permissions().mode() & 0o777;
    (mode & 0o077 != 0).then_some(mode)
}

#[cfg(not(unix))]
fn open_to_others(_: &fs::Metadata) -> Option<u32> {
    None
}

/// Who runs on this identity. Returns whether anybody does.
pub fn lock(report: &mut Report<'_>, paths: &AgentPaths) -> bool {
    let Some(owner) = LockOwner::running(paths) else {
        report.pass("lock", format_args!("free: no agent runs on this identity"));
        return false;
    };
    let (pid, silence) = (owner.pid, owner.since_last_liveness());
    if owner.is_unresponsive() {
        let what = format_args!(
            "the agent, pid {pid}, has shown no sign of life for {} min: it hangs",
            silence.as_secs() / 60
        );
        report.fail(
            "lock",
            what,
            format_args!("kill -KILL {pid}; under cron it is replaced by itself within a minute"),
        );
    } else {
        let what =
            format_args!("held by the agent that runs, pid {pid}; last sign of life {} s ago", silence.as_secs());
        report.pass("lock", what);
    }
    true
}

/// Whether the agent could write beside its identity.
pub fn disk(report: &mut Report<'_>, config: &Config) {
    let Some(folder) = existing_folder(&config.key_path) else {
        report.fail(
            "disk",
            format_args!("the identity has no folder"),
            format_args!("write an absolute path as [identity] key_path"),
        );
        return;
    };
    let place = folder.display();
    let free = statvfs(&folder).ok();
    let read_only = free.is_some_and(|disk| disk.flags().contains(FsFlags::ST_RDONLY));
    // Block counts are as wide as the platform has them.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    let free = free.map(|disk| (disk.blocks_available() as u64).saturating_mul(disk.fragment_size() as u64));
    if read_only {
        report.fail("disk", format_args!("`{place}` is mounted read-only"), format_args!("{READ_ONLY_FIX}"));
    } else if let Err(e) = write_probe(&folder) {
        report.fail(
            "disk",
            format_args!("nothing can be written to `{place}`: {e}"),
            format_args!("{}", write_fix(&e, &folder)),
        );
    } else if let Some(free) = free.filter(|free| *free < FREE_BYTES_MIN) {
        let what = format_args!("{} MiB are free at `{place}`: too little for state and log", free >> 20);
        report.fail("disk", what, format_args!("{FULL_FIX}"));
    } else {
        // Unknown only where the system does not say.
        let free = free.unwrap_or(0) >> 20;
        report.pass("disk", format_args!("`{place}` is writable, {free} MiB free"));
    }
}

const READ_ONLY_FIX: &str =
    "remount it writable (a disk with errors is mounted so: see dmesg), or move [identity] key_path";
const FULL_FIX: &str = "free some space: df -h shows which disk, du -xh | sort -h what is on it";

fn write_fix(e: &io::Error, folder: &Path) -> String {
    match e.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => FULL_FIX.into(),
        ErrorKind::ReadOnlyFilesystem => READ_ONLY_FIX.into(),
        _ => format!("let the user that the agent runs as own it: chown USER '{}'", folder.display()),
    }
}

/// As the agent writes, and away again.
fn write_probe(folder: &Path) -> io::Result<()> {
    let path = folder.join(format!(".usepod-doctor-{}", std::process::id()));
    files::write_atomic(&path, &[b'\n'; PROBE_BYTES])?;
    fs::remove_file(&path)
}

/// The folder of a file, or the nearest above it that exists: the agent makes those that are missing.
fn existing_folder(file: &Path) -> Option<PathBuf> {
    let file = fs::canonicalize(file).or_else(|_| std::path::absolute(file)).ok()?;
    file.ancestors().skip(1).find(|folder| folder.is_dir()).map(Path::to_owned)
}
