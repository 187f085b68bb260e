//! Moments: how others write them, how we do, and how long it is from one to the other.
//!
//! A moment is seconds since 1970, UTC. Whatever a text holds, what is no date is `None`.

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

const DAY: i64 = 86_400;
/// From the first of March of the year 0 to 1970, in days.
const DAYS_TO_1970: i64 = 719_468;
/// Leap years come again after so many years of so many days.
const ERA: (i64, i64) = (400, 146_097);

const WEEKDAYS: &str = "ThuFriSatSunMonTueWed";
const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";

/// The moment of a time that the system gives, 1970 for what was before.
pub fn moment_of(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).ok().and_then(|since| i64::try_from(since.as_secs()).ok()).unwrap_or(0)
}

/// This moment, by the box's clock.
pub fn now() -> i64 {
    moment_of(SystemTime::now())
}

/// In RFC 3339: `1994-11-06T08:49:37Z`.
pub fn rfc3339(at: SystemTime) -> String {
    let moment = moment_of(at);
    let (hour, minute, second) = time_of(moment);
    format!("{}T{hour:02}:{minute:02}:{second:02}Z", day(moment))
}

/// The day alone: `1994-11-06`.
pub fn day(moment: i64) -> String {
    let (year, month, day) = calendar(moment.div_euclid(DAY));
    format!("{year:04}-{month:02}-{day:02}")
}

/// As in HTTP's `Date`: `Sun, 06 Nov 1994 08:49:37 GMT`.
pub fn http(at: SystemTime) -> String {
    let moment = moment_of(at);
    let (year, month, day) = calendar(moment.div_euclid(DAY));
    let (hour, minute, second) = time_of(moment);
    let (weekday, month) = (name(WEEKDAYS, moment / DAY % 7), name(MONTHS, month - 1));
    format!("{weekday}, {day:02} {month} {year:04} {hour:02}:{minute:02}:{second:02} GMT")
}

/// Reads what [`rfc3339`] writes, parts of a second and other zones too; the parts are left out.
pub fn parse_rfc3339(text: &str) -> Option<i64> {
    let text = text.trim().as_bytes();
    let marks = [(4, "-"), (7, "-"), (10, "Tt "), (13, ":"), (16, ":")];
    let is_marked = |(at, any): (usize, &str)| text.get(at).is_some_and(|byte| any.as_bytes().contains(byte));
    if !marks.into_iter().all(is_marked) {
        return None;
    }
    let local = moment(number(text, 0..4)?, [5, 8, 11, 14, 17].map(|at| number(text, at..at + 2)))?;
    let mut zone = text.get(19..)?;
    if let Some(parts) = zone.strip_prefix(b".") {
        zone = &parts[parts.iter().take_while(|byte| byte.is_ascii_digit()).count()..];
    }
    let east = match zone {
        [b'Z' | b'z'] => return Some(local),
        [b'+', ..] => 1,
        [b'-', ..] => -1,
        _ => return None,
    };
    let (hours, minutes) = (number(zone, 1..3)?, number(zone, 4..6)?);
    let is_zone = zone.len() == 6 && zone[3] == b':' && hours < 24 && minutes < 60;
    is_zone.then_some(local - east * 60 * (60 * hours + minutes))
}

/// Reads what [`http`] writes; the day of the week is not looked at.
pub fn parse_http(text: &str) -> Option<i64> {
    let text = text.trim().as_bytes();
    let month = MONTHS.as_bytes().chunks(3).zip(1..).find(|(name, _)| text.get(8..11) == Some(name))?.1;
    let [day, hour, minute, second] = [5, 17, 20, 23].map(|at| number(text, at..at + 2));
    let moment = moment(number(text, 12..16)?, [Some(month), day, hour, minute, second]);
    moment.filter(|_| text.get(25..) == Some(b" GMT"))
}

/// The moment of a year and the month, day, hour, minute and second in it; `None` when there is none. A leap second is the one
/// before it.
pub fn moment(year: i64, rest: [Option<i64>; 5]) -> Option<i64> {
    let [month, day, hour, minute, second] = rest;
    let (month, day, hour, minute, second) = (month?, day?, hour?, minute?, second?);
    // Years begin in March here, so that a leap day is the last of its year.
    let (from_march, march_year) = if month > 2 { (month - 3, year) } else { (month + 9, year - 1) };
    let leap_days = march_year.div_euclid(4) - march_year.div_euclid(100) + march_year.div_euclid(ERA.0);
    let days = 365 * march_year + leap_days + (153 * from_march + 2) / 5 + day - 1 - DAYS_TO_1970;
    // A day that its month does not have is one of the next.
    let is_one = calendar(days) == (year, month, day) && hour < 24 && minute < 60 && second < 61;
    is_one.then_some(days * DAY + hour * 3600 + minute * 60 + second.min(59))
}

