//! `enroll`: prints the identity of this agent, for its enrollment.

use super::args::Globals;
use super::{CliError, load_config};
use crate::instance::identity::Identity;
use crate::logging::redact;

/// Prints the public key, the provider id and the first and last characters of the enrollment code.
pub fn run(globals: &Globals) -> Result<(), CliError> {
    let config = load_config(globals)?;
    Identity::check_not_lost(&config.key_path, config.paired_provider_id())?;
    let identity = Identity::load_or_create(&config.key_path)?;
    let code = config.coordinator.enrollment_code.as_deref().map_or_else(|| "<none>".to_owned(), redact);
    out!(
        "public_key: {}\nprovider_id: {}\nenrollment_code: {code}\n",
        identity.public_key_base64(),
        identity.provider_id().unwrap_or("<not yet enrolled>"),
    );
    Ok(())
}
