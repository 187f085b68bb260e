//! `wss`: the coordinator behind TLS, with a certificate authority of the test.

use serde_json::json;

use crate::support::*;

/// An agent in session over TLS.
fn session(backend: &Backend) -> (Session, TlsProxy, Agent, Coordinator) {
    let coordinator = Coordinator::new();
    let authority = Authority::new();
    let proxy = TlsProxy::new(&authority, Flaw::None, coordinator.address());
    let setup = Setup::new(&proxy.url()).backend(backend.toml()).limits("max_concurrent = 256");
    let ca_file = authority.write(&setup.scratch);
    let agent = setup.coordinator(&format!("ca_file = {ca_file:?}")).start();
    (coordinator.session(), proxy, agent, coordinator)
}

#[test]
fn streams_over_tls_are_unchanged_by_a_key_update() {
    let _descriptors = reserve_descriptors(300);
    const JOBS: usize = 256;
    let backend = Backend::vllm(&["m"]);
    let (session, proxy, _agent, _coordinator) = session(&backend);
    let jobs: Vec<_> = (0..JOBS).map(|n| session.job("m", json!({"n": n}))).collect();
    let mut held: Vec<_> = (0..JOBS).map(|_| backend.next()).collect();
    held.sort_by_key(|held| held.request.json()["n"].as_u64());
    held.iter_mut().for_each(Held::start_sse);
    let piece = |n: usize, round: usize| format!("data: {{\"job\":{n},\"text\":\"{}\"}}\n\n", "é".repeat(n + round));
    for round in 0..12 {
        for (n, held) in held.iter_mut().enumerate() {
            held.chunk(piece(n, round));
        }
        if round % 4 == 1 {
            proxy.update_keys();
        }
    }
    for mut held in held {
        held.chunk("data: [DONE]\n\n");
        held.end();
    }
    for (n, id) in jobs.iter().enumerate() {
        let expected: String = (0..12).map(|round| piece(n, round)).chain(["data: [DONE]\n\n".to_owned()]).collect();
        let outcome = session.outcome(id);
        outcome.done();
        assert!(outcome.body() == expected.as_bytes(), "stream {n} differs");
    }
}

#[test]
fn slow_request_of_20_mb_and_a_cancel_pass_over_tls() {
    let backend = Backend::vllm(&["m"]);
    let (session, _proxy, _agent, _coordinator) = session(&backend);
    let picture = "x".repeat(20 << 20);
    let id = session.job("m", json!({"picture": picture}));
    let mut held = backend.next_within(3 * SOON);
    assert_eq!(held.request.json()["picture"].as_str().map(str::len), Some(picture.len()));
    held.start_sse();
    session.cancel(&id);
    held.wait_hang_up();
    session.assert_quiet(&id);
}

#[test]
fn untrusted_certificate_is_refused_and_the_log_says_why() {
    let cases = [
        (Flaw::None, false, "UnknownIssuer"),
        (Flaw::WrongName, true, "not valid for name"),
        (Flaw::Expired, true, "expired"),
    ];
    side_by_side(cases, |(flaw, is_trusted, reason)| {
        let coordinator = Coordinator::new();
        let authority = Authority::new();
        let proxy = TlsProxy::new(&authority, flaw, coordinator.address());
        let mut setup = Setup::new(&proxy.url());
        if is_trusted {
            let ca_file = authority.write(&setup.scratch);
            setup = setup.coordinator(&format!("ca_file = {ca_file:?}"));
        }
        let agent = setup.start();
        agent.stderr.wait_line(&["not connected", "TLS", reason]);
    });
}

#[test]
fn ca_file_that_is_invalid_is_a_config_error() {
    for (content, words) in [(None, "failed to read"), (Some("no PEM"), "no certificate")] {
        let setup = Setup::new("wss://localhost:1/x");
        let path = setup.scratch.join("ca.pem");
        if let Some(content) = content {
            setup.scratch.write("ca.pem", content);
        }
        let mut agent = setup.coordinator(&format!("ca_file = {path:?}")).start();
        assert_eq!(agent.wait(SOON).code(), Some(2));
        agent.stderr.wait_line(&["ca_file", words]);
    }
}
