//! The relay of the response's bytes to the coordinator. Broken responses are tested in `failures`.

use crossbeam_channel::{RecvTimeoutError, unbounded};
use serde_json::json;

use crate::support::*;

/// Difficult input for a parser: CRLF and bare LF, comments, UTF-8 of each length, an event over two lines, an incomplete
/// last line.
fn awkward_stream() -> Vec<u8> {
    let mut text = String::from(": keep-alive\n\n:\n\nevent: x\r\ndata:{\"no\":\"space\"}\r\n\r\n");
    text.push_str("data: {\"choices\":[{\"delta\":{\"content\":\"é €  𝄞 \u{200d}👩‍🚀\"}}]}\n\n");
    text.push_str("data: {\"choices\":[],\ndata: \"usage\":null}\n\nid: 1\nretry: 5\n\n\r\n\r\r\n");
    text.push_str("data: not json {\n\ndata:\n\n");
    text.push_str(&sse(7, 13));
    text.push_str("data: [no end");
    text.into_bytes()
}

fn noise(length: usize) -> Vec<u8> {
    let words = std::iter::repeat_with(xorshift(0x9e37_79b9_7f4a_7c15)).map(u64::to_le_bytes);
    words.flatten().take(length).collect()
}

#[derive(Clone, Copy, Debug)]
enum Framing {
    Chunked,
    Length,
    UntilClose,
    Http10,
}

const FRAMINGS: [Framing; 4] = [Framing::Chunked, Framing::Length, Framing::UntilClose, Framing::Http10];

impl Framing {
    fn head(self, content_type: &str, length: usize) -> String {
        let (version, framing) = match self {
            Framing::Chunked => ("1.1", "Transfer-Encoding: chunked\r\n".to_owned()),
            Framing::Length => ("1.1", format!("Content-Length: {length}\r\n")),
            Framing::UntilClose => ("1.1", "Connection: close\r\n".to_owned()),
            Framing::Http10 => ("1.0", String::new()),
        };
        format!("HTTP/{version} 200 OK\r\nContent-Type: {content_type}\r\n{framing}\r\n")
    }

    fn send(self, held: &mut Held, piece: &[u8]) {
        match self {
            Framing::Chunked => held.chunk(piece),
            _ => held.send(piece),
        }
    }

    fn finish(self, held: Held) {
        match self {
            Framing::Chunked => held.end(),
            Framing::Length => held.keep(),
            Framing::UntilClose | Framing::Http10 => drop(held),
        }
    }
}

/// Runs one job whose answer has this body, sent in these pieces.
fn relayed(rig: &Rig, backend: &Backend, framing: Framing, content_type: &str, pieces: &[&[u8]]) -> Outcome {
    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    held.send(framing.head(content_type, pieces.iter().map(|piece| piece.len()).sum()));
    for piece in pieces {
        framing.send(&mut held, piece);
    }
    framing.finish(held);
    rig.session.outcome(&id)
}

fn assert_same(outcome: &Outcome, body: &[u8], what: &str) {
    let got = outcome.body();
    let differs = got.iter().zip(body).position(|(a, b)| a != b);
    assert!(got == body, "{what}: {} bytes became {}, the first difference at {differs:?}", body.len(), got.len());
    assert_eq!(outcome.end["type"], "job_done", "{what}: {}", outcome.end);
}

#[test]
fn stream_arrives_unchanged_in_any_framing_and_segmentation() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let body = awkward_stream();
    for framing in FRAMINGS {
        for size in [1, 2, 3, 7, 64, body.len()] {
            let pieces: Vec<_> = body.chunks(size).collect();
            let outcome = relayed(&rig, &backend, framing, "text/event-stream", &pieces);
            assert_same(&outcome, &body, &format!("{framing:?} in pieces of {size}"));
            assert_eq!(outcome.end["tokens"]["output"], 13, "usage is read across any cut: {}", outcome.end);
        }
    }
}

#[test]
fn chunk_is_relayed_as_soon_as_its_bytes_arrive() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    for framing in FRAMINGS {
        let pieces: [&[u8]; 6] = [b"d", b"ata: \xf0\x9d", b"\x84\x9e\r", b"\n\r\n", b": c\n", b"data: [DONE]\n\n"];
        let id = rig.session.job("m", json!({}));
        let mut held = backend.next();
        held.send(framing.head("text/event-stream", pieces.concat().len()));
        for piece in pieces {
            // The next piece is sent only after this one has arrived.
            framing.send(&mut held, piece);
            assert_eq!(rig.session.chunk(&id), piece, "{framing:?}");
        }
        framing.finish(held);
        rig.session.outcome(&id).done();
    }
}

