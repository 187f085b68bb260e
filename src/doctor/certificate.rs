//! What the doctor says about the coordinator's certificate: why it is invalid, how to fix that, its issuer and its validity
//! period. Parses only as much of X.509 as is printed.
//!
//! The parser makes no decisions: rustls decides whether a certificate is valid. Every read is bounds-checked, whatever the bytes.

use std::fmt;
use std::ops::Range;

use rustls::CertificateError;

use crate::sys::datetime::{format_date, parse_rfc3339};

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const INTEGER: u8 = 0x02;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// `[0]`, the tag of the version of a certificate.
const VERSION: u8 = 0xa0;
/// The tags of UTF8String, PrintableString, TeletexString and IA5String, which are close enough to UTF-8 to be printed.
const TEXTS: [u8; 4] = [0x0c, 0x13, 0x14, 0x16];

const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const ORGANIZATION: &[u8] = &[0x55, 0x04, 0x0a];

/// The printed fields of a certificate.
#[derive(Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The issuer's common name, organization, or both; empty if the certificate has neither.
    pub issuer: String,
    /// The start of the validity period, in seconds since 1970.
    pub not_before: i64,
    /// The end of the validity period, in seconds since 1970.
    pub not_after: i64,
}

impl Certificate {
    /// The issuer in quotes, or words that say that it has no name.
    pub fn issuer_text(&self) -> String {
        if self.issuer.is_empty() { "without a name".into() } else { format!("\"{}\"", self.issuer) }
    }
}

impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (format_date(self.not_before), format_date(self.not_after));
        write!(f, "issuer {}, valid from {from} to {to}", self.issuer_text())
    }
}

/// Returns what is wrong with a rejected certificate, and the fix.
pub fn explain(fault: &CertificateError) -> (&'static str, &'static str) {
    match fault {
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => (
            "not valid today",
            "if the date here is correct, the operator of the coordinator must renew the certificate; otherwise: \
             `timedatectl set-ntp true`",
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            ("issued for another name", "check the host in `[coordinator] url`")
        }
        CertificateError::UnknownIssuer => (
            "issued by an unknown authority",
            "if that authority is yours, set `[coordinator] ca_file = \"/path/to/its.pem\"`",
        ),
        _ => ("invalid", "the operator of the coordinator must correct it"),
    }
}

/// Parses a certificate in DER; `None` if it is invalid.
pub fn parse(der: &[u8]) -> Option<Certificate> {
    let mut certificate = Der(Der(der).value(SEQUENCE)?);
    let mut signed = Der(certificate.value(SEQUENCE)?);
    // Version 1 is not encoded.
    if signed.0.first() == Some(&VERSION) {
        signed.next()?;
    }
    signed.value(INTEGER)?;
    signed.value(SEQUENCE)?;
    let issuer = issuer(Der(signed.value(SEQUENCE)?));
    let mut validity = Der(signed.value(SEQUENCE)?);
    Some(Certificate { issuer, not_before: time(&mut validity)?, not_after: time(&mut validity)? })
}

/// Reads the name from a sequence of sets of pairs; unknown values are skipped.
fn issuer(mut name: Der<'_>) -> String {
    let (mut common_name, mut organization) = (None, None);
    while let Some(set) = name.value(SET) {
        let mut set = Der(set);
        while let Some(pair) = set.value(SEQUENCE) {
            let mut pair = Der(pair);
            let Some(key) = pair.value(OBJECT_IDENTIFIER) else { continue };
            let Some((_, value)) = pair.next().filter(|(tag, _)| TEXTS.contains(tag)) else { continue };
            let text = String::from_utf8_lossy(value).into_owned();
            match key {
                COMMON_NAME => common_name = Some(text),
                ORGANIZATION => organization = Some(text),
                _ => {}
            }
        }
    }
    match (common_name, organization) {
        (Some(name), Some(of)) => format!("{name} ({of})"),
        (name, of) => name.or(of).unwrap_or_default(),
    }
}

fn time(fields: &mut Der<'_>) -> Option<i64> {
    let (tag, text) = fields.next()?;
    let digits = str::from_utf8(text.strip_suffix(b"Z")?).ok()?;
    // X.509 maps two-digit years to 1950 to 2049.
    let century = match (tag, digits.len()) {
        (UTC_TIME, 12) if digits < "50" => "20",
        (UTC_TIME, 12) => "19",
        (GENERALIZED_TIME, 14) => "",
        _ => return None,
    };
    let digits = format!("{century}{digits}");
    let part = |range: Range<usize>| digits.get(range);
    let (year, month, day) = (part(0..4)?, part(4..6)?, part(6..8)?);
    let (hour, minute, second) = (part(8..10)?, part(10..12)?, part(12..14)?);
    parse_rfc3339(&format!("{year}-{month}-{day}T{hour}:{minute}:{second}Z"))
}

/// The rest of a sequence of tagged values.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The next value with its tag.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, rest) = rest.split_first()?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            // The number of length bytes; no certificate needs more than four.
            0x81..=0x84 => {
                let (length, rest) = rest.split_at_checked(usize::from(first - 0x80))?;
                (length.iter().fold(0_usize, |n, byte| (n << 8) | usize::from(*byte)), rest)
            }
            _ => return None,
        };
        let (value, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((tag, value))
    }

    /// The next value, if it has this tag.
    fn value(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next().filter(|(found, _)| *found == tag).map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, date_time_ymd};

    use super::*;

    fn made(names: &[(DnType, &str)], years: (i32, i32)) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, name) in names {
            params.distinguished_name.push(kind.clone(), *name);
        }
        (params.not_before, params.not_after) = (date_time_ymd(years.0, 2, 3), date_time_ymd(years.1, 12, 31));
        params.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate").der().to_vec()
    }

    fn midnight(year: i32, month: u8, day: u8) -> i64 {
        date_time_ymd(year, month, day).unix_timestamp()
    }

    #[test]
    fn parse_reads_issuer_and_validity() {
        let both = [(DnType::CountryName, "NL"), (DnType::OrganizationName, "Ours"), (DnType::CommonName, "Röot 1")];
        let certificate = parse(&made(&both, (2020, 2049))).expect("a certificate");
        assert_eq!(certificate.issuer, "Röot 1 (Ours)");
        assert_eq!(certificate.not_before, midnight(2020, 2, 3));
        assert_eq!(certificate.not_after, midnight(2049, 12, 31));
        // Dates from 2050 on have a different format.
        let certificate = parse(&made(&both[1..2], (1999, 2051))).expect("a certificate");
        assert_eq!(certificate.issuer, "Ours");
        assert_eq!((certificate.not_before, certificate.not_after), (midnight(1999, 2, 3), midnight(2051, 12, 31)));
        assert_eq!(parse(&made(&[], (2020, 2021))).expect("a certificate").issuer, "");
    }

    #[test]
    fn parse_survives_any_bytes() {
        let good = made(&[(DnType::CommonName, "x"), (DnType::OrganizationName, "y")], (2020, 2060));
        for cut in 0..good.len() {
            parse(&good[..cut]);
        }
        arbtest::arbtest(|u| {
            let mut bytes = good.clone();
            for _ in 0..u.int_in_range(1..=6)? {
                let at = u.choose_index(200.min(bytes.len()))?;
                match u.int_in_range(0..=2)? {
                    0 => bytes[at] = u.arbitrary()?,
                    1 => bytes.insert(at, u.arbitrary()?),
                    _ => drop(bytes.remove(at)),
                }
            }
            parse(&bytes);
            parse(u.arbitrary()?);
            Ok(())
        })
        .budget_ms(300);
    }
}
