//! The identity of the agent: an Ed25519 key and the provider id, in a file format that version 0.3.5 also reads and writes.
//!
//! Invariants: the seed is written only to the file, never to a log, an error or `Debug` output. The file is replaced atomically,
//! and its unknown lines are kept.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair};

use crate::logging::sanitize_for_log;
use crate::sys::datetime::rfc3339;
use crate::sys::files;

const BEGIN: &str = "-----BEGIN USEPOD AGENT KEY-----";
const END: &str = "-----END USEPOD AGENT KEY-----";
const VERSION: &str = "1";
/// Maximum size of an identity file, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Maximum length of a provider id that is stored, in bytes.
const PROVIDER_ID_BYTES_MAX: usize = 256;

/// What to do about a lost identity file.
pub const IDENTITY_LOST_FIX: &str = "mount the disk that holds it, or restore it from your backup; to pair this machine as a new agent instead: usepod-agent setup";

/// What to do about an unexpected provider id.
pub const UNEXPECTED_PROVIDER_ID_FIX: &str = "restore the identity file of that pairing; or, if this one is intended, correct \
    the comment `provider_id` in agent.toml";

/// An agent's identity.
pub struct Identity {
    key: Ed25519KeyPair,
    provider_id: Option<String>,
    /// The id that the agent is expected to have.
    expected: Option<String>,
    file: Option<IdentityFile>,
}

/// The file and its current text.
struct IdentityFile {
    path: PathBuf,
    text: String,
}

/// Why the identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file could not be read or created.
    #[error("failed to {action} the identity file `{}`: {error}", path.display())]
    Io {
        /// The operation that failed.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        error: io::Error,
    },
    /// The file is not an identity file. The reason quotes nothing from it.
    #[error("the identity file `{}` is invalid: {reason}; restore it from a backup, or move it away to start as a new agent", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with its content.
        reason: String,
    },
    /// The file is missing, although this agent was paired.
    #[error("{}; {}", self.fault(), IDENTITY_LOST_FIX)]
    Lost {
        /// The file.
        path: PathBuf,
        /// The id that the pairing gave the agent.
        provider_id: String,
    },
    /// The system provides no randomness.
    #[error("failed to create a key: the system provides no randomness")]
    NoRandomness,
}

impl IdentityError {
    /// What is wrong, without the fix.
    pub fn fault(&self) -> String {
        match self {
            IdentityError::Lost { path, provider_id } => format!(
                "the identity file `{}` does not exist, although agent.toml records that this agent was paired as {}",
                path.display(),
                sanitize_for_log(provider_id)
            ),
            other => other.to_string(),
        }
    }
}

impl Identity {
    /// Checks that the file exists if the agent was paired as `recorded`: a new identity would be another agent, without the
    /// operator noticing.
    ///
    /// # Errors
    /// The file does not exist.
    pub fn check_not_lost(path: &Path, recorded: Option<&str>) -> Result<(), IdentityError> {
        let is_missing = || std::fs::metadata(path).is_err_and(|e| is_absent(&e));
        match recorded {
            Some(id) if is_missing() => Err(IdentityError::Lost { path: path.to_owned(), provider_id: id.to_owned() }),
            _ => Ok(()),
        }
    }

