//! A text that comes in pieces, of which little is kept: a short one whole, of a long one, taken for JSON, what usage, an end
//! mark or an error could stand in.
//!
//! Invariants: what is kept depends on the bytes alone, never on how they were split; of JSON it is JSON, with the same keys
//! (but for the length of long ones) in the same places; it is never more than [`EXCERPT_MAX`].

/// A text is kept whole up to this length, in bytes.
pub const WHOLE_MAX: usize = 4 << 10;

/// Of a longer one so much is kept, in bytes; where that is too little, nothing.
pub const EXCERPT_MAX: usize = 32 << 10;

/// Of a string in a longer one, in bytes: more than is ever quoted of an error.
const STRING_KEPT: usize = 1 << 10;

/// The same once half of the excerpt is used up, so that the fortieth paragraph does not cost the usage behind it.
const STRING_KEPT_LATER: usize = 64;

const _: () = assert!(STRING_KEPT > crate::backend::ERROR_BODY_MAX && WHOLE_MAX <= EXCERPT_MAX);

/// The excerpt of one text.
#[derive(Debug, Default)]
pub struct BoundedJson {
    kept: Vec<u8>,
    form: Mode,
}

#[derive(Debug, Default)]
enum Mode {
    #[default]
    Whole,
    Shortened(Truncator),
    Nothing,
}

impl BoundedJson {
    /// Takes the next piece.
    pub fn push(&mut self, bytes: &[u8]) {
        match &mut self.form {
            Mode::Nothing => {}
            Mode::Whole if self.kept.len() + bytes.len() <= WHOLE_MAX => self.kept.extend_from_slice(bytes),
            Mode::Whole => {
                let whole = std::mem::take(&mut self.kept);
                self.form = Mode::Shortened(Truncator::default());
                self.push(&whole);
                self.push(bytes);
            }
            Mode::Shortened(cutter) => {
                for byte in bytes {
                    if cutter.keeps(*byte, &self.kept) {
                        self.kept.push(*byte);
                    }
                }
                if self.kept.len() > EXCERPT_MAX {
                    self.discard();
                }
            }
        }
    }

    /// Keeps nothing of this text, whatever else comes.
    pub fn discard(&mut self) {
        *self = BoundedJson { kept: Vec::new(), form: Mode::Nothing };
    }

    /// What is kept; `None` when the text was given up.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self.form {
            Mode::Nothing => None,
            Mode::Whole | Mode::Shortened(_) => Some(&self.kept),
        }
    }

    /// Whether nothing has come yet.
    pub fn is_empty(&self) -> bool {
        matches!(self.form, Mode::Whole) && self.kept.is_empty()
    }

    /// An empty one for the next text.
    pub fn recycle(mut self) -> BoundedJson {
        self.kept.clear();
        self.kept.shrink_to(WHOLE_MAX);
        BoundedJson { kept: self.kept, form: Mode::Whole }
    }
}

/// Leaves out what follows the beginning of a long string, all blanks but one, and the elements of arrays within arrays: a
/// token's ten alternatives, a picture, a page of text.
#[derive(Debug, Default)]
struct Truncator {
    /// Open arrays around.
    arrays: u32,
    /// Open brackets since the array that is left out began, it included; 0 outside of one.
    left_out: u32,
    string: Option<Str>,
}

/// The string that is being read.
#[derive(Debug, Default)]
struct Str {
    kept: usize,
    is_cut: bool,
    /// Bytes of an escape that are still to come.
    escape: Escape,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    Letter,
    Hex(u8),
}

impl Truncator {
    /// Whether the next byte is kept, behind what `kept` holds.
    fn keeps(&mut self, byte: u8, kept: &[u8]) -> bool {
        match &mut self.string {
            Some(string) => {
                let (is_within, is_over) = string.read(byte, kept);
                if is_over {
                    self.string = None;
                }
                self.left_out == 0 && is_within
            }
            // Of blanks one is enough: gateways send them for minutes, to keep a connection open.
            None if byte.is_ascii_whitespace() && kept.last().is_some_and(u8::is_ascii_whitespace) => false,
            None => self.keeps_outside(byte),
        }
    }

