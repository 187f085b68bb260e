//! One stream, as its request tells the backend: the script travels in the request's `user`, so that the backend has nothing
//! to keep and every subject relays it unread.

use std::fmt;

/// Between two events of a paced stream: 50 a second.
pub const INTERVAL_NS: u64 = 20_000_000;

/// What a customer says; about 1 KB, as a short chat would be.
const SENTENCE: &str = "Explain how a relay forwards bytes without looking at them. ";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    pub seq: u64,
    pub script: Script,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Script {
    /// An event every [`INTERVAL_NS`], `phase_ns` behind the ticks of a grid that all streams share, until there were `events`
    /// or the backend is told to stop.
    Paced { phase_ns: u64, events: u64 },
    /// HTTP chunks of so many events as fast as they are taken, until the backend is told to stop.
    Flood { events_a_chunk: u64 },
    /// One event and the end.
    One,
    /// One event, then nothing.
    OneThenSilence,
    /// Not even a response head.
    Silence,
}

impl Order {
    /// The chat request.
    pub fn request(&self) -> String {
        format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}],"max_tokens":1024,"stream":true,"stream_options":{{"include_usage":true}},"user":"{self}"}}"#,
            SENTENCE.repeat(17)
        )
    }

    /// Reads what [`fmt::Display`] wrote, wherever it stands in `text`.
    pub fn find(text: &str) -> Option<Self> {
        let (_, order) = text.split_once("bench:")?;
        let mut fields = order.split(':');
        let mut number = || fields.next()?.parse::<u64>().ok();
        let (seq, a, b) = (number()?, number()?, number()?);
        let script = match fields.next()? {
            "paced" => Script::Paced { phase_ns: a, events: b },
            "flood" => Script::Flood { events_a_chunk: a },
            "one" => Script::One,
            "one-then-silence" => Script::OneThenSilence,
            "silence" => Script::Silence,
            _ => return None,
        };
        Some(Self { seq, script })
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (a, b, name) = match self.script {
            Script::Paced { phase_ns, events } => (phase_ns, events, "paced"),
            Script::Flood { events_a_chunk } => (events_a_chunk, 0, "flood"),
            Script::One => (0, 0, "one"),
            Script::OneThenSilence => (0, 0, "one-then-silence"),
            Script::Silence => (0, 0, "silence"),
        };
        write!(f, "bench:{}:{a}:{b}:{name}:", self.seq)
    }
}
