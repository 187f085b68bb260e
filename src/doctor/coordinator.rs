//! Checks the connection to the coordinator with the agent's own dialer: DNS, TCP, proxy, TLS, WebSocket, challenge; and the clock.
//!
//! Invariant: the challenge is not answered, because that could displace the session of a running agent.

use std::fmt::Display;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use rustls::{CertificateError, ProtocolVersion};
use tungstenite::http::HeaderMap;

use super::report::Report;
use super::{certificate, clock};
use crate::config::CoordinatorConfig;
use crate::link::handshake;
use crate::link::{DialError, DialObserver, Dialer};
use crate::sys::datetime;

/// The timeout of a second connection, which fetches a certificate that was rejected, or a date that the upgrade response lacks.
const RETRY_TIMEOUT: Duration = Duration::from_secs(3);
/// The minimum number of days left; a certificate that is not renewed by then may not be renewed at all.
const EXPIRY_DAYS_MIN: i64 = 14;

const DROPPED: &str = "packets are dropped: let the firewall allow outgoing TCP to that port";

/// The layers, in the order of a dial.
const LAYERS: [&str; 6] = ["dns", "tcp", "proxy", "tls", "websocket", "challenge"];
const DNS: usize = 0;
const TCP: usize = 1;
const PROXY: usize = 2;
const TLS: usize = 3;
const WEBSOCKET: usize = 4;

/// Dials the coordinator and reports each layer.
pub fn examine(report: &mut Report<'_>, config: &CoordinatorConfig) {
    let dialer = Dialer::new(config.url.clone(), config.roots.clone());
    let secure = config.url.scheme_str() == Some("wss");
    let mut dial = DialReport { report, dialer: &dialer, secure, layer: DNS, since: Instant::now(), date: None };
    dial.report.pending(LAYERS[DNS]);
    match dialer.dial_observed(&mut dial) {
        Ok(mut half) => {
            dial.pass(format_args!("upgraded after {} ms", dial.since.elapsed().as_millis()));
            match handshake::challenge(&mut half) {
                Ok(_) => dial.pass("received; not answered, because that could displace a running agent"),
                Err(e) => {
                    let fix = "check that `[coordinator] url` is a Use Pod coordinator; if it is, the coordinator is failing: try later";
                    dial.fail(e, fix);
                }
            }
            half.close();
        }
        Err(e) => dial.report_error(&e),
    }
    let date = dial.date.or_else(|| if dial.layer > WEBSOCKET { fetch_date(&dialer) } else { None });
    match date {
        Some((theirs, ours)) => clock::compare(report, theirs, ours),
        None => report.skip(
            "clock",
            format_args!(
                "skipped: the coordinator sent no date; the time here is {}",
                datetime::rfc3339(SystemTime::now())
            ),
        ),
    }
}

/// The coordinator's time, and this machine's time when it arrived.
fn fetch_date(dialer: &Dialer) -> Option<(i64, i64)> {
    date_in(&dialer.fetch_headers(RETRY_TIMEOUT).ok()?)
}

/// The time in the headers of a response, and this machine's time when the headers arrived.
fn date_in(headers: &HeaderMap) -> Option<(i64, i64)> {
    Some((datetime::parse_http(headers.get("date")?.to_str().ok()?)?, datetime::now()))
}

/// The report of a dial in progress.
struct DialReport<'r, 'o> {
    report: &'r mut Report<'o>,
    dialer: &'r Dialer,
    secure: bool,
    /// The layer in progress.
    layer: usize,
    since: Instant,
    date: Option<(i64, i64)>,
}

impl DialObserver for DialReport<'_, '_> {
    fn resolved(&mut self, addresses: &[SocketAddr]) {
        let mut listed: Vec<String> = addresses.iter().map(|address| address.ip().to_string()).collect();
        listed.dedup();
        let owner = if self.dialer.uses_proxy() { " (the proxy in HTTPS_PROXY)" } else { "" };
        self.pass(format_args!("`{}`{owner}: {}", self.dialer.peer().0, listed.join(", ")));
    }

    fn connected(&mut self, address: SocketAddr) {
        self.pass(format_args!("{address} accepted after {} ms", self.since.elapsed().as_millis()));
        if !self.dialer.uses_proxy() {
            self.reach_coordinator();
        }
    }

    fn tunnelled(&mut self) {
        self.pass(format_args!("tunnel to the coordinator after {} ms", self.since.elapsed().as_millis()));
        self.reach_coordinator();
    }

