//! Faults of the clock, the disk, file locks, thread creation, name lookups and fixed ports, injected by a library that is preloaded into
//! the agent.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use super::scratch::temporary;
use super::{SOON, Scratch, Setup, ms};

/// Compiled once per test run.
static LIBRARY: LazyLock<PathBuf> = LazyLock::new(compile);

fn compile() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/shim.c");
    let folder = temporary();
    let (fresh, target) = (folder.join(format!("{}-shim.so", std::process::id())), folder.join("shim.so"));
    let status = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).args([&fresh, &source]).status();
    assert!(status.expect("a C compiler").success(), "{} does not compile", source.display());
    // Another run may be using the existing file.
    fs::rename(fresh, &target).expect("the file in its place");
    target
}

/// Controls the faults of one agent.
pub struct Shim(Arc<Scratch>);

impl Shim {
    /// Configures the agent to load the library.
    pub fn load(setup: Setup) -> Setup {
        let shim = Self::of(&setup);
        let variables = [
            ("LD_PRELOAD", &*LIBRARY),
            ("FAULT_CLOCK", &shim.clock()),
            ("FAULT_THREADS", &shim.threads()),
            ("FAULT_LOOKUPS", &shim.lookups()),
            ("FAULT_DISK", &shim.disk()),
            ("FAULT_LOCK", &shim.lock()),
        ];
        variables.into_iter().fold(setup, |setup, (name, path)| setup.env(name, path.to_str().expect("UTF-8")))
    }

    /// Configures the agent to find the server at port `to` at port `from`, which is fixed and may be in use.
    pub fn redirect(setup: Setup, from: u16, to: u16) -> Setup {
        Self::load(setup).env("FAULT_PORT", &format!("{from}:{to}"))
    }

    /// The shim of an agent whose setup loads it.
    pub fn of(setup: &Setup) -> Self {
        Self(Arc::clone(&setup.scratch))
    }

    fn clock(&self) -> PathBuf {
        self.0.join("fault-clock")
    }

    fn threads(&self) -> PathBuf {
        self.0.join("fault-threads")
    }

    fn lookups(&self) -> PathBuf {
        self.0.join("fault-lookups")
    }

    /// Makes every further lookup of a name hang.
    pub fn hang_lookups(&self) {
        self.0.write("fault-lookups", "");
    }

    /// The number of lookups that hang.
    pub fn hanging_lookups(&self) -> u64 {
        fs::metadata(self.lookups()).expect("the lookups' file").len()
    }

    /// Lets lookups end.
    pub fn end_lookups(&self) {
        fs::remove_file(self.lookups()).expect("the lookups' file");
    }

    fn disk(&self) -> PathBuf {
        self.0.join("fault-disk")
    }

    fn lock(&self) -> PathBuf {
        self.0.join("fault-lock")
    }

    /// Makes every write beside the identity fail with this errno from now on.
    pub fn fail_writes(&self, errno: i32) {
        self.0.write("fault-disk", errno.to_string());
    }

    /// Makes every lock of a file fail with this errno from now on.
    pub fn fail_locks(&self, errno: i32) {
        self.0.write("fault-lock", errno.to_string());
    }

    /// Shifts the wall clock by this many seconds from now on.
    pub fn set_clock_off_by(&self, seconds: i64) {
        let fresh = self.0.write("fault-clock.new", seconds.to_string());
        fs::rename(fresh, self.clock()).expect("the clock's file");
    }

    /// Makes every further start of a thread fail.
    pub fn refuse_threads(&self) {
        self.0.write("fault-threads", "");
    }

    /// Waits until the start of a thread has failed, which proves that the fault occurred.
    pub fn wait_refused(&self) {
        let began = Instant::now();
        while fs::metadata(self.threads()).expect("the threads' file").len() == 0 {
            assert!(began.elapsed() < SOON, "no thread was refused");
            std::thread::sleep(ms(5));
        }
    }

    /// Lets threads start again.
    pub fn allow_threads(&self) {
        fs::remove_file(self.threads()).expect("the threads' file");
    }
}
