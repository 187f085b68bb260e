//! `enroll`: who this agent is, for the person who enrolls it.

use super::args::Globals;
use super::{Failure, load_config, print};
use crate::identity::Identity;

/// The part of an enrollment code that is shown at each end, in characters.
const CODE_ENDS: usize = 4;

/// Prints the public key, the provider id and the ends of the enrollment code.
pub fn run(globals: &Globals) -> Result<(), Failure> {
    let config = load_config(globals)?;
    let identity = Identity::load_or_create(&config.key_path)?;
    let code = config.coordinator.enrollment_code.as_deref().map_or_else(|| "<none>".to_owned(), shortened);
    print(&format!(
        "public_key: {}\nprovider_id: {}\nenrollment_code: {code}\n",
        identity.public_key_base64(),
        identity.provider_id().unwrap_or("<not yet enrolled>"),
    ));
    Ok(())
}

/// Enough to recognise a code by, too little to use it.
fn shortened(code: &str) -> String {
    let chars: Vec<char> = code.chars().collect();
    if chars.len() < 4 * CODE_ENDS {
        return "…".to_owned();
    }
    let ends = |part: &[char]| part.iter().collect::<String>();
    format!("{}…{}", ends(&chars[..CODE_ENDS]), ends(&chars[chars.len() - CODE_ENDS..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_shows_its_ends_alone() {
        assert_eq!(shortened("POD-ENROLL-ABCD-1234"), "POD-…1234");
        assert_eq!(shortened("POD-1234"), "…");
    }
}
