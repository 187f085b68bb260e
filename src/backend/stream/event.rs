//! What the JSON of an event shows at a glance. Nearly every event is a piece of the answer and nothing else, and is not parsed.
//!
//! Invariant: what is shown depends on the event alone; that the event before it is remembered only saves work.

use std::ops::Range;

use memchr::memchr2;

/// Events up to this length are remembered, in bytes; it is held for each stream.
const REMEMBERED_MAX: usize = 1 << 10;

/// What a pass over an event's keys shows.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct EventClass {
    /// It carries a piece of the answer.
    pub is_delta: bool,
    /// It may hold usage, an end mark or an error: worth parsing.
    pub needs_parsing: bool,
}

/// Looks at the events of one stream.
#[derive(Debug, Default)]
pub struct EventClassifier {
    /// An event that was a piece and nothing else.
    template: Vec<u8>,
    /// The text in it, without its quotes.
    text: Range<usize>,
}

impl EventClassifier {
    /// What this event shows. One that differs from the remembered one in nothing but the text shows the same.
    pub fn classify(&mut self, json: &[u8]) -> EventClass {
        if self.differs_in_the_text_alone(json) {
            return EventClass { is_delta: true, needs_parsing: false };
        }
        let mut pass = KeyScan::default();
        pass.over(json);
        if let (Some(text), false, true) = (pass.text, pass.seen.needs_parsing, json.len() <= REMEMBERED_MAX) {
            self.template.clear();
            self.template.extend_from_slice(json);
            self.text = text;
        }
        pass.seen
    }

    fn differs_in_the_text_alone(&self, json: &[u8]) -> bool {
        let (head, foot) = (&self.template[..self.text.start], &self.template[self.text.end..]);
        json.len() > head.len() + foot.len() && json.starts_with(head) && json.ends_with(foot) && {
            let text = &json[head.len()..json.len() - foot.len()];
            // Neither an end of the string nor an escape: it ends where the other did.
            !self.text.is_empty() && memchr2(b'"', b'\\', text).is_none()
        }
    }
}

/// A pass over an event's strings, looking for keys.
#[derive(Default)]
struct KeyScan {
    seen: EventClass,
    pieces: u32,
    /// Of the only piece, if it has no escapes.
    text: Option<Range<usize>>,
}

impl KeyScan {
    fn over(&mut self, json: &[u8]) {
        let mut at = 0;
        while let Some(open) = json[at..].iter().position(|b| *b == b'"') {
            let start = at + open + 1;
            let Some(end) = end_of_string(json, start) else { break };
            at = end + 1;
            let rest = json[at..].trim_ascii_start();
            if let Some(value) = rest.strip_prefix(b":") {
                let value = value.trim_ascii_start();
                self.key(&json[start..end], value, json.len() - value.len());
            }
        }
    }

    /// `value` is the rest of the event from the key's value on, which starts at `value_at`.
    fn key(&mut self, key: &[u8], value: &[u8], value_at: usize) {
        let seen = &mut self.seen;
        match key {
            b"content" | b"reasoning_content" | b"reasoning" | b"arguments" | b"text" | b"thinking"
            | b"partial_json"
                if value.first() == Some(&b'"') && value.get(1).is_some_and(|b| *b != b'"') =>
            {
                seen.is_delta = true;
                self.pieces += 1;
                let plain = end_of_string(value, 1).filter(|end| {
                    // In what is no JSON it may be a key as well.
                    !value[..*end].contains(&b'\\') && !value[end + 1..].trim_ascii_start().starts_with(b":")
                });
                self.text = plain.filter(|_| self.pieces == 1).map(|end| value_at + 1..value_at + end);
            }
            b"usage" => seen.needs_parsing |= value.first() == Some(&b'{'),
            b"finish_reason" | b"error" => seen.needs_parsing |= !value.starts_with(b"null"),
            b"type" | b"object" => {
                seen.needs_parsing |= value.starts_with(b"\"message_stop\"")
                    || value.starts_with(b"\"error\"")
                    || is_escaped_string(value);
            }
            // An escape can spell any of them.
            _ => seen.needs_parsing |= key.contains(&b'\\'),
        }
    }
}