    fn keeps_outside(&mut self, byte: u8) -> bool {
        let was_left_out = self.left_out > 0;
        match byte {
            b'"' => self.string = Some(Str::default()),
            b'[' | b'{' if was_left_out => self.left_out += 1,
            b']' | b'}' if was_left_out => {
                self.left_out -= 1;
                if self.left_out == 0 {
                    self.arrays -= 1;
                    return true;
                }
            }
            b'[' => {
                self.arrays += 1;
                self.left_out = u32::from(self.arrays > 1);
            }
            b']' => self.arrays = self.arrays.saturating_sub(1),
            _ => {}
        }
        !was_left_out
    }
}

impl Str {
    /// Whether the byte is of the part that is kept, and whether it ends the string.
    fn read(&mut self, byte: u8, kept: &[u8]) -> (bool, bool) {
        let begins = self.escape == Escape::None && byte & 0xc0 != 0x80;
        if self.escape == Escape::None && byte == b'"' {
            return (true, true);
        }
        let room = if kept.len() < EXCERPT_MAX / 2 { STRING_KEPT } else { STRING_KEPT_LATER };
        // Only between two characters, so that what is kept stays text. Once cut, a byte costs next to nothing.
        if !self.is_cut && begins && self.kept >= room && !ends_in_half_a_pair(kept) {
            self.is_cut = true;
        }
        self.escape = match self.escape {
            Escape::None if byte == b'\\' => Escape::Letter,
            Escape::Letter if byte == b'u' => Escape::Hex(4),
            Escape::Hex(left @ 2..) => Escape::Hex(left - 1),
            _ => Escape::None,
        };
        self.kept += usize::from(!self.is_cut);
        (!self.is_cut, false)
    }
}

