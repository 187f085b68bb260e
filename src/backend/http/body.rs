//! The body of a request, in pieces.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;

/// A body made of parts of a text, of up to 64 MB, and of added text. The pieces are sent one after another, because joining them
/// would copy the text. Clones share the pieces.
#[derive(Clone)]
pub struct RequestBody(Arc<Pieces>);

struct Pieces {
    text: Arc<str>,
    /// The added text.
    added: String,
    /// The pieces in order, none of them empty. Positions from the end of `text` on are those in `added`.
    ranges: Vec<Range<usize>>,
}

/// Builds a body.
pub struct BodyBuilder(Pieces);

impl BodyBuilder {
    /// A body made of parts of `text`.
    pub fn new(text: Arc<str>) -> BodyBuilder {
        BodyBuilder(Pieces { text, added: String::new(), ranges: Vec::new() })
    }

    /// Appends a part of the text.
    pub fn keep(&mut self, range: Range<usize>) {
        match self.0.ranges.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.0.ranges.push(range),
        }
    }

    /// Appends another text, which is not empty.
    pub fn add(&mut self, text: &str) {
        let start = self.0.text.len() + self.0.added.len();
        self.0.added.push_str(text);
        self.0.ranges.push(start..start + text.len());
    }

    /// The body.
    pub fn build(self) -> RequestBody {
        RequestBody(Arc::new(self.0))
    }
}

impl From<String> for RequestBody {
    fn from(text: String) -> RequestBody {
        let mut body = BodyBuilder::new(text.into());
        body.keep(0..body.0.text.len());
        body.build()
    }
}

impl RequestBody {
    /// The length, in bytes.
    pub fn content_length(&self) -> usize {
        self.0.ranges.iter().map(Range::len).sum()
    }

    /// A reader from the beginning.
    pub fn reader(&self) -> BodyReader {
        BodyReader { pieces: self.0.clone(), next: 0, at: 0 }
    }
}

impl Pieces {
    fn get(&self, nth: usize) -> Option<&[u8]> {
        let range = self.ranges.get(nth)?;
        Some(match range.start.checked_sub(self.text.len()) {
            Some(start) => &self.added.as_bytes()[start..start + range.len()],
            None => &self.text.as_bytes()[range.clone()],
        })
    }
}

/// Reads a body.
pub struct BodyReader {
    pieces: Arc<Pieces>,
    /// The index of the piece, and the position in it.
    next: usize,
    at: usize,
}

impl Read for BodyReader {
    /// Fills the buffer across pieces, so that a small body is sent at once.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len()
            && let Some(piece) = self.pieces.get(self.next)
        {
            let read = (&piece[self.at..]).read(&mut buffer[filled..])?;
            (filled, self.at) = (filled + read, self.at + read);
            if self.at == piece.len() {
                (self.next, self.at) = (self.next + 1, 0);
            }
        }
        Ok(filled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn body_is_its_pieces_for_buffers_of_any_size() {
        arbtest::arbtest(|u| {
            let text: Arc<str> = u.arbitrary::<String>()?.into();
            let (mut builder, mut expected) = (BodyBuilder::new(text.clone()), Vec::<u8>::new());
            for _ in 0..u.int_in_range(0..=9)? {
                if u.arbitrary()? {
                    let start = u.int_in_range(0..=text.len())?;
                    let range = start..u.int_in_range(start..=text.len())?;
                    expected.extend(&text.as_bytes()[range.clone()]);
                    builder.keep(range);
                } else {
                    builder.add("added");
                    expected.extend(b"added");
                }
            }
            let body = builder.build();
            assert_eq!(body.content_length(), expected.len());
            for _ in 0..2 {
                let (mut reader, mut read) = (body.reader(), Vec::<u8>::new());
                loop {
                    let mut buffer = vec![0; u.int_in_range(1..=20)?];
                    let n = reader.read(&mut buffer).expect("a read from memory");
                    read.extend(&buffer[..n]);
                    if n < buffer.len() {
                        break;
                    }
                }
                assert_eq!(read, expected);
            }
            Ok(())
        })
        .budget_ms(200);
    }
}
