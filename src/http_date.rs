//! Dates as HTTP has them: `Sun, 06 Nov 1994 08:49:37 GMT`.

use std::time::SystemTime;

use time::{Date, Month, OffsetDateTime, Time, UtcOffset};

const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// For a `Date` header.
pub fn format(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at);
    let (day, month) =
        (DAYS[usize::from(at.weekday().number_days_from_monday())], MONTHS[usize::from(u8::from(at.month())) - 1]);
    let (hour, minute, second) = at.to_hms();
    format!("{day}, {:02} {month} {:04} {hour:02}:{minute:02}:{second:02} GMT", at.day(), at.year())
}

/// The Unix time, in seconds, that a `Date` header says; the day of the week is not looked at.
pub fn parse(text: &str) -> Option<i64> {
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let [_, day, month, year, clock, "GMT"] = words[..] else { return None };
    let month = 1 + u8::try_from(MONTHS.iter().position(|name| *name == month)?).ok()?;
    unix(year.parse().ok()?, month, day.parse().ok()?, clock, UtcOffset::UTC)
}

/// The Unix time, in seconds, of an RFC 3339 text such as `1994-11-06T08:49:37.5+00:00`; parts of a second are left out.
pub fn parse_rfc3339(text: &str) -> Option<i64> {
    let (date, rest) = text.trim().split_once(['T', 't', ' '])?;
    let mut date = date.splitn(3, '-');
    let (year, month, day) = (date.next()?, date.next()?, date.next()?);
    let zone_at = rest.find(['Z', 'z', '+', '-'])?;
    let (clock, zone) = rest.split_at(zone_at);
    let offset = match zone.split_at(1) {
        ("Z" | "z", "") => UtcOffset::UTC,
        (sign, hours_and_minutes) => {
            let (hours, minutes) = hours_and_minutes.split_once(':')?;
            let (hours, minutes): (i8, i8) = (hours.parse().ok()?, minutes.parse().ok()?);
            let sign = if sign == "-" { -1 } else { 1 };
            UtcOffset::from_hms(sign * hours.clamp(0, 99), sign * minutes.clamp(0, 99), 0).ok()?
        }
    };
    let clock = clock.split_once('.').map_or(clock, |(whole, _)| whole);
    unix(year.parse().ok()?, month.parse().ok()?, day.parse().ok()?, clock, offset)
}

fn unix(year: i32, month: u8, day: u8, clock: &str, offset: UtcOffset) -> Option<i64> {
    let parts: Vec<u8> = clock.split(':').map(str::parse).collect::<Result<_, _>>().ok()?;
    let [hour, minute, second] = parts[..] else { return None };
    // A leap second is no moment of its own here.
    let time = Time::from_hms(hour, minute, second.min(59)).ok()?;
    let date = Date::from_calendar_date(year, Month::try_from(month).ok()?, day).ok()?;
    Some(date.with_time(time).assume_offset(offset).unix_timestamp())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn dates_are_written_and_read() {
        let at = UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(format(at), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        for same in ["1994-11-06T08:49:37Z", "1994-11-06T08:49:37.999+00:00", "1994-11-06 10:19:37+01:30"] {
            assert_eq!(parse_rfc3339(same), Some(784_111_777), "{same}");
        }
        assert_eq!(parse_rfc3339("1994-11-06T00:49:37-08:00"), Some(784_111_777));
    }

    #[test]
    fn what_is_no_date_is_none() {
        for text in ["", "Sun, 06 Nov 1994", "Sun, 31 Feb 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:37 CET"] {
            assert_eq!(parse(text), None, "{text}");
        }
        for text in
            ["", "soon", "1994-11-06", "1994-11-06T08:49:37", "1994-13-06T08:49:37Z", "1994-11-06T08:49:37+\u{e9}"]
        {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
        assert_eq!(parse_rfc3339("1994-11-06T08:49:37+99:99"), None);
    }
}
