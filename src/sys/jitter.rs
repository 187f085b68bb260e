//! Randomizes delays, so that many agents do not act at the same moment.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

/// A random number, uniform in `0.0..1.0`. The standard library's hasher keys are random; jitter needs no better source.
pub fn random() -> f64 {
    let random = RandomState::new().build_hasher().finish();
    (random >> 11) as f64 / (1u64 << 53) as f64
}

/// `delay` times a factor of 0.8 to 1.2, chosen by `random` in `0.0..1.0`.
pub fn scale(delay: Duration, random: f64) -> Duration {
    delay.mul_f64(0.8 + 0.4 * random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_stays_within_a_fifth() {
        for random in [-1.0, 0.0, 0.3, 0.999, 7.0, super::random()] {
            let seconds = scale(Duration::from_secs(1), random).as_secs_f64();
            assert!((0.8..=1.2).contains(&seconds), "{seconds}");
        }
    }
}