    /// Reads the file, or creates it with a new identity if it does not exist.
    ///
    /// # Errors
    /// The file can be neither read nor created, or is invalid.
    pub fn load_or_create(path: &Path) -> Result<Identity, IdentityError> {
        match Identity::load(path) {
            Err(IdentityError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
            loaded => return loaded,
        }
        match Identity::create(path) {
            // Another process has created the file in the meantime.
            Err(IdentityError::Io { error, .. }) if error.kind() == io::ErrorKind::AlreadyExists => {
                Identity::load(path)
            }
            created => created,
        }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// The file does not exist, cannot be read, or is invalid.
    pub fn load(path: &Path) -> Result<Identity, IdentityError> {
        let io_error = |error| IdentityError::Io { action: "read", path: path.to_owned(), error };
        if let Some(mode) = files::open_to_others(&std::fs::metadata(path).map_err(io_error)?) {
            log::warn!("other users can read the key: `{0}` has mode {mode:04o}; run `chmod 600 {0}`", path.display());
        }
        let bytes = files::read_bounded(path, FILE_BYTES_MAX).map_err(io_error)?;
        Identity::parse(&bytes, path).map_err(|reason| IdentityError::Invalid { path: path.to_owned(), reason })
    }

    fn create(path: &Path) -> Result<Identity, IdentityError> {
        let io_error = |error| IdentityError::Io { action: "create", path: path.to_owned(), error };
        files::create_folder_of(path).map_err(io_error)?;
        let (seed, key) = new_key()?;
        let created = rfc3339(SystemTime::now()).replace('Z', "+00:00");
        let (secret, public) = (BASE64.encode(seed), BASE64.encode(key.public_key()));
        let text =
            format!("{BEGIN}\nversion: {VERSION}\ncreated: {created}\nsecret: {secret}\npublic: {public}\n{END}\n");
        files::create_atomic(path, text.as_bytes()).map_err(io_error)?;
        log::info!("new identity in `{}`", path.display());
        Ok(Identity {
            key,
            provider_id: None,
            expected: None,
            file: Some(IdentityFile { path: path.to_owned(), text }),
        })
    }

    /// Creates an identity that is not stored.
    ///
    /// # Errors
    /// The system provides no randomness.
    pub fn ephemeral() -> Result<Identity, IdentityError> {
        Ok(Identity { key: new_key()?.1, provider_id: None, expected: None, file: None })
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Identity, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not text")?;
        // Some editors write a byte-order mark.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut fields = HashMap::new();
        for line in block(text).ok_or_else(|| format!("it has no `{BEGIN}` … `{END}` block"))? {
            let (name, value) = line.split_once(':').ok_or("a line in it has no colon")?;
            fields.insert(name.trim(), value.trim());
        }
        let key = key_from(&fields)?;
        let provider_id = fields.get("provider_id").filter(|id| !id.is_empty()).map(|id| (*id).to_owned());
        let file = IdentityFile { path: path.to_owned(), text: text.to_owned() };
        Ok(Identity { key, provider_id, expected: None, file: Some(file) })
    }

    /// The public key, 32 bytes.
    pub fn public_key(&self) -> &[u8] {
        self.key.public_key().as_ref()
    }

    /// The public key in base64, as shown to operators.
    pub fn public_key_base64(&self) -> String {
        BASE64.encode(self.public_key())
    }

    /// Signs the decoded nonce of a challenge.
    pub fn sign(&self, nonce: &[u8]) -> Vec<u8> {
        self.key.sign(nonce).as_ref().to_vec()
    }

    /// The id that the coordinator gave the agent; `None` before the enrollment.
    pub fn provider_id(&self) -> Option<&str> {
        self.provider_id.as_deref()
    }

    /// Logs a warning now, and whenever the id changes, if the provider id is not `recorded`, the one of the pairing.
    pub fn expect_provider_id(&mut self, recorded: Option<String>) {
        self.expected = recorded;
        self.check_expected();
    }

    fn check_expected(&self) {
        if let Some(warning) = unexpected_provider_id(self.provider_id(), self.expected.as_deref()) {
            log::warn!("{warning}; {UNEXPECTED_PROVIDER_ID_FIX}");
        }
    }

    /// Sets the provider id and stores it in the file. If the file cannot be written, the id is kept until the agent stops.
    pub fn set_provider_id(&mut self, id: String) {
        if self.provider_id.as_deref() == Some(&id) {
            return;
        }
        if id.len() > PROVIDER_ID_BYTES_MAX || id.trim() != id || id.contains(char::is_control) {
            log::warn!("the coordinator sent a provider id that cannot be stored; it is used until the agent stops");
        } else if let Some(file) = &mut self.file
            && let Err(e) = file.store_provider_id(&id)
        {
            let path = file.path.display();
            log::warn!(
                "failed to store the provider id in `{path}`: {e}; it is used until the agent stops: free disk space or fix the permissions before the next start"
            );
        }
        self.provider_id = Some(id);
        self.check_expected();
    }
}

/// A warning if the agent's provider id is not the one that its pairing recorded.
pub fn unexpected_provider_id(id: Option<&str>, recorded: Option<&str>) -> Option<String> {
    let (id, recorded) = (sanitize_for_log(id?), sanitize_for_log(recorded?));
    (id != recorded)
        .then(|| format!("this agent is enrolled as {id}, but agent.toml records that it was paired as {recorded}"))
}

fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The trimmed lines between the begin and end lines, without blank ones.
fn block(text: &str) -> Option<impl Iterator<Item = &str>> {
    let mut lines = text.lines().map(str::trim);
    lines.find(|line| *line == BEGIN)?;
    lines.clone().find(|line| *line == END)?;
    Some(lines.take_while(|line| *line != END).filter(|line| !line.is_empty()))
}

impl IdentityFile {
    /// Writes the id into the block and keeps all other lines.
    fn store_provider_id(&mut self, id: &str) -> io::Result<()> {
        let newline = if self.text.contains("\r\n") { "\r\n" } else { "\n" };
        let mut text = String::with_capacity(self.text.len() + id.len() + 20);
        let (mut within, mut written) = (false, false);
        for line in self.text.split_inclusive('\n') {
            let ends = within && line.trim() == END;
            if ends && !written {
                text.push_str(&format!("provider_id: {id}{newline}"));
                written = true;
            }
            within = (within && !ends) || (!written && line.trim() == BEGIN);
            if !(within && line.split(':').next().is_some_and(|name| name.trim() == "provider_id")) {
                text.push_str(line);
            }
        }
        files::write_atomic(&self.path, text.as_bytes())?;
        self.text = text;
        Ok(())
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.public_key_base64())
    }
}

/// The key from the lines of a file, by their names.
fn key_from(fields: &HashMap<&str, &str>) -> Result<Ed25519KeyPair, String> {
    let field = |name: &str| fields.get(name).ok_or_else(|| format!("the line `{name}:` is missing"));
    if *field("version")? != VERSION {
        return Err(format!("its version is not {VERSION}"));
    }
    field("created")?;
    let bytes = |name: &str| -> Result<[u8; 32], String> {
        let bytes = BASE64.decode(field(name)?).ok().and_then(|b| b.try_into().ok());
        bytes.ok_or_else(|| format!("the line `{name}:` is not 32 bytes in base64"))
    };
    Ed25519KeyPair::from_seed_and_public_key(&bytes("secret")?, &bytes("public")?)
        .map_err(|_| "its public key does not match its secret".into())
}

fn new_key() -> Result<([u8; 32], Ed25519KeyPair), IdentityError> {
    let mut seed = [0; 32];
    SystemRandom::new().fill(&mut seed).map_err(|_| IdentityError::NoRandomness)?;
    let key = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|_| IdentityError::NoRandomness)?;
    Ok((seed, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_neither_panics_nor_quotes_the_secret() {
        let secret = BASE64.encode([7u8; 32]);
        let valid = format!("{BEGIN}\nversion: 1\ncreated: x\nsecret: {secret}\npublic: {secret}\n{END}\n");
        arbtest::arbtest(|u| {
            let mut bytes = valid.clone().into_bytes();
            for _ in 0..u.int_in_range(0..=4)? {
                let at = u.choose_index(bytes.len())?;
                match u.int_in_range(0..=2)? {
                    0 => bytes[at] = u.arbitrary()?,
                    1 => bytes.truncate(at.max(1)),
                    _ => bytes.insert(at, u.arbitrary()?),
                }
            }
            if let Err(reason) = Identity::parse(&bytes, Path::new("x")) {
                assert!(!reason.contains(&secret[..20]), "{reason}");
            }
            Ok(())
        });
    }

    #[test]
    fn store_provider_id_leaves_a_second_block_as_it_is() {
        let path = std::env::temp_dir().join(format!("usepod-{}.key", uuid::Uuid::new_v4()));
        let rest = format!("note\n{BEGIN}\nprovider_id: other\n{END}\n");
        let text = format!("{BEGIN}\nversion: 1\nprovider_id: old\n{END}\n{rest}");
        let mut file = IdentityFile { path: path.clone(), text };
        file.store_provider_id("new").expect("written");
        let _ = std::fs::remove_file(path);
        assert_eq!(file.text, format!("{BEGIN}\nversion: 1\nprovider_id: new\n{END}\n{rest}"));
    }

    #[test]
    fn debug_shows_only_the_public_key() {
        let identity = Identity::ephemeral().expect("randomness");
        assert_eq!(format!("{identity:?}"), format!("Identity({})", identity.public_key_base64()));
    }
}
