//! The request that the backend receives: route, headers, and the changes to its body.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::*;

/// Sends a job with this text as its `request`; returns what the backend received.
fn posted(rig: &Rig, backend: &Backend, request: &str, format: &str) -> Request {
    let id = Uuid::new_v4();
    rig.session.send_text(&format!(
        r#"{{"type":"job","job_id":"{id}","model_id":"m","request":{request},"format":{format},"deadline_ms":30000}}"#
    ));
    let held = backend.next();
    let request = held.request.clone();
    held.finish();
    rig.session.outcome(&id.to_string()).done();
    request
}

#[test]
fn openai_job_is_posted_as_a_stream_with_usage() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    // The request, and what must arrive: the request's keys first, then the added ones.
    let cases = [
        (r#"{"messages":[]}"#, r#"{"messages":[],"stream":true,"stream_options":{"include_usage":true},"model":"m"}"#),
        ("{}", r#"{"stream":true,"stream_options":{"include_usage":true},"model":"m"}"#),
        (
            r#"{"model":"theirs","stream":false}"#,
            r#"{"model":"m","stream":true,"stream_options":{"include_usage":true}}"#,
        ),
        (r#"{"stream":null,"model":null}"#, r#"{"stream":true,"model":"m","stream_options":{"include_usage":true}}"#),
        (
            r#"{"stream_options":{"include_usage":false},"model":"m"}"#,
            r#"{"stream_options":{"include_usage":false},"model":"m","stream":true}"#,
        ),
        (r#"{"stream_options":null,"model":"m"}"#, r#"{"stream_options":null,"model":"m","stream":true}"#),
        (r#"{"stream_options":{},"model":"m"}"#, r#"{"stream_options":{},"model":"m","stream":true}"#),
    ];
    for format in [r#""openai""#, r#""responses""#, "null", "7"] {
        for (sent, expected) in cases {
            let got = posted(&rig, &backend, sent, format);
            assert_eq!(got.line(), "POST /v1/chat/completions", "format {format}");
            assert_eq!(got.json(), serde_json::from_str::<Value>(expected).expect("JSON"), "{sent}, format {format}");
        }
    }
}

#[test]
fn anthropic_job_is_posted_to_messages_with_only_stream_and_model_added() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let cases = [
        (r#"{"max_tokens":5,"messages":[]}"#, json!({"max_tokens": 5, "messages": [], "stream": true, "model": "m"})),
        (r#"{"model":"theirs","stream":false}"#, json!({"model": "m", "stream": true})),
        (r#"{"model":"x","stream_options":1}"#, json!({"model": "m", "stream_options": 1, "stream": true})),
    ];
    for (sent, expected) in cases {
        let got = posted(&rig, &backend, sent, r#""anthropic""#);
        assert_eq!((got.line().as_str(), got.json()), ("POST /v1/messages", expected));
    }
}

/// The key order of a tool schema affects the prompt, and numbers must not be rounded.
#[test]
fn request_keeps_its_key_order_and_exact_numbers() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let own = concat!(
        r#""zeta":1,"alpha":{"z":[],"a":{},"m":null},"seed":123456789012345678901234567890,"#,
        r#""temperature":1.0,"top_p":0.1,"exact":0.30000000000000004,"small":1e-7,"big":1E+400,"negative":-0,"#,
        r#""text":"\u00e9 é \" \\ \n \u0000 𝄞 \ud834\udd1e </script>","empty":"","#,
        r#""messages":[{"role":"user","content":"hi"}]"#
    );
    let got = posted(&rig, &backend, &format!("{{{own}}}"), "\"openai\"").body_text();
    let normalised = |text: &str| text.replace("1E+400", "1e+400").replace("1e400", "1e+400");
    // Strings may be escaped in another way, as may the sign of an exponent; the rest is the same text.
    let (before, rest) = own.split_once(r#""text":"#).expect("the text");
    let got = normalised(&got);
    assert!(got.starts_with(&format!("{{{}", normalised(before))), "{got}");
    let (_, messages) = rest.split_once(r#""messages""#).expect("the messages");
    assert!(got.contains(&format!(r#""empty":"","messages"{messages},"stream":true"#)), "{got}");
    let text = serde_json::from_str::<Value>(&got).expect("JSON")["text"].clone();
    assert_eq!(text, "é é \" \\ \n \0 𝄞 𝄞 </script>");
}

#[test]
fn request_that_is_no_object_is_posted_unchanged() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    for request in ["[1,2]", "\"text\"", "null", "true", "1.50"] {
        for (format, line) in [("\"openai\"", "POST /v1/chat/completions"), ("\"anthropic\"", "POST /v1/messages")] {
            let got = posted(&rig, &backend, request, format);
            assert_eq!((got.body_text().as_str(), got.line().as_str()), (request, line));
        }
    }
}

#[test]
fn headers_to_the_backend_are_the_agents_own() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let id = Uuid::new_v4().to_string();
    let mut frame = job(&id, "m", json!({"messages": [], "headers": {"X-Conversation-Id": "1"}}));
    frame["headers"] = json!({"X-Conversation-Id": "1", "Authorization": "Bearer theirs"});
    rig.session.send(&frame);
    let held = backend.next();
    let request = held.request.clone();
    held.finish();
    assert_eq!(request.header("content-type"), Some("application/json"));
    assert_eq!(request.header("host"), Some(backend.address().to_string().as_str()));
    // With another value the backend might compress the response.
    assert!(matches!(request.header("accept-encoding"), None | Some("identity")), "{:?}", request.headers);
    let names: Vec<_> = request.headers.iter().map(|(name, _)| name.as_str()).collect();
    let known = [
        "host",
        "content-type",
        "content-length",
        "transfer-encoding",
        "accept",
        "accept-encoding",
        "user-agent",
        "connection",
    ];
    let strange: Vec<_> = names.iter().filter(|name| !known.contains(name)).collect();
    assert!(strange.is_empty(), "headers that are nobody's business: {strange:?}");
}

#[test]
fn api_key_is_sent_with_each_request_to_its_backend() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::with(|setup| {
        setup.backend(format!("{}\napi_key_env = \"THE_KEY\"", backend.toml())).env("THE_KEY", "sk-secret-123")
    });
    rig.session.job("m", json!({}));
    backend.next().finish();
    for request in backend.seen() {
        assert_eq!(request.header("authorization"), Some("Bearer sk-secret-123"), "{}", request.line());
    }
}

#[test]
fn job_goes_to_the_backend_that_was_advertised_for_its_model() {
    let backends = [&["a", "shared"], &["b", "shared"]].map(|models| Backend::vllm(models));
    let rig = Rig::with(|setup| backends.iter().fold(setup, |setup, backend| setup.backend(backend.toml())));
    for (model, served_by) in [("a", 0), ("b", 1), ("shared", 0)] {
        let id = rig.session.job(model, json!({}));
        let held = backends[served_by].next();
        assert_eq!(held.request.json()["model"], model);
        held.finish();
        rig.session.outcome(&id).done();
    }
}

/// Requests contain pictures. 0.3.5 accepts frames up to 16 MiB only.
#[test]
fn slow_requests_of_20_mb_and_nearly_64_mib_pass_in_one_frame() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    for size in [20_000_000, (64 << 20) - 1000] {
        let picture = "x".repeat(size);
        let id = Uuid::new_v4().to_string();
        // As text, as building so large a value takes an unoptimized test too long.
        let frame = job(&id, "m", json!({"picture": "PICTURE"})).to_string();
        let frame = frame.replace("\"deadline_ms\":30000", "\"deadline_ms\":600000");
        rig.session.send_text(&frame.replace("PICTURE", &picture));
        let held = backend.next_within(6 * SOON);
        let body = &held.request.body;
        let begins = body.windows(2).position(|pair| pair == b"xx").expect("the picture");
        assert!(body[begins..].starts_with(picture.as_bytes()), "the picture of {size} bytes changed");
        assert!(body.len() < size + 200, "{size} bytes arrived as {}", body.len());
        held.finish();
        rig.session.outcome(&id).done();
    }
}

#[test]
fn slow_job_with_an_unreadable_request_is_answered_by_its_id() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let nested = format!("{}{}", "[".repeat(300), "]".repeat(300));
    let many = format!("[{}0]", "0,".repeat(3_000_000));
    let requests = [
        ("half an emoji", r#"{"messages":[{"role":"user","content":"secret-prompt \ud83d"}]}"#),
        ("300 nested brackets", &nested),
        ("three million values", &many),
    ];
    for (what, request) in requests {
        let id = Uuid::new_v4().to_string();
        rig.session.send_text(&job(&id, "m", json!("REQUEST")).to_string().replace("\"REQUEST\"", request));
        let outcome = rig.session.outcome(&id);
        assert_eq!((outcome.error(), outcome.chunks.len()), ("internal", 0), "{what}");
        assert!(!outcome.message().contains("secret-prompt"), "{what}: {}", outcome.message());
    }
    let peak = rig.agent.peak_kib();
    assert!(peak < 48 << 10, "requests that cannot be read took {peak} KiB of memory");
    let id = rig.session.job("m", json!({}));
    backend.next().finish();
    rig.session.outcome(&id).done();
    assert!(!rig.agent.stderr.text().contains("secret-prompt"), "a prompt is in the log");
}