#[test]
fn slow_bodies_of_16_mib_arrive_complete() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let body = noise(16 << 20);
    for framing in [Framing::Chunked, Framing::Length, Framing::UntilClose] {
        let pieces: Vec<_> = body.chunks(100_003).collect();
        let outcome = relayed(&rig, &backend, framing, "application/octet-stream", &pieces);
        assert_same(&outcome, &body, &format!("{framing:?}"));
    }
}

/// The scanner for usage must neither buffer the line nor lose what follows.
#[test]
fn slow_line_of_32_mib_is_relayed_and_the_usage_behind_it_read() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let line = [b"data: ", &vec![b'x'; 32 << 20][..], b"\n\n"].concat();
    let tail = sse(7, 13);
    let outcome = relayed(&rig, &backend, Framing::Chunked, "text/event-stream", &[&line, tail.as_bytes()]);
    assert_same(&outcome, &[&line[..], tail.as_bytes()].concat(), "an endless line");
    assert_eq!(outcome.end["tokens"]["input"], 7);
    assert!(rig.agent.peak_kib() < 32 << 10, "a line of 32 MiB took {} KiB of memory", rig.agent.peak_kib());
}

#[test]
fn interleaved_streams_of_64_jobs_do_not_mix() {
    const JOBS: usize = 64;
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_concurrent = 64"));
    let jobs: Vec<_> = (0..JOBS).map(|n| rig.session.job("m", json!({"n": n}))).collect();
    let mut held: Vec<_> = (0..JOBS).map(|_| backend.next()).collect();
    held.sort_by_key(|held| held.request.json()["n"].as_u64());
    held.iter_mut().for_each(Held::start_sse);
    for round in 0..40 {
        for (n, held) in held.iter_mut().enumerate() {
            held.chunk(format!("data: {{\"job\":{n},\"round\":{round},\"text\":\"{}\"}}\n\n", "é".repeat(n)));
        }
    }
    for held in &mut held {
        held.chunk("data: [DONE]\n\n");
    }
    held.into_iter().for_each(Held::end);
    for (n, id) in jobs.iter().enumerate() {
        let expected: String = (0..40)
            .map(|round| format!("data: {{\"job\":{n},\"round\":{round},\"text\":\"{}\"}}\n\n", "é".repeat(n)))
            .chain(["data: [DONE]\n\n".to_owned()])
            .collect();
        assert_same(&rig.session.outcome(id), expected.as_bytes(), &format!("stream {n}"));
    }
}

#[test]
fn body_of_any_other_content_type_ends_with_its_framing() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let json = br#"{"choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":3,"completion_tokens":4}}"#;
    for framing in FRAMINGS {
        let outcome = relayed(&rig, &backend, framing, "application/json", &[&json[..30], &json[30..]]);
        assert_same(&outcome, json, &format!("{framing:?}"));
        let tokens = &outcome.end["tokens"];
        assert_eq!((&tokens["input"], &tokens["output"]), (&json!(3), &json!(4)), "usage of a JSON body: {framing:?}");
        let encoded = b"\xff\x00 no text";
        let outcome = relayed(&rig, &backend, framing, "text/plain", &[encoded]);
        assert_same(&outcome, encoded, &format!("{framing:?}"));
    }
}

#[test]
fn unusual_but_valid_http_is_understood() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let done = "data: [DONE]\n\n";
    let answers = [
        format!(
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 14\r\n\r\n{done}"
        ),
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: TEXT/EVENT-STREAM; charset=utf-8\r\nTRANSFER-ENCODING: chunked\r\n\r\nE;a=b\r\n{done}\r\n0\r\nTrailer: 1\r\n\r\n"
        ),
        format!("HTTP/1.1 200\r\nContent-Type:text/event-stream\r\nContent-Length:14\r\n\r\n{done}"),
    ];
    for answer in answers {
        let id = rig.session.job("m", json!({}));
        let mut held = backend.next();
        held.send(&answer);
        held.keep();
        assert_same(&rig.session.outcome(&id), done.as_bytes(), &answer);
    }
}

