//! Proxies, addresses, and coordinators that respond otherwise than expected.

use std::time::Instant;

use serde_json::json;

use crate::support::*;

/// Whether this machine has an IPv6 loopback address.
fn has_ipv6() -> bool {
    std::net::TcpListener::bind("[::1]:0").is_ok()
}

/// A proxy for the whole machine would connect to its own loopback.
#[test]
fn loopback_is_reached_directly_although_https_proxy_is_set() {
    let hosts = [
        ("127.0.0.1:0", "127.0.0.1"),
        ("127.0.0.1:0", "LocalHost"),
        ("127.0.0.12:0", "127.0.0.12"),
        ("[::1]:0", "[::1]"),
    ];
    side_by_side(hosts.into_iter().filter(|(_, host)| *host != "[::1]" || has_ipv6()), |(address, host)| {
        let (proxy, coordinator) = (Coordinator::new(), Coordinator::on(address));
        let hosted = Backend::vllm_on(address, &["hosted"]);
        let _agent = Setup::new(&format!("ws://{host}:{}/", coordinator.address().port()))
            .backend(format!(
                "kind = \"openrouter\"\nurl = \"http://{host}:{}/v1\"\napi_key_env = \"THE_KEY\"",
                hosted.address().port()
            ))
            .env("THE_KEY", "sk-x")
            .env("HTTPS_PROXY", &format!("http://{}", proxy.address()))
            .start();
        let session = coordinator.session();
        assert_eq!(session.capabilities["models"][0]["model_id"], "hosted", "{host}");
        proxy.assert_not_dialled(std::time::Duration::ZERO);
    });
}

/// 0.0.0.0 and :: are no loopback addresses, but reach it: whoever dials them directly reaches the coordinator.
#[test]
fn no_proxy_may_be_a_range_an_ipv6_address_a_host_with_port_or_have_spaces() {
    let direct = ["10.0.0.0/8, 0.0.0.0/8", "0.0.0.0:PORT", " .example.com ,\t0.0.0.0 ", "0.0.0.0/0:PORT"];
    let direct6 = ["::", "[::]", "[::]:PORT", "fd00::/8,::/16"];
    let proxied = ["10.0.0.0/8", "0.0.0.0:1", "0.0.0.0/33x", "::/0"];
    let proxied6 = ["fd00::/8", "[::]:1", "0.0.0.0/0"];
    let v4 = direct.map(|no_proxy| ("0.0.0.0", no_proxy, true)).into_iter();
    let v4 = v4.chain(proxied.map(|no_proxy| ("0.0.0.0", no_proxy, false)));
    let v6 = direct6.map(|no_proxy| ("[::]", no_proxy, true)).into_iter();
    let v6 = v6.chain(proxied6.map(|no_proxy| ("[::]", no_proxy, false)));
    side_by_side(v4.chain(v6.filter(|_| has_ipv6())), |(host, no_proxy, is_direct)| {
        let proxy = Coordinator::new();
        let coordinator = Coordinator::on(if host == "[::]" { "[::1]:0" } else { "127.0.0.1:0" });
        let port = coordinator.address().port();
        let _agent = Setup::new(&format!("wss://{host}:{port}/"))
            .env("HTTPS_PROXY", &format!("http://{}", proxy.address()))
            .env("NO_PROXY", &no_proxy.replace("PORT", &port.to_string()))
            .start();
        let (dialled, other) = if is_direct { (&coordinator, &proxy) } else { (&proxy, &coordinator) };
        assert!(dialled.try_dialled(SOON).is_some(), "NO_PROXY={no_proxy} for {host}");
        other.assert_not_dialled(std::time::Duration::ZERO);
    });
}

/// Fills the queue of a listening socket, so that further connects are not answered. They stay so while the result lives.
fn swallowing(address: &str) -> (std::net::TcpListener, Vec<std::net::TcpStream>) {
    let listener = std::net::TcpListener::bind(address).expect("a loopback port");
    let address = listener.local_addr().expect("its address");
    let mut queue = Vec::new();
    while let Ok(tcp) = std::net::TcpStream::connect_timeout(&address, ms(500)) {
        queue.push(tcp);
    }
    (listener, queue)
}

/// `localhost` has two addresses. A firewall that drops the packets to one of them must not delay the other by seconds.
#[test]
fn slow_address_that_swallows_connects_delays_the_next_by_a_quarter_of_a_second() {
    if !has_ipv6() {
        return left_out("there is no IPv6 loopback");
    }
    let (_silent, _queue) = swallowing("127.0.0.1:0");
    let port = _silent.local_addr().expect("its address").port();
    let coordinator = Coordinator::on(&format!("[::1]:{port}"));
    let started = Instant::now();
    let _agent = Setup::new(&format!("ws://localhost:{port}/")).start();
    let took = coordinator.dialled(SOON).at - started;
    assert!(took > ms(200) && took < ms(1500), "dialled after {took:?}");
    drop(coordinator);

    let backend = Backend::vllm_on(&format!("[::1]:{port}"), &["m"]);
    let coordinator = Coordinator::new();
    let _agent =
        Setup::new(&coordinator.url()).backend(format!("kind = \"vllm\"\nurl = \"http://localhost:{port}\"")).start();
    let session = coordinator.session();
    assert_eq!(session.capabilities["models"][0]["model_id"], "m");
    let sent = Instant::now();
    let id = session.job("m", json!({}));
    backend.next().finish();
    session.outcome(&id).done();
    assert!(sent.elapsed() < ms(1500), "a job took {:?}", sent.elapsed());
}

/// A lookup cannot be interrupted: a job that gives up leaves it behind.
#[test]
fn jobs_for_a_name_that_resolves_slowly_share_one_lookup() {
    let coordinator = Coordinator::new();
    let backend = Backend::vllm(&["m"]);
    let setup = Setup::new(&coordinator.url())
        .backend(format!("kind = \"vllm\"\nurl = \"http://gpu.test:{}\"", backend.address().port()));
    let setup = Shim::load(setup);
    let shim = Shim::of(&setup);
    let agent = setup.start();
    let session = coordinator.session();
    assert_eq!(session.capabilities["models"][0]["model_id"], "m");
    shim.hang_lookups();
    backend.hang_up();
    for _ in 0..40 {
        let id = session.job_within(ms(30), "m", json!({}));
        assert_eq!(session.outcome(&id).error(), "backend_timeout");
    }
    assert_eq!(shim.hanging_lookups(), 1);
    let threads = agent.threads();
    assert!(threads.iter().filter(|name| *name == "resolve").count() == 1, "{threads:?}");
    let waiting = session.job("m", json!({"waiting": true}));
    shim.end_lookups();
    let held = backend.next();
    assert_eq!(held.request.json()["waiting"], true);
    held.finish();
    session.outcome(&waiting).done();
}
