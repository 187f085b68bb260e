//! Responses of real servers to a job.

use std::io::Write;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, unbounded};
use serde_json::{Value, json};

use crate::support::http::{LAST_CHUNK, SSE_HEAD, push_chunk};
use crate::support::*;

const TEXT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\n";
const FINISHED: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":13}}\n\n";
const DONE: &str = "data: [DONE]\n\n";
const COMMENT: &str = ": keep-alive\n\n";

/// The outcome of a job that is answered with this body, whole and at once.
fn outcome_of(rig: &Rig, backend: &Backend, content_type: Option<&str>, body: impl AsRef<[u8]>) -> Outcome {
    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    let label = content_type.map_or(String::new(), |label| format!("Content-Type: {label}\r\n"));
    let head = format!("HTTP/1.1 200 OK\r\n{label}Content-Length: {}\r\n\r\n", body.as_ref().len());
    held.send([head.as_bytes(), body.as_ref()].concat());
    held.keep();
    rig.session.outcome(&id)
}

/// The input and output tokens of a `job_done`.
fn tokens_of(outcome: &Outcome) -> (u64, u64) {
    let figure = |name: &str| outcome.done()["tokens"][name].as_u64().expect("a figure");
    let figures = (figure("input"), figure("output"));
    assert_eq!(figures, (figure("input_tokens"), figure("output_tokens")), "both spellings");
    figures
}

/// Sends this every 20 ms until the agent disconnects, which must be within `time`.
fn fill_until_hang_up(held: &mut Held, filler: &str, time: Duration) {
    let began = Instant::now();
    let chunk = format!("{:x}\r\n{filler}\r\n", filler.len());
    while held.try_send(chunk.as_bytes()) {
        assert!(began.elapsed() < time, "the agent still reads after {time:?}");
        std::thread::sleep(ms(20));
    }
}

/// agentscope-ai/agentscope-java#2073, openai/openai-python#3566: gateways keep the body open after the end marker.
#[test]
fn stream_is_complete_with_its_end_marker_although_the_body_stays_open() {
    let openai = format!("{TEXT}{FINISHED}{USAGE}{DONE}");
    let bodies = [("openai", openai.as_str()), ("openai", openai.trim_end()), ("anthropic", MESSAGES)];
    for (format, body) in bodies {
        for comments in [false, true] {
            if comments && !body.ends_with('\n') {
                continue;
            }
            let backend = Backend::vllm(&["m"]);
            let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_concurrent = 1"));
            let run = || if format == "openai" { rig.session.job("m", json!({})) } else { messages(&rig) };
            let id = run();
            let mut held = backend.next();
            held.start_sse();
            held.chunk(body);
            let ended = Instant::now();
            let commenting = std::thread::spawn(move || {
                if comments {
                    fill_until_hang_up(&mut held, COMMENT, SOON);
                } else {
                    held.wait_hang_up();
                }
            });
            let outcome = rig.session.outcome(&id);
            assert_eq!(tokens_of(&outcome), (7, 13), "{format}, comments: {comments}");
            assert!(ended.elapsed() < secs(2), "{format}, comments: {comments}: after {:?}", ended.elapsed());
            let relayed = String::from_utf8(outcome.body()).expect("text");
            assert!(relayed.strip_prefix(body).is_some_and(|rest| rest.replace(COMMENT, "").is_empty()), "{relayed}");
            commenting.join().expect("the connection was closed");
            let next = run();
            backend.next().finish();
            rig.session.outcome(&next).done();
        }
    }
}

/// The customer has received everything.
#[test]
fn stream_is_complete_with_its_end_marker_although_the_body_breaks_off() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let body = format!("{TEXT}{USAGE}{DONE}");
    let chunked = format!("Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n", body.len());
    let long = format!("Content-Length: 9999\r\n\r\n{body}");
    for (first, rest) in [(&chunked, ""), (&chunked, "no size\r\n"), (&chunked, "f\r\n: cut"), (&long, "")] {
        let id = rig.session.job("m", json!({}));
        let mut held = backend.next();
        held.send(format!("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{first}"));
        assert_eq!(rig.session.chunk(&id), body.as_bytes());
        held.send(rest);
        drop(held);
        assert_eq!(tokens_of(&rig.session.outcome(&id)), (7, 13), "{first}{rest}");
    }
}

