//! How far the box's clock is off.

use super::report::Report;
use crate::sys::datetime;

/// More than this, and certificates and signatures that others date begin to fail.
const OFF_MAX_SECONDS: i64 = 5 * 60;
/// Less than this is the network and the whole seconds of the header.
const OFF_SEEN_SECONDS: i64 = 30;

/// How a clock is set right.
const FIX: &str = "timedatectl set-ntp true (as root), or whatever keeps this box's clock";

/// Compares what the coordinator's `Date` said with the box's clock at the same moment.
pub fn compare(report: &mut Report<'_>, theirs: i64, ours: i64) {
    let off = ours.saturating_sub(theirs);
    let way = if off > 0 { "ahead of" } else { "behind" };
    let span = datetime::format_duration(off.unsigned_abs());
    let what = format_args!("{span} {way} the coordinator's");
    match i64::try_from(off.unsigned_abs()).unwrap_or(i64::MAX) {
        0..=OFF_SEEN_SECONDS => report.pass("clock", format_args!("that of the coordinator, within 30 s")),
        seconds if seconds <= OFF_MAX_SECONDS => report.warn("clock", what, format_args!("{FIX}")),
        _ => report.fail("clock", what, format_args!("{FIX}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