/// The number that these bytes of a text write, in digits alone.
pub fn number(text: &[u8], range: Range<usize>) -> Option<i64> {
    let digit = |byte: &u8| byte.is_ascii_digit().then(|| i64::from(byte - b'0'));
    text.get(range)?.iter().try_fold(0_i64, |number, byte| number.checked_mul(10)?.checked_add(digit(byte)?))
}

/// A time that has passed, in its two largest units.
pub fn span(seconds: u64) -> String {
    let (large, large_unit, small, small_unit) = match seconds {
        0..60 => return format!("{seconds} s"),
        60..3_600 => (seconds / 60, "min", seconds % 60, "s"),
        3_600..86_400 => (seconds / 3_600, "h", seconds / 60 % 60, "min"),
        _ => (seconds / 86_400, "d", seconds / 3_600 % 24, "h"),
    };
    format!("{large} {large_unit} {small} {small_unit}")
}

/// Year, month and day of so many days since 1970.
fn calendar(days: i64) -> (i64, i64, i64) {
    let days = days + DAYS_TO_1970;
    let (era, of_era) = (days.div_euclid(ERA.1), days.rem_euclid(ERA.1));
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year + era * ERA.0 + i64::from(month < 3), month, day)
}

/// Hour, minute and second.
fn time_of(moment: i64) -> (i64, i64, i64) {
    let second = moment.rem_euclid(DAY);
    (second / 3_600, second / 60 % 60, second % 60)
}

/// The one of so many names of three letters.
fn name(names: &'static str, number: i64) -> &'static str {
    let at = usize::try_from(number).unwrap_or(0) * 3;
    names.get(at..at + 3).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn after(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn dates_are_written_and_read() {
        let at = after(784_111_777);
        assert_eq!(http(at), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(rfc3339(at), "1994-11-06T08:49:37Z");
        assert_eq!(rfc3339(UNIX_EPOCH), "1970-01-01T00:00:00Z");
        assert_eq!(http(UNIX_EPOCH), "Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(day(-1), "1969-12-31");
        for same in ["1994-11-06T08:49:37Z", "1994-11-06T08:49:37.999+00:00", "1994-11-06 10:19:37+01:30"] {
            assert_eq!(parse_rfc3339(same), Some(784_111_777), "{same}");
        }
        assert_eq!(parse_rfc3339("1994-11-06T00:49:37-08:00"), Some(784_111_777));
    }

    /// The `time` crate's calendar is the measure.
    #[test]
    fn every_day_is_the_one_of_the_calendar_and_comes_back() {
        for days in 0..=2_932_896_i64 {
            let date = time::Date::from_julian_day(i32::try_from(days + 2_440_588).expect("a day")).expect("a date");
            let (year, month, day) = date.to_calendar_date();
            let expected = (i64::from(year), i64::from(u8::from(month)), i64::from(day));
            assert_eq!(calendar(days), expected);
            let (year, month, day) = expected;
            assert_eq!(moment(year, [month, day, 0, 0, 0].map(Some)), Some(days * DAY));
        }
        arbtest::arbtest(|u| {
            let seconds = u.int_in_range(0..=253_402_300_799_i64)?;
            let at = after(u64::try_from(seconds).expect("not negative"));
            assert_eq!(parse_rfc3339(&rfc3339(at)), Some(seconds));
            assert_eq!(parse_http(&http(at)), Some(seconds));
            let expected = time::OffsetDateTime::from(at).weekday().to_string();
            assert_eq!(http(at)[..3], expected[..3]);
            Ok(())
        });
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
    fn spans_have_two_units() {
        let shown =
            [(59, "59 s"), (61, "1 min 1 s"), (7_260, "2 h 1 min"), (90_000, "1 d 1 h"), (86_400 * 800, "800 d 0 h")];
        shown.iter().for_each(|(seconds, text)| assert_eq!(span(*seconds), *text));
    }
}