/// diegosouzapw/OmniRoute#6777: `finish_reason`, no end marker, and the connection remains open.
#[test]
fn response_that_is_complete_is_so_at_the_deadline_although_the_body_stays_open() {
    let failed = "data: {\"error\":{\"message\":\"no memory\"}}\n\n";
    let json = r#"{"choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":7,"completion_tokens":13}}"#;
    let cases = [
        (format!("{TEXT}{USAGE}{FINISHED}"), "", "done"),
        (format!("{TEXT}{USAGE}{FINISHED}"), COMMENT, "done"),
        (format!("{TEXT}{USAGE}"), COMMENT, "backend_timeout"),
        (format!("{TEXT}{failed}"), "", "internal"),
        (json.to_owned(), "", "done"),
        (json.to_owned(), "\n", "done"),
        (json[..json.len() - 1].to_owned(), "\n", "backend_timeout"),
        (r#"{"error":{"message":"no memory"}}"#.to_owned(), "", "internal"),
    ];
    side_by_side(cases, |(body, filler, end)| {
        let backend = Backend::vllm(&["m"]);
        let rig = Rig::new(&backend);
        let id = rig.session.job_within(ms(1500), "m", json!({}));
        let mut held = backend.next();
        held.start_sse();
        held.chunk(&body);
        if filler.is_empty() {
            held.wait_hang_up();
        } else {
            fill_until_hang_up(&mut held, filler, SOON);
        }
        let outcome = rig.session.outcome(&id);
        assert_eq!(outcome.end["error_code"].as_str().unwrap_or("done"), end, "{body}: {}", outcome.end);
        if end == "done" {
            assert_eq!(tokens_of(&outcome), (7, 13), "{body}");
        }
    });
}

#[test]
fn slow_stream_with_a_finish_reason_is_complete_after_ten_seconds_of_comments() {
    side_by_side([false, true], |events_follow| {
        let backend = Backend::vllm(&["m"]);
        let rig = Rig::new(&backend);
        let id = rig.session.job_within(secs(60), "m", json!({}));
        let mut held = backend.next();
        held.start_sse();
        held.chunk(format!("{TEXT}{FINISHED}"));
        if events_follow {
            // A server that is slow with its last event.
            for _ in 0..3 {
                std::thread::sleep(secs(1));
                held.chunk(COMMENT);
            }
            held.chunk(USAGE);
        }
        let quiet_since = Instant::now();
        fill_until_hang_up(&mut held, COMMENT, secs(20));
        let waited = quiet_since.elapsed();
        assert!(secs(9) < waited && waited < secs(12), "the agent waited for {waited:?}");
        let outcome = rig.session.outcome(&id);
        assert_eq!(tokens_of(&outcome), if events_follow { (7, 13) } else { (0, 0) });
    });
}

/// lmstudio-ai/lmstudio-bug-tracker#618: an unknown route is answered with 200.
#[test]
fn json_without_an_answer_is_internal() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let bodies = [
        r#"{"error":"the model has crashed"}"#,
        r#"{"error":{"message":"the model has crashed","code":500}}"#,
        r#"{"error":{"message":"the model has crashed"},"choices":[]}"#,
        r#"{"type":"error","error":{"type":"api_error","message":"the model has crashed"}}"#,
        r#"{"object":"error","message":"the model has crashed","code":400}"#,
        "\u{feff}{\"error\":\"the model has crashed\"}",
        " \n {\"error\":\"the model has crashed\"}",
        r#"{"detail":"the model has crashed"}"#,
        r#"{"error":{}}"#,
        r#"{"error":""}"#,
        "{}",
        "[]",
        "null",
        r#"{"choices":[{"message":{"content":"cut off"#,
        "<!DOCTYPE html><title>log in</title>",
        "Bad Gateway",
        "\n",
    ];
    for body in bodies {
        for label in [Some("application/json"), Some("text/plain"), Some("text/event-stream"), None] {
            let outcome = outcome_of(&rig, &backend, label, body);
            assert_eq!((outcome.error(), outcome.body()), ("internal", body.into()), "{body} as {label:?}");
            assert!(
                !body.contains("crashed") || outcome.message().contains("the model has crashed"),
                "{}",
                outcome.end
            );
        }
    }
    assert!(!rig.agent.stderr.text().contains("crashed"), "a backend's text is in the log");
}

#[test]
fn json_answer_is_an_answer_however_it_is_labelled() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let long = format!(
        r#"{{"choices":[{{"message":{{"content":"{}"}}}}],"usage":{{"prompt_tokens":7,"completion_tokens":13}}}}"#,
        "a page of text, ".repeat(9000)
    );
    let bodies = [
        r#"{"choices":[{"message":{"content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":13}}"#,
        r#"{"error":null,"choices":[{"message":{"content":""}}],"usage":{"prompt_tokens":7,"completion_tokens":13}}"#,
        r#"{"type":"message","content":[],"stop_reason":"end_turn","usage":{"input_tokens":7,"output_tokens":13}}"#,
        &long,
    ];
    for body in bodies {
        for label in [Some("application/json; charset=utf-8"), Some("text/plain"), Some("text/event-stream"), None] {
            for body in [body.to_owned(), format!("\u{feff}{body}"), format!("\r\n  {body}\n")] {
                let outcome = outcome_of(&rig, &backend, label, &body);
                assert_eq!((tokens_of(&outcome), outcome.body()), ((7, 13), body.into()), "as {label:?}");
            }
        }
    }
    // It can be relayed as soon as it shows an answer.
    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    let (head, rest) = bodies[0].split_at(40);
    held.send(format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{head}",
        bodies[0].len()
    ));
    assert_eq!(rig.session.chunk(&id), head.as_bytes());
    held.send(rest);
    held.keep();
    assert_eq!(tokens_of(&rig.session.outcome(&id)), (7, 13));
}

#[test]
fn success_without_a_body_is_backend_unreachable_and_the_next_backend_is_asked() {
    for label in ["text/event-stream", "application/json", "text/plain", "x/y"] {
        let heads = [
            format!("200 OK\r\nContent-Type: {label}\r\nContent-Length: 0"),
            format!("200 OK\r\nContent-Type: {label}\r\nConnection: close"),
            "204 No Content".to_owned(),
        ];
        for head in heads {
            let answer = format!("HTTP/1.1 {head}\r\n\r\n");
            let (first, second, rig) = two_backends();
            let id = rig.session.job("m", json!({}));
            let mut held = first.next();
            held.send(&answer);
            drop(held);
            second.next().finish();
            let outcome = rig.session.outcome(&id);
            assert_eq!((tokens_of(&outcome), outcome.body()), ((7, 13), sse(7, 13).into()), "{head}");
        }
    }
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    assert_eq!(outcome_of(&rig, &backend, Some("application/json"), "").error(), "backend_unreachable");
}

