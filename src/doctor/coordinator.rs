//! The way to the coordinator, by the agent's own dialling: name, TCP, proxy, TLS, upgrade, challenge, and its clock.
//!
//! Invariant: the challenge is not answered, so that the session of an agent that runs is not displaced.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustls::{CertificateError, ProtocolVersion};
use tungstenite::http::HeaderMap;

use super::report::Report;
use super::{certificate, clock};
use crate::backend::proxy_from_env;
use crate::config::CoordinatorConfig;
use crate::logging::shown;
use crate::session;
use crate::transport::{CONNECT_TIMEOUT, DialError, Dialer, Presented, Steps};

/// For an ordinary answer of HTTP, where the one to the upgrade has no date.
const DATE_TIME: Duration = Duration::from_secs(3);
/// A certificate that is not renewed so long before its end may not be renewed at all.
const EXPIRY_DAYS_MIN: i64 = 14;

/// In the order in which a dial takes them.
const LAYERS: [&str; 6] = ["dns", "tcp", "proxy", "tls", "websocket", "challenge"];
const DNS: usize = 0;
const TCP: usize = 1;
const PROXY: usize = 2;
const TLS: usize = 3;
const WEBSOCKET: usize = 4;

/// Dials, and tells of each layer as it is passed.
pub fn examine(report: &mut Report<'_>, config: &CoordinatorConfig) {
    let mut dialer = Dialer::new(config.url.clone(), config.roots.clone(), proxy_from_env());
    let presented = dialer.keep_presented();
    let secure = config.url.scheme_str() == Some("wss");
    let mut way = Way { report, dialer: &dialer, presented, secure, layer: DNS, since: Instant::now(), date: None };
    way.report.pending(LAYERS[DNS]);
    match dialer.dial_by_steps(&mut way) {
        Ok(mut half) => {
            way.pass(&format!("upgraded after {} ms", way.since.elapsed().as_millis()));
            match session::challenge(&mut half) {
                Ok(_) => way.pass("received; not answered, for that could displace the agent that runs"),
                Err(e) => {
                    let fix =
                        "is `[coordinator] url` that of a Use Pod coordinator? If it is, it is not well: try later";
                    way.fail(&shown(&e.to_string()), fix);
                }
            }
            half.close();
        }
        Err(e) => way.broken(&e),
    }
    let date = way.date.or_else(|| if way.layer > WEBSOCKET { ask_date(&dialer) } else { None });
    match date {
        Some((theirs, ours)) => clock::compare(report, theirs, ours),
        None => report.skip("clock", &format!("the coordinator told no date; this box says {}", clock::now_shown())),
    }
}

/// The coordinator's time, and ours when it came.
fn ask_date(dialer: &Dialer) -> Option<(i64, i64)> {
    let head = dialer.head(DATE_TIME).ok()?;
    let fields = head.lines().filter_map(|line| line.split_once(':'));
    let date = fields.into_iter().find(|(name, _)| name.eq_ignore_ascii_case("date"))?.1;
    Some((clock::parse_http_date(date)?, clock::now()))
}

/// The dial under way.
struct Way<'r, 'o> {
    report: &'r mut Report<'o>,
    dialer: &'r Dialer,
    presented: Presented,
    secure: bool,
    /// The one that is being tried.
    layer: usize,
    since: Instant,
    date: Option<(i64, i64)>,
}

impl Steps for Way<'_, '_> {
    fn resolved(&mut self, addresses: &[SocketAddr]) {
        let mut listed: Vec<String> = addresses.iter().map(|address| address.ip().to_string()).collect();
        listed.dedup();
        let whose = if self.dialer.uses_proxy() { " (the proxy of HTTPS_PROXY)" } else { "" };
        self.pass(&format!("`{}`{whose}: {}", self.dialer.peer().0, listed.join(", ")));
    }

    fn connected(&mut self, address: SocketAddr) {
        self.pass(&format!("{address} accepted after {} ms", self.since.elapsed().as_millis()));
        if !self.dialer.uses_proxy() {
            self.reach(if self.secure { TLS } else { WEBSOCKET });
        }
    }

    fn tunnelled(&mut self) {
        self.pass(&format!("it reached the coordinator after {} ms", self.since.elapsed().as_millis()));
        self.reach(if self.secure { TLS } else { WEBSOCKET });
    }

    fn secured(&mut self, version: Option<ProtocolVersion>) {
        let version = match version {
            Some(ProtocolVersion::TLSv1_2) => "TLS 1.2",
            _ => "TLS 1.3",
        };
        let Some(shown_certificate) = self.certificate() else {
            return self.pass(version);
        };
        let days = shown_certificate.not_after.saturating_sub(clock::now()) / 86400;
        let until = clock::day_of(shown_certificate.not_after);
        let what = format!("{version}, issuer {}, expires in {days} day(s), on {until}", issuer(&shown_certificate));
        if days < EXPIRY_DAYS_MIN {
            self.report.warn(LAYERS[TLS], &what, "whoever runs the coordinator must renew its certificate: tell them");
            self.reach(WEBSOCKET);
        } else {
            self.pass(&what);
        }
    }

    fn answered(&mut self, headers: &HeaderMap) {
        let date = headers.get("date").and_then(|date| date.to_str().ok()).and_then(clock::parse_http_date);
        self.date = date.map(|theirs| (theirs, clock::now()));
    }
}

impl Way<'_, '_> {
    fn pass(&mut self, what: &str) {
        self.report.pass(LAYERS[self.layer], what);
        self.reach(self.layer + 1);
    }

