//! API keys: held, sent, never shown.

use std::fmt;

/// The key that an environment variable holds, looked up once: a process's environment does not change.
#[derive(Clone)]
pub enum ApiKey {
    /// The backend takes none.
    NotNeeded,
    /// The value of the `Authorization` header.
    Bearer(String),
    /// The variable is unset, empty, or cannot be a header.
    Missing {
        /// Its name.
        variable: String,
    },
}

impl ApiKey {
    /// Reads the variable, if one is named.
    pub fn from_env(variable: Option<&str>) -> ApiKey {
        let Some(variable) = variable else { return ApiKey::NotNeeded };
        let key = std::env::var(variable).unwrap_or_default();
        let key = key.trim();
        if key.is_empty() || !key.bytes().all(|b| (0x21..0x7f).contains(&b)) {
            return ApiKey::Missing { variable: variable.to_owned() };
        }
        ApiKey::Bearer(format!("Bearer {key}"))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ApiKey::NotNeeded => f.write_str("NotNeeded"),
            ApiKey::Bearer(_) => f.write_str("Bearer(***)"),
            ApiKey::Missing { variable } => write!(f, "Missing({variable})"),
        }
    }
}
