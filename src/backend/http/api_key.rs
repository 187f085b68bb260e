//! API keys of backends. A key is sent to its backend, and never printed.

use std::fmt;

/// An API key, read once from an environment variable.
#[derive(Clone)]
pub enum ApiKey {
    /// The backend needs no key.
    NotNeeded,
    /// The value of the `Authorization` header.
    Bearer(String),
    /// The variable is unset, empty, or not valid in a header.
    Missing {
        /// The name of the variable.
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
