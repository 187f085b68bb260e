//! A response with the arrival times of its bytes, and the delays between two recordings of the same response.

use std::time::{Duration, Instant};

use crate::backend::{BackendResult, JobSink};

/// A response with the arrival times of its bytes.
pub(super) struct Timed {
    started: Instant,
    pub(super) bytes: Vec<u8>,
    /// For each piece: its arrival, and the number of bytes including it.
    pieces: Vec<(Instant, usize)>,
}

impl Timed {
    /// Starts the response to a request that is sent now.
    pub(super) fn starting_now() -> Self {
        Self { started: Instant::now(), bytes: Vec::new(), pieces: Vec::new() }
    }

    /// Appends bytes that arrived at this moment.
    pub(super) fn push(&mut self, at: Instant, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        self.pieces.push((at, self.bytes.len()));
    }

    /// Time from the request to the first byte, or until now if there is none.
    pub(super) fn first_byte(&self) -> Duration {
        self.pieces.first().map_or_else(Instant::now, |(at, _)| *at) - self.started
    }

    /// Time from the request to the last byte, or until now if there is none.
    pub(super) fn total(&self) -> Duration {
        self.pieces.last().map_or_else(Instant::now, |(at, _)| *at) - self.started
    }

    /// Appends the times between pieces to `to`.
    pub(super) fn gaps(&self, to: &mut Vec<Duration>) {
        to.extend(self.pieces.windows(2).map(|two| two[1].0 - two[0].0));
    }

    /// Whether this response was in progress when `other` started.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        let other_started = other.started + other.first_byte();
        (self.started + self.first_byte()..=self.started + self.total()).contains(&other_started)
    }

    /// Appends to `to` the delay of each event relative to `before`. The bytes must be the same; the pieces may differ.
    pub(super) fn delays(&self, before: &Self, to: &mut Vec<Duration>) {
        for end in (1..=self.bytes.len()).filter(|end| ends_an_event(&self.bytes[..*end])) {
            to.push(self.complete_at(end).saturating_duration_since(before.complete_at(end)));
        }
    }

    /// The time at which the first `count` bytes had arrived.
    fn complete_at(&self, count: usize) -> Instant {
        let piece = self.pieces.partition_point(|(_, bytes)| *bytes < count);
        self.pieces.get(piece).map_or(self.started, |(at, _)| *at)
    }
}

/// Records the response to a direct request.
impl JobSink for Timed {
    fn send_chunk(&mut self, bytes: &[u8]) -> BackendResult<()> {
        self.push(Instant::now(), bytes);
        Ok(())
    }
}

/// Whether this prefix of a stream ends with a blank line.
fn ends_an_event(stream: &[u8]) -> bool {
    stream.ends_with(b"\n\n") || stream.ends_with(b"\n\r\n")
}

/// A percentile; 50 is the median. Zero if there are no times.
pub(super) fn percentile(times: &[Duration], percent: usize) -> Duration {
    let rank = |time: &&Duration| times.iter().filter(|other| other < time).count() <= times.len() * percent / 100;
    times.iter().filter(rank).max().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A response whose pieces arrive this many milliseconds after the request.
    fn timed(started: Instant, pieces: &[(u32, &str)]) -> Timed {
        let mut timed = Timed { started, bytes: Vec::new(), pieces: Vec::new() };
        pieces.iter().for_each(|(ms, piece)| timed.push(started + MS * *ms, piece.as_bytes()));
        timed
    }

    #[test]
    fn delays_are_per_event_however_the_stream_was_split() {
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
    fn responses_overlap_when_one_starts_within_the_other() {
        let start = Instant::now();
        let [first, second, third] =
            [(10, 20), (15, 30), (25, 40)].map(|(from, to)| timed(start, &[(from, "a"), (to, "b")]));
        assert!(first.overlaps(&second) && !second.overlaps(&first));
        assert!(second.overlaps(&third) && !first.overlaps(&third));
        assert!(first.overlaps(&first));
    }

    #[test]
    fn percentiles_are_measured_times() {
        let of = |times: &[u32], percent| percentile(&times.iter().map(|n| MS * *n).collect::<Vec<_>>(), percent);
        for times in [&[3, 1, 2][..], &[2, 2, 9], &[2, 2, 1], &[5, 2, 2, 1, 9], &[2]] {
            assert_eq!(of(times, 50), MS * 2, "{times:?}");
        }
        let hundred: Vec<u32> = (1..=100).collect();
        assert_eq!([25, 75, 99].map(|percent| of(&hundred, percent)), [MS * 26, MS * 76, MS * 100]);
        assert_eq!(of(&[], 50), Duration::ZERO);
    }
}
