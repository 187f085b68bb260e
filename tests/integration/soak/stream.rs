//! Generates the bodies of answers, as vLLM, llama.cpp and others send them, each with unique content.

use serde_json::json;

use super::rng::Rng;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Openai,
    Anthropic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub input: u64,
    pub output: u64,
}

/// Builds the body of an answer.
pub struct Stream {
    pub format: Format,
    pub text: String,
    pub usage: Usage,
}

impl Stream {
    pub fn new(rng: &mut Rng, format: Format) -> Self {
        let usage = Usage { input: rng.within(1..1_000_000), output: rng.within(1..1_000_000) };
        let mut stream = Self { format, text: String::new(), usage };
        if format == Format::Anthropic {
            let usage = json!({"input_tokens": usage.input, "output_tokens": 1});
            stream.event("message_start", &json!({"type": "message_start", "message": {"usage": usage}}).to_string());
        }
        stream
    }

    /// Appends `count` deltas, some of them with keep-alive comments in between.
    pub fn pieces(&mut self, rng: &mut Rng, count: u64) {
        for _ in 0..count {
            if rng.per_mille(50) {
                self.text.push_str(": keep-alive\n\n");
            }
            let content = format!("{:x} é𝄞 \\\"usage\\\":{{", rng.next());
            self.piece(&content);
        }
    }

    /// `content` is the inside of a JSON string.
    pub fn piece(&mut self, content: &str) {
        let data = match self.format {
            Format::Openai => {
                format!("{{\"choices\":[{{\"delta\":{{\"content\":\"{content}\"}},\"finish_reason\":null}}]}}")
            }
            Format::Anthropic => {
                format!("{{\"type\":\"content_block_delta\",\"delta\":{{\"text\":\"{content}\"}}}}")
            }
        };
        self.event("content_block_delta", &data);
    }

    /// Appends usage and an end marker, in one of the usual forms.
    pub fn end(&mut self, rng: &mut Rng) {
        let (finish, done) = *rng.pick(&[(true, true), (true, false), (false, true)]);
        self.end_with(rng, finish, done);
    }

    /// Appends usage and the end marker behind which nothing more can come.
    pub fn end_with_mark(&mut self, rng: &mut Rng) {
        let finish = rng.per_mille(500);
        self.end_with(rng, finish, true);
    }

    fn end_with(&mut self, rng: &mut Rng, finish: bool, done: bool) {
        let Usage { input, output } = self.usage;
        match self.format {
            Format::Openai => {
                if finish {
                    self.text.push_str("data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n");
                }
                let usage = json!({"prompt_tokens": input, "completion_tokens": output});
                let last = match rng.within(0..10) {
                    0 => json!({"choices": [], "x_groq": {"usage": usage}}),
                    1 => {
                        json!({"choices": [], "timings": {"prompt_n": 1, "cache_n": input - 1, "predicted_n": output}})
                    }
                    _ => json!({"choices": [], "usage": usage}),
                };
                self.event("", &last.to_string());
                if done {
                    self.text.push_str("data: [DONE]\n\n");
                }
            }
            Format::Anthropic => {
                let usage = match rng.within(0..5) {
                    0 => json!({"input_tokens": 0, "output_tokens": output}),
                    _ => json!({"output_tokens": output}),
                };
                self.event("message_delta", &json!({"type": "message_delta", "delta": {}, "usage": usage}).to_string());
                self.event("message_stop", "{\"type\":\"message_stop\"}");
            }
        }
    }

    /// Appends the last events of a server that fails in the middle and says so only in the finish reason.
    pub fn finish_error(&mut self) {
        match self.format {
            Format::Openai => self
                .text
                .push_str("data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"error\"}]}\n\ndata: [DONE]\n\n"),
            Format::Anthropic => self.error(),
        }
    }

    /// Appends the error event of a server that fails in the middle.
    pub fn error(&mut self) {
        match self.format {
            Format::Openai => self.text.push_str("data: {\"error\":{\"message\":\"soaked\",\"code\":500}}\n\n"),
            Format::Anthropic => self.event("error", "{\"type\":\"error\",\"error\":{\"message\":\"soaked\"}}"),
        }
    }

    /// The whole answer as one JSON object.
    pub fn json(&self, rng: &mut Rng) -> String {
        let (text, Usage { input, output }) = (format!("{:x}", rng.next()), self.usage);
        let body = match self.format {
            Format::Openai => json!({
                "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": input, "completion_tokens": output},
            }),
            Format::Anthropic => json!({
                "type": "message", "content": [{"type": "text", "text": text}],
                "usage": {"input_tokens": input, "output_tokens": output},
            }),
        };
        body.to_string()
    }

    fn event(&mut self, name: &str, data: &str) {
        if self.format == Format::Anthropic {
            self.text.push_str(&format!("event: {name}\n"));
        }
        self.text.push_str(&format!("data: {data}\n\n"));
    }
}
