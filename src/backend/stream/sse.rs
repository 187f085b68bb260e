//! Reads usage and the end mark off a stream as it passes. Sans-io: bytes in, verdict out.
//!
//! Invariant: the verdict depends on the bytes alone, never on how they were split. Nothing here alters, delays or
//! keeps what is relayed; of a line only an [`BoundedJson`] is held, until its end is known.

use memchr::memchr;
use serde_json::Value;

use super::bounded_json::{BoundedJson, WHOLE_MAX};
use super::event::EventClassifier;
use super::usage::Usage;
use crate::backend::{BackendError, truncated_body};

/// What a line begins with that is looked into; what is longer than a field's name and none of these is not held.
const FIELDS: [&[u8]; 3] = [b"data:", b"event:", b"error:"];

/// The longest of them.
const FIELD_LEN: usize = 6;

/// The scanner of one `text/event-stream`.
#[derive(Debug, Default)]
pub struct Scanner {
    usage: Usage,
    /// Events that carried a piece of the answer: an estimate of its tokens, for servers that never say.
    deltas: u32,
    ended: bool,
    failure: Option<BackendError>,
    glance: EventClassifier,
    /// Of the unfinished last line; given up when it can tell nothing.
    line: BoundedJson,
}

impl Scanner {
    /// Looks at the next bytes.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while let Some(end) = memchr(b'\n', bytes) {
            let (head, rest) = (&bytes[..end], &bytes[end + 1..]);
            if self.line.is_empty() && head.len() <= WHOLE_MAX {
                self.look_at(head);
            } else {
                self.hold(head);
                self.end_of_line();
            }
            bytes = rest;
        }
        self.hold(bytes);
    }

    fn hold(&mut self, bytes: &[u8]) {
        self.line.push(bytes);
        let tells_nothing =
            |line: &[u8]| line.len() >= FIELD_LEN && !FIELDS.iter().any(|field| line.starts_with(field));
        if self.line.bytes().is_some_and(tells_nothing) {
            self.line.discard();
        }
    }

    fn end_of_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        if let Some(text) = line.bytes() {
            self.look_at(text);
        }
        self.line = line.recycle();
    }

    /// Output tokens so far: what usage said, or the pieces counted where that is more.
    pub fn tokens_emitted(&self) -> u32 {
        self.usage.output.unwrap_or(0).max(self.deltas)
    }

    /// The input is over: the usage, if the stream is whole.
    ///
    /// # Errors
    /// The stream carried an error, or has no end mark.
    pub fn finish(&mut self) -> Result<Usage, BackendError> {
        self.end_of_line();
        match self.failure.take() {
            Some(failure) => Err(failure),
            None if self.ended => Ok(self.usage),
            None => Err(BackendError::CutStream("it ended without an end mark".into())),
        }
    }

    fn look_at(&mut self, line: &[u8]) {
        if let Some(data) = line.strip_prefix(b"data:") {
            self.data(data.trim_ascii());
        } else if let Some(event) = line.strip_prefix(b"event:") {
            if event.trim_ascii() == b"error" {
                self.failure.get_or_insert(BackendError::StreamError(String::new()));
            }
        } else if let Some(error) = line.strip_prefix(b"error:") {
            // What older builds of llama.cpp send in place of an event.
            self.fail_with(truncated_body(error));
        }
    }

    fn data(&mut self, data: &[u8]) {
        if data == b"[DONE]" {
            self.ended = true;
            return;
        }
        let seen = self.glance.at(data);
        self.deltas = self.deltas.saturating_add(u32::from(seen.is_delta));
        if !seen.needs_parsing {
            return;
        }
        let Ok(event) = serde_json::from_slice::<Value>(data) else { return };
        self.usage.merge(&event["usage"]);
        self.usage.merge(&event["message"]["usage"]);
        for choice in event["choices"].as_array().into_iter().flatten() {
            match &choice["finish_reason"] {
                Value::Null => {}
                // Some gateways send an empty one with every piece.
                Value::String(reason) if reason.is_empty() => {}
                Value::String(reason) if reason == "abort" => {
                    self.failure.get_or_insert(BackendError::Aborted);
                }
                _ => self.ended = true,
            }
        }
        self.ended |= event["type"] == "message_stop";
        if !event["error"].is_null() {
            let message = event["error"]["message"].as_str().map_or_else(|| event["error"].to_string(), str::to_owned);
            self.fail_with(truncated_body(message.as_bytes()));
        } else if event["type"] == "error" || event["object"] == "error" {
            self.fail_with(truncated_body(data));
        }
    }

    /// The first message counts; an `event: error` line before it had none.
    fn fail_with(&mut self, message: String) {
        match &self.failure {
            Some(BackendError::StreamError(empty)) if empty.is_empty() => {}
            Some(_) => return,
            None => {}
        }
        self.failure = Some(BackendError::StreamError(message));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::stream::bounded_json::EXCERPT_MAX;

    fn verdict(stream: &[u8]) -> (Result<Usage, BackendError>, u32) {
        verdict_of([stream])
    }

    /// As [`verdict`], fed in these pieces.
    fn verdict_of<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Result<Usage, BackendError>, u32) {
        let mut s = Scanner::default();
        pieces.into_iter().for_each(|piece| s.feed(piece));
        let result = s.finish();
        (result, s.tokens_emitted())
    }

    fn usage(input: u32, output: u32) -> Usage {
        Usage { input: Some(input), output: Some(output) }
    }

    #[test]
    fn usage_is_read_in_every_spelling() {
        for (object, want) in [
            (r#"{"prompt_tokens":7,"completion_tokens":13}"#, usage(7, 13)),
            (r#"{"input_tokens":7,"output_tokens":13}"#, usage(7, 13)),
            (r#"{"input":7,"output":13}"#, usage(7, 13)),
            (
                r#"{"prompt_tokens":1,"input_tokens":7,"output":2,"completion_tokens":3,"output_tokens":13}"#,
                usage(7, 13),
            ),
            (r#"{"input_tokens":4294967296,"prompt_tokens":7,"output_tokens":13}"#, usage(7, 13)),
        ] {
            let stream = format!("data: {{\"choices\":[],\"usage\":{object}}}\n\ndata: [DONE]\n\n");
            assert_eq!(verdict(stream.as_bytes()).0, Ok(want), "{object}");
        }
    }

    #[test]
    fn each_field_keeps_its_last_value() {
        let stream = b"data: {\"usage\":{\"prompt_tokens\":7}}\n\ndata: {\"usage\":null}\n\n\
            data: {\"usage\":{\"completion_tokens\":1}}\n\ndata: {\"usage\":{\"completion_tokens\":2}}\r\n\r\ndata:[DONE]";
        assert_eq!(verdict(stream).0, Ok(usage(7, 2)));
    }

    #[test]
    fn escapes_hide_neither_usage_nor_an_end_nor_an_error() {
        let stream = br#"data: {"us\u0061ge":{"input":1,"output":2}}
data: {"type":"message_st\u006fp"}"#;
        assert_eq!(verdict(stream).0, Ok(usage(1, 2)));
        let failed = verdict(b"data: {\"type\":\"err\\u006fr\"}\ndata: [DONE]").0;
        assert!(matches!(failed, Err(BackendError::StreamError(_))), "{failed:?}");
    }

    #[test]
    fn anthropic_streams_nest_their_usage() {
        let stream = b"event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":25,\"output_tokens\":1}}}\n\n\
            event: ping\ndata: {\"type\":\"ping\"}\n\n\
            event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{},\"usage\":{\"output_tokens\":15}}\n\n\
            event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
        assert_eq!(verdict(stream).0, Ok(usage(25, 15)));
    }

    #[test]
    fn a_stream_without_an_end_mark_is_cut() {
        let piece = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":null}]}\n\n";
        assert!(matches!(verdict(piece.as_bytes()), (Err(BackendError::CutStream(_)), 1)));
        assert!(matches!(verdict(b""), (Err(BackendError::CutStream(_)), 0)));
        for end in ["data: [DONE]", "data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n"] {
            assert!(verdict(format!("{piece}{end}").as_bytes()).0.is_ok(), "{end}");
        }
    }

    #[test]
    fn errors_in_the_stream_win_over_an_end_mark() {
        for (event, want) in [
            ("data: {\"error\":{\"message\":\"no memory\"}}\n\n", BackendError::StreamError("no memory".into())),
            ("data: {\"error\":\"no memory\"}\n\n", BackendError::StreamError("\"no memory\"".into())),
            ("event: error\ndata: {\"error\":{\"message\":\"m\"}}\n\n", BackendError::StreamError("m".into())),
            ("error: {\"code\":500}\n", BackendError::StreamError("{\"code\":500}".into())),
            ("data: {\"choices\":[{\"finish_reason\":\"abort\"}]}\n\n", BackendError::Aborted),
        ] {
            assert_eq!(verdict(format!("{event}data: [DONE]\n\n").as_bytes()).0, Err(want), "{event}");
        }
        assert!(verdict(b"data: {\"error\":null}\n\ndata: [DONE]\n\n").0.is_ok());
    }

    #[test]
    fn text_that_looks_like_keys_is_text() {
        let stream = br#"data: {"choices":[{"delta":{"content":"\"usage\":{\"input\":9},\"error\":1,[DONE]"}}]}

data: [DONE]"#;
        assert_eq!(verdict(stream).0, Ok(Usage::default()));
    }

    #[test]
    fn an_endless_line_costs_a_bounded_buffer_and_what_follows_it_is_read() {
        for begin in ["", "data: ", "data: {\"text\":\"", "data: [[0,"] {
            let mut s = Scanner::default();
            s.feed(begin.as_bytes());
            for _ in 0..40 {
                s.feed(&[b'x'; 64 << 10]);
                assert!(s.line.bytes().is_none_or(|text| text.len() <= EXCERPT_MAX));
            }
            s.feed(b"\ndata: {\"usage\":{\"input\":1,\"output\":2}}\ndata: [DONE]\n");
            assert_eq!(s.finish(), Ok(usage(1, 2)), "{begin}");
        }
    }

    #[test]
    fn a_long_line_is_looked_into() {
        let page = "a page of text, ".repeat(100_000);
        let stream = format!(
            "data: {{\"choices\":[{{\"delta\":{{\"content\":\"{page}\"}},\"finish_reason\":\"stop\"}}],\"usage\":{{\"input\":1,\"output\":2}}}}\n\n"
        );
        assert_eq!(verdict_of(stream.as_bytes().chunks(16 << 10)), (Ok(usage(1, 2)), 2));
        assert_eq!(verdict(stream.as_bytes()), (Ok(usage(1, 2)), 2));
    }

    /// A line of `length` bytes that ends the stream, if it is looked into.
    fn padded_end_mark(length: usize) -> Vec<u8> {
        let (head, tail) = ("data: {\"type\":\"message_stop\",\"a\":[", "]}");
        let padding = length - head.len() - tail.len();
        let numbers = "1,".repeat((padding - 1) / 2) + &"11"[padding % 2..];
        format!("{head}{numbers}{tail}").into_bytes()
    }

    #[test]
    fn a_line_is_overlong_whether_it_comes_in_one_piece_or_in_many() {
        for (length, is_seen) in [(EXCERPT_MAX - 1, true), (EXCERPT_MAX, true), (EXCERPT_MAX + 1, false)] {
            for newline in ["\n", ""] {
                let stream = [&padded_end_mark(length)[..], newline.as_bytes()].concat();
                for size in [1000, WHOLE_MAX, WHOLE_MAX + 1, EXCERPT_MAX - 1, EXCERPT_MAX, 2 * EXCERPT_MAX] {
                    let (result, _) = verdict_of(stream.chunks(size));
                    assert_eq!(result.is_ok(), is_seen, "{length} bytes, then {newline:?}, in pieces of {size}");
                }
            }
        }
    }

    #[test]
    fn the_verdict_does_not_depend_on_the_split() {
        const PIECES: &[&str] = &[
            "data: {\"choices\":[{\"delta\":{\"content\":\"\u{e9}\"},\"finish_reason\":null}],\"usage\":null}\n\n",
            "data:{\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\r\n\r\n",
            "data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n\n",
            "data: {\"choices\":[{\"finish_reason\":\"abort\"}]}\n\n",
            "data: {\"error\":{\"message\":\"x\"}}\n\n",
            "event: error\n",
            "error: x\n",
            ": comment\n\n",
            "data: [DONE]\n\n",
            "data: {\"type\":\"message_stop\"}\n",
            "\n",
            "\"",
        ];
        arbtest::arbtest(|u| {
            let mut stream = Vec::new();
            for _ in 0..u.int_in_range(0..=8)? {
                let start = stream.len();
                match u.int_in_range(0..=9)? {
                    0..=4 => stream.extend_from_slice(u.choose(PIECES)?.as_bytes()),
                    5 | 6 => {
                        stream.extend_from_slice(u.choose(PIECES)?.as_bytes());
                        let at = u.int_in_range(start..=stream.len() - 1)?;
                        stream[at] = u.arbitrary()?;
                    }
                    _ => stream.extend(u.bytes(u.len().min(40))?),
                }
            }
            if u.ratio(1, 10)? {
                let length = *u.choose(&[WHOLE_MAX, EXCERPT_MAX])?;
                let line = padded_end_mark(u.int_in_range(length - 20..=length + 20)?);
                let at = u.choose_index(stream.len() + 1)?;
                stream.splice(at..at, [b"\n", &line[..], b"\n"].concat());
            }
            let mut cuts = vec![0, stream.len()];
            for _ in 0..u.int_in_range(0..=30)? {
                cuts.push(u.int_in_range(0..=stream.len())?);
            }
            cuts.sort_unstable();
            let whole = verdict(&stream);
            assert_eq!(verdict_of(cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]])), whole);
            assert_eq!(verdict_of(stream.chunks(1)), whole);
            Ok(())
        })
        .budget_ms(700);
    }
}
