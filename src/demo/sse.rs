//! Splits a `text/event-stream` into events, regardless of chunk boundaries.

/// Splits a stream into the `data` of its events. Buffers the current event only; the caller bounds the stream.
#[derive(Default)]
pub(super) struct EventSplitter {
    line: Vec<u8>,
    data: Option<String>,
}

impl EventSplitter {
    /// Appends bytes, and returns the events that they complete.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut events = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                events.extend(self.end_line());
            }
        }
        events
    }

    /// Ends the stream. An event without a closing blank line counts as well.
    pub(super) fn finish(mut self) -> Option<String> {
        self.end_line().or_else(|| self.end_line())
    }

    /// Ends the line. An empty line ends an event, which is returned.
    fn end_line(&mut self) -> Option<String> {
        let line = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\r', '\n']);
        if text.is_empty() {
            return self.data.take();
        }
        let value = text.strip_prefix("data:")?; // other fields and comments are ignored
        let value = value.strip_prefix(' ').unwrap_or(value);
        self.data = Some(self.data.take().map_or_else(|| value.to_owned(), |data| data + "\n" + value));
        None
    }
}

/// The `data` of all events of a complete stream.
pub(super) fn events(stream: &[u8]) -> Vec<String> {
    let mut splitter = EventSplitter::default();
    let mut events = splitter.push(stream);
    events.extend(splitter.finish());
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] =
        "data: {\"a\":\"ü\"}\n\n: ping\n\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\ndata: [DONE]".as_bytes();
    const WANT: [&str; 3] = ["{\"a\":\"ü\"}", "two\nlines", "[DONE]"];

    #[test]
    fn events_of_a_whole_stream_are_split() {
        assert_eq!(events(STREAM), WANT);
    }

    #[test]
    fn event_splitter_does_not_depend_on_piece_boundaries() {
        for size in 1..STREAM.len() {
            let mut got = Vec::new();
            let mut splitter = EventSplitter::default();
            for piece in STREAM.chunks(size) {
                got.extend(splitter.push(piece));
            }
            got.extend(splitter.finish());
            assert_eq!(got, WANT, "pieces of {size} bytes");
        }
    }

    #[test]
    fn events_of_an_empty_stream_are_none() {
        assert!(events(b"").is_empty());
        assert!(events(b"\n\n: only a comment\n\n").is_empty());
    }
}