/// lmstudio-ai/lmstudio-bug-tracker#618.
#[test]
fn unknown_route_that_is_answered_with_200_sends_the_job_to_the_next_backend() {
    let bodies = [
        r#"{"error":"Unexpected endpoint or method. (POST /v1/messages)"}"#,
        r#"{"error":{"message":"Unknown endpoint"}}"#,
        r#"{"detail":"Not Found"}"#,
        r#"{"error":"Not Found","statusCode":404}"#,
    ];
    for body in bodies {
        let (first, second, rig) = two_backends();
        let id = messages(&rig);
        answer(&first, response(200, "application/json; charset=utf-8", body));
        answer(&second, response(200, "text/event-stream", MESSAGES));
        let outcome = rig.session.outcome(&id);
        assert_eq!((tokens_of(&outcome), outcome.body()), ((7, 13), MESSAGES.into()), "{body}");
        let id = messages(&rig);
        answer(&second, response(200, "text/event-stream", MESSAGES));
        rig.session.outcome(&id).done();
        assert_eq!(first.posts(), 1, "it gets no more jobs in this format: {body}");
    }
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let id = messages(&rig);
    answer(&backend, response(200, "application/json", bodies[0]));
    let outcome = rig.session.outcome(&id);
    assert_eq!(outcome.error(), "internal");
    assert!(outcome.message().contains("does not serve Anthropic requests"), "{}", outcome.end);
}

/// The first bytes of a body decide what it is.
#[test]
fn stream_is_a_stream_however_it_is_labelled() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let begins = [
        "",
        ": OPENROUTER PROCESSING\n\n",
        "\u{feff}",
        "\n\n",
        "\u{feff}\r\n",
        "event: x\n",
        "id: 1\n",
        "retry: 3000\n",
        ":\n\n",
        "data:\n\n",
    ];
    for label in [
        Some("text/plain"),
        Some("application/json"),
        Some("application/octet-stream"),
        Some("TEXT/EVENT-STREAM"),
        None,
    ] {
        for begin in begins {
            let body = format!("{begin}{TEXT}{USAGE}{DONE}");
            let outcome = outcome_of(&rig, &backend, label, &body);
            assert_eq!((tokens_of(&outcome), outcome.body()), ((7, 13), body.into()), "{begin:?} as {label:?}");
        }
        let cut = outcome_of(&rig, &backend, label, TEXT);
        assert_eq!((cut.error(), cut.body()), ("internal", TEXT.into()), "truncated, as {label:?}");
        let failed = format!("data: {{\"error\":{{\"message\":\"boom\"}}}}\n\n{DONE}");
        assert_eq!(outcome_of(&rig, &backend, label, failed).error(), "internal", "as {label:?}");
    }
}

/// The first bytes may arrive one at a time.
#[test]
fn stream_without_a_label_is_recognized_byte_by_byte() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let body = format!("\u{feff}{TEXT}{USAGE}{DONE}");
    let id = rig.session.job("m", json!({}));
    let mut held = backend.next();
    held.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
    let (head, rest) = body.as_bytes().split_at(12);
    for byte in head {
        held.chunk([*byte]);
        assert_eq!(rig.session.chunk(&id), [*byte], "each byte is relayed as it arrives");
    }
    held.chunk(rest);
    held.end();
    assert_eq!(tokens_of(&rig.session.outcome(&id)), (7, 13));
}

/// The standard's framing (html.spec.whatwg.org, 9.2.6): one event over several `data:` lines (SamSaffron/term-llm#456), a byte
/// order mark, and lines that end with CR, LF or CRLF.
#[test]
fn event_may_span_several_lines_that_end_in_any_way() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let usage = "data: {\ndata:   \"choices\": [],\ndata:   \"usage\": {\ndata: \"prompt_tokens\": 7,\nid: 5\n: in between\ndata:\ndata: \"completion_tokens\": 13}\ndata: }\n\n";
    let error = "data: {\"error\":\ndata: {\"message\": \"boom\"}}\n\n";
    let stop = "data: {\"choices\":[{\"finish_reason\":\ndata: \"stop\"}]}\n\n";
    for line_end in ["\n", "\r", "\r\n"] {
        for begin in ["", "\u{feff}", "\u{feff}: hi\n\n"] {
            let with = |body: String| format!("{begin}{body}").replace('\n', line_end);
            let whole = with(format!("{TEXT}{usage}{DONE}"));
            let outcome = outcome_of(&rig, &backend, Some("text/event-stream"), &whole);
            assert_eq!((tokens_of(&outcome), outcome.body()), ((7, 13), whole.into()), "{begin:?}, {line_end:?}");
            let finished = outcome_of(&rig, &backend, Some("text/event-stream"), with(format!("{usage}{stop}")));
            assert_eq!(tokens_of(&finished), (7, 13), "{begin:?}, {line_end:?}");
            let failed = outcome_of(&rig, &backend, Some("text/event-stream"), with(format!("{TEXT}{error}{DONE}")));
            assert_eq!(
                (failed.error(), failed.message().contains("boom")),
                ("internal", true),
                "{begin:?}, {line_end:?}"
            );
        }
    }
}

/// rexxars/eventsource-parser#31: events that are separated by one line end.
#[test]
fn events_on_consecutive_lines_are_separate_events() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let body = format!("{TEXT}{USAGE}{DONE}").replace("\n\n", "\n");
    assert_eq!(tokens_of(&outcome_of(&rig, &backend, Some("text/event-stream"), body)), (7, 13));
}

