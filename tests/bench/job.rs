//! The jobs that the bench submits. What the backend is to answer, the job's [`Script`], travels in the request's `user` field:
//! the backend keeps no list of jobs, and every subject relays the field unread.

use std::fmt;

/// Between two events of a paced stream: 50 per second.
pub const INTERVAL_NS: u64 = 20_000_000;

/// Repeated, it makes a prompt of about 1 KB, the size of a short chat.
const SENTENCE: &str = "Explain how a relay forwards bytes without looking at them. ";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    pub id: u64,
    pub script: Script,
}

/// What the backend answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Script {
    /// An event every [`INTERVAL_NS`], `phase_ns` after the ticks of a grid that all streams share, until `events` were sent or
    /// the backend ends its streams.
    Paced { phase_ns: u64, events: u64 },
    /// HTTP chunks of `events_per_chunk` events, as fast as the subject reads them, until the backend ends its streams.
    Flood { events_per_chunk: u64 },
    /// One event, then the end of the stream.
    OneEvent,
    /// One event, then nothing.
    OneEventThenSilence,
    /// Nothing, not even a response head.
    Silence,
}

impl Job {
    /// The chat request.
    pub fn request(&self) -> String {
        format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}],"max_tokens":1024,"stream":true,"stream_options":{{"include_usage":true}},"user":"{self}"}}"#,
            SENTENCE.repeat(17)
        )
    }

    /// Parses what [`fmt::Display`] wrote, anywhere in `text`.
    pub fn find(text: &str) -> Option<Self> {
        let (_, job) = text.split_once("bench:")?;
        let mut fields = job.split(':');
        let mut number = || fields.next()?.parse::<u64>().ok();
        let (id, a, b) = (number()?, number()?, number()?);
        let script = match fields.next()? {
            "paced" => Script::Paced { phase_ns: a, events: b },
            "flood" => Script::Flood { events_per_chunk: a },
            "one-event" => Script::OneEvent,
            "one-event-then-silence" => Script::OneEventThenSilence,
            "silence" => Script::Silence,
            _ => return None,
        };
        Some(Self { id, script })
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (a, b, name) = match self.script {
            Script::Paced { phase_ns, events } => (phase_ns, events, "paced"),
            Script::Flood { events_per_chunk } => (events_per_chunk, 0, "flood"),
            Script::OneEvent => (0, 0, "one-event"),
            Script::OneEventThenSilence => (0, 0, "one-event-then-silence"),
            Script::Silence => (0, 0, "silence"),
        };
        write!(f, "bench:{}:{a}:{b}:{name}:", self.id)
    }
}
