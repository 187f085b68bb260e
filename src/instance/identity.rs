//! Who the agent is: an Ed25519 key in a file that 0.3.5 reads and writes too.
//!
//! Invariants: the seed leaves this module for the file alone, never for a log, an error or `Debug`; a file is replaced
//! as a whole or not at all; lines that we do not know are kept.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair};

use crate::sys::datetime::rfc3339;
use crate::sys::files;

const BEGIN: &str = "-----BEGIN USEPOD AGENT KEY-----";
const END: &str = "-----END USEPOD AGENT KEY-----";
const VERSION: &str = "1";
/// A file larger than this is no identity file, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// The longest provider id that is kept in the file, in bytes.
const PROVIDER_ID_BYTES_MAX: usize = 256;

/// An agent's identity.
pub struct Identity {
    key: Ed25519KeyPair,
    provider_id: Option<String>,
    file: Option<IdentityFile>,
}

/// The file, as it is.
struct IdentityFile {
    path: PathBuf,
    text: String,
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be read or made.
    #[error("failed to {action} the identity file `{}`: {error}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The file is not an identity. The reason quotes nothing of it.
    #[error("the identity file `{}` is refused: {reason}; restore it from a backup, or move it away to start as a new agent", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The system has no randomness, or the like.
    #[error("failed to make a key: the system gave no randomness")]
    NoRandomness,
}

impl Identity {
    /// Reads the file; makes a new identity, and the file, where there is none.
    ///
    /// # Errors
    /// It can neither be read nor made.
    pub fn load_or_create(path: &Path) -> Result<Identity, IdentityError> {
        match Identity::load(path) {
            Err(IdentityError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
            loaded => return loaded,
        }
        match Identity::create(path) {
            // Somebody was faster: theirs it is.
            Err(IdentityError::Io { error, .. }) if error.kind() == io::ErrorKind::AlreadyExists => {
                Identity::load(path)
            }
            created => created,
        }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// There is none, it cannot be read, or it is no identity.
    pub fn load(path: &Path) -> Result<Identity, IdentityError> {
        let io_error = |error| IdentityError::Io { action: "read", path: path.to_owned(), error };
        warn_if_readable_by_others(path, &std::fs::metadata(path).map_err(io_error)?);
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
        Ok(Identity { key, provider_id: None, file: Some(IdentityFile { path: path.to_owned(), text }) })
    }

    /// An identity of this process alone.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn ephemeral() -> Result<Identity, IdentityError> {
        Ok(Identity { key: new_key()?.1, provider_id: None, file: None })
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Identity, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not text")?;
        // A byte-order mark is what some editors put first.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut fields = Fields::default();
        for line in block(text).ok_or_else(|| format!("it has no `{BEGIN}` … `{END}` block"))? {
            let (name, value) = line.split_once(':').ok_or("a line in it has no colon")?;
            let value = Some(value.trim());
            match name.trim() {
                "version" => fields.version = value,
                "created" => fields.created = value,
                "secret" => fields.secret = value,
                "public" => fields.public = value,
                "provider_id" => fields.provider_id = value,
                _ => {}
            }
        }
        let key = fields.key()?;
        let provider_id = fields.provider_id.filter(|id| !id.is_empty()).map(str::to_owned);
        let file = IdentityFile { path: path.to_owned(), text: text.to_owned() };
        Ok(Identity { key, provider_id, file: Some(file) })
    }

    /// The public key, 32 bytes.
    pub fn public_key(&self) -> &[u8] {
        self.key.public_key().as_ref()
    }

    /// The public key in base64, as people pass it on.
    pub fn public_key_base64(&self) -> String {
        BASE64.encode(self.public_key())
    }

    /// Signs the decoded nonce of a challenge.
    pub fn sign(&self, nonce: &[u8]) -> Vec<u8> {
        self.key.sign(nonce).as_ref().to_vec()
    }

    /// The id that the coordinator knows us by, once enrolled.
    pub fn provider_id(&self) -> Option<&str> {
        self.provider_id.as_deref()
    }

    /// Takes the id that the coordinator gave us, and keeps it in the file. Where the file cannot be written we go on
    /// with what we learnt.
    pub fn set_provider_id(&mut self, id: String) {
        if self.provider_id.as_deref() == Some(&id) {
            return;
        }
        if id.len() > PROVIDER_ID_BYTES_MAX || id.trim() != id || id.contains(char::is_control) {
            log::warn!("the coordinator named a provider id that no file can hold; it is used until the agent stops");
        } else if let Some(file) = &mut self.file
            && let Err(e) = file.keep_provider_id(&id)
        {
            let path = file.path.display();
            log::warn!(
                "failed to keep the provider id in `{path}`: {e}; the agent serves on with it, but free some space or fix the rights before it is started again"
            );
        }
        self.provider_id = Some(id);
    }
}

/// The lines between the marks that are not blank, trimmed.
fn block(text: &str) -> Option<impl Iterator<Item = &str>> {
    let mut lines = text.lines().map(str::trim);
    lines.find(|line| *line == BEGIN)?;
    lines.clone().find(|line| *line == END)?;
    Some(lines.take_while(|line| *line != END).filter(|line| !line.is_empty()))
}

impl IdentityFile {
    /// Writes the id into the block; every other line stays as it is, known to us or not.
    fn keep_provider_id(&mut self, id: &str) -> io::Result<()> {
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

#[derive(Default)]
struct Fields<'a> {
    version: Option<&'a str>,
    created: Option<&'a str>,
    secret: Option<&'a str>,
    public: Option<&'a str>,
    provider_id: Option<&'a str>,
}

impl Fields<'_> {
    fn key(&self) -> Result<Ed25519KeyPair, String> {
        let missing = |name: &str| format!("the line `{name}:` is missing");
        let version = self.version.ok_or_else(|| missing("version"))?;
        if version != VERSION {
            return Err(format!("its version is not {VERSION}"));
        }
        self.created.ok_or_else(|| missing("created"))?;
        let bytes = |name: &str, value: Option<&str>| -> Result<[u8; 32], String> {
            let decoded = BASE64.decode(value.ok_or_else(|| missing(name))?);
            let bytes = decoded.ok().and_then(|b| b.try_into().ok());
            bytes.ok_or_else(|| format!("the line `{name}:` is not 32 bytes in base64"))
        };
        let (seed, public) = (bytes("secret", self.secret)?, bytes("public", self.public)?);
        Ed25519KeyPair::from_seed_and_public_key(&seed, &public)
            .map_err(|_| "its public key does not belong to its secret".into())
    }
}

fn new_key() -> Result<([u8; 32], Ed25519KeyPair), IdentityError> {
    let mut seed = [0; 32];
    SystemRandom::new().fill(&mut seed).map_err(|_| IdentityError::NoRandomness)?;
    let key = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|_| IdentityError::NoRandomness)?;
    Ok((seed, key))
}