/// mastra-ai/mastra#20302: `finish_reason` `error` without an error object.
#[test]
fn finish_reason_that_names_a_failure_is_internal() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    for choice in [
        r#"{"delta":{},"finish_reason":"error"}"#,
        r#"{"delta":{},"finish_reason":"abort"}"#,
        r#"{"delta":{"content":""},"finish_reason":"ERROR","native_finish_reason":"MALFORMED_FUNCTION_CALL"}"#,
        r#"{"delta":{},"finish_reason":{"type":"abort","message":"out of memory"}}"#,
        r#"{"delta":{},"finish_reason":"error","error":{"code":502,"message":"the provider is gone"}}"#,
        r#"{"delta":{},"finish_reason":"network_error"}"#,
        r#"{"delta":{},"finish_reason":"insufficient_system_resource"}"#,
    ] {
        let message = choice.contains("the provider is gone").then_some("the provider is gone");
        let stream = format!("{TEXT}data: {{\"choices\":[{choice}]}}\n\n{USAGE}{DONE}");
        let json = format!("{{\"choices\":[{choice}]}}");
        for body in [stream, json] {
            let outcome = outcome_of(&rig, &backend, Some("text/event-stream"), &body);
            assert_eq!((outcome.error(), outcome.body()), ("internal", body.into()), "{choice}");
            assert!(message.is_none_or(|message| outcome.message().contains(message)), "{}", outcome.end);
        }
    }
}

#[test]
fn stop_reason_that_names_a_failure_is_internal() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let stream = MESSAGES.replace(r#""message_delta","#, r#""message_delta","delta":{"stop_reason":"error"},"#);
    let json = r#"{"type":"message","content":[{"type":"text","text":"hi"}],"stop_reason":"error"}"#;
    for body in [&stream, json] {
        let outcome = outcome_of(&rig, &backend, Some("text/event-stream"), body);
        assert_eq!((outcome.error(), outcome.body()), ("internal", body.into()), "{body}");
    }
    // A stop string of the customer's request, as vLLM reports it.
    let stopped = format!(
        "{TEXT}data: {{\"choices\":[{{\"delta\":{{}},\"finish_reason\":\"stop\",\"stop_reason\":\"error\"}}]}}\n\n{USAGE}{DONE}"
    );
    assert_eq!(tokens_of(&outcome_of(&rig, &backend, Some("text/event-stream"), &stopped)), (7, 13));
}

