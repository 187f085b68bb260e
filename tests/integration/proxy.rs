//! HTTPS_PROXY and NO_PROXY: which connections use a proxy, and which never do.

use std::io::{BufReader, Read};
use std::time::Duration;

use serde_json::json;

use crate::support::*;

/// Accepts the agent's CONNECT request; returns it and the first bytes through the tunnel.
fn tunnel(proxy: &Coordinator) -> (Request, Vec<u8>) {
    let mut dialled = proxy.dialled(SOON);
    let request = dialled.request();
    dialled.send(b"HTTP/1.1 200 Connection established\r\n\r\n");
    (request, first_bytes(&dialled))
}

fn first_bytes(dialled: &Dialled) -> Vec<u8> {
    dialled.stream.set_read_timeout(Some(SOON)).expect("a read timeout");
    let mut bytes = vec![0; 2048];
    let n = BufReader::new(&dialled.stream).read(&mut bytes).expect("the first bytes");
    bytes.truncate(n);
    bytes
}

fn assert_client_hello(bytes: &[u8], host: &str) {
    assert_eq!(bytes.first(), Some(&0x16), "a TLS handshake begins with 0x16: {bytes:?}");
    assert!(bytes.windows(host.len()).any(|window| window == host.as_bytes()), "no {host} in the ClientHello");
}

const COORDINATOR: &str = "wss://coordinator.example:4433/provider/connect";

#[test]
fn https_proxy_is_asked_to_connect_to_the_coordinator() {
    side_by_side(["HTTPS_PROXY", "https_proxy"], |variable| {
        let proxy = Coordinator::new();
        let agent = Setup::new(COORDINATOR).env(variable, &format!("http://{}", proxy.address())).start();
        let (request, tunnelled) = tunnel(&proxy);
        assert_eq!(request.line(), "CONNECT coordinator.example:4433", "{variable}");
        assert_eq!(request.header("host"), Some("coordinator.example:4433"));
        assert_client_hello(&tunnelled, "coordinator.example");
        drop(agent);
    });
}

#[test]
fn proxy_password_is_sent_to_the_proxy_and_not_logged() {
    let proxy = Coordinator::new();
    let url = format!("http://me:s3cret@{}", proxy.address());
    let agent = Setup::new(COORDINATOR).env("HTTPS_PROXY", &url).start();
    let mut dialled = proxy.dialled(SOON);
    let request = dialled.request();
    let expected = format!("Basic {}", base64("me:s3cret"));
    assert_eq!(request.header("proxy-authorization"), Some(expected.as_str()));
    dialled.send(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n");
    drop(dialled);
    // A refusal is retried.
    agent.stderr.wait_line(&["407"]);
    proxy.dialled(SOON);
    assert!(!agent.stderr.text().contains("s3cret"), "the proxy's password is in the log");
}

#[test]
fn no_proxy_names_the_hosts_to_dial_directly() {
    side_by_side(["127.0.0.1", "localhost,127.0.0.1", "*"], |no_proxy| {
        let (proxy, coordinator) = (Coordinator::new(), Coordinator::new());
        let agent = Setup::new(&format!("wss://{}/", coordinator.address()))
            .env("HTTPS_PROXY", &format!("http://{}", proxy.address()))
            .env("NO_PROXY", no_proxy)
            .start();
        let direct = first_bytes(&coordinator.dialled(SOON));
        assert_eq!(direct.first(), Some(&0x16), "NO_PROXY={no_proxy}");
        proxy.assert_not_dialled(QUIET);
        drop(agent);
    });
}

#[test]
fn hosted_backends_go_through_https_proxy_and_local_ones_through_none() {
    let proxy = Coordinator::new();
    // At another address than the coordinator's, which NO_PROXY names.
    let local = Backend::vllm_on("127.0.0.10:0", &["local"]);
    let proxy_url = format!("http://{}", proxy.address());
    let coordinator = Coordinator::new();
    let mut setup = Setup::new(&coordinator.url())
        .backend("kind = \"openrouter\"\nurl = \"https://hosted.example/api/v1\"\napi_key_env = \"THE_KEY\"")
        .backend(local.toml())
        .env("THE_KEY", "sk-hosted")
        .env("NO_PROXY", "127.0.0.1");
    for variable in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"] {
        setup = setup.env(variable, &proxy_url);
    }
    let _agent = setup.start();
    let session = coordinator.accept();
    session.challenge(b"nonce");
    session.send(&json!({"type": "auth_ok"}));

    // The one connection to the proxy is the hosted backend's probe.
    let (request, tunnelled) = tunnel(&proxy);
    assert_eq!(request.line(), "CONNECT hosted.example:443");
    assert_client_hello(&tunnelled, "hosted.example");
    let capabilities = session.frame("capabilities", SOON);
    assert_eq!(capabilities["models"][0]["model_id"], "local");
    let id = session.job("local", json!({}));
    local.next().finish();
    session.outcome(&id).done();
}

#[test]
fn proxy_may_have_an_ipv6_address() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return left_out("there is no IPv6 loopback");
    }
    let proxy = Coordinator::on("[::1]:0");
    let _agent = Setup::new(COORDINATOR).env("HTTPS_PROXY", &format!("http://{}", proxy.address())).start();
    let (request, tunnelled) = tunnel(&proxy);
    assert_eq!(request.line(), "CONNECT coordinator.example:4433");
    assert_client_hello(&tunnelled, "coordinator.example");
}

/// The failed resolution of the name proves that no proxy was used; otherwise the proxy would resolve it.
#[test]
fn no_proxy_with_a_domain_covers_its_subdomains() {
    side_by_side(["invalid", "elsewhere.example, .coordinator.invalid"], |no_proxy| {
        let proxy = Coordinator::new();
        let agent = Setup::new("wss://eu.coordinator.invalid:4433/")
            .env("HTTPS_PROXY", &format!("http://{}", proxy.address()))
            .env("NO_PROXY", no_proxy)
            .start();
        agent.stderr.wait_line(&["resolve", "eu.coordinator.invalid"]);
        proxy.assert_not_dialled(Duration::ZERO);
    });
    // A name with the same ending is not a subdomain.
    let proxy = Coordinator::new();
    let proxy_url = format!("http://{}", proxy.address());
    let _agent = Setup::new(COORDINATOR).env("HTTPS_PROXY", &proxy_url).env("NO_PROXY", "ordinator.example").start();
    assert_eq!(tunnel(&proxy).0.line(), "CONNECT coordinator.example:4433");
}
