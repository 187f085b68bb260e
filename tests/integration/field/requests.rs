//! Requests of any size and shape: what a backend receives of them, and what they cost in memory.

use std::time::Instant;

use serde_json::json;
use uuid::Uuid;

use super::network::{finish_listing, session_before_the_first_offer};
use crate::support::*;

const MIB: usize = 1 << 20;

/// What the agent may take beside 2.5 times the text of the requests.
const PEAK_BASE_BYTES: usize = 64 * MIB;

fn frame(id: &str, model: &str, request: &str, format: &str) -> String {
    format!(
        r#"{{"type":"job","job_id":"{id}","model_id":"{model}","request":{request},"format":"{format}","deadline_ms":600000}}"#
    )
}

/// Sends a job with this text as its request, and returns the body that the backend received.
fn body_at(rig: &Rig, backend: &Backend, model: &str, request: &str, format: &str) -> String {
    let id = Uuid::new_v4().to_string();
    rig.session.send_text(&frame(&id, model, request, format));
    let held = backend.next_within(3 * SOON);
    let body = held.request.body_text();
    assert!(held.request.header("content-length").is_some(), "{:?}", held.request.headers);
    held.finish();
    rig.session.outcome(&id).done();
    body
}

/// The order of the keys of a tool schema reaches the model's prompt, as do the spellings of its numbers and strings.
#[test]
fn request_reaches_the_backend_byte_for_byte() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let own = concat!(
        "{ \"zeta\" : 1 ,\r\n\t\"alpha\":{\"z\":[],\"a\":{ },\"z\":null} , \"seed\":123456789012345678901234567890,",
        r#""exact":0.1000000000000000055511151231257827,"one":1.0,"big":1E+400,"small":1e-7,"negative":-0.0,"#,
        r#""text":"\u00e9 é \/ \" \\ \n \u0000 𝄞 \ud834\udd1e \uD834\uDD1E </script> \"model\":\"b\",}","#,
        r#""alpha":"again","\u0061lpha":"and again","$serde_json::private::Number":"x","":"","#,
        r#""metadata":{"model":"b","stream":false,"models":["b"],"route":"x","$serde_json::private::RawValue":"x"}"#,
    );
    for (format, added) in [
        ("openai", r#","stream":true,"stream_options":{"include_usage":true},"model":"m""#),
        ("anthropic", r#","stream":true,"model":"m""#),
    ] {
        let got = body_at(&rig, &backend, "m", &format!("{own}\n }}"), format);
        assert_eq!(got, format!("{own}{added}\n }}"));
    }
}

/// A model that is not offered cannot be reached with the operator's key.
#[test]
fn model_of_the_job_is_forced_however_the_request_names_another() {
    let backend = Backend::vllm(&["a", "b"]);
    let rig = Rig::with(|setup| setup.backend(format!("{}\nmodels = [\"a\"]", backend.toml())));
    let usage = r#""stream_options":{"include_usage":true}"#;
    let stream = format!(r#""stream":true,{usage}"#);
    let table = [
        (r#"{"model":"b"}"#, format!(r#"{{"model":"a",{stream}}}"#)),
        (r#"{"mod\u0065l":"b","n":1}"#, format!(r#"{{"model":"a","n":1,{stream}}}"#)),
        (r#"{"model":"a","n":1,"model":"b"}"#, format!(r#"{{"model":"a","n":1,{stream}}}"#)),
        (r#"{"model":"a","\u006d\u006f\u0064\u0065\u006C":"b" }"#, format!(r#"{{"model":"a",{stream} }}"#)),
        (r#"{"model":["b"],"model":{"model":"b"}}"#, format!(r#"{{"model":"a",{stream}}}"#)),
        (r#"{"model":null}"#, format!(r#"{{"model":"a",{stream}}}"#)),
        // Servers in Go accept keys in any case, and use the last of several (golang/go#14750).
        (r#"{"Model":"b"}"#, format!(r#"{{"model":"a",{stream}}}"#)),
        (r#"{"model":"a","n":1,"MODE\u006C":"b"}"#, format!(r#"{{"model":"a","n":1,{stream}}}"#)),
        (r#"{"modell":"b","model ":"b"}"#, format!(r#"{{"modell":"b","model ":"b",{stream},"model":"a"}}"#)),
        (r#"{ }"#, format!(r#"{{{stream},"model":"a" }}"#)),
        // OpenRouter and LiteLLM try these if the model fails.
        (r#"{"models":["b"]}"#, format!(r#"{{{stream},"model":"a"}}"#)),
        (r#"{ "models" : ["b"] , "n":1}"#, format!(r#"{{"n":1,{stream},"model":"a"}}"#)),
        (
            r#"{"n":1 , "route":"fallback", "z":2 , "mode\u006cs":[]}"#,
            format!(r#"{{"n":1, "z":2,{stream},"model":"a"}}"#),
        ),
        (r#"{"n":1,"fallbacks":["b"]}"#, format!(r#"{{"n":1,{stream},"model":"a"}}"#)),
        (r#"{"route":1,"models":2,"route":3}"#, format!(r#"{{{stream},"model":"a"}}"#)),
        // Without a stream, nothing would reach the customer before the end.
        (r#"{"str\u0065am":false,"stream":false,"n":1}"#, format!(r#"{{"stream":true,"n":1,{usage},"model":"a"}}"#)),
        (
            r#"{"stream\u005foptions":null,"n":1}"#,
            r#"{"stream\u005foptions":null,"n":1,"stream":true,"model":"a"}"#.into(),
        ),
    ];
    for (request, expected) in &table {
        assert_eq!(&body_at(&rig, &backend, "a", request, "openai"), expected, "{request}");
        let expected = match request.contains("options") {
            true => expected.clone(),
            false => expected.replace(&format!(",{usage}"), ""),
        };
        assert_eq!(body_at(&rig, &backend, "a", request, "anthropic"), expected, "anthropic: {request}");
    }
    // A request that is not an object names no model.
    for request in [r#"["model","b"]"#, r#""\"model\":\"b\"""#, "[ 1.0 ,\n2]", "1E400", "null"] {
        assert_eq!(body_at(&rig, &backend, "a", request, "openai"), request);
    }
}

#[test]
fn request_that_fails_over_reaches_the_next_backend_byte_for_byte() {
    let refusing = Backend::vllm_with(&["m"], |_| Answer::Json(503, json!({"error": "server busy"})));
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(refusing.toml()).backend(backend.toml()));
    let request = r#"{"one":1.0,"model":"b","text":"\u00e9","stream":false}"#;
    let expected = r#"{"one":1.0,"model":"m","text":"\u00e9","stream":true,"stream_options":{"include_usage":true}}"#;
    assert_eq!(body_at(&rig, &backend, "m", request, "openai"), expected);
    let refused = refusing.seen();
    assert_eq!(refused.last().map(Request::body_text).as_deref(), Some(expected));
}

/// However invalid it is, the second frame must not end the running job.
#[test]
fn unreadable_job_with_the_id_of_a_running_one_is_ignored() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let running = backend.next();
    let nested = format!("{}{}", "[".repeat(300), "]".repeat(300));
    let repeated = format!(r#"{{"type":"job","job_id":"{id}","model_id":"m","request":{{}},"format":1,"format":2}}"#);
    let ended = Uuid::new_v4().to_string();
    let unreadable = [
        frame(&id, "m", r#"{"text":"\ud83d"}"#, "openai"),
        frame(&id.to_uppercase(), "unknown", r#"{"text":"\udc00"}"#, "openai"),
        frame(&id, "m", &nested, "anthropic"),
        frame(&id, r"\ud83d", "{}", "openai"),
        repeated,
        frame(&ended, "m", &nested, "openai"),
    ];
    for text in &unreadable {
        rig.session.send_text(text);
    }
    // Its answer shows that the frames before it have been read.
    assert_eq!(rig.session.outcome(&ended).error(), "internal");
    rig.session.assert_quiet(&id);
    running.finish();
    assert_eq!(rig.session.outcome(&id).body(), sse(7, 13).as_bytes());
    rig.session.assert_quiet(&id);
    // Once the job has ended, its id is free.
    rig.session.send_text(&unreadable[0]);
    assert_eq!(rig.session.outcome(&id).error(), "internal");
}

/// A job that waits for the first offer also reserves its id.
#[test]
fn unreadable_job_with_the_id_of_a_waiting_one_is_ignored() {
    let (_coordinator, backend, _agent, session, listing) = session_before_the_first_offer();
    let id = session.job("m", json!({}));
    session.send_text(&frame(&id, "m", r#"{"text":"\ud83d"}"#, "openai"));
    session.assert_quiet(&id);
    finish_listing(listing);
    backend.next().finish();
    assert_eq!(session.outcome(&id).body(), sse(7, 13).as_bytes());
    session.assert_quiet(&id);
}

/// When memory is short, the agent should end before the inference server: it is back within a minute.
#[test]
fn kernel_short_of_memory_ends_the_agent_first() {
    let read = |pid: &str| -> i32 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("its adjustment");
        text.trim().parse().expect("a number")
    };
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    assert_eq!(read(&rig.agent.pid().to_string()), 1000);
    assert!(read("self") < 1000, "this process stays as it was");
}

/// The requests run side by side, and reach their backend as they are. The peak of the resident memory is as promised.
#[track_caller]
fn assert_peak(what: &str, requests: &[String]) {
    // With two backends, the request is kept until the first has answered.
    let backends = [Backend::vllm(&["m"]), Backend::vllm(&["m"])];
    let rig = Rig::with(|setup| {
        let setup = backends.iter().fold(setup, |setup, backend| setup.backend(backend.toml()));
        setup.limits("max_concurrent = 8")
    });
    backends.iter().for_each(Backend::forget);
    let ids: Vec<_> = requests.iter().map(|_| Uuid::new_v4().to_string()).collect();
    for (id, request) in ids.iter().zip(requests) {
        rig.session.send_text(&frame(id, "m", request, "openai"));
    }
    let mut held: Vec<Held> = Vec::new();
    let began = Instant::now();
    while held.len() < requests.len() {
        assert!(began.elapsed() < 6 * SOON, "{what}: {} of {} requests have arrived", held.len(), requests.len());
        held.extend(backends.iter().filter_map(|backend| backend.try_next(ms(20))));
    }
    for held in held {
        let body = &held.request.body;
        assert!(requests.iter().any(|request| begins_alike(request, body)), "{what}: {} bytes arrived", body.len());
        held.finish();
    }
    for id in &ids {
        rig.session.outcome(id).done();
    }
    let text: usize = requests.iter().map(String::len).sum();
    let (peak, limit) = (rig.agent.peak_kib() as usize, (PEAK_BASE_BYTES + text * 5 / 2) >> 10);
    assert!(peak < limit, "{what}: a peak of {peak} KiB, of {limit}");
}

/// Up to the end of the object, where keys are added, or to the first key that is set.
fn begins_alike(request: &str, body: &[u8]) -> bool {
    let own = request.split_once(r#""model""#).map_or(request.strip_suffix('}').unwrap_or(request), |(own, _)| own);
    body.starts_with(own.as_bytes())
}

/// As many as fit, in requests of 3.6 MB: with a tree, each took 240 MB.
#[test]
fn slow_memory_of_8_requests_of_many_numbers_is_that_of_their_text() {
    let request = format!("{{\"n\":[{}1]}}", "100,".repeat(900_000));
    assert_peak("numbers", &vec![request; 8]);
}

#[test]
fn slow_memory_of_a_request_of_12_mb_is_that_of_its_text_whatever_it_holds() {
    const BYTES: usize = 12_000_000;
    let filled = |head: &str, unit: &str, tail: &str, count_max: usize| {
        format!("{head}{}{tail}", unit.repeat(count_max.min(BYTES / unit.len())))
    };
    let message = format!(r#"{{"role":"user","content":"{}"}},"#, "word ".repeat(43));
    let nested = format!("{}{},", "[".repeat(120), "]".repeat(120));
    let cases = [
        ("one text", filled(r#"{"text":""#, "x", r#""}"#, BYTES)),
        ("48 000 messages", filled(r#"{"messages":["#, &message, r#"0]}"#, 48_000)),
        ("escaped text", filled(r#"{"text":""#, r"\u00e9", r#""}"#, BYTES)),
        ("an escaped key", filled(r#"{""#, r"\u00e9", r#"":1}"#, BYTES)),
        ("escaped pairs", filled(r#"{"text":""#, r"\ud834\udd1e", r#""}"#, BYTES)),
        ("one key repeated", filled("{", r#""a":0,"#, r#""a":1}"#, 200_000)),
        ("keys of the agent between others", filled("{", r#""":0,"model":0,"#, r#""a":1}"#, 100_000)),
        ("white space", filled("{", " ", r#""a":1}"#, BYTES)),
        ("deep arrays", filled("[", &nested, "0]", 8_000)),
        ("empty objects", filled("[", "{},", "0]", 500_000)),
        ("a text that is no object", filled("\"", "x", "\"", BYTES)),
    ];
    for (what, request) in cases {
        assert_peak(what, &[request]);
    }
}

/// Fragments are joined, so the last of them and the message are held at the same time.
#[test]
fn slow_memory_of_a_request_of_60_mib_in_fragments_is_as_promised() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    backend.forget();
    let id = Uuid::new_v4().to_string();
    let text = frame(&id, "m", &format!(r#"{{"text":"{}"}}"#, "x".repeat(60 * MIB)), "openai");
    let fragments: Vec<_> = text.as_bytes().chunks(20 * MIB).collect();
    for (nth, fragment) in fragments.iter().enumerate() {
        let opcode = if nth == 0 { TEXT } else { CONTINUATION };
        rig.session.send_raw(&encode(opcode, nth + 1 == fragments.len(), fragment));
    }
    backend.next_within(6 * SOON).finish();
    rig.session.outcome(&id).done();
    let (peak, limit) = (rig.agent.peak_kib() as usize, (PEAK_BASE_BYTES + text.len() * 5 / 2) >> 10);
    assert!(peak < limit, "a peak of {peak} KiB, of {limit}");
}

#[test]
fn slow_frame_of_64_mib_that_is_no_job_takes_little_more_than_its_text() {
    const FRAME_BYTES_MAX: usize = 64 * MIB;
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let peak_after = |bytes: usize, head: &str, unit: &str, tail: &str| {
        let count = (bytes - head.len() - tail.len()) / unit.len();
        rig.session.send_text(&format!("{head}{}{tail}", unit.repeat(count)));
        // The answer shows that the frame has been read.
        let job = rig.session.job("unknown", json!({}));
        assert_eq!(rig.session.outcome(&job).error(), "model_not_loaded");
        rig.agent.peak_kib() as usize
    };
    let no_request = format!(r#"{{"type":"job","job_id":"{}","model_id":"m","x":""#, Uuid::new_v4());
    for (bytes, head, unit, tail) in [
        (FRAME_BYTES_MAX, r#"{"x":""#, r"\u00e9", r#"","type":"news"}"#),
        (FRAME_BYTES_MAX, r#"{"type":"news"#, "s", r#""}"#),
        (FRAME_BYTES_MAX, &no_request, "x", r#""}"#),
        (8 * MIB, r#"{"type":"news","x":"#, "[", "]}"),
    ] {
        let (peak, limit) = (peak_after(bytes, head, unit, tail), (FRAME_BYTES_MAX + PEAK_BASE_BYTES / 2) >> 10);
        assert!(peak < limit, "{head}: a peak of {peak} KiB, of {limit}");
    }
}
