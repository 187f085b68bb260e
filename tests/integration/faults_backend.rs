//! Faults of a backend: its job ends once, nothing leaks, and the next job is served.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::*;

const SSE: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n";
const CHUNKED: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
const TEXT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n";
const DONE: &str = "data: [DONE]\n\n";

/// The most memory that an agent may have held, in KiB.
const PEAK_KIB_MAX: u64 = 32 << 10;

/// A job for `m`, and the connection that its backend holds.
fn start_job(measured: &MeasuredAgent) -> (String, Held) {
    (measured.rig.session.job("m", json!({})), measured.backend.next())
}

/// The next job gets its own answer, nothing leaked, and of these jobs nothing more was sent.
fn assert_well(measured: &MeasuredAgent, ids: &[&str]) {
    assert_well_below(PEAK_KIB_MAX, measured, ids);
}

fn assert_well_below(peak_kib_max: u64, measured: &MeasuredAgent, ids: &[&str]) {
    let (session, agent) = (&measured.rig.session, &measured.rig.agent);
    let (id, held) = start_job(measured);
    held.finish();
    assert_eq!(session.outcome(&id).body(), sse(7, 13).as_bytes());
    let peak = agent.peak_kib();
    assert!(peak < peak_kib_max, "the agent held {peak} KiB of memory");
    measured.assert_no_leak();
    session.assert_no_frame("a second end", Duration::ZERO, |frame| ids.iter().any(|id| frame["job_id"] == *id));
}

fn with_length(length: &str, body: &str) -> String {
    format!("{SSE}Content-Length: {length}\r\n\r\n{body}")
}

#[derive(Clone, Copy)]
enum Then {
    Close,
    /// The agent must close the connection.
    Stay,
}

use Then::{Close, Stay};

/// A broken response: its name, its first part, what of that is relayed before the rest is sent, the rest, what of that is
/// relayed, who closes the connection, and how the job ends.
type Broken<'a> = (&'a str, String, &'a str, String, &'a str, Then, &'a str);

fn assert_harmless((what, first, relayed, rest, more, then, end): Broken<'_>) {
    let measured = MeasuredAgent::new();
    let (id, mut held) = start_job(&measured);
    held.send(&first);
    if !relayed.is_empty() {
        assert_eq!(measured.rig.session.chunk(&id), relayed.as_bytes(), "{what}");
    }
    held.send(&rest);
    let kept = match then {
        Close => {
            drop(held);
            None
        }
        Stay => Some(held),
    };
    let outcome = measured.rig.session.outcome(&id);
    assert_eq!(String::from_utf8_lossy(&outcome.body()), more, "{what}");
    let ended_with = outcome.end["error_code"].as_str().unwrap_or("done");
    assert_eq!(ended_with, end, "{what}: {}", outcome.end);
    if let Some(mut held) = kept {
        held.wait_hang_up();
    }
    assert_well(&measured, &[&id]);
}

#[test]
fn body_of_the_wrong_length_fails_only_the_job() {
    let _descriptors = reserve_descriptors(160);
    let first_chunk = || format!("{CHUNKED}{:x}\r\n{TEXT}\r\n", TEXT.len());
    // Bytes behind a response are not the response to the next request.
    let forged = response(200, "text/event-stream", format!("data: forged\n\n{DONE}"));
    let forged = String::from_utf8(forged).expect("text");
    let lengths = ["14\r\nContent-Length: 5", "14, 5", "-1", "+14", "many", "99999999999999999999"];
    let lengths = lengths.map(|length| -> Broken<'_> {
        (length, with_length(length, DONE), "", String::new(), "", Stay, "backend_unreachable")
    });
    let framings: [Broken<'_>; 4] = [
        ("shorter than its length", with_length("999", TEXT), TEXT, String::new(), "", Close, "internal"),
        (
            "longer than its length",
            with_length("14", &format!("{DONE}{forged}")),
            DONE,
            String::new(),
            "",
            Stay,
            "done",
        ),
        (
            "no line end after a chunk",
            first_chunk().trim_end().to_owned() + "\n\n",
            TEXT,
            "e\r\n".into(),
            "",
            Stay,
            "internal",
        ),
        ("a chunk without end", first_chunk(), TEXT, format!("ffffffffffffffff\r\n{TEXT}"), TEXT, Close, "internal"),
    ];
    let sizes = ["xyz\r\n", "-5\r\n", "\r\n", "fffffffffffffffff\r\n"].map(str::to_owned);
    let endless = ["", "e;", "0\r\nX: "].map(|start| start.to_owned() + &"0".repeat(1 << 20));
    let sizes: Vec<_> = sizes.into_iter().chain(endless).collect();
    let sizes = sizes.iter().map(|rest| -> Broken<'_> {
        (rest.get(..9).unwrap_or(rest), first_chunk(), TEXT, rest.clone(), "", Stay, "internal")
    });
    side_by_side(lengths.into_iter().chain(framings).chain(sizes), assert_harmless);
}