/// envoyproxy/ai-gateway#1631: `message_delta` with 0 input tokens.
#[test]
fn token_count_of_zero_does_not_replace_a_count() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let start = r#"{"type":"message_start","message":{"usage":{"input_tokens":25,"output_tokens":1}}}"#;
    let cases: [(&[&str], (u64, u64)); 7] = [
        (&[start, r#"{"type":"message_delta","usage":{"input_tokens":0,"output_tokens":15}}"#], (25, 15)),
        (&[start, r#"{"usage":{"input_tokens":30,"output_tokens":0}}"#], (30, 1)),
        (
            &[r#"{"usage":{"input_tokens":0,"output_tokens":0}}"#, r#"{"usage":{"input_tokens":5,"output_tokens":6}}"#],
            (5, 6),
        ),
        (
            &[
                r#"{"usage":{"prompt_tokens":9,"completion_tokens":4}}"#,
                r#"{"usage":{"prompt_tokens":0,"completion_tokens":0}}"#,
            ],
            (9, 4),
        ),
        (&[r#"{"usage":{"input_tokens":0,"prompt_tokens":9,"output_tokens":0,"completion_tokens":4}}"#], (9, 4)),
        (&[r#"{"usage":{"prompt_tokens":0,"completion_tokens":0},"timings":{"prompt_n":9,"predicted_n":4}}"#], (9, 4)),
        (&[r#"{"usage":{"prompt_tokens":0,"completion_tokens":0}}"#], (0, 0)),
    ];
    for (events, want) in cases {
        let body: String = events.iter().map(|event| format!("data: {event}\n\n")).chain([DONE.to_owned()]).collect();
        assert_eq!(tokens_of(&outcome_of(&rig, &backend, Some("text/event-stream"), body)), want, "{events:?}");
    }
}

/// Groq and llama.cpp report usage in objects of their own, llama.cpp even if it was not requested; Moonshot in the choice.
#[test]
fn usage_is_read_from_x_groq_and_timings_if_no_usage_came() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let groq = r#""x_groq":{"id":"req_1","usage":{"queue_time":0.01,"prompt_tokens":7,"completion_tokens":13}}"#;
    let timings = r#""timings":{"cache_n":3,"prompt_n":4,"prompt_ms":1.5,"predicted_n":13,"predicted_ms":9.5}"#;
    let old_timings = r#""timings":{"prompt_n":7,"predicted_n":13}"#;
    let usage = r#""usage":{"prompt_tokens":7,"completion_tokens":13}"#;
    let other =
        r#""x_groq":{"usage":{"prompt_tokens":1,"completion_tokens":2}},"timings":{"prompt_n":3,"predicted_n":4}"#;
    // The last of two equal keys counts.
    let in_choice = r#""choices":[{"delta":{},"usage":{"prompt_tokens":7,"completion_tokens":13}}]"#;
    let early = r#""timings":{"prompt_n":1,"predicted_n":1}"#;
    for events in [
        vec![groq.to_owned()],
        vec![timings.to_owned()],
        vec![early.to_owned(), timings.to_owned()],
        vec![old_timings.to_owned()],
        vec![in_choice.to_owned()],
        vec![usage.to_owned(), other.to_owned()],
        vec![other.to_owned(), usage.to_owned()],
        vec![format!("{other},{usage}")],
        vec![format!("{timings},\"usage\":null")],
    ] {
        let event =
            |keys: &String| format!("data: {{\"choices\":[{{\"delta\":{{}},\"finish_reason\":null}}],{keys}}}\n\n");
        let stream: String = events.iter().map(event).chain([FINISHED.to_owned(), DONE.to_owned()]).collect();
        assert_eq!(tokens_of(&outcome_of(&rig, &backend, Some("text/event-stream"), stream)), (7, 13), "{events:?}");
        if let [keys] = events.as_slice() {
            let json = format!("{{\"choices\":[{{\"message\":{{\"content\":\"hi\"}}}}],{keys}}}");
            assert_eq!(tokens_of(&outcome_of(&rig, &backend, Some("application/json"), json)), (7, 13), "{events:?}");
        }
    }
}

/// The answer of llama.cpp to the second of two identical requests to `/v1/messages`.
fn mostly_cached(key: &str) -> String {
    format!(
        "event: message_start\ndata: {{\"type\":\"message_start\",\"message\":{{\"usage\":{{\"{key}\":37,\"input_tokens\":1,\"output_tokens\":0}}}}}}\n\n\
         event: message_delta\ndata: {{\"type\":\"message_delta\",\"delta\":{{}},\"usage\":{{\"output_tokens\":2}}}}\n\n\
         event: message_stop\ndata: {{\"type\":\"message_stop\"}}\n\n"
    )
}

/// Anthropic's `input_tokens` exclude cached tokens, which are tokens of the prompt nevertheless.
#[test]
fn cached_input_tokens_count_for_the_token_limit_and_the_status() {
    let json = r#"{"type":"message","content":[{"type":"text","text":"hi"}],"usage":{"input_tokens":1,"cache_read_input_tokens":30,"cache_creation_input_tokens":7,"output_tokens":2}}"#;
    for body in
        [mostly_cached("cache_read_input_tokens"), mostly_cached("cache_creation_input_tokens"), json.to_owned()]
    {
        let backend = Backend::vllm(&["m"]);
        let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_tokens_per_minute = 80"));
        let run = || messages(&rig);
        for _ in 0..2 {
            let id = run();
            let mut held = backend.next();
            held.send(response(200, "text/event-stream", &body));
            held.keep();
            assert_eq!(tokens_of(&rig.session.outcome(&id)), (1, 2), "on the wire as the backend states it");
        }
        assert_eq!(rig.session.outcome(&run()).error(), "out_of_capacity", "two jobs of 40 tokens use up 80");
        wait_until("the status counts the cached tokens", || {
            let ran = cli(rig.setup.scratch.path(), &["status", "--json", "--config", "agent.toml"], &[]);
            let state: Value = serde_json::from_str(&ran.stdout).expect("the status");
            (&state["tokens"]["input"], &state["tokens"]["output"]) == (&json!(76), &json!(4))
        });
    }
}

/// OpenAI's `prompt_tokens` include them, also where a gateway adds Anthropic's fields.
#[test]
fn cached_tokens_that_the_prompt_tokens_include_are_not_counted_twice() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| setup.backend(backend.toml()).limits("max_tokens_per_minute = 80"));
    let usage = r#"{"prompt_tokens":20,"completion_tokens":6,"prompt_tokens_details":{"cached_tokens":15},"cache_read_input_tokens":15}"#;
    let body = format!("data: {{\"choices\":[],\"usage\":{usage}}}\n\n{DONE}");
    for _ in 0..3 {
        assert_eq!(tokens_of(&outcome_of(&rig, &backend, Some("text/event-stream"), &body)), (20, 6));
    }
}

// Unsuccessful responses.

/// Two backends that list `m`; the first is advertised.
fn two_backends() -> (Backend, Backend, Rig) {
    let (first, second) = (Backend::vllm(&["m"]), Backend::vllm(&["m"]));
    let rig = Rig::with(|setup| setup.backend(first.toml()).backend(second.toml().replace("vllm", "openai")));
    // The first offer does not wait for a slow second backend.
    rig.agent.stderr.wait_line(&[&second.url(), "serving 1 model"]);
    (first, second, rig)
}

fn answer(backend: &Backend, answer: impl AsRef<[u8]>) {
    let mut held = backend.next();
    held.send(answer);
    held.keep();
}

/// A backend that cannot serve the job says so by its status, by its text, or by both. LM Studio: lmstudio-ai/lms#107,
/// continuedev/continue#10150 and tinyhumansai/openhuman#4181. 529: vava-nessa/free-coding-models#148. 520 to 524: laravel/ai#810.
#[test]
fn response_of_a_backend_that_cannot_serve_the_job_sends_it_to_the_next() {
    let cases: &[(u16, &str, &str)] = &[
        (529, r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#, "out_of_capacity"),
        (500, r#"{"error":{"type":"overloaded_error","message":"Overloaded"}}"#, "out_of_capacity"),
        (520, "error code: 520", "backend_unreachable"),
        (521, "<html><title>521: Web server is down</title>", "backend_unreachable"),
        (522, "", "backend_unreachable"),
        (523, "", "backend_unreachable"),
        (524, "error code: 524", "backend_unreachable"),
        (530, "error code: 1033", "backend_unreachable"),
        (408, r#"{"error":{"code":408,"message":"Your request timed out"}}"#, "backend_unreachable"),
        (
            404,
            r#"{"error":{"message":"No models loaded. Please load a model in the developer page or use the `lms load` command.","type":"invalid_request_error","param":"model","code":null}}"#,
            "model_not_loaded",
        ),
        (
            400,
            r#"{"error":{"message":"No models loaded.","type":"invalid_request_error","param":"model"}}"#,
            "model_not_loaded",
        ),
        (
            404,
            r#"{"error":{"message":"The model `m` does not exist.","type":"NotFoundError","param":"model","code":404}}"#,
            "model_not_loaded",
        ),
        (400, r#"{"error":{"message":"Failed to load model \"m\". Error: Error loading model."}}"#, "model_not_loaded"),
        (
            500,
            r#"{"error":{"message":"model requires more system memory (5.6 GiB) than is available (3.2 GiB)"}}"#,
            "model_not_loaded",
        ),
        (
            500,
            r#"{"error":{"message":"llama runner process has terminated: exit status 2","type":"api_error"}}"#,
            "model_not_loaded",
        ),
        (
            500,
            r#"{"error":{"code":500,"message":"model name=m failed to load","type":"server_error"}}"#,
            "model_not_loaded",
        ),
        (400, r#"{"error":{"message":"Model is unloaded."}}"#, "model_not_loaded"),
        (503, r#"{"error":"Model m is currently loading","estimated_time":20.0}"#, "model_not_loaded"),
    ];
    let (first, second, rig) = two_backends();
    for (status, body, code) in cases {
        let response = response(*status, "application/json", body);
        let id = rig.session.job("m", json!({}));
        answer(&first, &response);
        second.next().finish();
        let outcome = rig.session.outcome(&id);
        assert_eq!(outcome.done()["tokens"]["output"], 13, "{status} {body}");
        assert_eq!(outcome.body(), sse(7, 13).as_bytes(), "{status} {body}");

        let id = rig.session.job("m", json!({}));
        answer(&first, &response);
        answer(&second, &response);
        let outcome = rig.session.outcome(&id);
        assert_eq!(outcome.error(), *code, "{}", outcome.end);
        assert!(outcome.message().contains(&status.to_string()), "{}", outcome.message());
        // Resets the count of failures.
        let id = rig.session.job("m", json!({}));
        first.next().finish();
        rig.session.outcome(&id).done();
    }
}

/// The text of a response that rejects the request may quote it.
#[test]
fn response_that_rejects_the_request_does_not_send_it_to_the_next_backend() {
    let cases: &[(u16, &str)] = &[
        (400, r#"{"error":{"message":"This model's maximum context length is 4096 tokens."}}"#),
        (400, r#"{"error":{"message":"Failed to load image: cannot identify image file","type":"BadRequestError"}}"#),
        (
            422,
            r#"{"detail":[{"loc":["body","temperature"],"msg":"Input should be less than or equal to 2","input":9}]}"#,
        ),
        (
            422,
            r#"{"detail":[{"type":"string_type","loc":["body","messages",0,"content","str"],"msg":"Input should be a valid string","input":[{"type":"text","txt":"Failed to load model, so the model was not found while loading model"}]}]}"#,
        ),
        (413, "too large"),
        (500, r#"{"error":{"message":"CUDA error: an illegal memory access was encountered"}}"#),
    ];
    let (first, second, rig) = two_backends();
    for (status, body) in cases {
        let id = rig.session.job("m", json!({}));
        answer(&first, response(*status, "application/json", body));
        let outcome = rig.session.outcome(&id);
        assert_eq!(outcome.error(), "internal", "{}", outcome.end);
    }
    second.assert_none(QUIET);
}

/// A job in the Anthropic format; returns its id.
fn messages(rig: &Rig) -> String {
    let id = uuid::Uuid::new_v4().to_string();
    let mut frame = job(&id, "m", json!({"max_tokens": 5, "messages": []}));
    frame["format"] = json!("anthropic");
    rig.session.send(&frame);
    id
}

const MESSAGES: &str = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":7}}}\n\n\
    event: message_delta\ndata: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":13}}\n\n\
    event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";

/// How servers respond to a path that they do not know: transformers serve and others on FastAPI; llama.cpp; Ollama; Express;
/// Fastify; OpenAI (anthropics/claude-code#3593); nginx; mlx_lm; axum; servers that know the path for GET only; servers that name
/// the path; Flask; Python's `http.server`.
const NO_SUCH_ROUTE: &[(u16, &str, &str)] = &[
    (404, "application/json", r#"{"detail":"Not Found"}"#),
    (404, "application/json", r#"{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}"#),
    (404, "text/plain", "404 page not found"),
    (404, "text/html", "<!DOCTYPE html><html><body><pre>Cannot POST /v1/messages</pre></body></html>"),
    (
        404,
        "application/json",
        r#"{"message":"Route POST:/v1/messages not found","error":"Not Found","statusCode":404}"#,
    ),
    (
        404,
        "application/json",
        r#"{"error":{"message":"Invalid URL (POST /v1/messages)","type":"invalid_request_error"}}"#,
    ),
    (
        404,
        "text/html",
        "<html>\r\n<head><title>404 Not Found</title></head>\r\n<body><center><h1>404 Not Found</h1></center>",
    ),
    (404, "text/plain", "Not Found"),
    (404, "text/plain", ""),
    (405, "application/json", r#"{"detail":"Method Not Allowed"}"#),
    (405, "text/plain", "POST cannot be used here."),
    (404, "application/json", r#"{"error":"unknown path: /v1/messages"}"#),
    (404, "application/json", r#"{"code":"NOT_FOUND","message":"POST /v1/messages is not supported by this server"}"#),
    (
        404,
        "application/json",
        r#"{"message":"The requested URL was not found on the server. If you entered the URL manually please check your spelling and try again."}"#,
    ),
    (
        501,
        "text/html",
        "<!DOCTYPE HTML>\n<html lang=\"en\"><p>Error code: 501</p><p>Message: Unsupported method ('POST').</p>",
    ),
];

#[test]
fn backend_without_the_route_of_a_format_gets_no_more_such_jobs() {
    side_by_side(NO_SUCH_ROUTE, |(status, kind, body)| {
        let (first, second, rig) = two_backends();
        let id = messages(&rig);
        answer(&first, response(*status, kind, body));
        answer(&second, response(200, "text/event-stream", MESSAGES));
        assert_eq!(rig.session.outcome(&id).done()["tokens"]["output"], 13, "{status} {body}");
        for _ in 0..2 {
            let id = messages(&rig);
            answer(&second, response(200, "text/event-stream", MESSAGES));
            rig.session.outcome(&id).done();
        }
        assert_eq!(first.posts(), 1, "{status} {body}");
        // Jobs in the other format are unaffected.
        let id = rig.session.job("m", json!({}));
        first.next().finish();
        rig.session.outcome(&id).done();
    });
}

#[test]
fn job_in_a_format_that_no_backend_serves_names_the_format() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let id = messages(&rig);
    answer(&backend, response(404, "application/json", r#"{"detail":"Not Found"}"#));
    let check = |id: &str| {
        let outcome = rig.session.outcome(id);
        assert_eq!(outcome.error(), "model_not_loaded");
        assert!(outcome.message().contains("does not serve Anthropic requests"), "{}", outcome.message());
    };
    check(&id);
    check(&messages(&rig));
    assert_eq!(backend.posts(), 1);
    rig.agent.stderr.wait_line(&["warn", &backend.url(), "does not serve Anthropic requests"]);
}

/// A server that comes back may be another version.
#[test]
fn missing_route_is_forgotten_when_the_backend_was_down() {
    let address = nobody_at("127.0.0.9");
    let backend = Backend::vllm_on(&address, &["m"]);
    let rig = Rig::new(&backend);
    let id = messages(&rig);
    answer(&backend, response(404, "text/plain", "404 page not found"));
    rig.session.outcome(&id).error();
    drop(backend);
    assert_eq!(rig.session.outcome(&rig.session.job("m", json!({}))).error(), "backend_unreachable");
    let backend = Backend::vllm_on(&address, &["m"]);
    let id = messages(&rig);
    answer(&backend, response(200, "text/event-stream", MESSAGES));
    rig.session.outcome(&id).done();
}

/// A 404 about something that the request names says nothing about the route.
#[test]
fn missing_model_or_file_is_no_missing_route() {
    let cases: &[&str] = &[
        r#"{"type":"error","error":{"type":"not_found_error","message":"model: m"}}"#,
        r#"{"error":"model \"m\" not found, try pulling it first"}"#,
        r#"{"error":"m not found"}"#,
        r#"{"error":{"message":"File not found: file_011","type":"not_found_error"}}"#,
        r#"{"error":{"message":"No endpoints found that support tool use.","code":404}}"#,
    ];
    let (first, second, rig) = two_backends();
    for body in cases {
        let id = messages(&rig);
        answer(&first, response(404, "application/json", body));
        answer(&second, response(200, "text/event-stream", MESSAGES));
        rig.session.outcome(&id).done();
    }
}

/// A job on the kept-alive connection of the probe.
fn job_on_a_kept_alive_connection(rig: &Rig, backend: &Backend, text: &str) -> (String, Held) {
    let id = uuid::Uuid::new_v4().to_string();
    // As text, as building a large value takes an unoptimized test too long.
    rig.session.send_text(&job(&id, "m", json!({"text": "TEXT"})).to_string().replace("TEXT", text));
    let held = backend.next();
    assert_eq!(held.request.connection, 0, "the test needs the connection of the probe");
    (id, held)
}

/// A server that closes an idle connection may receive a request at the same moment: it then resets the connection.
#[test]
fn request_that_meets_the_end_of_a_kept_alive_connection_is_repeated_once() {
    let backend = Backend::vllm(&["m"]);
    // Closing the connection with the last byte of the body in the socket resets it.
    backend.leave_unread(1);
    let rig = Rig::new(&backend);
    let (id, held) = job_on_a_kept_alive_connection(&rig, &backend, "");
    backend.leave_unread(0);
    drop(held);
    backend.next().finish();
    rig.session.outcome(&id).done();
    assert_eq!(backend.posts(), 2);
}

/// A completion that runs twice costs twice.
#[test]
fn request_that_a_kept_alive_backend_has_worked_on_is_not_repeated() {
    side_by_side([0, 1], |unread| {
        let backend = Backend::vllm(&["m"]);
        backend.leave_unread(unread);
        let rig = Rig::new(&backend);
        let (id, held) = job_on_a_kept_alive_connection(&rig, &backend, "");
        backend.assert_none(ms(1100));
        drop(held);
        assert_eq!(rig.session.outcome(&id).error(), "backend_unreachable");
        backend.assert_none(QUIET);
        assert_eq!(backend.posts(), 1);
    });
}

/// The server closed the idle connection while a large request was on its way.
#[test]
fn request_that_a_kept_alive_backend_did_not_read_to_its_end_is_repeated() {
    let backend = Backend::vllm(&["m"]);
    backend.leave_unread(usize::MAX);
    // More than the buffers of both sockets hold.
    let text = "x".repeat(5 << 20);
    let rig = Rig::new(&backend);
    let (id, held) = job_on_a_kept_alive_connection(&rig, &backend, &text);
    backend.leave_unread(0);
    // Sending goes on for as long as the server does not read.
    backend.assert_none(ms(1100));
    drop(held);
    backend.next().finish();
    rig.session.outcome(&id).done();
}

/// The writer of a stream whose socket has Nagle's algorithm on: the head and each of these events are writes of their own. Reports
/// when each event was written.
fn write_with_nagle(written: Sender<Instant>, events: usize, event_bytes: usize) -> Answer {
    Answer::Play(Box::new(move |mut stream| {
        stream.set_nodelay(false)?;
        stream.write_all(SSE_HEAD)?;
        let comment = format!(": {}\n\n", "x".repeat(event_bytes));
        for n in 0..=events {
            let mut out = Vec::new();
            if n < events {
                push_chunk(&mut out, comment.as_bytes());
            } else {
                push_chunk(&mut out, sse(7, 13).as_bytes());
                out.extend_from_slice(LAST_CHUNK);
            }
            let _ = written.send(Instant::now());
            stream.write_all(&out)?;
            std::thread::sleep(ms(4));
        }
        Ok(true)
    }))
}

/// KoboldCpp and other servers on Python's `http.server` leave Nagle's algorithm on.
#[test]
fn events_of_a_backend_with_nagle_on_are_not_delayed() {
    const EVENTS: usize = 4;
    for event_bytes in [100, 700] {
        let (sender, written) = unbounded();
        let backend = Backend::vllm_with(&["m"], move |_| write_with_nagle(sender.clone(), EVENTS, event_bytes));
        let rig = Rig::new(&backend);
        let mut delays = Vec::new();
        for _ in 0..10 {
            let id = rig.session.job("m", json!({}));
            let (mut body, mut events) = (String::new(), 0);
            while events < EVENTS {
                body += &String::from_utf8(rig.session.chunk(&id)).expect("UTF-8");
                let received = Instant::now();
                // A chunk holds several events if they came late.
                while events < body.matches("\n\n").count().min(EVENTS) {
                    let sent = written.recv_timeout(SOON).expect("it was written");
                    delays.push(received.saturating_duration_since(sent));
                    events += 1;
                }
            }
            rig.session.outcome(&id).done();
            written.recv_timeout(SOON).expect("the end was written");
        }
        delays.sort_unstable();
        // The kernel delays an acknowledgement by up to 40 ms. On a loaded machine many events are late for other reasons.
        let lower_quartile = delays[delays.len() / 4];
        assert!(lower_quartile < ms(10), "events of {event_bytes} bytes are late: {delays:?}");
    }
}

/// Servers that do not know `stream_options`, which the agent adds: FlowiseAI/Flowise#2866, gpustack/gpustack#429,
/// modelscope/ms-agent#489, openai/openai-python#2296.
#[test]
fn stream_options_that_the_backend_rejects_are_left_out() {
    let cases: &[(u16, &str)] = &[
        (
            400,
            r#"{"error":{"message":"Unrecognized request argument supplied: stream_options","type":"invalid_request_error"}}"#,
        ),
        (400, r#"{"error":{"message":"Extra inputs are not permitted, field: 'stream_options'"}}"#),
        (
            400,
            r#"{"object":"error","message":"[{'type': 'extra_forbidden', 'loc': ('body', 'stream_options'), 'msg': 'Extra inputs are not permitted', 'input': {}}]"}"#,
        ),
        (
            422,
            r#"{"detail":[{"type":"extra_forbidden","loc":["body","stream_options"],"msg":"Extra inputs are not permitted","input":{"include_usage":true}}]}"#,
        ),
        (400, r#"{"error":{"message":"json: unknown field \"include_usage\""}}"#),
        (500, r#"{"error":"create() got an unexpected keyword argument 'stream_options'"}"#),
    ];
    side_by_side(cases, |(status, body)| {
        let backend = Backend::vllm(&["m"]);
        let rig = Rig::new(&backend);
        let id = rig.session.job("m", json!({"n": 1}));
        let held = backend.next();
        assert!(held.request.json().get("stream_options").is_some());
        let mut expected = held.request.json();
        expected.as_object_mut().expect("an object").remove("stream_options");
        let mut held = held;
        held.send(response(*status, "application/json", body));
        held.keep();
        let held = backend.next();
        assert_eq!(held.request.json(), expected);
        held.finish();
        assert_eq!(rig.session.outcome(&id).done()["tokens"]["output"], 13, "{status} {body}");
        // Remembered.
        let id = rig.session.job("m", json!({}));
        let held = backend.next();
        assert!(held.request.json().get("stream_options").is_none(), "{}", held.request.body_text());
        held.finish();
        rig.session.outcome(&id).done();
        assert_eq!(backend.posts(), 3);
    });
}

/// The options of the customer, and an error that quotes a request which is wrong in another way.
#[test]
fn stream_options_are_left_out_only_if_that_helps() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let rejection = response(400, "application/json", r#"{"error":{"message":"stream_options: not permitted"}}"#);
    let id = rig.session.job("m", json!({"stream_options": {"include_usage": true}}));
    answer(&backend, &rejection);
    assert_eq!(rig.session.outcome(&id).error(), "internal");
    assert_eq!(backend.posts(), 1);

    let id = rig.session.job("m", json!({"temperature": 9}));
    answer(&backend, &rejection);
    answer(&backend, &rejection);
    assert_eq!(rig.session.outcome(&id).error(), "internal");
    assert_eq!(backend.posts(), 3);

    let id = rig.session.job("m", json!({}));
    let held = backend.next();
    assert!(held.request.json().get("stream_options").is_some());
    held.finish();
    rig.session.outcome(&id).done();
}