#[cfg(unix)]
fn warn_if_readable_by_others(path: &Path, metadata: &std::fs::Metadata) {
    use std::os::unix::fs::PermissionsExt;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        log::warn!("others can read the key: `{0}` has mode {mode:04o}; run `chmod 600 {0}`", path.display());
    }
}

#[cfg(not(unix))]
fn warn_if_readable_by_others(_: &Path, _: &std::fs::Metadata) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_make_the_parser_panic_or_show_the_secret() {
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
    fn a_second_block_is_kept_as_it_is() {
        let path = std::env::temp_dir().join(format!("usepod-{}.key", uuid::Uuid::new_v4()));
        let rest = format!("note\n{BEGIN}\nprovider_id: other\n{END}\n");
        let text = format!("{BEGIN}\nversion: 1\nprovider_id: old\n{END}\n{rest}");
        let mut file = IdentityFile { path: path.clone(), text };
        file.keep_provider_id("new").expect("written");
        let _ = std::fs::remove_file(path);
        assert_eq!(file.text, format!("{BEGIN}\nversion: 1\nprovider_id: new\n{END}\n{rest}"));
    }

    #[test]
    fn debug_shows_the_public_key_alone() {
        let identity = Identity::ephemeral().expect("randomness");
        assert_eq!(format!("{identity:?}"), format!("Identity({})", identity.public_key_base64()));
    }
}
