//! The token counts that a backend reports.

use serde_json::Value;

/// Token counts, each as last reported. Invariant: a 0 never replaces a count. Servers send 0 for a count that they do not know yet,
/// or that another event contains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, as the backend states them.
    pub input: Option<u32>,
    /// Tokens of the response.
    pub output: Option<u32>,
    /// Tokens of the prompt that `input` does not include because they were read from a cache or written to it.
    pub cached: Option<u32>,
}

impl Usage {
    /// Updates the counts from a `usage` object.
    pub fn merge(&mut self, usage: &Value) {
        let read = |names: [&str; 3]| {
            let counts = names.into_iter().filter_map(|name| count(&usage[name]));
            counts.reduce(|first, next| if first == 0 { next } else { first })
        };
        update(&mut self.input, read(["input_tokens", "prompt_tokens", "input"]));
        update(&mut self.output, read(["output_tokens", "completion_tokens", "output"]));
        // Unlike `input_tokens`, `prompt_tokens` include the cached ones, also where a gateway names them as Anthropic does.
        if usage["prompt_tokens"].is_null() {
            update(&mut self.cached, sum(&usage["cache_read_input_tokens"], &usage["cache_creation_input_tokens"]));
        }
    }

    /// Updates the counts from llama.cpp's `timings`.
    pub fn merge_timings(&mut self, timings: &Value) {
        update(&mut self.input, sum(&timings["prompt_n"], &timings["cache_n"]));
        update(&mut self.output, count(&timings["predicted_n"]));
    }

    /// The counts, completed by those of `other`.
    pub fn or(mut self, other: Usage) -> Usage {
        for (own, other) in [(&mut self.input, other.input), (&mut self.output, other.output)] {
            if own.is_none_or(|count| count == 0) {
                update(own, other);
            }
        }
        self
    }
}

fn update(count: &mut Option<u32>, new: Option<u32>) {
    if new.is_some_and(|new| new > 0) || count.is_none() {
        *count = new;
    }
}

fn count(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|tokens| u32::try_from(tokens).ok())
}

/// The sum of the counts that are present.
fn sum(a: &Value, b: &Value) -> Option<u32> {
    match (count(a), count(b)) {
        (Some(a), Some(b)) => Some(a.saturating_add(b)),
        (a, b) => a.or(b),
    }
}
