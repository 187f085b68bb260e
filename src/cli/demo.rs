//! stub
use super::Failure;
use super::args::{Demo, Globals};
pub fn run(_: &Globals, _: &Demo) -> Result<(), Failure> {
    Ok(())
}
