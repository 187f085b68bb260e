//! The layers of the connection to the coordinator, and the clock.

use super::*;

#[test]
fn unresolvable_name_and_closed_port_are_distinguished() {
    let backend = backend();
    let no_name = setup("wss://coordinator.invalid/").backend(backend.toml());
    let report = Report::by(&no_name, &["--no-inference"]);
    report.assert_only_broken("dns", &["coordinator.invalid"], "resolv.conf");
    report.assert_skipped(&["tcp", "tls", "websocket", "challenge", "clock"]);

    let nobody = nobody_at("127.0.0.73");
    let closed = setup(&format!("wss://{nobody}/")).backend(backend.toml());
    let report = Report::by(&closed, &["--no-inference"]);
    report.assert_only_broken("tcp", &[&nobody, "refused"], "check host and port");
    report.assert_passed(&["dns"]);
    report.assert_skipped(&["tls", "websocket", "challenge", "clock"]);
}

#[test]
fn certificate_faults_are_reported_with_issuer_and_cause() {
    let cases = [
        (Flaw::None, false, "unknown authority", "ca_file"),
        (Flaw::Expired, true, "to 2021-01-01", "timedatectl"),
        (Flaw::NotYet, true, "from 2090-01-01", "timedatectl"),
        (Flaw::WrongName, true, "`localhost`: issued for another name", "check the host"),
    ];
    side_by_side(cases, |(flaw, is_trusted, words, fix)| {
        let (coordinator, backend, authority) = (coordinator(Some(0)), backend(), Authority::new());
        let proxy = TlsProxy::new(&authority, flaw, coordinator.address());
        let mut setup = setup(&proxy.url()).backend(backend.toml());
        if is_trusted {
            let ca_file = authority.write(&setup.scratch);
            setup = setup.coordinator(&format!("ca_file = {ca_file:?}"));
        }
        let report = Report::by(&setup, &["--no-inference"]);
        report.assert_only_broken("tls", &[words, "rcgen self signed cert"], fix);
        report.assert_passed(&["dns", "tcp"]);
        report.assert_skipped(&["websocket", "challenge", "clock"]);
    });
}

#[test]
fn certificate_without_fault_is_reported_with_issuer_expiry_and_version() {
    for (flaw, mark, words) in [(Flaw::None, '✓', "on 4096-01-01"), (Flaw::EndsSoon, '!', "expires in 5 day(s)")] {
        let (coordinator, backend, authority) = (coordinator(Some(0)), backend(), Authority::new());
        let proxy = TlsProxy::new(&authority, flaw, coordinator.address());
        let setup = setup(&proxy.url()).backend(backend.toml());
        let ca_file = authority.write(&setup.scratch);
        let setup = setup.coordinator(&format!("ca_file = {ca_file:?}"));
        let report = Report::by(&setup, &["--no-inference"]);
        report.assert_well();
        report.line(mark, "tls", &["TLS 1.3", "rcgen self signed cert", words]);
        report.assert_passed(&["websocket", "challenge", "clock"]);
    }
}

#[test]
fn peer_without_tls_is_not_reported_as_a_bad_certificate() {
    let backend = backend();
    let setup = setup(&format!("wss://{}/", backend.address())).backend(backend.toml());
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_only_broken("tls", &[], "check host and port");
}

#[test]
fn clock_is_compared_with_the_coordinators() {
    for (off, mark, words) in
        [(3600, '✗', "behind"), (-3600, '✗', "ahead of"), (120, '!', "behind"), (-5, '✓', "within")]
    {
        let (coordinator, backend) = (coordinator(Some(off)), backend());
        let setup = setup(&coordinator.url()).backend(backend.toml());
        let report = Report::by(&setup, &["--no-inference"]);
        report.line(mark, "clock", &[words]);
        if mark == '✗' {
            report.assert_only_broken("clock", &[" min"], "timedatectl set-ntp true");
        } else {
            report.assert_well();
        }
    }
}

/// The agent's own clock is off, and the date comes from a separate request.
#[test]
fn clock_check_asks_for_the_date_if_the_upgrade_has_none() {
    let (coordinator, backend) = (coordinator(None), backend());
    let setup = Shim::load(setup(&coordinator.url()).backend(backend.toml()));
    Report::by(&setup, &["--no-inference"]).assert_well();
    // Half an hour more, so that seconds of delay do not change the text.
    Shim::of(&setup).set_clock_off_by(-(2 * 86400 + 1800));
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_only_broken("clock", &["behind", "2 d 0 h"], "timedatectl");
}

#[test]
fn slow_coordinator_that_refuses_or_is_silent_is_the_broken_layer() {
    let refusing = Coordinator::played(|mut dialled| {
        dialled.request_if_any();
        dialled.send(format!("HTTP/1.1 502 Bad Gateway\r\nDate: {}\r\n\r\n", http_date(-7200)).as_bytes());
    });
    let silent = Coordinator::new();
    let mute = Coordinator::played(|dialled| {
        dialled.upgrade().ends_within(LONGEST);
    });
    let cases = [
        (&refusing, "websocket", "HTTP 502", "wait"),
        (&silent, "websocket", "no connection within 15 s", "does not respond"),
        (&mute, "challenge", "auth_challenge", "[coordinator] url"),
    ];
    side_by_side(cases, |(coordinator, layer, words, fix)| {
        // A silent backend does not prolong the run.
        let backend = Backend::new(|_| Answer::Hold);
        let setup = setup(&coordinator.url()).backend(backend.toml());
        let report = Report::by(&setup, &["--no-inference"]);
        let (_, printed_fix) = report.line('✗', layer, &[words]);
        assert!(printed_fix.contains(fix), "{}", report.text);
        report.line('✗', "health", &["no response within 3 s"]);
        if words == "HTTP 502" {
            // This response has a date.
            report.line('✗', "clock", &["2 h 0 min ahead of"]);
        }
    });
}

#[test]
fn proxy_is_its_own_layer_and_its_password_is_not_shown() {
    let backend = backend();
    let proxy = Coordinator::played(|mut dialled| {
        dialled.request_if_any();
        dialled.send(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n");
    });
    let url = format!("http://me:s3cret@{}", proxy.address());
    let setup = setup("wss://coordinator.example/").backend(backend.toml()).env("HTTPS_PROXY", &url);
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_only_broken("proxy", &["407"], "NO_PROXY");
    report.line('✓', "dns", &["HTTPS_PROXY"]);
    report.assert_skipped(&["tls", "websocket"]);
    assert!(!report.text.contains("s3cret"), "{}", report.text);
}
