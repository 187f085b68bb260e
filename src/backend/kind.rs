//! The kinds of backend: name, rank, default addresses and health check of each.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ureq::http::Uri;

use crate::net::is_loopback;

/// A kind of backend. If two backends list the same model, the one with the lesser kind is offered.
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
    /// All kinds, by rank.
    pub const ALL: [Kind; 7] =
        [Kind::Vllm, Kind::LlamaCpp, Kind::LmStudio, Kind::Ollama, Kind::OpenAi, Kind::Venice, Kind::OpenRouter];

    /// The name in `agent.toml` and in the protocol.
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

    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|k| k.name() == name)
    }

    /// The rank of the kind with this name; unknown names come last.
    pub fn rank_of(name: &str) -> usize {
        Kind::ALL.iter().position(|k| k.name() == name).unwrap_or(Kind::ALL.len())
    }

    /// The address of a hosted kind; `None` for the others.
    pub fn hosted_url(self) -> Option<&'static str> {
        match self {
            Kind::Venice => Some("https://api.venice.ai/api/v1"),
            Kind::OpenRouter => Some("https://openrouter.ai/api/v1"),
            Kind::Vllm | Kind::LlamaCpp | Kind::LmStudio | Kind::Ollama | Kind::OpenAi => None,
        }
    }

    /// Whether the kind is a hosted service, reached over the internet and perhaps through a proxy.
    pub fn is_hosted(self) -> bool {
        self.hosted_url().is_some()
    }

    /// The default addresses of servers of this kind.
    pub fn default_urls(self) -> &'static [&'static str] {
        match self {
            Kind::Vllm => &["http://localhost:8000"],
            Kind::LlamaCpp => &["http://localhost:8080", "http://localhost:9931"],
            Kind::LmStudio => &["http://localhost:1234"],
            Kind::Ollama => &["http://localhost:11434"],
            Kind::OpenAi | Kind::Venice | Kind::OpenRouter => &[],
        }
    }

    /// The path of the health check; `None` if the model listing serves as the health check.
    pub(super) fn health_path(self) -> Option<&'static str> {
        match self {
            Kind::Vllm | Kind::LlamaCpp => Some("/health"),
            Kind::Ollama => Some("/api/tags"),
            Kind::LmStudio | Kind::OpenAi | Kind::Venice | Kind::OpenRouter => None,
        }
    }

    /// Whether a job for a listed model may make a server of this kind load it.
    pub fn loads_on_demand(self) -> bool {
        matches!(self, Kind::LmStudio | Kind::Ollama)
    }

    /// Whether a server of this kind may be a gateway, which goes on listing models while no server behind it can be reached.
    pub(super) fn may_be_gateway(self) -> bool {
        self == Kind::OpenAi
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The ends of names that exist only within a network.
const LOCAL_DOMAINS: [&str; 7] = [".localhost", ".local", ".lan", ".internal", ".home.arpa", ".localdomain", ".ts.net"];

/// A validated `http` or `https` address. A trailing slash is removed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BaseUrl(String);

/// Why an address is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BaseUrlError {
    /// The address cannot be parsed.
    #[error("it is not a URL")]
    Unparsable,
    /// The scheme is neither `http` nor `https`.
    #[error("a backend's URL must begin with http:// or https://")]
    Scheme,
    /// The address contains a user name or password.
    #[error("a backend's URL must not contain a user or password; use `api_key_env` instead")]
    Credentials,
    /// The address has a query or a fragment.
    #[error("a backend's URL must not contain `?` or `#`")]
    Query,
}

impl BaseUrl {
    /// Parses and validates an address.
    ///
    /// # Errors
    /// Why the address is invalid.
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

    /// Whether the network cannot read what is sent there: it is encrypted, or does not leave this machine.
    pub fn is_private(&self) -> bool {
        let uri: Result<Uri, _> = self.0.parse();
        uri.is_ok_and(|uri| uri.scheme_str() == Some("https") || uri.host().is_some_and(is_loopback))
    }

    /// Whether the server is on this machine or in its network, as far as the address shows it.
    pub fn is_in_local_network(&self) -> bool {
        let uri: Option<Uri> = self.0.parse().ok();
        let host = uri.as_ref().and_then(Uri::host).unwrap_or_default().trim_matches(['[', ']', '.']);
        match host.parse() {
            Ok(IpAddr::V4(ip)) => is_local_v4(ip),
            Ok(IpAddr::V6(ip)) => match ip.to_ipv4_mapped() {
                Some(ip) => is_local_v4(ip),
                None => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
            },
            Err(_) => {
                let host = host.to_ascii_lowercase();
                !host.contains('.') || LOCAL_DOMAINS.iter().any(|domain| host.ends_with(domain))
            }
        }
    }

    /// The root of the server's own routes: the address without a trailing `/v1`.
    pub fn root(&self) -> &str {
        self.0.strip_suffix("/v1").unwrap_or(&self.0).trim_end_matches('/')
    }
}

fn is_local_v4(ip: Ipv4Addr) -> bool {
    // 100.64.0.0/10 is what Tailscale uses.
    let is_shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64;
    ip.is_loopback() || ip.is_private() || ip.is_link_local() || ip.is_unspecified() || is_shared
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
    fn base_url_accepts_a_slash_a_path_and_v1() {
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
    fn base_url_is_in_the_local_network_if_the_address_shows_it() {
        for (host, is_local) in [
            ("localhost:1", true),
            ("127.0.0.9", true),
            ("[::1]:1", true),
            ("[::ffff:10.0.0.1]", true),
            ("192.168.1.2:8000", true),
            ("100.101.2.3", true),
            ("[fd00::1]", true),
            ("gpu-box", true),
            ("GPU.LAN:1/v1", true),
            ("api.groq.com/openai/v1", false),
            ("8.8.8.8", false),
            ("100.200.2.3", false),
            ("[2001:db8::1]:443", false),
            ("local", true),
            ("evil-local.com", false),
        ] {
            let url = BaseUrl::parse(&format!("http://{host}")).expect(host);
            assert_eq!(url.is_in_local_network(), is_local, "{host}");
        }
    }

    #[test]
    fn base_url_rejects_everything_else() {
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
