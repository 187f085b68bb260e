//! The HTTP proxy from the environment.

use ureq::Proxy;

/// Reads the proxy from `HTTPS_PROXY` and its exceptions from `NO_PROXY`. Used for hosted backends and the coordinator.
pub fn from_env() -> Option<Proxy> {
    let read = |names: [&str; 2]| names.iter().find_map(|n| std::env::var(n).ok().filter(|v| !v.trim().is_empty()));
    let address = read(["HTTPS_PROXY", "https_proxy"])?;
    let parsed = match Proxy::new(address.trim()) {
        Ok(parsed) if parsed.protocol() == ureq::ProxyProtocol::Http => parsed,
        // The address is not logged, because it may contain a password.
        _ => {
            log::warn!("HTTPS_PROXY is ignored: it does not have the form http://HOST:PORT");
            return None;
        }
    };
    let mut proxy = Proxy::builder(parsed.protocol()).host(parsed.host()).port(parsed.port());
    if let Some(user) = parsed.username() {
        proxy = proxy.username(user).password(parsed.password().unwrap_or_default());
    }
    for exception in read(["NO_PROXY", "no_proxy"]).unwrap_or_default().split(',') {
        let exception = exception.trim();
        if !exception.is_empty() {
            // A bare name includes its subdomains, as in other programs.
            proxy = proxy.no_proxy(exception).no_proxy(&format!(".{}", exception.trim_start_matches(['*', '.'])));
        }
    }
    proxy.build().ok()
}
