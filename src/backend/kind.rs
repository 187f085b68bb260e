//! The kinds of backend, as data: names, rank, default addresses, and where each keeps what.

use std::fmt;

use ureq::http::Uri;

/// A kind, in the order of rank: of two that list a model, the lesser is advertised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// vLLM.
    Vllm,
    /// llama.cpp's server.
    LlamaCpp,
    /// LM Studio.
    LmStudio,
    /// Ollama.
    Ollama,
    /// Any OpenAI-compatible server.
    OpenAi,
    /// Venice, hosted.
    Venice,
    /// OpenRouter, hosted.
    OpenRouter,
}

impl Kind {
    /// All of them, by rank.
    pub const ALL: [Kind; 7] =
        [Kind::Vllm, Kind::LlamaCpp, Kind::LmStudio, Kind::Ollama, Kind::OpenAi, Kind::Venice, Kind::OpenRouter];

    /// The name in `agent.toml` and on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Vllm => "vllm",
            Kind::LlamaCpp => "llamacpp",
            Kind::LmStudio => "lmstudio",
            Kind::Ollama => "ollama",
            Kind::OpenAi => "openai",
            Kind::Venice => "venice",
            Kind::OpenRouter => "openrouter",
        }
    }

    /// The kind of that name.
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|k| k.name() == name)
    }

    /// The rank of a kind's name; names that we do not know come last.
    pub fn rank_of(name: &str) -> usize {
        Kind::ALL.iter().position(|k| k.name() == name).unwrap_or(Kind::ALL.len())
    }

    /// The address of a hosted kind; `None` for the kinds that run on the operator's own machines.
    pub fn hosted_url(self) -> Option<&'static str> {
        match self {
            Kind::Venice => Some("https://api.venice.ai/api/v1"),
            Kind::OpenRouter => Some("https://openrouter.ai/api/v1"),
            Kind::Vllm | Kind::LlamaCpp | Kind::LmStudio | Kind::Ollama | Kind::OpenAi => None,
        }
    }

    /// Whether it is somebody else's machine, reached over the internet and so perhaps through a proxy.
    pub fn is_hosted(self) -> bool {
        self.hosted_url().is_some()
    }

    /// Where the servers of this kind listen by default.
    pub fn default_urls(self) -> &'static [&'static str] {
        match self {
            Kind::Vllm => &["http://localhost:8000"],
            Kind::LlamaCpp => &["http://localhost:8080", "http://localhost:9931"],
            Kind::LmStudio => &["http://localhost:1234"],
            Kind::Ollama => &["http://localhost:11434"],
            Kind::OpenAi | Kind::Venice | Kind::OpenRouter => &[],
        }
    }

    /// The health check below the root; `None` where the listing is the health check.
    pub(super) fn health_path(self) -> Option<&'static str> {
        match self {
            Kind::Vllm | Kind::LlamaCpp => Some("/health"),
            Kind::Ollama => Some("/api/tags"),
            Kind::LmStudio | Kind::OpenAi | Kind::Venice | Kind::OpenRouter => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A checked `http` or `https` address, without a trailing slash: two that differ by one are equal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BaseUrl(String);

/// Why an address is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BaseUrlError {
    /// It cannot be parsed.
    #[error("it is not a URL")]
    Unparsable,
    /// Neither `http` nor `https`.
    #[error("a backend's URL begins with http:// or https://")]
    Scheme,
    /// A user name or password in it.
    #[error("a backend's URL holds no user or password; name a variable in `api_key_env` instead")]
    Credentials,
    /// A query or fragment.
    #[error("a backend's URL has no `?` or `#` part")]
    Query,
}

impl BaseUrl {
    /// Checks an address.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<BaseUrl, BaseUrlError> {
        let text = text.trim();
        let uri: Uri = text.parse().map_err(|_| BaseUrlError::Unparsable)?;
        let host = uri.host().filter(|h| !h.is_empty()).ok_or(BaseUrlError::Unparsable)?;
        match uri.scheme_str() {
            Some("http" | "https") => {}
            _ => return Err(BaseUrlError::Scheme),
        }
        let authority = uri.authority().map_or("", |a| a.as_str());
        if authority.contains('@') {
            return Err(BaseUrlError::Credentials);
        }
        // `host:` and `host:99999` parse as authorities without a port.
        if authority.len() != host.len() && uri.port_u16().is_none() {
            return Err(BaseUrlError::Unparsable);
        }
        if text.contains(['?', '#']) {
            return Err(BaseUrlError::Query);
        }
        Ok(BaseUrl(text.trim_end_matches('/').to_owned()))
    }

    /// The address.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the server's own routes start: the address without a `/v1` that the operator may have put behind it.
    pub fn root(&self) -> &str {
        self.0.strip_suffix("/v1").unwrap_or(&self.0).trim_end_matches('/')
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_with_and_without_slash_path_and_v1() {
        for (given, root) in [
            ("http://h:1", "http://h:1"),
            ("http://h:1/", "http://h:1"),
            ("http://h:1/v1", "http://h:1"),
            ("http://h:1/v1/", "http://h:1"),
            ("http://h:1/gpu/7//", "http://h:1/gpu/7"),
            ("https://[::1]:8000/x/v1", "https://[::1]:8000/x"),
        ] {
            assert_eq!(BaseUrl::parse(given).expect(given).root(), root);
        }
    }

    #[test]
    fn what_is_no_address_of_a_backend_is_refused() {
        for (given, why) in [
            ("", BaseUrlError::Unparsable),
            ("not a url", BaseUrlError::Unparsable),
            ("/path", BaseUrlError::Unparsable),
            ("http://h:99999", BaseUrlError::Unparsable),
            ("http://h:", BaseUrlError::Unparsable),
            ("localhost:8000", BaseUrlError::Scheme),
            ("ws://h", BaseUrlError::Scheme),
            ("http://me:secret@h", BaseUrlError::Credentials),
            ("http://h/?q", BaseUrlError::Query),
        ] {
            assert_eq!(BaseUrl::parse(given), Err(why), "{given}");
        }
    }
}
