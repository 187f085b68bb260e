//! The addresses of one coordinator, all from the base that a person names.

use std::net::IpAddr;

use tungstenite::http::Uri;

/// The market's.
pub const BASE_DEFAULT: &str = "https://api.usepod.ai";
/// Its page for people is on another host.
const PAGE_DEFAULT: &str = "https://usepod.ai/host/pair";
/// Where agents connect to, below the base.
const CONNECT: &str = "/provider/connect";

/// A coordinator, by its base: scheme, host, and a path perhaps, without a slash at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoordinatorUrls {
    base: String,
}

impl CoordinatorUrls {
    /// Checks an address. The one that agents connect to, as it stands in `agent.toml`, will do as well as the base.
    ///
    /// # Errors
    /// What is wrong with it.
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
        // `host:` and `host:99999` parse as authorities without a port.
        if host.is_empty() || (authority.len() != host.len() && uri.port_u16().is_none()) {
            return Err("it has no valid host and port");
        }
        let path = uri.path().trim_end_matches('/');
        let path = path.strip_suffix(CONNECT).unwrap_or(path).trim_end_matches('/');
        Ok(CoordinatorUrls { base: format!("{scheme}://{authority}{path}") })
    }

    /// The base.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Whether what is said to it is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.base.starts_with("https:")
    }

    /// Whether nobody else can read what is said to it: it is encrypted, or does not leave this machine.
    pub fn is_private(&self) -> bool {
        let host = self.base.parse::<Uri>().ok().and_then(|uri| Some(uri.host()?.trim_matches(['[', ']']).to_owned()));
        let is_here = |host: String| host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        self.is_encrypted() || host.is_some_and(is_here)
    }

    /// Where a person enters the code.
    pub fn page(&self) -> String {
        if self.base == BASE_DEFAULT { PAGE_DEFAULT.to_owned() } else { format!("{}/host/pair", self.base) }
    }

    /// Where a code is asked for.
    pub fn issue(&self) -> String {
        format!("{}/v1/host/pair/issue", self.base)
    }

    /// Where one asks what has become of it.
    pub fn poll(&self) -> String {
        format!("{}/v1/host/pair/poll", self.base)
    }

    /// Where agents connect to: `https` becomes `wss`, `http` becomes `ws`.
    pub fn connect(&self) -> String {
        format!("ws{}{CONNECT}", self.base.trim_start_matches("http"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_base_gives_the_same_addresses() {
        let cases = [
            ("https://api.usepod.ai", "https://usepod.ai/host/pair", "wss://api.usepod.ai/provider/connect"),
            ("HTTPS://API.usepod.ai/", "https://usepod.ai/host/pair", "wss://api.usepod.ai/provider/connect"),
            ("https://h:8443/pod//", "https://h:8443/pod/host/pair", "wss://h:8443/pod/provider/connect"),
            (" http://127.0.0.1:1 ", "http://127.0.0.1:1/host/pair", "ws://127.0.0.1:1/provider/connect"),
            ("wss://h/provider/connect", "https://h/host/pair", "wss://h/provider/connect"),
            ("http://[::1]:7/", "http://[::1]:7/host/pair", "ws://[::1]:7/provider/connect"),
        ];
        for (given, page, connect) in cases {
            let site = CoordinatorUrls::parse(given).expect(given);
            assert_eq!((site.page().as_str(), site.connect().as_str()), (page, connect), "{given}");
            assert_eq!(site.is_encrypted(), connect.starts_with("wss"), "{given}");
        }
    }

    #[test]
    fn what_does_not_leave_the_machine_needs_no_encryption() {
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
    fn what_is_no_base_is_refused() {
        for given in
            ["", "api.usepod.ai", "ftp://h", "https://", "https://h:", "https://u:p@h", "https://h/?q", "not a url"]
        {
            assert!(CoordinatorUrls::parse(given).is_err(), "{given}");
        }
    }
}
