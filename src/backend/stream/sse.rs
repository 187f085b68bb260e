//! Scans a stream of server-sent events for usage, errors and the end marker. Does no I/O.
//!
//! Invariants: the result depends on the bytes alone, not on how they were split. The scanner does not alter or delay the
//! relayed bytes. It buffers an incomplete line or event only, each as a [`BoundedJson`].

use memchr::memchr2;
use serde_json::Value;

use super::bounded_json::{BoundedJson, VERBATIM_BYTES_MAX};
use super::event::{EventClassifier, is_partial};
use super::report::{Progress, Report};
use super::usage::Usage;
use crate::backend::{BackendError, BackendResult};

/// The fields that are examined. Other lines are discarded as soon as they are long enough to be recognized.
const FIELDS: [&[u8]; 3] = [b"data:", b"event:", b"error:"];

/// Length of the longest field.
const FIELD_LEN: usize = 6;

/// The last event of an OpenAI stream.
const END_MARKER: &[u8] = b"[DONE]";

/// The scanner of one `text/event-stream`.
#[derive(Debug, Default)]
pub struct Scanner {
    report: Report,
    /// Number of events with a part of the response: an estimate of its tokens, for servers that report no usage.
    deltas: u32,
    classifier: EventClassifier,
    /// The incomplete last line; discarded if it is none of [`FIELDS`].
    line: BoundedJson,
    /// The input so far ends with a CR, to which a LF may belong.
    ended_with_cr: bool,
    /// The `data:` lines of an event whose first line is partial.
    event: BoundedJson,
    has_event: bool,
}

impl Scanner {
    /// Scans the next bytes.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        if !bytes.is_empty() && std::mem::take(&mut self.ended_with_cr) {
            bytes = bytes.strip_prefix(b"\n").unwrap_or(bytes);
        }
        while let Some(end) = memchr2(b'\n', b'\r', bytes) {
            let (head, rest) = (&bytes[..end], self.after_line_end(&bytes[end..]));
            // Mostly, the line is a whole event. Its blank line is not worth a search of its own.
            let is_last = matches!(rest.first(), Some(b'\n' | b'\r'));
            if self.line.is_empty() && head.len() <= VERBATIM_BYTES_MAX {
                self.scan_line(head, is_last);
            } else {
                self.buffer(head);
                self.end_of_line(is_last);
            }
            bytes = rest;
            if is_last {
                self.end_of_event();
                bytes = self.after_line_end(rest);
            }
        }
        self.buffer(bytes);
    }

    /// The bytes after the line end that `bytes` starts with.
    fn after_line_end<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        match bytes {
            [b'\r', b'\n', rest @ ..] => rest,
            [b'\r'] => {
                self.ended_with_cr = true;
                &[]
            }
            _ => &bytes[1..],
        }
    }

    fn buffer(&mut self, bytes: &[u8]) {
        self.line.push(bytes);
        let is_other_field =
            |line: &[u8]| line.len() >= FIELD_LEN && !FIELDS.iter().any(|field| line.starts_with(field));
        if self.line.bytes().is_some_and(is_other_field) {
            self.line.discard();
        }
    }

    fn end_of_line(&mut self, is_last: bool) {
        let line = std::mem::take(&mut self.line);
        if let Some(text) = line.bytes() {
            self.scan_line(text, is_last);
        }
        self.line = line.recycle();
    }

    /// Output tokens so far: the reported number, or the number of deltas if that is larger.
    pub fn tokens_emitted(&self) -> u32 {
        self.report.output_tokens().max(self.deltas)
    }

    /// How far the response has come. An end marker counts without its line end, which may never come.
    pub fn progress(&self) -> Progress {
        match self.line.bytes().and_then(data_of) {
            Some(END_MARKER) => Progress::Done,
            _ => self.report.progress(),
        }
    }

    /// Whether an event has come since the last call. Comments are not events.
    pub fn take_event(&mut self) -> bool {
        std::mem::take(&mut self.has_event)
    }

    /// Ends the input, and returns the usage.
    ///
    /// # Errors
    /// The stream contains an error, or has no end marker.
    pub fn finish(&mut self) -> BackendResult<Usage> {
        self.end_of_line(true);
        self.end_of_event();
        match self.report.take_failure() {
            Some(failure) => Err(failure),
            None if self.report.progress() > Progress::Open => Ok(self.report.usage()),
            None => Err(BackendError::CutStream("it ended without an end marker".into())),
        }
    }

    /// Scans a line. `is_last`: it is known to be the last one of its event.
    fn scan_line(&mut self, line: &[u8], is_last: bool) {
        if line.is_empty() {
            self.end_of_event();
        } else if let Some(data) = data_of(line) {
            self.data(data, is_last);
        } else if let Some(event) = line.strip_prefix(b"event:") {
            if event.trim_ascii() == b"error" {
                self.report.fail("");
            }
        } else if let Some(error) = line.strip_prefix(b"error:") {
            // Older llama.cpp builds send this instead of an event.
            self.report.fail(&String::from_utf8_lossy(error));
        }
    }

    /// Scans a `data:` line. The standard has one event extend to the next blank line; but some servers separate events with one
    /// line end, so a line that is complete JSON is an event of its own.
    fn data(&mut self, data: &[u8], is_last: bool) {
        self.has_event |= !data.is_empty();
        if data == END_MARKER {
            self.report.end();
        } else if !self.event.is_empty() {
            self.event.push(b"\n");
            self.event.push(data);
        } else if !is_last && is_partial(data) {
            self.event.push(data);
        } else {
            self.json(data);
        }
    }

    fn end_of_event(&mut self) {
        if self.event.is_empty() {
            return;
        }
        let event = std::mem::take(&mut self.event);
        if let Some(json) = event.bytes() {
            self.json(json);
        }
        self.event = event.recycle();
    }

    fn json(&mut self, json: &[u8]) {
        let class = self.classifier.classify(json);
        self.deltas = self.deltas.saturating_add(u32::from(class.is_delta));
        if class.needs_parsing
            && let Ok(event) = serde_json::from_slice::<Value>(json)
        {
            self.report.read_event(&event, json);
        }
    }
}

