//! `max_tokens_per_minute`, over a sliding minute.
//!
//! Tokens count when they are seen: those of an answer as they pass, those of a prompt when the backend says how many there
//! were, which is at the job's end. What a job is going to use nobody knows beforehand, so the minute may run over by what
//! the jobs in flight still emit.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// The minute is kept by the second: the window is 60 s long, and up to one second more.
const SECONDS: usize = 60;

/// The limit and what was used of it. Without a limit nothing is counted.
#[derive(Debug, Default)]
pub struct TokenLimit {
    per_minute: Option<u64>,
    used: Mutex<Used>,
}

#[derive(Debug)]
struct Used {
    began: Instant,
    /// The second, since `began`, that was written last.
    newest: u64,
    /// Tokens by second, that of second `s` at `s` modulo the length.
    by_second: [u64; SECONDS + 1],
}

impl Default for Used {
    fn default() -> Self {
        Used { began: Instant::now(), newest: 0, by_second: [0; SECONDS + 1] }
    }
}

impl TokenLimit {
    /// So many tokens a minute, or any number of them.
    pub fn new(per_minute: Option<u64>) -> TokenLimit {
        TokenLimit { per_minute, used: Mutex::default() }
    }

    /// Counts tokens that were just seen.
    pub fn count(&self, tokens: u64) {
        if self.per_minute.is_some() && tokens > 0 {
            self.count_at(Instant::now(), tokens);
        }
    }

    /// The limit, once it is used up.
    pub fn used_up(&self) -> Option<u64> {
        let limit = self.per_minute?;
        (self.sum_at(Instant::now()) >= limit).then_some(limit)
    }

    fn count_at(&self, now: Instant, tokens: u64) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = used.forget_until(now);
        used.by_second[slot] = used.by_second[slot].saturating_add(tokens);
    }

    fn sum_at(&self, now: Instant) -> u64 {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.forget_until(now);
        used.by_second.iter().fold(0, |sum, tokens| sum.saturating_add(*tokens))
    }
}

impl Used {
    /// Clears the seconds that have left the window; returns the place of this one.
    fn forget_until(&mut self, now: Instant) -> usize {
        let length = self.by_second.len() as u64;
        let second = now.saturating_duration_since(self.began).as_secs().max(self.newest);
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
    fn tokens_leave_with_their_minute() {
        let limit = TokenLimit::new(Some(100));
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
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
    fn the_limit_is_used_up_when_it_is_reached() {
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
    fn any_sequence_of_counts_is_a_sum_over_the_last_minute() {
        arbtest::arbtest(|u| {
            let limit = TokenLimit::new(Some(1));
            let began = limit.used.lock().expect("not poisoned").began;
            let (mut second, mut counted) = (0u64, Vec::new());
            for _ in 0..u.int_in_range(0..=40)? {
                second += u.int_in_range(0..=90)?;
                let tokens = u64::from(u.arbitrary::<u8>()?);
                limit.count_at(began + Duration::from_secs(second), tokens);
                counted.push((second, tokens));
            }
            let within = |(at, _): &&(u64, u64)| at + SECONDS as u64 >= second;
            let expected: u64 = counted.iter().filter(within).map(|(_, tokens)| tokens).sum();
            assert_eq!(limit.sum_at(began + Duration::from_secs(second)), expected);
            Ok(())
        });
    }
}
