//! Splits a `text/event-stream` into events, independent of chunk boundaries.

/// Splits a stream into the `data` of its events. Buffers the current event only; the caller bounds the stream.
#[derive(Default)]
pub(super) struct EventSplitter {
    line: Vec<u8>,
    data: String,
    has_data: bool,
}

impl EventSplitter {
    /// Appends bytes, and calls `on_data` for each event that they complete.
    pub(super) fn push(&mut self, bytes: &[u8], mut on_data: impl FnMut(&str)) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if piece.last() == Some(&b'\n') {
                let line = std::mem::take(&mut self.line);
                self.end_line(&line, &mut on_data);
            }
        }
    }

    /// Ends the stream. An event without a closing blank line counts as well.
    pub(super) fn finish(mut self, mut on_data: impl FnMut(&str)) {
        let line = std::mem::take(&mut self.line);
        if !line.is_empty() {
            self.end_line(&line, &mut on_data);
        }
        self.end_line(b"\n", &mut on_data);
    }

    fn end_line(&mut self, line: &[u8], on_data: &mut impl FnMut(&str)) {
        let text = String::from_utf8_lossy(line);
        let text = text.trim_end_matches(['\r', '\n']);
        if text.is_empty() {
            if std::mem::take(&mut self.has_data) {
                on_data(&self.data);
            }
            self.data.clear();
        } else if let Some(value) = text.strip_prefix("data:") {
            if self.has_data {
                self.data.push('\n');
            }
            self.has_data = true;
            self.data.push_str(value.strip_prefix(' ').unwrap_or(value));
        } // other fields and comments are ignored
    }
}

/// The `data` of all events of a complete stream.
pub(super) fn events(stream: &[u8]) -> Vec<String> {
    let mut all = Vec::new();
    let mut splitter = EventSplitter::default();
    splitter.push(stream, |data| all.push(data.to_owned()));
    splitter.finish(|data| all.push(data.to_owned()));
    all
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
                splitter.push(piece, |data| got.push(data.to_owned()));
            }
            splitter.finish(|data| got.push(data.to_owned()));
            assert_eq!(got, WANT, "pieces of {size} bytes");
        }
    }

    #[test]
    fn events_of_an_empty_stream_are_none() {
        assert!(events(b"").is_empty());
        assert!(events(b"\n\n: only a comment\n\n").is_empty());
    }
}