/// The content of a `data:` line.
fn data_of(line: &[u8]) -> Option<&[u8]> {
    line.strip_prefix(b"data:").map(<[u8]>::trim_ascii)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::stream::bounded_json::TRUNCATED_BYTES_MAX;

    fn result_of(stream: &[u8]) -> (Result<Usage, BackendError>, u32) {
        result_of_pieces([stream])
    }

    /// Like [`result_of`], for a stream in these pieces.
    fn result_of_pieces<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Result<Usage, BackendError>, u32) {
        let mut s = Scanner::default();
        pieces.into_iter().for_each(|piece| s.feed(piece));
        let result = s.finish();
        (result, s.tokens_emitted())
    }

    fn usage(input: u32, output: u32) -> Usage {
        Usage { input: Some(input), output: Some(output), cached: None }
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
            assert_eq!(result_of(stream.as_bytes()).0, Ok(want), "{object}");
        }
    }

    #[test]
    fn usage_keeps_the_last_value_of_each_field() {
        let stream = b"data: {\"usage\":{\"prompt_tokens\":7}}\n\ndata: {\"usage\":null}\n\n\
            data: {\"usage\":{\"completion_tokens\":1}}\n\ndata: {\"usage\":{\"completion_tokens\":2}}\r\n\r\ndata:[DONE]";
        assert_eq!(result_of(stream).0, Ok(usage(7, 2)));
    }

    #[test]
    fn usage_end_and_errors_are_found_behind_escapes() {
        let stream = br#"data: {"us\u0061ge":{"input":1,"output":2}}
data: {"type":"message_st\u006fp"}"#;
        assert_eq!(result_of(stream).0, Ok(usage(1, 2)));
        let failed = result_of(b"data: {\"type\":\"err\\u006fr\"}\ndata: [DONE]").0;
        assert!(matches!(failed, Err(BackendError::ReportedError(_))), "{failed:?}");
    }

    #[test]
    fn usage_of_anthropic_streams_is_nested() {
        let stream = b"event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":25,\"output_tokens\":1}}}\n\n\
            event: ping\ndata: {\"type\":\"ping\"}\n\n\
            event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{},\"usage\":{\"output_tokens\":15}}\n\n\
            event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
        assert_eq!(result_of(stream).0, Ok(usage(25, 15)));
    }

    #[test]
    fn stream_without_an_end_marker_is_truncated() {
        let piece = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":null}]}\n\n";
        assert!(matches!(result_of(piece.as_bytes()), (Err(BackendError::CutStream(_)), 1)));
        assert!(matches!(result_of(b""), (Err(BackendError::CutStream(_)), 0)));
        for end in ["data: [DONE]", "data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n"] {
            assert!(result_of(format!("{piece}{end}").as_bytes()).0.is_ok(), "{end}");
        }
    }

    #[test]
    fn errors_in_a_stream_take_precedence_over_its_end_marker() {
        for (event, want) in [
            ("data: {\"error\":{\"message\":\"no memory\"}}\n\n", BackendError::ReportedError("no memory".into())),
            ("data: {\"error\":\"no memory\"}\n\n", BackendError::ReportedError("\"no memory\"".into())),
            ("event: error\ndata: {\"error\":{\"message\":\"m\"}}\n\n", BackendError::ReportedError("m".into())),
            ("error: {\"code\":500}\n", BackendError::ReportedError("{\"code\":500}".into())),
            ("data: {\"choices\":[{\"finish_reason\":\"abort\"}]}\n\n", BackendError::Aborted),
        ] {
            assert_eq!(result_of(format!("{event}data: [DONE]\n\n").as_bytes()).0, Err(want), "{event}");
        }
        assert!(result_of(b"data: {\"error\":null}\n\ndata: [DONE]\n\n").0.is_ok());
    }

    #[test]
    fn text_that_looks_like_keys_is_ignored() {
        let stream = br#"data: {"choices":[{"delta":{"content":"\"usage\":{\"input\":9},\"error\":1,[DONE]"}}]}

data: [DONE]"#;
        assert_eq!(result_of(stream).0, Ok(Usage::default()));
    }

    #[test]
    fn endless_line_takes_bounded_memory_and_what_follows_is_read() {
        for begin in ["", "data: ", "data: {\"text\":\"", "data: [[0,"] {
            let mut s = Scanner::default();
            s.feed(begin.as_bytes());
            for _ in 0..40 {
                s.feed(&[b'x'; 64 << 10]);
                assert!(s.line.bytes().is_none_or(|text| text.len() <= TRUNCATED_BYTES_MAX));
            }
            s.feed(b"\ndata: {\"usage\":{\"input\":1,\"output\":2}}\ndata: [DONE]\n");
            assert_eq!(s.finish(), Ok(usage(1, 2)), "{begin}");
        }
    }

    #[test]
    fn endless_event_takes_bounded_memory_and_what_follows_is_read() {
        let mut s = Scanner::default();
        s.feed(b"data: {\n");
        for _ in 0..100_000 {
            s.feed(b"data: \"a\": \"some text\",\n");
            assert!(s.event.bytes().is_none_or(|text| text.len() <= TRUNCATED_BYTES_MAX));
        }
        s.feed(b"data: }\n\ndata: {\"usage\":{\"input\":1,\"output\":2}}\n\ndata: [DONE]\n\n");
        assert_eq!(s.finish(), Ok(usage(1, 2)));
    }

    #[test]
    fn long_line_is_scanned() {
        let page = "a page of text, ".repeat(100_000);
        let stream = format!(
            "data: {{\"choices\":[{{\"delta\":{{\"content\":\"{page}\"}},\"finish_reason\":\"stop\"}}],\"usage\":{{\"input\":1,\"output\":2}}}}\n\n"
        );
        assert_eq!(result_of_pieces(stream.as_bytes().chunks(16 << 10)), (Ok(usage(1, 2)), 2));
        assert_eq!(result_of(stream.as_bytes()), (Ok(usage(1, 2)), 2));
    }

    /// A line of `length` bytes that ends the stream if it is scanned.
    fn padded_end_marker(length: usize) -> Vec<u8> {
        let (head, tail) = ("data: {\"type\":\"message_stop\",\"a\":[", "]}");
        let padding = length - head.len() - tail.len();
        let numbers = "1,".repeat((padding - 1) / 2) + &"11"[padding % 2..];
        format!("{head}{numbers}{tail}").into_bytes()
    }

    #[test]
    fn overlong_line_is_discarded_whole_or_in_pieces() {
        for (length, is_scanned) in
            [(TRUNCATED_BYTES_MAX - 1, true), (TRUNCATED_BYTES_MAX, true), (TRUNCATED_BYTES_MAX + 1, false)]
        {
            for newline in ["\n", ""] {
                let stream = [&padded_end_marker(length)[..], newline.as_bytes()].concat();
                for size in [
                    1000,
                    VERBATIM_BYTES_MAX,
                    VERBATIM_BYTES_MAX + 1,
                    TRUNCATED_BYTES_MAX - 1,
                    TRUNCATED_BYTES_MAX,
                    2 * TRUNCATED_BYTES_MAX,
                ] {
                    let (result, _) = result_of_pieces(stream.chunks(size));
                    assert_eq!(result.is_ok(), is_scanned, "{length} bytes, then {newline:?}, in pieces of {size}");
                }
            }
        }
    }

    #[test]
    fn result_does_not_depend_on_the_split() {
        const PIECES: &[&str] = &[
            "data: {\"choices\":[{\"delta\":{\"content\":\"\u{e9}\"},\"finish_reason\":null}],\"usage\":null}\n\n",
            "data:{\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\r\n\r\n",
            "data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n\n",
            "data: {\"choices\":[{\"finish_reason\":\"abort\"}]}\n\n",
            "data: {\"error\":{\"message\":\"x\"}}\n\n",
            "event: error\n",
            "error: x\n",
            ": comment\n\n",
            "data: {\ndata: \"usage\":{\"input\":5}\ndata: }\n",
            "data: {\"type\":\r\n",
            "data: \"message_stop\"}\r",
            "\r",
            "\r\n",
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
                let length = *u.choose(&[VERBATIM_BYTES_MAX, TRUNCATED_BYTES_MAX])?;
                let line = padded_end_marker(u.int_in_range(length - 20..=length + 20)?);
                let at = u.choose_index(stream.len() + 1)?;
                stream.splice(at..at, [b"\n", &line[..], b"\n"].concat());
            }
            let mut cuts = vec![0, stream.len()];
            for _ in 0..u.int_in_range(0..=30)? {
                cuts.push(u.int_in_range(0..=stream.len())?);
            }
            cuts.sort_unstable();
            let whole = result_of(&stream);
            assert_eq!(result_of_pieces(cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]])), whole);
            assert_eq!(result_of_pieces(stream.chunks(1)), whole);
            Ok(())
        })
        .budget_ms(700);
    }
}
