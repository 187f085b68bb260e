//! Derives from a job's seed what a backend does with the job. The backend that plays the script and the coordinator that
//! checks the result derive the same script, and it is the same at every backend; only refusals differ between backends.

use std::ops::Range;
use std::time::Duration;

use super::rng::Rng;
use super::stream::{Format, Stream, Usage};
use crate::support::ms;

/// Seeds of jobs that every backend serves at once.
pub const PLAIN_SEEDS: Range<u64> = 0..1 << 20;
/// Seeds of jobs that are answered at once with several MB.
pub const LARGE_SEEDS: Range<u64> = 1 << 20..2 << 20;
/// Seeds of all other jobs.
pub const RANDOM_SEEDS: Range<u64> = 2 << 20..1 << 53;

/// How a backend serves a job.
pub struct Script {
    /// The wait before the first byte of the head.
    pub wait: Duration,
    pub framing: Framing,
    /// The content type; `None`: the head does not state it.
    pub content_type: Option<&'static str>,
    /// All bytes that it sends, and so all that the coordinator may receive.
    pub body: Vec<u8>,
    /// Sizes of the writes.
    pub pieces: Vec<usize>,
    /// The pause after each write.
    pub pause: Duration,
    pub ending: Ending,
    pub verdict: Verdict,
    pub usage: Usage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    Chunked,
    Length,
    UntilClose,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Complete, by its framing; the connection may serve another request.
    Whole {
        keeps: bool,
    },
    /// The connection ends although more was promised.
    Closed,
    Reset,
    /// An invalid chunk size.
    BadChunk,
    /// Nothing more comes.
    Silence,
    /// Nothing more comes, behind an end marker.
    Open,
    /// Not even a head comes.
    NoHead,
}

/// How a job that was served so can end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Done,
    /// `internal`, after the last byte of the body has been passed on.
    Broken,
    /// `internal`, or `backend_unreachable` when the reset, or the bad chunk size, took all bytes with it.
    Torn,
    /// Only by its deadline.
    Never,
}

#[derive(Clone, Copy)]
enum Act {
    Quick,
    Slow,
    Trickle,
    LateHead,
    Silence,
    NoHead,
    Cut,
    Reset,
    ErrorEvent,
    FinishError,
    LeftOpen,
    BadChunk,
    Json,
    EndlessLine,
    Flood,
}

const ACTS: [(u64, Act); 15] = [
    (700, Act::Quick),
    (60, Act::Slow),
    (30, Act::Trickle),
    (30, Act::LateHead),
    (20, Act::Silence),
    (10, Act::NoHead),
    (50, Act::Cut),
    (30, Act::Reset),
    (40, Act::ErrorEvent),
    (20, Act::FinishError),
    (40, Act::LeftOpen),
    (30, Act::BadChunk),
    (40, Act::Json),
    (3, Act::EndlessLine),
    (3, Act::Flood),
];

impl Script {
    pub fn of(seed: u64, format: Format) -> Self {
        let rng = &mut Rng::of(seed, "script");
        let act = match seed {
            _ if PLAIN_SEEDS.contains(&seed) => Act::Quick,
            _ if LARGE_SEEDS.contains(&seed) => Act::Flood,
            _ => rng.weighed(&ACTS),
        };
        let mut stream = Stream::new(rng, format);
        let (verdict, ending) = match act {
            Act::Silence => (Verdict::Never, Ending::Silence),
            Act::NoHead => (Verdict::Never, Ending::NoHead),
            Act::Cut => (Verdict::Broken, Ending::Closed),
            Act::Reset => (Verdict::Torn, Ending::Reset),
            Act::BadChunk => (Verdict::Torn, Ending::BadChunk),
            Act::ErrorEvent | Act::FinishError => (Verdict::Broken, Ending::Whole { keeps: rng.per_mille(800) }),
            Act::LeftOpen => (Verdict::Done, Ending::Open),
            _ => (Verdict::Done, Ending::Whole { keeps: rng.per_mille(900) }),
        };
        let framing = match act {
            Act::BadChunk => Framing::Chunked,
            _ => rng.weighed(&[(6, Framing::Chunked), (3, Framing::Length), (1, Framing::UntilClose)]),
        };
        let body = body_of(act, &mut stream, rng);
        let (size, pause) = match act {
            Act::Slow => (body.len() / 8, rng.time(30..250)),
            Act::Trickle => (3, ms(2)),
            Act::EndlessLine | Act::Flood => (64 << 10, Duration::ZERO),
            _ => (400, Duration::ZERO),
        };
        Self {
            wait: if matches!(act, Act::LateHead) { rng.time(50..1500) } else { Duration::ZERO },
            framing,
            content_type: match act {
                Act::Json => Some("application/json"),
                _ => rng.weighed(&[
                    (90, Some("text/event-stream")),
                    (3, Some("text/plain; charset=utf-8")),
                    (4, Some("application/json")),
                    (3, None),
                ]),
            },
            pieces: cut(rng, body.len(), size.max(1)),
            body,
            pause,
            ending,
            verdict,
            usage: stream.usage,
        }
    }

    /// Whether the first `length` bytes of the body contain an end marker.
    pub fn has_end_mark(&self, length: usize) -> bool {
        let text = String::from_utf8_lossy(&self.body[..length]);
        ["\"finish_reason\":\"stop\"", "[DONE]", "message_stop"].iter().any(|mark| text.contains(mark))
    }

