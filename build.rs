//! Where the machine code lies in the program file.
//!
//! Cron calls `run --cron` each minute, and nearly always it has nothing to do. What it touches on the way there is a twelfth of
//! the code, and the system reads in 64 KiB around each place that is touched: scattered, that is most of the program. So it is
//! laid side by side (`scripts/startup.ld`, made by `scripts/startup-order`), which takes a quarter from the memory of a call.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=scripts/startup.ld");
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|is| is == value);
    // A linker of the builder's own choice may not take it: mold does not.
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    let is_usual_linker = !["fuse-ld", "linker"].iter().any(|word| flags.contains(word));
    if is("PROFILE", "release") && is("CARGO_CFG_TARGET_OS", "linux") && is_usual_linker {
        let folder = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{folder}/scripts/startup.ld");
    }
}
