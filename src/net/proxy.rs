//! The HTTP proxy that the environment names.

use ureq::Proxy;

/// The proxy of `HTTPS_PROXY`, with the exceptions of `NO_PROXY`; for hosted backends and the coordinator.
pub fn from_env() -> Option<Proxy> {
    let read = |names: [&str; 2]| names.iter().find_map(|n| std::env::var(n).ok().filter(|v| !v.trim().is_empty()));
    let address = read(["HTTPS_PROXY", "https_proxy"])?;
    let parsed = match Proxy::new(address.trim()) {
        Ok(parsed) if parsed.protocol() == ureq::ProxyProtocol::Http => parsed,
        // The address may hold a password, so it is not shown.
        _ => {
            log::warn!("HTTPS_PROXY is ignored: it is not an address of the form http://HOST:PORT");
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
            // A bare name stands for what is below it too, as everywhere else.
            proxy = proxy.no_proxy(exception).no_proxy(&format!(".{}", exception.trim_start_matches(['*', '.'])));
        }
    }
    proxy.build().ok()
}