/// The agent asks for no encoding, and relays an encoded body as it is.
#[test]
fn encoded_body_stays_encoded() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let body = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 1, 2, 3];
    for encoding in ["gzip", "br", "deflate"] {
        let id = rig.session.job("m", json!({}));
        let mut held = backend.next();
        let head =
            format!("Content-Type: text/plain\r\nContent-Encoding: {encoding}\r\nContent-Length: {}", body.len());
        held.send([format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n").as_bytes(), &body].concat());
        held.keep();
        assert_same(&rig.session.outcome(&id), &body, encoding);
    }
}

#[test]
fn usage_is_read_from_the_stream_as_it_passes() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let cases: [(&str, &[&str], (u64, u64)); 13] = [
        ("openai", &[r#"{"usage":{"prompt_tokens":1,"completion_tokens":2}}"#], (1, 2)),
        ("anthropic's names", &[r#"{"usage":{"input_tokens":1,"output_tokens":2}}"#], (1, 2)),
        ("short names", &[r#"{"usage":{"input":1,"output":2}}"#], (1, 2)),
        (
            "input_tokens beats prompt_tokens",
            &[r#"{"usage":{"prompt_tokens":9,"input_tokens":1,"output_tokens":2,"completion_tokens":9}}"#],
            (1, 2),
        ),
        (
            "the last one wins",
            &[
                r#"{"usage":{"prompt_tokens":1,"completion_tokens":1}}"#,
                r#"{"usage":{"prompt_tokens":5,"completion_tokens":6}}"#,
            ],
            (5, 6),
        ),
        (
            "each field's last value wins on its own",
            &[r#"{"usage":{"prompt_tokens":1,"completion_tokens":1}}"#, r#"{"usage":{"completion_tokens":8}}"#],
            (1, 8),
        ),
        ("null says nothing", &[r#"{"usage":{"prompt_tokens":1,"completion_tokens":2}}"#, r#"{"usage":null}"#], (1, 2)),
        (
            "a number above u32 is ignored",
            &[
                r#"{"usage":{"prompt_tokens":1,"completion_tokens":2}}"#,
                r#"{"usage":{"prompt_tokens":4294967296,"completion_tokens":99999999999999999999}}"#,
            ],
            (1, 2),
        ),
        (
            "the largest u32 is not",
            &[r#"{"usage":{"prompt_tokens":4294967295,"completion_tokens":0}}"#],
            (4_294_967_295, 0),
        ),
        (
            "nonsense is ignored",
            &[
                r#"{"usage":{"prompt_tokens":3,"completion_tokens":4}}"#,
                r#"{"usage":{"prompt_tokens":-1,"completion_tokens":"7"}}"#,
                r#"{"usage":[1,2]}"#,
                r#"{"usage":7}"#,
                "[]",
                "null",
            ],
            (3, 4),
        ),
        (
            "in every chunk",
            &[
                r#"{"choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":5,"completion_tokens":1}}"#,
                r#"{"choices":[{"delta":{"content":"b"}}],"usage":{"prompt_tokens":5,"completion_tokens":2}}"#,
            ],
            (5, 2),
        ),
        (
            "anthropic's stream",
            &[
                r#"{"type":"message_start","message":{"usage":{"input_tokens":25,"output_tokens":1}}}"#,
                r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":15}}"#,
            ],
            (25, 15),
        ),
        (
            "the word usage in a text is no usage",
            &[
                r#"{"usage":{"prompt_tokens":1,"completion_tokens":2}}"#,
                r#"{"choices":[{"delta":{"content":"\"usage\":{\"prompt_tokens\":9}"}}]}"#,
            ],
            (1, 2),
        ),
    ];
    for (what, events, (input, output)) in cases {
        for (prefix, newline) in [("data: ", "\n\n"), ("data:", "\r\n\r\n")] {
            let body: String = events.iter().map(|event| format!("{prefix}{event}{newline}")).collect();
            let body = format!("{body}{prefix}[DONE]{newline}");
            let outcome = relayed(&rig, &backend, Framing::Chunked, "text/event-stream", &[body.as_bytes()]);
            let expected = json!({"input": input, "output": output, "input_tokens": input, "output_tokens": output});
            assert_eq!(outcome.done()["tokens"], expected, "{what}, `{prefix}`");
        }
    }
}

/// The coordinator stops reading for a while: nothing is dropped, and the cancel of another job takes effect.
#[test]
fn slow_backpressure_reaches_the_backend_and_loses_nothing() {
    // More than every buffer on the way together; the writing must come to a stop. Made before the job's deadline runs.
    let body = noise(48 << 20);
    let backend = Backend::vllm(&["m", "n"]);
    let rig = Rig::new(&backend);
    let mut silent_job = {
        let id = rig.session.job("n", json!({}));
        (id, backend.next())
    };
    let id = rig.session.job_within(secs(120), "m", json!({}));
    let mut held = backend.next();
    held.start_sse();
    held.chunk("data: 1\n\n");
    assert_eq!(rig.session.chunk(&id), b"data: 1\n\n");
    rig.session.pause(true);

    let copy = body.clone();
    let (wrote, written) = unbounded();
    let writer = std::thread::spawn(move || {
        for piece in copy.chunks(1 << 16) {
            held.chunk(piece);
            wrote.send(()).expect("the test");
        }
        held.chunk("\n\ndata: [DONE]\n\n");
        held.end();
    });
    rig.session.cancel(&silent_job.0);
    silent_job.1.wait_hang_up();
    let stopped = std::iter::repeat_with(|| written.recv_timeout(ms(500))).find_map(Result::err);
    assert_eq!(stopped, Some(RecvTimeoutError::Timeout), "48 MiB went into an agent whose coordinator reads nothing");

    assert!(rig.agent.peak_kib() < 40 << 10, "a blocked stream took {} KiB of memory", rig.agent.peak_kib());

    rig.session.pause(false);
    let outcome = rig.session.outcome(&id);
    writer.join().expect("the writer");
    let expected = [&body[..], b"\n\ndata: [DONE]\n\n"].concat();
    assert_eq!(outcome.end["type"], "job_done", "{}", outcome.end);
    assert!(outcome.body() == expected, "{} bytes of {} arrived", outcome.body().len(), expected.len());
}

/// The jobs are blocked by the coordinator's full socket.
#[test]
fn blocked_job_is_ended_by_cancel_and_deadline() {
    // With tens of megabytes unread, the kernel may drop segments from the agent, among them the acknowledgement of the cancel.
    // A round in which the cancel never reached the agent proves nothing.
    assert!((0..3).any(|_| blocked_jobs_end()), "the cancel did not get through to the agent, three times");
}

/// False if the cancel did not reach the agent.
fn blocked_jobs_end() -> bool {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let start = |deadline_ms: u64| {
        let id = uuid::Uuid::new_v4().to_string();
        let mut frame = job(&id, "m", json!({}));
        frame["deadline_ms"] = json!(deadline_ms);
        rig.session.send(&frame);
        let mut held = backend.next();
        held.start_sse();
        (id, held.flood())
    };
    rig.session.pause(true);
    let (cancelled, cancelled_flood) = start(60_000);
    let (late, late_flood) = start(1500);
    late_flood.join().expect("the flood of the job that ran out of time");
    assert!(!cancelled_flood.is_finished(), "the other job was to go on");
    rig.session.cancel(&cancelled);
    if !rig.agent.stderr.has_line(&[&cancelled, "cancelled"], secs(2)) {
        return false;
    }
    cancelled_flood.join().expect("the flood of the cancelled job");
    rig.session.pause(false);
    assert_eq!(rig.session.outcome(&late).error(), "backend_timeout");
    rig.session.assert_no_frame("an end of the cancelled job", QUIET, |frame| {
        frame["job_id"] == cancelled.as_str() && frame["type"] != "job_chunk"
    });
    true
}

#[test]
fn slow_control_frames_never_wait_behind_a_flood_of_chunks() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let (jobs, floods): (Vec<_>, Vec<_>) = (0..4)
        .map(|_| {
            let id = rig.session.job("m", json!({}));
            let mut held = backend.next();
            held.start_sse();
            (id, held.flood())
        })
        .unzip();
    for n in 0..5 {
        rig.session.send_frame(PING, &[n]);
        let refused = rig.session.job("unknown", json!({}));
        let (mut ponged, mut answered) = (false, false);
        // The flood never ends: a control frame behind it would never come.
        rig.session.each("a pong and a refusal beside a flood", SOON, |event| {
            match event {
                Event::Pong(payload) => ponged |= payload == &[n],
                Event::Frame(frame) => answered |= frame["job_id"] == refused.as_str(),
                _ => {}
            }
            if ponged && answered { Take::Stop } else { Take::Eat }
        });
    }
    for id in &jobs {
        rig.session.cancel(id);
    }
    for flood in floods {
        flood.join().expect("the flood to end with its job");
    }
}
