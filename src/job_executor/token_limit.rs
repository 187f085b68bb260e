//! Enforces `max_tokens_per_minute` over a sliding window.
//!
//! Tokens count as soon as they are known: output tokens as they are relayed, input tokens at the job's end, when the backend
//! reports them. A job's tokens are not known in advance, so the jobs in flight may exceed the limit.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Seconds in the window, which has a resolution of one second: it covers between 60 and 61 s.
const SECONDS: usize = 60;

/// The limit, and the tokens used within the window. Without a limit, no tokens are counted.
#[derive(Debug, Default)]
pub struct TokenLimit {
    per_minute: Option<u64>,
    used: Mutex<Used>,
}

#[derive(Debug)]
struct Used {
    started: Instant,
    /// The latest second that is valid in `by_second`, counted from `started`.
    newest: u64,
    /// A ring buffer: second `s` is at index `s` modulo the length.
    by_second: [u64; SECONDS + 1],
}

impl Default for Used {
    fn default() -> Self {
        Used { started: Instant::now(), newest: 0, by_second: [0; SECONDS + 1] }
    }
}

impl TokenLimit {
    /// A limit of `per_minute` tokens; `None` for no limit.
    pub fn new(per_minute: Option<u64>) -> TokenLimit {
        TokenLimit { per_minute, used: Mutex::default() }
    }

    /// Counts tokens as used now.
    pub fn count(&self, tokens: u64) {
        if self.per_minute.is_some() && tokens > 0 {
            self.count_at(Instant::now(), tokens);
        }
    }

    /// The limit, if it is used up.
    pub fn used_up(&self) -> Option<u64> {
        let limit = self.per_minute?;
        (self.sum_at(Instant::now()) >= limit).then_some(limit)
    }

    fn count_at(&self, now: Instant, tokens: u64) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let index = used.advance_to(now);
        used.by_second[index] = used.by_second[index].saturating_add(tokens);
    }

    fn sum_at(&self, now: Instant) -> u64 {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.advance_to(now);
        used.by_second.iter().fold(0, |sum, tokens| sum.saturating_add(*tokens))
    }
}

impl Used {
    /// Clears the seconds that have left the window, and returns the index of the current second.
    fn advance_to(&mut self, now: Instant) -> usize {
        let length = self.by_second.len() as u64;
        let second = now.saturating_duration_since(self.started).as_secs().max(self.newest);
        for passed in (self.newest + 1..=second).take(self.by_second.len()) {
            self.by_second[(passed % length) as usize] = 0;
        }
        self.newest = second;
        (second % length) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn token_limit_forgets_tokens_after_a_minute() {
        let limit = TokenLimit::new(Some(100));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        limit.count_at(at(0), 60);
        limit.count_at(at(30), 30);
        assert_eq!(limit.sum_at(at(30)), 90);
        limit.count_at(at(31), 10);
        assert_eq!(limit.sum_at(at(59)), 100);
        assert_eq!(limit.sum_at(at(62)), 40, "the first 60 are gone");
        assert_eq!(limit.sum_at(at(10_000)), 0);
        limit.count_at(at(10_001), 7);
        assert_eq!(limit.sum_at(at(10_002)), 7);
    }

    #[test]
    fn token_limit_is_used_up_when_it_is_reached() {
        let limit = TokenLimit::new(Some(10));
        limit.count(9);
        assert_eq!(limit.used_up(), None);
        limit.count(1);
        assert_eq!(limit.used_up(), Some(10));
        let none = TokenLimit::new(None);
        none.count(u64::MAX);
        assert_eq!(none.used_up(), None);
    }

    #[test]
    fn token_limit_sums_any_sequence_of_counts_over_the_last_minute() {
        arbtest::arbtest(|u| {
            let limit = TokenLimit::new(Some(1));
            let started = limit.used.lock().expect("not poisoned").started;
            let (mut second, mut counted) = (0u64, Vec::new());
            for _ in 0..u.int_in_range(0..=40)? {
                second += u.int_in_range(0..=90)?;
                let tokens = u64::from(u.arbitrary::<u8>()?);
                limit.count_at(started + Duration::from_secs(second), tokens);
                counted.push((second, tokens));
            }
            let within = |(at, _): &&(u64, u64)| at + SECONDS as u64 >= second;
            let expected: u64 = counted.iter().filter(within).map(|(_, tokens)| tokens).sum();
            assert_eq!(limit.sum_at(started + Duration::from_secs(second)), expected);
            Ok(())
        });
    }
}
