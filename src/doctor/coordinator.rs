//! The way to the coordinator, by the agent's own dialling: name, TCP, proxy, TLS, upgrade, challenge, and its clock.
//!
//! Invariant: the challenge is not answered, so that the session of an agent that runs is not displaced.

use std::fmt;
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
use crate::net::proxy;
use crate::sys::datetime;

/// For another look: at the certificate that was refused, or for a date where the answer to the upgrade has none.
const LOOK_TIME: Duration = Duration::from_secs(3);
/// A certificate that is not renewed so long before its end may not be renewed at all.
const EXPIRY_DAYS_MIN: i64 = 14;

const SWALLOWED: &str = "something swallows the packets: let the firewall allow outgoing TCP to that port";

/// In the order in which a dial takes them.
const LAYERS: [&str; 6] = ["dns", "tcp", "proxy", "tls", "websocket", "challenge"];
const DNS: usize = 0;
const TCP: usize = 1;
const PROXY: usize = 2;
const TLS: usize = 3;
const WEBSOCKET: usize = 4;

/// Dials, and tells of each layer as it is passed.
pub fn examine(report: &mut Report<'_>, config: &CoordinatorConfig) {
    let dialer = Dialer::new(config.url.clone(), config.roots.clone(), proxy::from_env());
    let secure = config.url.scheme_str() == Some("wss");
    let mut way = DialReport { report, dialer: &dialer, secure, layer: DNS, since: Instant::now(), date: None };
    way.report.pending(LAYERS[DNS]);
    match dialer.dial_observed(&mut way) {
        Ok(mut half) => {
            way.pass(format_args!("upgraded after {} ms", way.since.elapsed().as_millis()));
            match handshake::challenge(&mut half) {
                Ok(_) => way.pass(format_args!("received; not answered, for that could displace a running agent")),
                Err(e) => {
                    let fix = format_args!(
                        "is `[coordinator] url` that of a Use Pod coordinator? If it is, it is not well: try later"
                    );
                    way.fail(format_args!("{e}"), fix);
                }
            }
            half.close();
        }
        Err(e) => way.broken(&e),
    }
    let date = way.date.or_else(|| if way.layer > WEBSOCKET { ask_date(&dialer) } else { None });
    match date {
        Some((theirs, ours)) => clock::compare(report, theirs, ours),
        None => report.skip(
            "clock",
            format_args!("the coordinator told no date; this box says {}", datetime::rfc3339(SystemTime::now())),
        ),
    }
}

/// The coordinator's time, and ours when it came.
fn ask_date(dialer: &Dialer) -> Option<(i64, i64)> {
    date_in(&dialer.fetch_headers(LOOK_TIME).ok()?)
}

/// The time that the headers of an answer give, and ours when it came.
fn date_in(headers: &HeaderMap) -> Option<(i64, i64)> {
    Some((datetime::parse_http(headers.get("date")?.to_str().ok()?)?, datetime::now()))
}

/// The dial under way.
struct DialReport<'r, 'o> {
    report: &'r mut Report<'o>,
    dialer: &'r Dialer,
    secure: bool,
    /// The one that is being tried.
    layer: usize,
    since: Instant,
    date: Option<(i64, i64)>,
}

impl DialObserver for DialReport<'_, '_> {
    fn resolved(&mut self, addresses: &[SocketAddr]) {
        let mut listed: Vec<String> = addresses.iter().map(|address| address.ip().to_string()).collect();
        listed.dedup();
        let whose = if self.dialer.uses_proxy() { " (the proxy of HTTPS_PROXY)" } else { "" };
        self.pass(format_args!("`{}`{whose}: {}", self.dialer.peer().0, listed.join(", ")));
    }

    fn connected(&mut self, address: SocketAddr) {
        self.pass(format_args!("{address} accepted after {} ms", self.since.elapsed().as_millis()));
        if !self.dialer.uses_proxy() {
            self.reach_coordinator();
        }
    }

    fn tunnelled(&mut self) {
        self.pass(format_args!("it reached the coordinator after {} ms", self.since.elapsed().as_millis()));
        self.reach_coordinator();
    }

