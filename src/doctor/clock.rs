//! Checks the offset of this machine's clock from the coordinator's.

use super::report::Report;
use crate::sys::datetime;

/// The maximum offset, in seconds, at which certificates and signatures of others are still accepted.
const OFF_MAX_SECONDS: i64 = 5 * 60;
/// The minimum offset that is reported, in seconds; smaller offsets are within the precision of the header and the network delay.
const OFF_IGNORED_SECONDS: i64 = 30;

const FIX: &str = "timedatectl set-ntp true (as root), or synchronize the clock in another way";

/// Compares the `Date` of the coordinator with the clock of this machine at the same moment.
pub fn compare(report: &mut Report<'_>, theirs: i64, ours: i64) {
    let off = ours.saturating_sub(theirs);
    let direction = if off > 0 { "ahead of" } else { "behind" };
    let span = datetime::format_duration(off.unsigned_abs());
    let what = format_args!("{span} {direction} the coordinator's");
    match i64::try_from(off.unsigned_abs()).unwrap_or(i64::MAX) {
        0..=OFF_IGNORED_SECONDS => report.pass("clock", "within 30 s of the coordinator's"),
        seconds if seconds <= OFF_MAX_SECONDS => report.warn("clock", what, FIX),
        _ => report.fail("clock", what, FIX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::terminal::Terminal;

    #[test]
    fn compare_reports_the_direction_and_size_of_the_offset() {
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
            let terminal = Terminal { width: 80, is_utf8: true, is_live: false, has_color: false };
            let mut out = Vec::new();
            compare(&mut Report::new(&mut out, terminal), 0, off);
            let text = String::from_utf8(out).expect("text");
            assert!(text.contains(mark) && text.contains(words), "{off}: {text}");
        }
    }
}
