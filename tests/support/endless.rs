//! A line that is too long to be kept in memory.

use super::{base64, unbase64};

/// An endless line that repeats a period. Received pieces are compared in base64 as they come, as decoding them would take an
/// unoptimized test too long.
pub struct EndlessLine {
    pub period: Vec<u8>,
    /// The base64 of two periods, from each of the first three bytes on.
    base64: [String; 3],
    /// Bytes received.
    pub length: usize,
}

impl EndlessLine {
    pub fn new() -> Self {
        let byte = |n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8 | 0x20;
        let period: Vec<u8> = (0..48 << 10).map(byte).collect();
        let twice = period.repeat(2);
        let base64 = [0, 1, 2].map(|start| base64(&twice[start..]));
        Self { period, base64, length: 0 }
    }

    /// Compares the next piece, in base64.
    pub fn compare(&mut self, piece: &str) {
        let at = self.length % self.period.len();
        let (groups, last) = piece.split_at(piece.len() - 4);
        let expected = &self.base64[at % 3][at / 3 * 4..];
        assert!(expected.starts_with(groups), "the piece at {} differs", self.length);
        let last = unbase64(last);
        let at = (at + groups.len() / 4 * 3) % self.period.len();
        assert!(self.period[at..].iter().chain(&self.period).zip(&last).all(|(a, b)| a == b));
        self.length += groups.len() / 4 * 3 + last.len();
    }
}