    /// The least time that it takes.
    pub fn time(&self) -> Duration {
        match self.ending {
            Ending::Silence | Ending::NoHead => Duration::MAX,
            _ => self.wait + self.pause * self.pieces.len() as u32,
        }
    }
}

fn body_of(act: Act, stream: &mut Stream, rng: &mut Rng) -> Vec<u8> {
    match act {
        Act::NoHead => {}
        Act::Json => return stream.json(rng).into_bytes(),
        Act::Cut | Act::Reset | Act::Silence | Act::BadChunk => {
            // No end marker, so that it cannot pass for complete.
            let count = rng.within(1..20);
            stream.pieces(rng, count);
            stream.text.truncate(stream.text.trim_end().len());
        }
        Act::ErrorEvent => {
            let count = rng.within(1..20);
            stream.pieces(rng, count);
            stream.error();
        }
        Act::FinishError => {
            let count = rng.within(1..20);
            stream.pieces(rng, count);
            stream.finish_error();
        }
        Act::LeftOpen => {
            let count = rng.within(1..20);
            stream.pieces(rng, count);
            stream.end_with_mark(rng);
        }
        Act::Flood => {
            let content = format!("{:x}", rng.next()).repeat(64);
            for _ in 0..rng.within(1000..3000) {
                stream.piece(&content);
            }
            stream.end(rng);
        }
        Act::EndlessLine => {
            let length = rng.within(1_200_000..2_500_000);
            stream.piece(&"x".repeat(length as usize));
            stream.end(rng);
        }
        Act::Trickle => {
            let count = rng.within(1..5);
            stream.pieces(rng, count);
            stream.end(rng);
        }
        Act::Quick | Act::Slow | Act::LateHead => {
            let count = rng.within(1..40);
            stream.pieces(rng, count);
            stream.end(rng);
            match rng.within(0..10) {
                0 | 1 => stream.text = stream.text.replace('\n', "\r\n"),
                2 => stream.text = stream.text.replace('\n', "\r"),
                3 => stream.text.insert(0, '\u{feff}'),
                4 => stream.text = stream.text.replace("data: {", "data: {\ndata:"),
                _ => {}
            }
        }
    }
    std::mem::take(&mut stream.text).into_bytes()
}

/// Cuts `length` bytes at random places.
fn cut(rng: &mut Rng, length: usize, size: usize) -> Vec<usize> {
    let mut pieces = Vec::new();
    let mut left = length;
    while left > 0 {
        let piece = (rng.within(1..2 * size as u64 + 1) as usize).min(left);
        pieces.push(piece);
        left -= piece;
    }
    pieces
}

/// How a backend refuses a job.
#[derive(Debug)]
pub struct Refusal {
    pub answer: Answer,
    /// The error code if no other backend takes the job.
    pub code: &'static str,
    /// Whether another backend may take it.
    pub may_fail_over: bool,
}

#[derive(Debug)]
pub enum Answer {
    Status(u16, &'static str),
    /// These bytes, if any, and the end of the connection.
    Bytes(&'static str),
    Reset,
}

const fn refusal(answer: Answer, code: &'static str, may_fail_over: bool) -> Refusal {
    Refusal { answer, code, may_fail_over }
}

static REFUSALS: [Refusal; 19] = [
    refusal(Answer::Status(400, "too long"), "internal", false),
    refusal(Answer::Status(401, "who are you?"), "auth_rejected_by_backend", false),
    refusal(Answer::Status(404, "no such model"), "model_not_loaded", true),
    refusal(Answer::Status(429, "slow down"), "out_of_capacity", true),
    refusal(Answer::Status(500, "CUDA error"), "internal", false),
    refusal(
        Answer::Status(500, "{\"error\":{\"message\":\"image input is not supported\",\"code\":500}}"),
        "internal",
        false,
    ),
    refusal(Answer::Status(404, "{\"error\":{\"message\":\"No models loaded.\"}}"), "model_not_loaded", true),
    refusal(Answer::Status(400, "{\"error\":\"Failed to load model\"}"), "model_not_loaded", true),
    refusal(Answer::Status(502, "bad gateway"), "backend_unreachable", true),
    refusal(Answer::Status(522, "connection timed out"), "backend_unreachable", true),
    refusal(Answer::Status(529, "{\"error\":{\"type\":\"overloaded_error\"}}"), "out_of_capacity", true),
    refusal(Answer::Status(503, "{\"error\":{\"message\":\"Loading model\"}}"), "model_not_loaded", true),
    refusal(Answer::Status(503, "server busy"), "out_of_capacity", true),
    refusal(Answer::Bytes(""), "backend_unreachable", true),
    refusal(Answer::Bytes("SSH-2.0-OpenSSH_9.6\r\n"), "backend_unreachable", true),
    refusal(
        Answer::Bytes("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\n"),
        "backend_unreachable",
        true,
    ),
    refusal(
        Answer::Bytes(
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        "backend_unreachable",
        true,
    ),
    refusal(
        Answer::Bytes("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n"),
        "backend_unreachable",
        true,
    ),
    refusal(Answer::Reset, "backend_unreachable", true),
];

/// How this backend refuses this job, if it does.
pub fn refusal_at(seed: u64, backend: usize) -> Option<&'static Refusal> {
    let rng = &mut Rng::of(seed, &format!("refusal at {backend}"));
    (!PLAIN_SEEDS.contains(&seed) && rng.per_mille(120)).then(|| rng.pick(&REFUSALS))
}