/// Whether `value` starts with a string that has an escape in it.
fn is_escaped_string(value: &[u8]) -> bool {
    let string = value.strip_prefix(b"\"").and_then(|string| string.get(..end_of_string(string, 0)?));
    string.is_some_and(|string| string.contains(&b'\\'))
}

/// The closing quote of the string that starts at `at`.
fn end_of_string(json: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match json.get(at)? {
            b'"' => return Some(at),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a scanner without a memory sees.
    fn afresh(json: &[u8]) -> EventClass {
        EventClassifier::default().classify(json)
    }

    #[test]
    fn pieces_and_telling_events_are_told_apart() {
        let seen = |piece, telling| EventClass { is_delta: piece, needs_parsing: telling };
        for (event, want) in [
            (r#"{"choices":[{"delta":{"content":"x"},"finish_reason":null}]}"#, seen(true, false)),
            (r#"{"choices":[{"delta":{"content":""},"finish_reason":null}]}"#, seen(false, false)),
            (r#"{"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}"#, seen(true, true)),
            (r#"{"choices":[],"usage":{"prompt_tokens":1}}"#, seen(false, true)),
            (r#"{"type":"message_stop"}"#, seen(false, true)),
            (r#"{"us\u0061ge":{}}"#, seen(false, true)),
            (r#"{"delta":{"text":"\"usage\":{"}}"#, seen(true, false)),
        ] {
            assert_eq!(afresh(event.as_bytes()), want, "{event}");
        }
    }

    #[test]
    fn the_text_alone_may_differ_from_the_remembered_event() {
        let event = |text: &str| format!(r#"{{"id":"a","delta":{{"content":"{text}"}},"usage":null}}"#);
        let mut classifier = EventClassifier::default();
        classifier.classify(event("Hello").as_bytes());
        assert!(classifier.differs_in_the_text_alone(event("you, there").as_bytes()));
        for other in [
            event(""),
            event(r#"x","type":"message_stop"#),
            event(r"x\n"),
            event(r"x\"),
            event("x").replace("null", "{}"),
            event("x").replace("id", "ID"),
            String::new(),
        ] {
            assert!(!classifier.differs_in_the_text_alone(other.as_bytes()), "{other}");
            assert_eq!(classifier.classify(other.as_bytes()), afresh(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn a_text_that_is_a_key_is_not_remembered() {
        let mut classifier = EventClassifier::default();
        for text in ["x", "error"] {
            let event = format!(r#"{{"content":"{text}":1}}"#);
            assert_eq!(classifier.classify(event.as_bytes()), afresh(event.as_bytes()), "{event}");
        }
    }

    #[test]
    fn memory_changes_nothing_of_what_is_seen() {
        const PARTS: &[&str] = &[
            r#"{"id":"a","#,
            r#""delta":{"content":""#,
            r#""text":""#,
            "Hello",
            " you",
            "",
            "\"",
            r#"\""#,
            r"\",
            r"\n",
            r#""},"#,
            r#""usage":null"#,
            r#""usage":{"input":1}"#,
            r#""finish_reason":"stop""#,
            r#""type":"error""#,
            "}",
            "{",
            ":",
        ];
        arbtest::arbtest(|u| {
            let mut classifier = EventClassifier::default();
            let mut event: Vec<&str> = Vec::new();
            for _ in 0..u.int_in_range(1..=6)? {
                // Mostly a small change to the event before.
                for _ in 0..u.int_in_range(1..=4)? {
                    let part = *u.choose(PARTS)?;
                    match u.int_in_range(0..=2)? {
                        0 if !event.is_empty() => {
                            let at = u.choose_index(event.len())?;
                            event[at] = part;
                        }
                        1 if !event.is_empty() => {
                            let at = u.choose_index(event.len())?;
                            event.remove(at);
                        }
                        _ => event.push(part),
                    }
                }
                let json = event.concat();
                assert_eq!(classifier.classify(json.as_bytes()), afresh(json.as_bytes()), "{json}");
            }
            Ok(())
        })
        .budget_ms(500);
    }
}