/// `\ud83d` without the `\ude00` that makes it a character.
fn ends_in_half_a_pair(kept: &[u8]) -> bool {
    let last = kept.last_chunk::<6>().map(|last| last.to_ascii_lowercase());
    last.is_some_and(|last| last.starts_with(b"\\ud") && matches!(last[3], b'8'..=b'b'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn excerpt_of<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Option<String> {
        let mut excerpt = BoundedJson::default();
        for piece in pieces {
            excerpt.push(piece);
            assert!(excerpt.kept.capacity() <= 2 * EXCERPT_MAX);
        }
        excerpt.bytes().map(|text| String::from_utf8(text.to_vec()).expect("text stays text"))
    }

    #[test]
    fn what_matters_of_a_long_event_is_kept() {
        let text = "é\\n\\ud83d\\ude00\\\"".repeat(10_000);
        let event = format!(
            r#"{{"choices":[{{"delta":{{"content":"{text}"}},"logprobs":{{"content":[{{"a":[1,"]",{{}}]}},2]}},"finish_reason":"stop"}}],"usage":{{"input":7}},"a":[[0],{{"b":[]}}]}}"#
        );
        let kept: Value = serde_json::from_str(&excerpt_of([event.as_bytes()]).expect("kept")).expect("JSON");
        assert_eq!((&kept["usage"]["input"], &kept["choices"][0]["finish_reason"]), (&7.into(), &"stop".into()));
        assert_eq!(kept["choices"][0]["logprobs"]["content"], Value::Array(Vec::new()));
        let content = kept["choices"][0]["delta"]["content"].as_str().expect("a string");
        assert!(content.starts_with("é\n😀\"é") && content.len() < 2 * STRING_KEPT, "{} bytes", content.len());
    }

    #[test]
    fn no_character_is_cut_in_two() {
        for before in 0..12 {
            for unit in [r"\ud83d\ude00", "😀", r"\u00e9", r"\n", r#"\\\""#] {
                let json = format!("\"{}{}\"", "x".repeat(before), unit.repeat(5000));
                let kept = excerpt_of([json.as_bytes()]).expect("kept");
                assert!(serde_json::from_str::<String>(&kept).is_ok_and(|text| text.len() < 2 * STRING_KEPT), "{kept}");
            }
        }
    }

    #[test]
    fn what_is_kept_is_bounded_and_a_short_text_is_whole() {
        for (text, is_kept) in [
            ("x".repeat(WHOLE_MAX), true),
            ("x".repeat(EXCERPT_MAX), true),
            ("x".repeat(EXCERPT_MAX + 1), false),
            (format!("\"{}\"", "x".repeat(1 << 20)), true),
            (format!("[[{}0]]", "0,".repeat(1 << 19)), true),
            (format!("{}[0]", "\n  ".repeat(1 << 19)), true),
            (format!("[{}0]", "0,".repeat(1 << 19)), false),
            (format!("[{}0]", format!("\"{}\",", "x".repeat(4000)).repeat(200)), true),
        ] {
            let kept = excerpt_of(text.as_bytes().chunks(1000));
            assert_eq!(kept.is_some(), is_kept, "{} bytes of {}", text.len(), &text[..3]);
            assert!(text.len() > WHOLE_MAX || kept == Some(text));
        }
    }

    #[test]
    fn an_excerpt_of_json_is_json_with_the_same_keys_however_it_was_split() {
        fn value(u: &mut arbtest::arbitrary::Unstructured<'_>, depth: u32) -> arbtest::arbitrary::Result<Value> {
            Ok(match u.int_in_range(0..=if depth == 0 { 2 } else { 5 })? {
                0 => Value::from(u.arbitrary::<u32>()?),
                1 => Value::Null,
                2 | 3 => {
                    let unit: String = u.arbitrary()?;
                    Value::from(unit.repeat(u.int_in_range(0..=400)?))
                }
                4 => (0..u.int_in_range(0..=3)?).map(|_| value(u, depth - 1)).collect::<Result<_, _>>()?,
                _ => {
                    let keys = ["usage", "choices", "a", "ключ", "\"\\"].into_iter().take(u.int_in_range(0..=5)?);
                    Value::Object(keys.map(|k| Ok((k.to_owned(), value(u, depth - 1)?))).collect::<Result<_, _>>()?)
                }
            })
        }
        fn assert_same(whole: &Value, kept: &Value, arrays: u32) {
            match (whole, kept) {
                (Value::Object(whole), Value::Object(kept)) => {
                    assert!(whole.keys().eq(kept.keys()));
                    whole.values().zip(kept.values()).for_each(|(whole, kept)| assert_same(whole, kept, arrays));
                }
                (Value::Array(_), Value::Array(kept)) if arrays > 0 => assert!(kept.is_empty()),
                (Value::Array(whole), Value::Array(kept)) => {
                    assert_eq!(whole.len(), kept.len());
                    whole.iter().zip(kept).for_each(|(whole, kept)| assert_same(whole, kept, arrays + 1));
                }
                (Value::String(whole), Value::String(kept)) => assert!(whole.starts_with(kept.as_str())),
                (whole, kept) => assert_eq!(whole, kept),
            }
        }
        fn escaped(json: &str) -> String {
            let escape = |c: char| match c.is_ascii() {
                true => c.to_string(),
                false => c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
            };
            json.chars().map(escape).collect()
        }
        arbtest::arbtest(|u| {
            let whole = value(u, 4)?;
            let json = if u.arbitrary()? { whole.to_string() } else { escaped(&whole.to_string()) };
            let kept = excerpt_of([json.as_bytes()]);
            let mut cuts = vec![0, json.len()];
            for _ in 0..u.int_in_range(0..=10)? {
                cuts.push(u.int_in_range(0..=json.len())?);
            }
            cuts.sort_unstable();
            assert_eq!(excerpt_of(cuts.windows(2).map(|cut| &json.as_bytes()[cut[0]..cut[1]])), kept);
            match kept {
                Some(kept) if json.len() <= WHOLE_MAX => assert_eq!(kept, json),
                Some(kept) => assert_same(&whole, &serde_json::from_str(&kept).expect("JSON"), 0),
                None => assert!(json.len() > EXCERPT_MAX),
            }
            Ok(())
        })
        .budget_ms(700);
    }
}
