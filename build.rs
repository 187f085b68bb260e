//! What the linker is asked for beside the program, in release builds: less to read from the disk, and less memory for a call by
//! cron that finds an agent at work.
//!
//! Invariant: an option is used only where a small program that was linked with it runs, on this machine and with the linker that
//! links the agent. So a build never fails for want of one; the program is then larger, and otherwise the same. A program for
//! another machine gets none of them.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// Lays what a call by cron runs side by side: of each place in the program that is touched the system reads 64 KiB, and
/// scattered, that is most of it. Made by `scripts/startup-order`.
const LAYOUT: &str = "scripts/startup.ld";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={LAYOUT}");
    let variable = |name| env::var(name).unwrap_or_default();
    if variable("PROFILE") != "release" || variable("HOST") != variable("TARGET") {
        return;
    }
    // cargo keeps what is said here, and of all paths in it corrects that of OUT_DIR alone when the project has been moved.
    let layout = Path::new(&variable("OUT_DIR")).join("startup.ld");
    // Without it the option does not work.
    let _ = fs::copy(LAYOUT, &layout);
    let options = [
        format!("-Wl,-T,{}", layout.display()),
        // 100 KB of addresses that the loader has to adjust, as bits. The C library has to know them: glibc from 2.36 on.
        "-Wl,-z,pack-relative-relocs".to_owned(),
        // Functions that came out the same are there once.
        "-Wl,--icf=all".to_owned(),
    ];
    for option in options.iter().filter(|option| works(option)) {
        println!("cargo:rustc-link-arg-bins={option}");
    }
}

/// Whether a program that is linked with this option runs.
fn works(option: &str) -> bool {
    let folder = env::var("OUT_DIR").unwrap_or_default();
    let (source, program) = (Path::new(&folder).join("probe.rs"), Path::new(&folder).join("probe"));
    let _ = fs::remove_file(&program);
    if fs::write(&source, "fn main() {}").is_err() {
        return false;
    }
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    // As cargo is going to link the agent.
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    rustc.args(flags.split('\x1f').filter(|flag| !flag.is_empty()));
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg(format!("-Clinker={linker}"));
    }
    rustc.arg(format!("-Clink-arg={option}")).arg("-o").arg(&program).arg(&source);
    succeeds(rustc) && succeeds(Command::new(&program))
}

fn succeeds(mut command: Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
