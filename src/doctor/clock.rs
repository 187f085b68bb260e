//! Moments: how others write them, and how far the box's clock is off.

use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::{Date, Month};

use super::report::Report;
use crate::heartbeat::rfc3339;

/// More than this, and certificates and signatures that others date begin to fail.
const OFF_MAX_SECONDS: i64 = 5 * 60;
/// Less than this is the network and the whole seconds of the header.
const OFF_SEEN_SECONDS: i64 = 30;

/// Of an RFC 3339 date without its time.
const DAY_LENGTH: usize = 10;

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// How a clock is set right.
pub const FIX: &str = "timedatectl set-ntp true (as root), or whatever keeps this box's clock";

/// Seconds since 1970, UTC; `None` when there is no such moment.
pub fn moment(year: i32, month: u8, day: u8, [hour, minute, second]: [u8; 3]) -> Option<i64> {
    let date = Date::from_calendar_date(year, Month::try_from(month).ok()?, day).ok()?;
    Some(date.with_hms(hour, minute, second).ok()?.assume_utc().unix_timestamp())
}

/// The box's time, in seconds since 1970.
pub fn now() -> i64 {
    let since = |at: SystemTime| at.duration_since(UNIX_EPOCH).ok();
    since(SystemTime::now()).and_then(|d| i64::try_from(d.as_secs()).ok()).unwrap_or(0)
}

/// The box's time, to be shown.
pub fn now_shown() -> String {
    rfc3339(SystemTime::now()).unwrap_or_default()
}

/// The day of a moment, to be shown.
pub fn day_of(moment: i64) -> String {
    let since = Duration::from_secs(u64::try_from(moment).unwrap_or(0));
    let mut shown = UNIX_EPOCH.checked_add(since).and_then(rfc3339).unwrap_or_default();
    shown.truncate(DAY_LENGTH);
    shown
}

/// A `Date` of HTTP in the one form that is still written: `Sun, 06 Nov 1994 08:49:37 GMT`.
pub fn parse_http_date(text: &str) -> Option<i64> {
    let text = text.trim().as_bytes();
    let month = MONTHS.iter().position(|name| Some(name.as_bytes()) == text.get(8..11))? + 1;
    let pair = |at: usize| number(text, at..at + 2).and_then(|n| u8::try_from(n).ok());
    moment(i32::from(number(text, 12..16)?), u8::try_from(month).ok()?, pair(5)?, [pair(17)?, pair(20)?, pair(23)?])
}

/// The number that these bytes of a text write, four digits at the most.
pub fn number(text: &[u8], range: Range<usize>) -> Option<u16> {
    let mut number = 0;
    for digit in text.get(range).filter(|digits| digits.len() <= 4)? {
        number = number * 10 + u16::from(digit.is_ascii_digit().then(|| digit - b'0')?);
    }
    Some(number)
}

/// Compares what the coordinator's `Date` said with the box's clock at the same moment.
pub fn compare(report: &mut Report<'_>, theirs: i64, ours: i64) {
    let off = ours.saturating_sub(theirs);
    let way = if off > 0 { "ahead of" } else { "behind" };
    let span = span(off.unsigned_abs());
    let what = format_args!("{span} {way} the coordinator's");
    match i64::try_from(off.unsigned_abs()).unwrap_or(i64::MAX) {
        0..=OFF_SEEN_SECONDS => report.pass("clock", &"that of the coordinator, within 30 s"),
        seconds if seconds <= OFF_MAX_SECONDS => report.warn("clock", &what, &FIX),
        _ => report.fail("clock", &what, &FIX),
    }
}

/// In the two largest units.
fn span(seconds: u64) -> String {
    match (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, m, s) => format!("{m} min {s} s"),
        (0, h, m, _) => format!("{h} h {m} min"),
        (d, h, _, _) => format!("{d} d {h} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_http_are_read() {
        assert_eq!(parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(parse_http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        for wrong in ["", "now", "Sun, 06 Nov 1994 08:49 GMT", "Sun, 31 Feb 1994 08:49:37 GMT", "a b c d e GMT"] {
            assert_eq!(parse_http_date(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_clock_is_told_which_way_it_is_off() {
        for (off, mark, words) in [
            (0, '✓', "within"),
            (-30, '✓', "within"),
            (31, '!', "31 s ahead of"),
            (-300, '!', "5 min 0 s behind"),
            (301, '✗', "5 min 1 s ahead of"),
            (-3600, '✗', "1 h 0 min behind"),
            (3 * 86400 + 7200, '✗', "3 d 2 h ahead of"),
            (i64::MAX, '✗', "ahead of"),
        ] {
            let mut out = Vec::new();
            compare(&mut Report::new(&mut out, false), 0, off);
            let told = String::from_utf8(out).expect("text");
            assert!(told.contains(mark) && told.contains(words), "{off}: {told}");
        }
    }
}