    fn secured(&mut self, version: Option<ProtocolVersion>, certificate: &[u8]) {
        let version = if version == Some(ProtocolVersion::TLSv1_2) { "TLS 1.2" } else { "TLS 1.3" };
        let Some(certificate) = certificate::parse(certificate) else { return self.pass(version) };
        let days = certificate.not_after.saturating_sub(datetime::now()) / 86400;
        let (issuer, until) = (certificate.issuer_text(), datetime::format_date(certificate.not_after));
        let what = format_args!("{version}, issuer {issuer}, expires in {days} day(s), on {until}");
        if days < EXPIRY_DAYS_MIN {
            self.report.warn(
                LAYERS[TLS],
                what,
                "the certificate must be renewed: notify the operator of the coordinator",
            );
            self.reach(WEBSOCKET);
        } else {
            self.pass(what);
        }
    }

    fn answered(&mut self, headers: &HeaderMap) {
        self.date = date_in(headers);
    }
}

impl DialReport<'_, '_> {
    fn pass(&mut self, what: impl Display) {
        self.report.pass(LAYERS[self.layer], what);
        self.reach(self.layer + 1);
    }

    fn reach_coordinator(&mut self) {
        if !self.secure {
            self.report.skip(LAYERS[TLS], "skipped: ws:// is not encrypted");
        }
        self.reach(if self.secure { TLS } else { WEBSOCKET });
    }

    /// Proceeds to this layer; the layers below it have passed.
    fn reach(&mut self, layer: usize) {
        self.layer = layer;
        self.since = Instant::now();
        if let Some(name) = LAYERS.get(layer) {
            self.report.pending(name);
        }
    }

    fn fail(&mut self, what: impl Display, fix: impl Display) {
        self.report.fail(LAYERS[self.layer], what, fix);
    }

    /// Reports the layer that failed, and skips those above it.
    fn report_error(&mut self, e: &DialError) {
        self.report_failure(e);
        for (layer, name) in LAYERS.iter().enumerate().skip(self.layer + 1) {
            let is_used = match layer {
                PROXY => self.dialer.uses_proxy(),
                TLS => self.secure,
                _ => true,
            };
            if is_used {
                self.report.skip(name, format_args!("skipped: needs {}", LAYERS[self.layer]));
            }
        }
    }

    fn report_failure(&mut self, e: &DialError) {
        let fix = match e {
            DialError::Tls { fault: Some(fault), .. } => return self.report_certificate(e, fault),
            DialError::Resolve { .. } => {
                "check the name; if it is correct, check `getent hosts NAME` and the name servers in /etc/resolv.conf"
            }
            DialError::Connect { error, .. } => match error.kind() {
                ErrorKind::ConnectionRefused => "nothing is listening there: check host and port",
                ErrorKind::TimedOut | ErrorKind::WouldBlock => DROPPED,
                _ => "check that this machine is online: ip route; ping -c 1 1.1.1.1",
            },
            DialError::Proxy(_) | DialError::ProxyRefused(_) => {
                "check the proxy and its rules, or add the coordinator's host to NO_PROXY"
            }
            DialError::Tls { .. } => {
                "the server there does not speak TLS, or no version in common: check host and port"
            }
            DialError::UpgradeRefused(refusal) if refusal.is_from_between => {
                "a captive portal or another server answers instead of the coordinator: log in there with a browser, or correct the URL"
            }
            DialError::Upgrade(_) | DialError::UpgradeRefused(_) => {
                "if the status is 5xx, the coordinator is failing: wait; otherwise check the path, usually /provider/connect"
            }
            DialError::TimedOut => match self.layer {
                DNS => "the name server does not respond: check /etc/resolv.conf",
                TCP => DROPPED,
                _ => "the server accepts and does not respond: check host and port; if they are correct, try later",
            },
            DialError::System(_) | DialError::Stopping => {
                "this machine is out of descriptors, threads or memory: ulimit -a; free -m"
            }
        };
        let key = if self.dialer.uses_proxy() { "HTTPS_PROXY" } else { "`[coordinator] url`" };
        self.fail(e, format_args!("{fix}; the address is from {key}"));
    }

    fn report_certificate(&mut self, e: &DialError, fault: &CertificateError) {
        let certificate = self.dialer.fetch_peer_certificate(RETRY_TIMEOUT).and_then(|der| certificate::parse(&der));
        let shown = certificate.map_or_else(String::new, |certificate| format!("; {certificate}"));
        let (what, fix) = certificate::explain(fault);
        let today = datetime::format_date(datetime::now());
        self.fail(
            format_args!("the certificate for `{}`: {what} ({today}){shown}; {e}", self.dialer.host()),
            format_args!("{fix}; or something on the network answers instead of the coordinator"),
        );
    }
}