#[test]
fn head_of_a_megabyte_fails_only_the_job_and_a_thousand_interim_heads_nothing() {
    let megabyte = "x".repeat(1 << 20);
    let given_up = [
        ("one header", format!("{SSE}X: {megabyte}\r\n\r\n")),
        ("many headers", format!("{SSE}{}\r\n", "X: 0123456789\r\n".repeat(70_000))),
        ("the status", format!("HTTP/1.1 200 {megabyte}\r\n\r\n")),
        ("nothing but line ends", "\r\n".repeat(1 << 19)),
        ("no HTTP at all", megabyte),
    ];
    let given_up =
        given_up.map(|(what, head)| -> Broken<'_> { (what, head, "", String::new(), "", Stay, "backend_unreachable") });
    let interim = ["100 Continue", "102 Processing", "103 Early Hints\r\nLink: x"];
    let heads: Vec<String> = interim.iter().map(|status| format!("HTTP/1.1 {status}\r\n\r\n").repeat(1000)).collect();
    let served = heads
        .iter()
        .map(|heads| -> Broken<'_> { (&heads[..12], heads.clone(), "", with_length("14", DONE), DONE, Close, "done") });
    side_by_side(given_up.into_iter().chain(served), assert_harmless);
}

/// The agent closes both directions.
#[test]
fn error_body_of_10_mb_is_quoted_with_512_bytes_and_the_rest_is_not_read() {
    let framings = [
        "Content-Length: 10000000\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n989680\r\n",
        "Connection: close\r\n\r\n",
        "\r\n",
    ];
    side_by_side(framings, |framing| {
        let measured = MeasuredAgent::new();
        let (id, mut held) = start_job(&measured);
        let began = Instant::now();
        let body = "e".repeat(10_000_000);
        let answer = format!("HTTP/1.1 500 Broken\r\nContent-Type: text/plain\r\n{framing}{body}");
        let sender = std::thread::spawn(move || (held.try_send(answer.as_bytes()), held));
        let outcome = measured.rig.session.outcome_within(&id, SOON);
        let took = began.elapsed();
        assert_eq!((outcome.error(), outcome.chunks.len()), ("internal", 0), "{framing:?}");
        let quoted = outcome.message().matches('e').count();
        assert!((500..=540).contains(&quoted), "{framing:?}: {}", outcome.message());
        assert!(took < secs(2), "{framing:?}: given up after {took:?}");
        let (sent, mut held) = sender.join().expect("the sender");
        assert!(!sent, "{framing:?}: all of it was read");
        held.wait_hang_up();
        assert_well(&measured, &[&id]);
    });
}

#[test]
fn error_body_that_never_ends_is_not_awaited() {
    let stalls = ["Content-Length: 500\r\n\r\nbusy", "Transfer-Encoding: chunked\r\n\r\n4\r\nbusy\r\n", "\r\nbusy"];
    side_by_side(stalls, |rest| {
        let measured = MeasuredAgent::new();
        let (id, mut held) = start_job(&measured);
        held.send(format!("HTTP/1.1 503 Busy\r\nContent-Type: text/plain\r\n{rest}"));
        let outcome = measured.rig.session.outcome_within(&id, SOON);
        assert_eq!(outcome.error(), "out_of_capacity", "{rest:?}");
        assert!(outcome.message().contains("busy"), "{rest:?}: {}", outcome.message());
        held.wait_hang_up();
        assert_well(&measured, &[&id]);
    });
}

/// The deadline ends the job, neither earlier nor, on a loaded machine, much later.
fn assert_ends_after(time: Duration, what: &str, progress: impl FnOnce(&MeasuredAgent, &str, Held)) {
    let measured = MeasuredAgent::new();
    let began = Instant::now();
    let id = measured.rig.session.job_within(time, "m", json!({}));
    progress(&measured, &id, measured.backend.next());
    let outcome = measured.rig.session.outcome(&id);
    let took = began.elapsed();
    assert_eq!(outcome.error(), "backend_timeout", "{what}");
    assert!(took >= time && took < time + secs(3), "{what}: a deadline of {time:?} ended it after {took:?}");
    assert_well(&measured, &[&id]);
}

fn stalls_before_the_head() {
    assert_ends_after(secs(1), "silence", |_, _, mut held| {
        held.wait_hang_up();
    });
}

fn stalls_in_the_stream() {
    assert_ends_after(secs(2), "a stall", |measured, id, mut held| {
        held.start_sse();
        held.chunk(TEXT);
        assert_eq!(measured.rig.session.chunk(id), TEXT.as_bytes());
        held.wait_hang_up();
    });
}

fn trickles() {
    assert_ends_after(secs(3), "a trickle", |measured, id, mut held| {
        held.start_sse();
        for byte in ["d", "a"] {
            held.chunk(byte);
            assert_eq!(measured.rig.session.chunk(id), byte.as_bytes());
            std::thread::sleep(secs(1));
        }
        held.wait_hang_up();
    });
}

fn never_ends() {
    assert_ends_after(secs(1), "an endless stream", |_, _, mut held| {
        held.start_sse();
        held.flood().join().expect("the flood");
    });
}

fn has_interim_answers_without_end() {
    assert_ends_after(secs(1), "endless interim answers", |_, _, mut held| {
        let heads = "HTTP/1.1 100 Continue\r\n\r\n".repeat(100);
        while held.try_send(heads.as_bytes()) {}
    });
}

fn never_ends_until_it_is_cancelled() {
    let measured = MeasuredAgent::new();
    let (id, mut held) = start_job(&measured);
    held.start_sse();
    let flood = held.flood();
    measured.rig.session.chunk(&id);
    measured.rig.session.cancel(&id);
    flood.join().expect("the flood");
    // Chunks sent before the cancel are allowed.
    measured.rig.session.each("the answer to a ping behind the last chunk", SOON, {
        measured.rig.session.send_frame(PING, b"?");
        |event| match event {
            Event::Frame(frame) if frame["job_id"] == id.as_str() => {
                assert_eq!(frame["type"], "job_chunk");
                Take::Eat
            }
            Event::Pong(_) => Take::Stop,
            _ => Take::Leave,
        }
    });
    assert_well(&measured, &[&id]);
}

fn is_reset() {
    for begun in [false, true] {
        let measured = MeasuredAgent::new();
        measured.backend.reset_on_close();
        // The setting applies from the next connection on.
        measured.backend.hang_up();
        let (id, mut held) = start_job(&measured);
        if begun {
            held.start_sse();
            held.chunk(TEXT);
            assert_eq!(measured.rig.session.chunk(&id), TEXT.as_bytes());
        }
        drop(held);
        let code = if begun { "internal" } else { "backend_unreachable" };
        assert_eq!(measured.rig.session.outcome(&id).error(), code);
        measured.backend.leave_unread(0);
        assert_well(&measured, &[&id]);
    }
}

fn refuses() {
    let address = nobody_at("127.0.0.10");
    let mut measured = MeasuredAgent::beside(Backend::vllm_on(&address, &["m"]), |setup| setup);
    drop(std::mem::replace(&mut measured.backend, Backend::vllm(&[])));
    let ids: Vec<_> = (0..8).map(|_| measured.rig.session.job("m", json!({}))).collect();
    for id in &ids {
        assert_eq!(measured.rig.session.outcome(id).error(), "backend_unreachable");
    }
    measured.backend = Backend::vllm_on(&address, &["m"]);
    assert_well(&measured, &ids.iter().map(String::as_str).collect::<Vec<_>>());
}

/// The queue of connections is full: a SYN stays unanswered.
fn never_accepts() {
    let measured = MeasuredAgent::new();
    measured.backend.hang_up();
    let queue = measured.backend.swallow_connects();
    let id = measured.rig.session.job("m", json!({}));
    let began = Instant::now();
    assert_eq!(measured.rig.session.outcome(&id).error(), "backend_unreachable");
    let took = began.elapsed();
    assert!(took > secs(4) && took < secs(10), "the connect was given up after {took:?}");
    measured.backend.accept_again(queue);
    assert_well(&measured, &[&id]);
}

#[test]
fn slow_backend_that_refuses_resets_stalls_or_never_ends_fails_only_the_job() {
    let _descriptors = reserve_descriptors(240);
    let faults: [fn(); 9] = [
        refuses,
        never_accepts,
        is_reset,
        stalls_before_the_head,
        stalls_in_the_stream,
        trickles,
        never_ends,
        never_ends_until_it_is_cancelled,
        has_interim_answers_without_end,
    ];
    side_by_side(faults, |fault| fault());
}

/// More than the socket buffers hold of a request that is not read.
const PICTURE_BYTES: usize = 12_000_000;

/// The allocator retains the memory of a few requests of this size.
fn allow_for_large_requests(measured: &mut MeasuredAgent) {
    measured.before.resident_kib += 4 * (PICTURE_BYTES >> 10) as u64;
}

/// The most memory with requests of this size, in KiB.
const PEAK_KIB_MAX_LARGE: u64 = PEAK_KIB_MAX + 8 * (PICTURE_BYTES >> 10) as u64;

/// Sends a job with a large request as text, as building so large a value takes an unoptimized test too long.
fn send_large_job(measured: &MeasuredAgent, time: Duration) -> String {
    let id = Uuid::new_v4().to_string();
    let frame = job_within(time, &id, "m", json!({"picture": "PICTURE"}));
    measured.rig.session.send_text(&frame.to_string().replace("PICTURE", &"x".repeat(PICTURE_BYTES)));
    id
}

/// The backend accepts, and reads only the head of the request.
#[test]
fn slow_request_that_the_backend_never_reads_is_ended_by_deadline_and_cancel() {
    side_by_side([false, true], |is_cancelled| {
        let mut measured = MeasuredAgent::new();
        allow_for_large_requests(&mut measured);
        measured.backend.leave_unread(usize::MAX);
        measured.backend.hang_up();
        // Includes the time that an unoptimized agent takes to serialize so large a request.
        let time = if is_cancelled { secs(60) } else { secs(10) };
        let id = send_large_job(&measured, time);
        measured.rig.agent.stderr.wait_line(&["job", &id, "for model"]);
        let accepted = Instant::now();
        let mut held = measured.backend.next();
        if is_cancelled {
            measured.rig.session.cancel(&id);
            // Frames are handled in order: once this is answered, the cancel was read.
            let unknown = measured.rig.session.job("unknown", json!({}));
            measured.rig.session.outcome(&unknown);
        } else {
            assert_eq!(measured.rig.session.outcome(&id).error(), "backend_timeout");
            let took = accepted.elapsed();
            assert!(took < time + secs(2), "a deadline of {time:?} ended it after {took:?}");
        }
        let read = held.read_to_end(SOON);
        assert!(read < PICTURE_BYTES, "the backend got all {read} bytes of a request that it did not read");
        measured.backend.leave_unread(0);
        assert_well_below(PEAK_KIB_MAX_LARGE, &measured, &[&id]);
    });
}

/// The rest of the request is never read, so that closing resets the connection.
#[test]
fn slow_answer_before_the_request_was_read_is_relayed_or_fails_only_the_job() {
    let answers = [(response(413, "text/plain", "too large"), "internal"), (with_length("14", DONE).into(), "done")];
    side_by_side(answers, |(answer, end)| {
        let mut measured = MeasuredAgent::new();
        allow_for_large_requests(&mut measured);
        measured.backend.leave_unread(usize::MAX);
        measured.backend.hang_up();
        let id = send_large_job(&measured, secs(30));
        measured.backend.next_within(3 * SOON).send(answer);
        let outcome = measured.rig.session.outcome(&id);
        assert_eq!(outcome.end["error_code"].as_str().unwrap_or("done"), end, "{}", outcome.end);
        measured.backend.leave_unread(0);
        assert_well_below(PEAK_KIB_MAX_LARGE, &measured, &[&id]);
    });
}

#[test]
fn slow_line_of_200_mb_is_relayed_unchanged_in_bounded_memory() {
    const PERIODS: usize = 4200;
    let measured = MeasuredAgent::new();
    let id = measured.rig.session.job_within(secs(120), "m", json!({}));
    let mut held = measured.backend.next();
    let mut line = EndlessLine::new();
    let chunk = [format!("{:x}\r\n", line.period.len()).as_bytes(), &line.period, b"\r\n"].concat();
    let line_length = PERIODS * line.period.len();
    assert!(line_length > 200_000_000);
    let head = format!(r#"{{"type":"job_chunk","job_id":"{id}","data":""#);
    let (arrived, has_arrived) = crossbeam_channel::bounded(1);
    measured.rig.session.tap(move |frame| {
        let piece = frame.strip_prefix(head.as_bytes()).and_then(|rest| rest.strip_suffix(b"\"}"));
        let Some(piece) = piece.filter(|_| line.length < line_length) else { return false };
        line.compare(std::str::from_utf8(piece).expect("base64"));
        if line.length == line_length {
            arrived.send(()).expect("the test");
        }
        true
    });
    held.start_sse();
    let sender = std::thread::spawn(move || {
        (0..PERIODS).for_each(|_| held.send(&chunk));
        held
    });
    has_arrived.recv_timeout(secs(100)).expect("the whole line");
    let mut held = sender.join().expect("the sender");
    held.chunk(format!("\n\n{}", sse(7, 13)));
    held.end();
    assert_eq!(measured.rig.session.outcome(&id).done()["tokens"]["output"], 13);
    assert_well(&measured, &[&id]);
}

/// Two backends list `m`, the first is advertised; `n` is the second's alone.
#[test]
fn slow_death_of_one_of_two_backends_leaves_the_other_serving_until_it_is_back() {
    const STREAMS: usize = 4;
    let address = nobody_at("127.0.0.11");
    let (mortal, other) = (Backend::vllm_on(&address, &["m"]), Backend::vllm(&["m", "n"]));
    let rig = Rig::with(|setup| setup.backend(mortal.toml()).backend(other.toml().replace("vllm", "openai")));
    let advertised = |offer: &Value| offer["models"][0]["backend"].clone();
    assert_eq!(advertised(&rig.session.capabilities), "vllm");
    let before = ResourceUsage::after_a_job(&rig.agent, &rig.session, &mortal);
    let begin = |model: &str, backend: &Backend| {
        let id = rig.session.job(model, json!({}));
        let mut held = backend.next();
        held.start_sse();
        held.chunk(TEXT);
        assert_eq!(rig.session.chunk(&id), TEXT.as_bytes());
        (id, held)
    };
    let doomed: Vec<_> = (0..STREAMS).map(|_| begin("m", &mortal)).collect();
    let spared: Vec<_> = (0..STREAMS).map(|_| begin("n", &other)).collect();
    drop(mortal);
    for (id, held) in doomed {
        drop(held);
        let outcome = rig.session.outcome(&id);
        assert_eq!((outcome.error(), outcome.chunks.len()), ("internal", 0));
    }
    // The other backend serves, whether or not it is advertised by now.
    for _ in 0..STREAMS {
        let id = rig.session.job("m", json!({}));
        other.next().finish();
        assert_eq!(rig.session.outcome(&id).body(), sse(7, 13).as_bytes());
    }
    assert_eq!(advertised(&rig.session.frame("capabilities", SOON)), "openai");
    for (id, mut held) in spared {
        held.chunk(sse(1, 2));
        held.end();
        assert_eq!(rig.session.outcome(&id).body(), sse(1, 2).as_bytes());
    }

    let back = Backend::vllm_on(&address, &["m"]);
    // A job whose model is missing causes a probe at once.
    let id = rig.session.job("n", json!({}));
    let mut held = other.next();
    held.send(response(404, "text/plain", "no such model"));
    held.keep();
    assert_eq!(rig.session.outcome(&id).error(), "model_not_loaded");
    assert_eq!(advertised(&rig.session.frame("capabilities", SOON)), "vllm");
    // Idle connections to the other backend are closed by the first exchange after their maximum age.
    let began = Instant::now();
    while ResourceUsage::of(&rig.agent).descriptors > before.descriptors {
        assert!(began.elapsed() < SOON, "before: {before:?}, now: {:?}", ResourceUsage::of(&rig.agent));
        std::thread::sleep(ms(100));
        let id = rig.session.job("n", json!({}));
        other.next().finish();
        rig.session.outcome(&id).done();
    }
    before.assert_no_leak(&rig.agent, &rig.session, &back);
}