    /// The layers below it are passed.
    fn reach(&mut self, layer: usize) {
        self.layer = layer;
        self.since = Instant::now();
        if let Some(name) = LAYERS.get(layer) {
            self.report.pending(name);
        }
    }

    fn fail(&mut self, what: &str, fix: &str) {
        self.report.fail(LAYERS[self.layer], what, fix);
    }

    /// Names the layer that did not hold, and those that rest on it.
    fn broken(&mut self, e: &DialError) {
        let (what, fix) = self.explained(e);
        self.fail(&what, &fix);
        for (layer, name) in LAYERS.iter().enumerate().skip(self.layer + 1) {
            let is_on_the_way = match layer {
                PROXY => self.dialer.uses_proxy(),
                TLS => self.secure,
                _ => true,
            };
            if is_on_the_way {
                self.report.skip(name, &format!("rests on {}", LAYERS[self.layer]));
            }
        }
    }

    fn explained(&self, e: &DialError) -> (String, String) {
        let (host, port) = self.dialer.peer();
        let key = if self.dialer.uses_proxy() { "HTTPS_PROXY" } else { "`[coordinator] url`" };
        match e {
            DialError::Resolve { error, .. } => (
                format!("`{host}` has no address: {error}"),
                format!(
                    "is the name in {key} right? If it is: getent hosts {host}, and the servers in /etc/resolv.conf"
                ),
            ),
            DialError::Connect { error, .. } => {
                let fix = match error.kind() {
                    ErrorKind::ConnectionRefused => format!("nothing listens there: check host and port in {key}"),
                    ErrorKind::TimedOut | ErrorKind::WouldBlock => {
                        format!("something swallows the packets: let the firewall allow outgoing TCP to port {port}")
                    }
                    _ => "is this box online? ip route; ping -c 1 1.1.1.1".to_owned(),
                };
                (format!("`{host}:{port}`: {error}"), fix)
            }
            DialError::Proxy(why) => (
                format!("the proxy `{host}:{port}` of HTTPS_PROXY refused to connect: {}", shown(why)),
                "check HTTPS_PROXY, and what it allows; or name the coordinator's host in NO_PROXY".to_owned(),
            ),
            DialError::Tls(why) => self.tls_explained(why),
            DialError::Upgrade(why) => (
                shown(why),
                "a 5xx is the coordinator's own trouble: wait; else check the path of `[coordinator] url`, usually \
                 /provider/connect"
                    .to_owned(),
            ),
            DialError::TimedOut => {
                let fix = match self.layer {
                    DNS => "the name server does not answer: check /etc/resolv.conf".to_owned(),
                    TCP => {
                        format!("something swallows the packets: let the firewall allow outgoing TCP to port {port}")
                    }
                    PROXY => "check HTTPS_PROXY, and whether that proxy is well".to_owned(),
                    _ => format!("`{host}:{port}` accepts and says nothing: check {key}; if it is right, try later"),
                };
                (format!("no answer within {} s of the dial", CONNECT_TIMEOUT.as_secs()), fix)
            }
            DialError::System(_) | DialError::Stopping => {
                (shown(&e.to_string()), "the box is short of something: ulimit -a, free -m".to_owned())
            }
        }
    }

    fn tls_explained(&self, why: &str) -> (String, String) {
        let host = self.dialer.host();
        let Some(fault) = self.presented.certificate().and_then(|certificate| certificate.fault) else {
            let fix = "something that speaks no TLS, or none of ours, answers there: check host and port in \
                       `[coordinator] url`";
            return (shown(why), fix.to_owned());
        };
        let certificate = self.certificate();
        let issuer = certificate.as_ref().map_or_else(|| "(unreadable)".into(), issuer);
        let day = |pick: fn(&certificate::Certificate) -> i64| certificate.as_ref().map(pick).map(clock::day_of);
        let box_says = format!("this box says it is {}", clock::now_shown());
        let clock_first = format!(
            "if that date of this box is wrong, its clock is the reason: {}; if it is right, whoever runs the coordinator must \
             renew its certificate",
            clock::FIX
        );
        match fault {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                let day = day(|c| c.not_after).unwrap_or_default();
                (format!("the certificate (issuer {issuer}) expired on {day}; {box_says}"), clock_first)
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                let day = day(|c| c.not_before).unwrap_or_default();
                (format!("the certificate (issuer {issuer}) holds from {day} only; {box_says}"), clock_first)
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => (
                format!("the certificate (issuer {issuer}) is for another name than `{host}`"),
                "check the host in `[coordinator] url`; if it is right, something between here and there answers in the \
                 coordinator's place"
                    .to_owned(),
            ),
            CertificateError::UnknownIssuer => (
                format!("the certificate is of an unknown authority (issuer {issuer})"),
                "if that authority is yours: [coordinator] ca_file = \"/path/to/its.pem\"; if not, something between here and \
                 there answers in the coordinator's place: a filter, a portal, a proxy"
                    .to_owned(),
            ),
            _ => (
                format!("{} (issuer {issuer})", shown(why)),
                "whoever runs the coordinator must mend its certificate, unless something between here and there answers in \
                 its place"
                    .to_owned(),
            ),
        }
    }

    fn certificate(&self) -> Option<certificate::Certificate> {
        certificate::parse(&self.presented.certificate()?.der)
    }
}

fn issuer(certificate: &certificate::Certificate) -> String {
    if certificate.issuer.is_empty() { "without a name".into() } else { format!("\"{}\"", shown(&certificate.issuer)) }
}
