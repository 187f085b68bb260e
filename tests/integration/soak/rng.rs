//! Reproducible random numbers: splitmix64, with a separate stream for each actor and each job.

use std::ops::Range;
use std::time::Duration;

use crate::support::ms;

#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    /// The stream of one actor, by name.
    pub fn of(seed: u64, actor: &str) -> Self {
        let name = actor.bytes().fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Self(name)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// True with this probability, in thousandths.
    pub fn per_mille(&mut self, share: u64) -> bool {
        self.within(0..1000) < share
    }

    /// Milliseconds.
    pub fn time(&mut self, range: Range<u64>) -> Duration {
        ms(self.within(range))
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.next() as usize % of.len()]
    }

    /// One of these, with probabilities proportional to the weights.
    pub fn weighed<T: Copy>(&mut self, of: &[(u64, T)]) -> T {
        let mut at = self.within(0..of.iter().map(|(weight, _)| weight).sum());
        for (weight, one) in of {
            match at.checked_sub(*weight) {
                Some(left) => at = left,
                None => return *one,
            }
        }
        unreachable!("the weights add up")
    }
}
