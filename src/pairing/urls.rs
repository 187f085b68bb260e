//! The URLs of one coordinator, derived from the base URL that the operator gives.

use tungstenite::http::Uri;

use crate::net::is_loopback;

/// The base URL of the market.
pub const BASE_DEFAULT: &str = "https://api.usepod.ai";
/// The pairing page of the market, which is on another host.
const PAGE_DEFAULT: &str = "https://usepod.ai/host/pair";
/// The path that agents connect to, below the base.
const CONNECT: &str = "/provider/connect";

/// A coordinator, by its base URL: scheme, host and an optional path, without a trailing slash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoordinatorUrls {
    base: String,
}

impl CoordinatorUrls {
    /// Parses a base URL, or the URL that agents connect to, as in `agent.toml`.
    ///
    /// # Errors
    /// The reason why the URL is invalid.
    pub fn parse(text: &str) -> Result<CoordinatorUrls, &'static str> {
        let text = text.trim();
        let uri: Uri = text.parse().map_err(|_| "it is not a URL")?;
        let scheme = match uri.scheme_str().map(str::to_ascii_lowercase).as_deref() {
            Some("https" | "wss") => "https",
            Some("http" | "ws") => "http",
            _ => return Err("it does not begin with https://"),
        };
        let authority = uri.authority().map_or("", |a| a.as_str()).to_ascii_lowercase();
        let host = uri.host().unwrap_or_default();
        if authority.contains('@') || text.contains(['?', '#']) {
            return Err("it has a user, a password or a `?` or `#` part");
        }
        // `host:` and `host:99999` parse as an authority without a port.
        if host.is_empty() || (authority.len() != host.len() && uri.port_u16().is_none()) {
            return Err("it has no valid host and port");
        }
        let path = uri.path().trim_end_matches('/');
        let path = path.strip_suffix(CONNECT).unwrap_or(path).trim_end_matches('/');
        Ok(CoordinatorUrls { base: format!("{scheme}://{authority}{path}") })
    }

    /// The base URL.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Whether the connection is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.base.starts_with("https:")
    }

    /// Whether nobody else can read the connection, because it is encrypted or stays on this machine.
    pub fn is_private(&self) -> bool {
        self.is_encrypted() || self.base.parse::<Uri>().is_ok_and(|uri| uri.host().is_some_and(is_loopback))
    }

    /// The page on which a person enters the code.
    pub fn page(&self) -> String {
        if self.base == BASE_DEFAULT { PAGE_DEFAULT.to_owned() } else { format!("{}/host/pair", self.base) }
    }

    /// The endpoint that issues a code.
    pub fn issue(&self) -> String {
        format!("{}/v1/host/pair/issue", self.base)
    }

    /// The endpoint that returns the state of a code.
    pub fn poll(&self) -> String {
        format!("{}/v1/host/pair/poll", self.base)
    }

    /// The URL that agents connect to: `https` becomes `wss`, `http` becomes `ws`.
    pub fn connect(&self) -> String {
        format!("ws{}{CONNECT}", self.base.trim_start_matches("http"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_takes_every_spelling_of_a_base() {
        let cases = [
            ("https://api.usepod.ai", "https://usepod.ai/host/pair", "wss://api.usepod.ai/provider/connect"),
            ("HTTPS://API.usepod.ai/", "https://usepod.ai/host/pair", "wss://api.usepod.ai/provider/connect"),
            ("https://h:8443/pod//", "https://h:8443/pod/host/pair", "wss://h:8443/pod/provider/connect"),
            (" http://127.0.0.1:1 ", "http://127.0.0.1:1/host/pair", "ws://127.0.0.1:1/provider/connect"),
            ("wss://h/provider/connect", "https://h/host/pair", "wss://h/provider/connect"),
            ("http://[::1]:7/", "http://[::1]:7/host/pair", "ws://[::1]:7/provider/connect"),
        ];
        for (given, page, connect) in cases {
            let urls = CoordinatorUrls::parse(given).expect(given);
            assert_eq!((urls.page().as_str(), urls.connect().as_str()), (page, connect), "{given}");
            assert_eq!(urls.is_encrypted(), connect.starts_with("wss"), "{given}");
        }
    }

    #[test]
    fn is_private_if_encrypted_or_on_this_machine() {
        for (given, is_private) in [
            ("http://127.0.0.1:8787", true),
            ("http://[::1]:8787/x", true),
            ("ws://localhost/provider/connect", true),
            ("https://h", true),
            ("http://localhost.example.com", false),
            ("http://192.0.2.7:8787", false),
        ] {
            assert_eq!(CoordinatorUrls::parse(given).expect(given).is_private(), is_private, "{given}");
        }
    }

    #[test]
    fn parse_refuses_what_is_no_base() {
        for given in
            ["", "api.usepod.ai", "ftp://h", "https://", "https://h:", "https://u:p@h", "https://h/?q", "not a url"]
        {
            assert!(CoordinatorUrls::parse(given).is_err(), "{given}");
        }
    }
}
