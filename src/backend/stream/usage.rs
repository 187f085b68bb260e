//! The token counts that a backend reports.

use serde_json::Value;

/// Token counts, each as last reported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub input: Option<u32>,
    /// Tokens of the response.
    pub output: Option<u32>,
}

impl Usage {
    /// Updates the counts from a `usage` object.
    pub fn merge(&mut self, usage: &Value) {
        let read = |names: [&str; 3]| {
            names.into_iter().find_map(|n| usage[n].as_u64().and_then(|tokens| u32::try_from(tokens).ok()))
        };
        self.input = read(["input_tokens", "prompt_tokens", "input"]).or(self.input);
        self.output = read(["output_tokens", "completion_tokens", "output"]).or(self.output);
    }

    /// The usage in a JSON body that is not a stream.
    pub fn from_body(body: &[u8]) -> Usage {
        let mut usage = Usage::default();
        if let Ok(body) = serde_json::from_slice::<Value>(body) {
            usage.merge(&body["usage"]);
        }
        usage
    }
}