    fn secured(&mut self, version: Option<ProtocolVersion>, certificate: &[u8]) {
        let version = if version == Some(ProtocolVersion::TLSv1_2) { "TLS 1.2" } else { "TLS 1.3" };
        let Some(certificate) = certificate::parse(certificate) else { return self.pass(format_args!("{version}")) };
        let days = certificate.not_after.saturating_sub(datetime::now()) / 86400;
        let (issuer, until) = (issuer(&certificate), datetime::format_date(certificate.not_after));
        let what = format_args!("{version}, issuer {issuer}, expires in {days} day(s), on {until}");
        if days < EXPIRY_DAYS_MIN {
            self.report.warn(
                LAYERS[TLS],
                what,
                format_args!("whoever runs the coordinator must renew its certificate: tell them"),
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
    fn pass(&mut self, what: fmt::Arguments<'_>) {
        self.report.pass(LAYERS[self.layer], what);
        self.reach(self.layer + 1);
    }

    fn reach_coordinator(&mut self) {
        if !self.secure {
            self.report.skip(LAYERS[TLS], format_args!("ws:// is not encrypted"));
        }
        self.reach(if self.secure { TLS } else { WEBSOCKET });
    }

    /// The layers below it are passed.
    fn reach(&mut self, layer: usize) {
        self.layer = layer;
        self.since = Instant::now();
        if let Some(name) = LAYERS.get(layer) {
            self.report.pending(name);
        }
    }

    fn fail(&mut self, what: fmt::Arguments<'_>, fix: fmt::Arguments<'_>) {
        self.report.fail(LAYERS[self.layer], what, fix);
    }

    /// Names the layer that did not hold, and those that rest on it.
    fn broken(&mut self, e: &DialError) {
        self.explain(e);
        for (layer, name) in LAYERS.iter().enumerate().skip(self.layer + 1) {
            let is_on_the_way = match layer {
                PROXY => self.dialer.uses_proxy(),
                TLS => self.secure,
                _ => true,
            };
            if is_on_the_way {
                self.report.skip(name, format_args!("rests on {}", LAYERS[self.layer]));
            }
        }
    }

    fn explain(&mut self, e: &DialError) {
        let fix = match e {
            DialError::Tls { fault: Some(fault), .. } => return self.explain_certificate(e, fault),
            DialError::Resolve { .. } => {
                "is the name right? If so: getent hosts NAME, and the servers in /etc/resolv.conf"
            }
            DialError::Connect { error, .. } => match error.kind() {
                ErrorKind::ConnectionRefused => "nothing listens there: check host and port",
                ErrorKind::TimedOut | ErrorKind::WouldBlock => SWALLOWED,
                _ => "is this box online? ip route; ping -c 1 1.1.1.1",
            },
            DialError::Proxy(_) => "check the proxy, and what it allows; or name the coordinator's host in NO_PROXY",
            DialError::Tls { .. } => {
                "something that speaks no TLS, or none of ours, answers there: check host and port"
            }
            DialError::Upgrade(_) => {
                "a 5xx is the coordinator's own trouble: wait; else check the path, usually /provider/connect"
            }
            DialError::TimedOut => match self.layer {
                DNS => "the name server does not answer: check /etc/resolv.conf",
                TCP => SWALLOWED,
                _ => "it accepts and says nothing: check host and port; if they are right, try later",
            },
            DialError::System(_) | DialError::Stopping => "the box is short of something: ulimit -a; free -m",
        };
        let key = if self.dialer.uses_proxy() { "HTTPS_PROXY" } else { "`[coordinator] url`" };
        self.fail(format_args!("{e}"), format_args!("{fix}; the address is that of {key}"));
    }

    fn explain_certificate(&mut self, e: &DialError, fault: &CertificateError) {
        let certificate = self.dialer.fetch_peer_certificate(LOOK_TIME).and_then(|der| certificate::parse(&der));
        let shown = certificate.map_or_else(String::new, |c| {
            format!(
                "; issuer {}, holds from {} to {}",
                issuer(&c),
                datetime::format_date(c.not_before),
                datetime::format_date(c.not_after)
            )
        });
        let (what, fix) = match fault {
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => (
                "it does not hold today",
                "if this box's date is right, whoever runs the coordinator must renew its certificate; if not: timedatectl \
                 set-ntp true",
            ),
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                ("it is for another name", "check the host in `[coordinator] url`")
            }
            CertificateError::UnknownIssuer => (
                "it is of an unknown authority",
                "if that authority is yours: [coordinator] ca_file = \"/path/to/its.pem\"",
            ),
            _ => ("it is no good", "whoever runs the coordinator must mend it"),
        };
        let today = datetime::format_date(datetime::now());
        self.fail(
            format_args!("the certificate for `{}`: {what} ({today}){shown}; {e}", self.dialer.host()),
            format_args!("{fix}; or something between here and there answers in the coordinator's place"),
        );
    }
}

fn issuer(certificate: &certificate::Certificate) -> String {
    if certificate.issuer.is_empty() { "without a name".into() } else { format!("\"{}\"", certificate.issuer) }
}
