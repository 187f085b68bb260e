//! The entry point of the program. The code is in [`provider_agent::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    provider_agent::cli::main(std::env::args_os())
}
