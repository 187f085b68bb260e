//! Responses of real servers to a job.

use serde_json::json;

use crate::support::*;

// Unsuccessful responses.

/// Two backends that list `m`; the first is advertised.
fn two_backends() -> (Backend, Backend, Rig) {
    let (first, second) = (Backend::vllm(&["m"]), Backend::vllm(&["m"]));
    let rig = Rig::with(|setup| setup.backend(first.toml()).backend(second.toml().replace("vllm", "openai")));
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
/// Fastify; OpenAI (anthropics/claude-code#3593); nginx; mlx_lm; axum; a server that knows the path for GET only; Python's
/// `http.server`.
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
fn job_on_a_kept_alive_connection(rig: &Rig, backend: &Backend, request: serde_json::Value) -> (String, Held) {
    let id = rig.session.job("m", request);
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
    let (id, held) = job_on_a_kept_alive_connection(&rig, &backend, json!({}));
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
        let (id, held) = job_on_a_kept_alive_connection(&rig, &backend, json!({}));
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
    let rig = Rig::new(&backend);
    // More than the buffers of both sockets hold.
    let (id, held) = job_on_a_kept_alive_connection(&rig, &backend, json!({"text": "x".repeat(12 << 20)}));
    backend.leave_unread(0);
    // Sending goes on for as long as the server does not read.
    backend.assert_none(ms(1100));
    drop(held);
    backend.next().finish();
    rig.session.outcome(&id).done();
}
