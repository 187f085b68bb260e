//! Formats and parses points in time, with the crates `time` and `httpdate`, and formats durations for people.
//!
//! A point in time is a [`SystemTime`] or Unix seconds, always UTC. Parsing returns `None` if the text is not a date.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// The last second of the year 9999, the latest that the formats support.
const UNIX_SECONDS_MAX: u64 = 253_402_300_799;

/// Unix seconds of a system time, within the years 1970 to 9999.
pub fn to_unix(at: SystemTime) -> i64 {
    let seconds = at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    seconds.min(UNIX_SECONDS_MAX).cast_signed()
}

/// The current Unix seconds, by the clock of this machine.
pub fn now() -> i64 {
    to_unix(SystemTime::now())
}

/// Formats as RFC 3339: `1994-11-06T08:49:37Z`.
pub fn rfc3339(at: SystemTime) -> String {
    date_time(to_unix(at)).format(&Rfc3339).unwrap_or_default()
}

/// Formats the date only: `1994-11-06`.
pub fn format_date(unix_seconds: i64) -> String {
    date_time(unix_seconds).date().to_string()
}

/// Formats as HTTP's `Date`: `Sun, 06 Nov 1994 08:49:37 GMT`.
pub fn format_http(at: SystemTime) -> String {
    // `httpdate` panics outside the years 1970 to 9999.
    httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(to_unix(at).unsigned_abs()))
}

/// Parses RFC 3339 in any time zone. Fractions of a second are dropped.
pub fn parse_rfc3339(text: &str) -> Option<i64> {
    OffsetDateTime::parse(text.trim(), &Rfc3339).ok().map(OffsetDateTime::unix_timestamp)
}

/// Parses any valid format of HTTP's `Date`.
pub fn parse_http(text: &str) -> Option<i64> {
    httpdate::parse_http_date(text.trim()).ok().map(to_unix)
}

/// Formats a duration in its two largest units: `2 h 1 min`.
pub fn format_duration(seconds: u64) -> String {
    let (large, large_unit, small, small_unit) = match seconds {
        0..60 => return format!("{seconds} s"),
        60..3_600 => (seconds / 60, "min", seconds % 60, "s"),
        3_600..86_400 => (seconds / 3_600, "h", seconds / 60 % 60, "min"),
        _ => (seconds / 86_400, "d", seconds / 3_600 % 24, "h"),
    };
    format!("{large} {large_unit} {small} {small_unit}")
}

/// Converts to `time`'s type; returns the epoch for years that `time` does not support.
fn date_time(unix_seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(unix_seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn dates_are_written_and_read() {
        let at = after(784_111_777) + Duration::from_millis(250);
        assert_eq!(format_http(at), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(rfc3339(at), "1994-11-06T08:49:37Z");
        assert_eq!(rfc3339(UNIX_EPOCH), "1970-01-01T00:00:00Z");
        assert_eq!(format_http(UNIX_EPOCH), "Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(format_date(-1), "1969-12-31");
        for same in ["1994-11-06T08:49:37Z", "1994-11-06T08:49:37.999+00:00", "1994-11-06 10:19:37+01:30"] {
            assert_eq!(parse_rfc3339(same), Some(784_111_777), "{same}");
        }
        assert_eq!(parse_rfc3339("1994-11-06T00:49:37-08:00"), Some(784_111_777));
        assert_eq!(parse_rfc3339("2016-12-31T23:59:60Z"), Some(1_483_228_799), "a leap second is the one before it");
    }

    #[test]
    fn every_second_comes_back_and_none_that_a_clock_can_show_panics() {
        arbtest::arbtest(|u| {
            let seconds = u.int_in_range(0..=UNIX_SECONDS_MAX)?;
            let unix_seconds = Some(seconds.cast_signed());
            assert_eq!(parse_rfc3339(&rfc3339(after(seconds))), unix_seconds);
            assert_eq!(parse_http(&format_http(after(seconds))), unix_seconds);
            format_date(u.arbitrary()?);
            Ok(())
        });
        let years = Duration::from_secs(400_000_000_000);
        for at in [UNIX_EPOCH - years, UNIX_EPOCH - Duration::from_millis(1), UNIX_EPOCH + years] {
            assert_eq!(parse_rfc3339(&rfc3339(at)), Some(to_unix(at)));
            assert_eq!(parse_http(&format_http(at)), Some(to_unix(at)));
        }
    }

    #[test]
    fn what_is_no_date_is_none() {
        for text in [
            "",
            "now",
            "Sun, 06 Nov 1994",
            "Sun, 06 Nov 1994 08:49 GMT",
            "Sun, 31 Feb 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "a b c d e GMT",
        ] {
            assert_eq!(parse_http(text), None, "{text}");
        }
        for text in [
            "",
            "soon",
            "2026",
            "1994-11-06",
            "1994-11-06T08:49:37",
            "1994-11-06T08:49:37.5",
            "1994-13-06T08:49:37Z",
            "1994-00-06T08:49:37Z",
            "1994-11-06T25:49:37Z",
            "1994-11-06T08-49-37Z",
            "1994-11-06T08:49:37+\u{e9}",
            "1994-11-06T08:49:37+99:99",
            "äääääääääääääää",
        ] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
        arbtest::arbtest(|u| {
            let text: &str = u.arbitrary()?;
            parse_rfc3339(text);
            parse_http(text);
            Ok(())
        });
    }

    #[test]
    fn durations_have_two_units() {
        let cases =
            [(59, "59 s"), (61, "1 min 1 s"), (7_260, "2 h 1 min"), (90_000, "1 d 1 h"), (86_400 * 800, "800 d 0 h")];
        cases.iter().for_each(|(seconds, text)| assert_eq!(format_duration(*seconds), *text));
    }
}
