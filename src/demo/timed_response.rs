//! One answer with the moments at which its bytes came, and what two such records of the same bytes tell. Pure but for the
//! clock.

use std::time::{Duration, Instant};

use crate::backend::{BackendResult, JobSink};

/// The bytes of an answer, from the request on.
pub(super) struct Timed {
    asked_at: Instant,
    pub(super) bytes: Vec<u8>,
    /// Of each piece that came: when, and how many bytes there were with it.
    pieces: Vec<(Instant, usize)>,
}

impl Timed {
    /// The request is sent now.
    pub(super) fn asked_now() -> Self {
        Self { asked_at: Instant::now(), bytes: Vec::new(), pieces: Vec::new() }
    }

    /// The next bytes came at this moment.
    pub(super) fn push(&mut self, at: Instant, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        self.pieces.push((at, self.bytes.len()));
    }

    /// From the request to the first byte; without any byte, until now.
    pub(super) fn first_byte(&self) -> Duration {
        self.pieces.first().map_or_else(Instant::now, |(at, _)| *at) - self.asked_at
    }

    /// From the request to the last byte; without any byte, until now.
    pub(super) fn total(&self) -> Duration {
        self.pieces.last().map_or_else(Instant::now, |(at, _)| *at) - self.asked_at
    }

    /// Adds the time from each piece to the next.
    pub(super) fn gaps(&self, to: &mut Vec<Duration>) {
        to.extend(self.pieces.windows(2).map(|two| two[1].0 - two[0].0));
    }

    /// Whether bytes of this answer had come, and others were still to come, when `other` began.
    pub(super) fn is_under_way_with(&self, other: &Self) -> bool {
        let began = other.asked_at + other.first_byte();
        (self.asked_at + self.first_byte()..=self.asked_at + self.total()).contains(&began)
    }

    /// Adds how much later than in `before` each event of the stream was whole here. The bytes have to be the same; the
    /// pieces need not be.
    pub(super) fn delays(&self, before: &Self, to: &mut Vec<Duration>) {
        for end in (1..=self.bytes.len()).filter(|end| ends_an_event(&self.bytes[..*end])) {
            to.push(self.whole_at(end).saturating_duration_since(before.whole_at(end)));
        }
    }

    /// When the first `count` bytes were there.
    fn whole_at(&self, count: usize) -> Instant {
        let piece = self.pieces.partition_point(|(_, bytes)| *bytes < count);
        self.pieces.get(piece).map_or(self.asked_at, |(at, _)| *at)
    }
}

/// As the sink of a request that no agent stands between.
impl JobSink for Timed {
    fn send_chunk(&mut self, bytes: &[u8]) -> BackendResult<()> {
        self.push(Instant::now(), bytes);
        Ok(())
    }
}

/// Whether so much of a stream ends with a blank line.
fn ends_an_event(stream: &[u8]) -> bool {
    stream.ends_with(b"\n\n") || stream.ends_with(b"\n\r\n")
}

/// The time that so many in a hundred are below: 50 is the median. Zero of nothing.
pub(super) fn percentile(times: &[Duration], percent: usize) -> Duration {
    let rank = |time: &&Duration| times.iter().filter(|other| other < time).count() <= times.len() * percent / 100;
    times.iter().filter(rank).max().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// An answer whose pieces come so many milliseconds after the request.
    fn timed(asked_at: Instant, pieces: &[(u32, &str)]) -> Timed {
        let mut timed = Timed { asked_at, bytes: Vec::new(), pieces: Vec::new() };
        pieces.iter().for_each(|(ms, piece)| timed.push(asked_at + MS * *ms, piece.as_bytes()));
        timed
    }

    #[test]
    fn each_event_is_late_by_its_own_time_however_the_stream_was_cut() {
        let start = Instant::now();
        let given = timed(start, &[(10, "data: 1\n\nda"), (20, "ta: 2\r\n\r\n"), (30, "data: 3\n\n")]);
        let arrived = timed(start, &[(11, "data: 1\n\n"), (32, "data: 2\r\n\r\ndata: 3\n"), (35, "\n")]);
        let (mut delays, mut gaps) = (Vec::new(), Vec::new());
        arrived.delays(&given, &mut delays);
        timed(start, &[(1, "{}")]).delays(&given, &mut delays);
        assert_eq!(delays, [MS, MS * 12, MS * 5]);
        assert_eq!((given.first_byte(), given.total()), (MS * 10, MS * 30));
        arrived.gaps(&mut gaps);
        assert_eq!(gaps, [MS * 21, MS * 3]);
    }

    #[test]
    fn answers_are_under_way_together_when_one_begins_within_the_other() {
        let start = Instant::now();
        let [first, second, third] =
            [(10, 20), (15, 30), (25, 40)].map(|(from, to)| timed(start, &[(from, "a"), (to, "b")]));
        assert!(first.is_under_way_with(&second) && !second.is_under_way_with(&first));
        assert!(second.is_under_way_with(&third) && !first.is_under_way_with(&third));
        assert!(first.is_under_way_with(&first));
    }

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let of = |times: &[u32], percent| percentile(&times.iter().map(|n| MS * *n).collect::<Vec<_>>(), percent);
        for times in [&[3, 1, 2][..], &[2, 2, 9], &[2, 2, 1], &[5, 2, 2, 1, 9], &[2]] {
            assert_eq!(of(times, 50), MS * 2, "{times:?}");
        }
        let hundred: Vec<u32> = (1..=100).collect();
        assert_eq!([25, 75, 99].map(|percent| of(&hundred, percent)), [MS * 26, MS * 76, MS * 100]);
        assert_eq!(of(&[], 50), Duration::ZERO);
    }
}
