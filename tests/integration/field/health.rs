//! Which failures count against which backend and model, and for how long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use crate::support::*;

/// A trial: the only request of one token.
fn is_trial(request: &Request) -> bool {
    request.method == "POST" && request.json()["max_tokens"] == 1
}

fn trials(backend: &Backend) -> Vec<Request> {
    backend.seen().into_iter().filter(is_trial).collect()
}

fn answer_of_success() -> Answer {
    Answer::Raw(response(200, "text/event-stream", sse(1, 2)))
}

/// A backend of these models. A job that names a status and a body gets them; any other request succeeds.
fn answering_as_asked(models: &[&str]) -> Backend {
    Backend::vllm_with(models, |request| match request.json() {
        asked if asked["status"].is_u64() => {
            let body = asked["body"].as_str().unwrap_or_default();
            Answer::Raw(response(asked["status"].as_u64().expect("a status") as u16, "application/json", body))
        }
        _ => answer_of_success(),
    })
}

fn run(rig: &Rig, model: &str, request: Value) -> Outcome {
    rig.session.outcome(&rig.session.job(model, request))
}

fn offered(capabilities: &Value) -> Vec<&str> {
    let models = capabilities["models"].as_array().expect("models");
    models.iter().map(|model| model["model_id"].as_str().expect("an id")).collect()
}

/// Starts a round of probes, by a job whose model is missing.
fn start_a_probe(rig: &Rig, model: &str) {
    let outcome = run(rig, model, json!({"status": 404, "body": "{\"error\":\"model not found\"}"}));
    assert_eq!(outcome.error(), "model_not_loaded");
}

/// What llama.cpp (b11434) and transformers serve were seen to answer. Pictures: ggml-org/llama.cpp#13566, #15377, #12947.
const CAUSED_BY_THE_REQUEST: [(u16, &str); 11] = [
    (
        500,
        r#"{"error":{"code":500,"message":"image input is not supported - hint: if this is unexpected, you may need to provide the mmproj","type":"server_error"}}"#,
    ),
    (
        500,
        r#"{"error":{"code":500,"message":"audio input is not supported - hint: if this is unexpected, you may need to provide the mmproj","type":"server_error"}}"#,
    ),
    (
        500,
        r#"{"error":{"code":500,"message":"Failed to parse messages: [json.exception.type_error.302] type must be string, but is number","type":"server_error"}}"#,
    ),
    (
        500,
        r#"{"error":{"code":500,"message":"Failed to parse messages: Unsupported content part type: \"image_url\"; messages = [ proxy error: Could not establish connection ]","type":"server_error"}}"#,
    ),
    (
        500,
        r#"{"error":{"code":500,"message":"Failed to parse tools: Expected 'tools' to be an array, got \"x\"; tools = \"x\"","type":"server_error"}}"#,
    ),
    (
        500,
        r#"{"error":{"code":500,"message":"Failed to parse tools: Unsupported tool type: {\"type\":\"foo\"}","type":"server_error"}}"#,
    ),
    (500, r#"{"error":{"code":500,"message":"Unknown reasoning format: foo","type":"server_error"}}"#),
    (500, r#"{"error":{"code":500,"message":"'messages' is required","type":"server_error"}}"#),
    (500, r#"{"error":{"code":500,"message":"Cannot use both json_schema and grammar","type":"server_error"}}"#),
    // These do not say whose fault it is.
    (500, r#"{"error":{"code":500,"message":"Value is not callable: null at row 1, column 3","type":"server_error"}}"#),
    (500, "Internal Server Error"),
];

#[test]
fn requests_that_a_server_answers_with_500_withdraw_nothing() {
    side_by_side(CAUSED_BY_THE_REQUEST, |(status, body)| {
        let backend = answering_as_asked(&["m"]);
        let rig = Rig::new(&backend);
        for _ in 0..12 {
            let outcome = run(&rig, "m", json!({"status": status, "body": body}));
            assert_eq!(outcome.error(), "internal", "{body}");
        }
        rig.session.assert_no_frame(&format!("another offer after {body}"), QUIET, is_offer);
        run(&rig, "m", json!({})).done();
        let trials = trials(&backend);
        assert!(trials.len() <= 1, "{} trials after {body}: anybody can provoke them", trials.len());
        let says_so = !body.contains("Internal") && !body.contains("callable");
        assert_eq!(trials.is_empty(), says_so, "{body}");
        for trial in trials {
            assert_eq!((trial.json()["model"].as_str(), &trial.json()["stream"]), (Some("m"), &json!(true)));
        }
    });
}

#[test]
fn slow_model_that_always_fails_is_withdrawn_alone_until_a_trial_succeeds() {
    let cases = [(500, "out of memory"), (500, "Internal Server Error"), (501, "not now"), (507, "")];
    side_by_side(cases, |(status, body)| {
        let fails = Arc::new(AtomicBool::new(true));
        let is_failing = fails.clone();
        let backend = Backend::vllm_with(&["bad", "good"], move |request| {
            match request.json()["model"] == "bad" && is_failing.load(Ordering::SeqCst) {
                true => Answer::Raw(response(status, "text/plain", body)),
                false => answer_of_success(),
            }
        });
        let rig = Rig::new(&backend);
        assert_eq!(offered(&rig.session.capabilities), ["bad", "good"]);
        for nth in 0..3 {
            assert!(nth == 0 || trials(&backend).is_empty());
            run(&rig, "bad", json!({})).error();
            run(&rig, "good", json!({})).done();
        }
        assert_eq!(offered(&rig.session.frame("capabilities", SOON)), ["good"], "{status} {body}");
        let withdrawn = Instant::now();
        rig.agent.stderr.wait_line(&["warn", &backend.url(), "not offered", "bad", "3 jobs", &status.to_string()]);
        let ran = cli(rig.setup.scratch.path(), &["status", "--config", "agent.toml"], &[]);
        assert!(ran.code == Some(0) && ran.stdout.contains("bad (its last 3 jobs and a trial failed"), "{ran:?}");
        // A job that was sent before still gets the actual error.
        assert_eq!(run(&rig, "bad", json!({})).error(), "internal");
        run(&rig, "good", json!({})).done();
        fails.store(false, Ordering::SeqCst);
        assert_eq!(offered(&rig.session.frame("capabilities", secs(10))), ["bad", "good"]);
        assert!(withdrawn.elapsed() > secs(3), "tried again after {:?}", withdrawn.elapsed());
        assert_eq!(trials(&backend).len(), 2);
        run(&rig, "bad", json!({})).done();
    });
}

/// Some models require more than one token.
#[test]
fn slow_withdrawn_model_returns_although_its_server_rejects_the_trial() {
    let fails = Arc::new(AtomicBool::new(true));
    let is_failing = fails.clone();
    let backend = Backend::vllm_with(&["m"], move |request| match is_failing.load(Ordering::SeqCst) {
        true => Answer::Raw(response(500, "text/plain", "out of memory")),
        false if is_trial(request) => Answer::Raw(response(400, "text/plain", "max_tokens must be at least 16")),
        false => answer_of_success(),
    });
    let rig = Rig::new(&backend);
    for _ in 0..3 {
        run(&rig, "m", json!({})).error();
    }
    assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]));
    fails.store(false, Ordering::SeqCst);
    assert_eq!(offered(&rig.session.frame("capabilities", secs(10))), ["m"]);
}

#[test]
fn only_model_that_fails_leaves_the_agent_without_a_healthy_backend() {
    let backend = Backend::vllm_with(&["m"], |_| Answer::Raw(response(500, "text/plain", "CUDA error")));
    let rig = Rig::new(&backend);
    for _ in 0..3 {
        run(&rig, "m", json!({})).error();
    }
    assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]));
    wait_until("`status` says why", || {
        let ran = cli(rig.setup.scratch.path(), &["status", "--config", "agent.toml"], &[]);
        ran.code == Some(1) && ran.stdout.contains("no healthy backend") && ran.stdout.contains("its last 3 jobs")
    });
}

/// While the agent is paused, the operator needs the machine for other work.
#[test]
fn slow_paused_agent_tries_no_model() {
    let backend = Backend::vllm_with(&["bad"], |_| Answer::Raw(response(500, "text/plain", "CUDA error")));
    let rig = Rig::new(&backend);
    for _ in 0..3 {
        run(&rig, "bad", json!({})).error();
    }
    assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]));
    let command = |name: &str| {
        let ran = cli(rig.setup.scratch.path(), &[name, "--config", "agent.toml"], &[]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
    };
    command("pause");
    assert_eq!(trials(&backend).len(), 1);
    rig.session.assert_no_frame("an offer", secs(6), is_offer);
    assert_eq!(trials(&backend).len(), 1, "the next one was due after 4 s");
    command("resume");
    wait_until("the model is tried again", || trials(&backend).len() == 2);
}

/// Trials on a hosted backend would cost the operator money.
#[test]
fn slow_model_of_a_hosted_backend_is_withdrawn_for_a_limited_time_and_never_tried() {
    let backend = Backend::new(|request| match request.line().as_str() {
        "GET /models" => Answer::Json(200, json!({"data": [{"id": "bad"}, {"id": "good"}]})),
        _ if request.json()["model"] == "bad" => Answer::Raw(response(500, "text/plain", "oops")),
        _ => answer_of_success(),
    });
    let toml = format!("kind = \"openrouter\"\nurl = \"{}\"\napi_key_env = \"THE_KEY\"", backend.url());
    let rig = Rig::with(|setup| setup.backend(toml).env("THE_KEY", "sk-hosted"));
    for _ in 0..3 {
        run(&rig, "bad", json!({})).error();
    }
    assert_eq!(offered(&rig.session.frame("capabilities", SOON)), ["good"]);
    let withdrawn = Instant::now();
    assert_eq!(offered(&rig.session.frame("capabilities", SOON)), ["bad", "good"]);
    let took = withdrawn.elapsed();
    assert!(took > secs(3) && took < secs(6), "offered again after {took:?}");
    run(&rig, "good", json!({})).done();
    assert_eq!(backend.posts(), 4);
}

/// A cloud model of Ollama, which the operator pays for.
#[test]
fn slow_model_that_a_local_server_runs_elsewhere_is_never_tried() {
    let backend = Backend::new(|request| match (request.method.as_str(), request.target.as_str()) {
        ("GET", "/v1/models") => Answer::Json(200, json!({"data": [{"id": "m:cloud"}, {"id": "m"}]})),
        ("GET", "/api/tags") => Answer::Json(
            200,
            json!({"models": [{"name": "m:cloud", "remote_host": "https://ollama.com:443"}, {"name": "m"}]}),
        ),
        ("POST", "/v1/chat/completions") if request.json()["model"] == "m:cloud" => {
            Answer::Raw(response(500, "text/plain", "oops"))
        }
        ("POST", "/v1/chat/completions") => answer_of_success(),
        _ => Answer::Json(404, json!({})),
    });
    let toml = format!("{}\nmodels = [\"m:cloud\", \"m\"]", backend.toml().replace("vllm", "ollama"));
    let rig = Rig::with(|setup| setup.backend(toml));
    for _ in 0..3 {
        run(&rig, "m:cloud", json!({})).error();
    }
    assert_eq!(offered(&rig.session.frame("capabilities", SOON)), ["m"]);
    assert_eq!(offered(&rig.session.frame("capabilities", SOON)), ["m", "m:cloud"], "for a limited time");
    assert!(trials(&backend).is_empty());
}

/// A router that answers 502 for the one model whose server does not start (llama-swap), or breaks off its streams.
#[test]
fn model_that_a_gateway_cannot_reach_is_withdrawn_alone_while_others_serve() {
    let broken = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\nno size\r\n";
    let answers = [response(502, "text/plain", "unable to start process"), broken.as_bytes().to_vec()];
    side_by_side(answers, |answer| {
        let backend = Backend::vllm_with(&["bad", "good"], move |request| match request.json()["model"] == "bad" {
            true => Answer::Raw(answer.clone()),
            false => answer_of_success(),
        });
        let rig = Rig::new(&backend);
        for _ in 0..3 {
            run(&rig, "bad", json!({})).error();
            run(&rig, "good", json!({})).done();
        }
        assert_eq!(offered(&rig.session.frame("capabilities", SOON)), ["good"]);
    });
}

/// One of two workers behind a router dies.
#[test]
fn streams_that_break_together_are_one_failure() {
    let backend = Backend::vllm(&["m"]);
    let rig = Rig::new(&backend);
    let jobs: Vec<_> = (0..6).map(|_| rig.session.job("m", json!({}))).collect();
    let mut held: Vec<_> = jobs.iter().map(|_| backend.next()).collect();
    for stream in &mut held {
        stream.start_sse();
        stream.chunk("data: 1\n\n");
    }
    jobs.iter().for_each(|id| drop(rig.session.chunk(id)));
    drop(held);
    jobs.iter().for_each(|id| assert_eq!(rig.session.outcome(id).error(), "internal"));
    rig.session.assert_no_frame("another offer", QUIET, is_offer);
    let id = rig.session.job("m", json!({}));
    backend.next().finish();
    rig.session.outcome(&id).done();
    // Before an answer, too: the next failure is the first again.
    let jobs: Vec<_> = (0..4).map(|_| rig.session.job("m", json!({}))).collect();
    let held: Vec<_> = jobs.iter().map(|_| backend.next()).collect();
    for mut request in held {
        request.send(response(502, "text/plain", "Backend request failed"));
        request.keep();
    }
    jobs.iter().for_each(|id| assert_eq!(rig.session.outcome(id).error(), "backend_unreachable"));
    rig.session.assert_no_frame("another offer", QUIET, is_offer);
}

/// vllm-project/router#135: the listing fails while one worker of several is down. Its `/health` says 503 then.
#[test]
fn gateway_that_serves_stays_offered_although_a_probe_gets_a_5xx() {
    let cases = [
        ("GET /v1/models", 500, "Request failed: error sending request for url (http://127.0.0.1:8001/v1/models)"),
        ("GET /health", 503, "Unhealthy servers: [\"http://127.0.0.1:8001\"]"),
        ("GET /v1/models", 502, ""),
    ];
    // Whether a job has just been answered. If not, a trial shows that the gateway serves.
    let cases = cases.into_iter().flat_map(|case| [(case, true), (case, false)]);
    side_by_side(cases, |((line, status, body), is_busy)| {
        let fails = Arc::new(AtomicBool::new(false));
        let is_failing = fails.clone();
        let backend = Backend::new(move |request| match request.line() {
            asked if asked == line && is_failing.load(Ordering::SeqCst) => {
                Answer::Raw(response(status, "text/plain", body))
            }
            asked if asked == "GET /v1/models" => Answer::Json(200, json!({"data": [{"id": "m"}, {"id": "gone"}]})),
            _ if request.method == "GET" => Answer::Raw(response(200, "text/plain", "")),
            _ if request.json()["model"] == "gone" => {
                Answer::Raw(response(404, "application/json", "{\"error\":\"model not found\"}"))
            }
            _ => answer_of_success(),
        });
        let rig = Rig::new(&backend);
        if is_busy {
            run(&rig, "m", json!({})).done();
        }
        let asked = backend.seen().iter().filter(|request| request.line() == line).count();
        fails.store(true, Ordering::SeqCst);
        assert_eq!(run(&rig, "gone", json!({})).error(), "model_not_loaded");
        backend.wait_for(line, asked + 1);
        rig.session.assert_no_frame(&format!("another offer after {status} to {line}"), 2 * QUIET, is_offer);
        run(&rig, "m", json!({})).done();
    });
}

#[test]
fn slow_server_that_fails_its_probe_and_a_trial_is_withdrawn() {
    let fails = Arc::new(AtomicBool::new(false));
    let is_failing = fails.clone();
    let backend = Backend::new(move |request| match request.line().as_str() {
        "POST /v1/chat/completions" if is_trial(request) => Answer::Raw(response(500, "text/plain", "engine is dead")),
        "POST /v1/chat/completions" => Answer::Raw(response(404, "text/plain", "no such model")),
        "GET /health" if is_failing.load(Ordering::SeqCst) => Answer::Raw(response(503, "text/plain", "")),
        _ => Answer::Json(200, json!({"data": [{"id": "m"}]})),
    });
    let rig = Rig::new(&backend);
    fails.store(true, Ordering::SeqCst);
    start_a_probe(&rig, "m");
    assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]));
    fails.store(false, Ordering::SeqCst);
    assert_eq!(offered(&rig.session.frame("capabilities", SOON)), ["m"], "the probe succeeds again");
}

/// A trial of a model that has served nothing may load it, and unload the one that is in use.
#[test]
fn failed_probe_makes_no_server_load_a_model() {
    let fails = Arc::new(AtomicBool::new(false));
    let is_failing = fails.clone();
    let backend = Backend::new(move |request| match request.line().as_str() {
        "GET /v1/models" if is_failing.load(Ordering::SeqCst) => Answer::Raw(response(500, "text/plain", "")),
        "GET /v1/models" => Answer::Json(200, json!({"data": [{"id": "m"}, {"id": "n"}]})),
        _ if request.method == "GET" => Answer::Json(404, json!({})),
        _ if request.json()["status"].is_u64() => Answer::Raw(response(404, "text/plain", "no such model")),
        _ => answer_of_success(),
    });
    let rig = Rig::with(|setup| setup.backend(backend.toml().replace("vllm", "lmstudio")));
    fails.store(true, Ordering::SeqCst);
    start_a_probe(&rig, "m");
    assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]));
    assert!(trials(&backend).is_empty());
}

/// Path, status, body.
type ReadinessAnswer = (&'static str, u16, &'static str);

/// smg and the routers of SGLang and vLLM say at `/readiness` whether any worker is healthy (sgl-project/sglang#12248); they go on
/// listing models (like BerriAI/litellm#30128).
#[test]
fn gateway_that_says_that_it_is_not_ready_is_not_offered() {
    let not_ready = r#"{"status":"not ready","reason":"no healthy workers"}"#;
    // The answers, and whether the gateway is offered.
    let cases: [(&[ReadinessAnswer], bool); 8] = [
        (&[("/readiness", 503, not_ready), ("/health", 200, "OK")], false),
        (&[("/readiness", 404, ""), ("/health", 503, "")], false),
        (&[("/readiness", 404, ""), ("/health", 500, "")], false),
        (&[("/readiness", 405, ""), ("/health", 401, "")], true),
        (&[], true),
        (&[("/health", 200, "OK")], true),
        // One worker of two is down.
        (
            &[("/readiness", 200, r#"{"status":"ready","healthy_workers":1}"#), ("/health", 503, "Unhealthy servers")],
            true,
        ),
        // Another kind of resource at the path.
        (&[("/readiness", 302, ""), ("/health", 404, "<html>")], true),
    ];
    side_by_side(cases, |(answers, is_offered)| {
        let answers = answers.to_vec();
        let backend = Backend::new({
            let answers = answers.clone();
            move |request| match answers.iter().find(|(path, ..)| *path == request.target) {
                Some((_, status, body)) => Answer::Raw(response(*status, "text/plain", body)),
                None if request.target == "/v1/models" => Answer::Json(200, json!({"data": [{"id": "m"}]})),
                None => Answer::Raw(response(404, "text/plain", "")),
            }
        });
        let rig = Rig::with(|setup| setup.backend(backend.toml().replace("vllm", "openai")));
        assert_eq!(!offered(&rig.session.capabilities).is_empty(), is_offered, "{answers:?}");
    });
}

/// The readiness of a gateway takes effect at once, whatever its earlier jobs showed.
#[test]
fn gateway_that_loses_its_last_worker_is_withdrawn_by_the_next_probe() {
    let readiness = Arc::new(AtomicU16::new(200));
    let status = readiness.clone();
    let backend = Backend::new(move |request| match request.line().as_str() {
        "GET /readiness" => Answer::Json(status.load(Ordering::SeqCst), json!({})),
        "GET /v1/models" => Answer::Json(200, json!({"data": [{"id": "m"}]})),
        "GET /health" => Answer::Json(200, json!({})),
        _ if request.json()["status"].is_u64() => Answer::Raw(response(404, "text/plain", "no such model")),
        _ => answer_of_success(),
    });
    let rig = Rig::with(|setup| setup.backend(backend.toml().replace("vllm", "openai")));
    run(&rig, "m", json!({})).done();
    readiness.store(503, Ordering::SeqCst);
    start_a_probe(&rig, "m");
    assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]));
    rig.agent.stderr.wait_line(&["warn", &backend.url(), "not offered", "503"]);
}

/// LiteLLM requests a paid completion of each model for `GET /health`; huggingface/ml-intern#70 is about such a probe.
#[test]
fn litellm_is_not_asked_for_the_health_that_costs_money() {
    let backend = Backend::new(|request| match request.target.as_str() {
        "/v1/models" => Answer::Json(200, json!({"data": [{"id": "m"}]})),
        "/health/readiness" => Answer::Json(200, json!({"status": "connected", "litellm_version": "1.109.1"})),
        "/readiness" => Answer::Json(404, json!({"detail": "Not Found"})),
        _ => Answer::Hold,
    });
    let rig = Rig::with(|setup| setup.backend(backend.toml().replace("vllm", "openai")));
    assert_eq!(offered(&rig.session.capabilities), ["m"]);
    backend.assert_none(QUIET);
}

/// Texts of smg 1.13.0, vllm-router 0.1.17, llama.cpp's router, Envoy, and LiteLLM.
#[test]
fn gateway_without_a_server_behind_it_is_backend_unreachable_and_the_next_backend_serves() {
    let cases = [
        (
            503,
            r#"{"error":{"type":"service_unavailable","code":"no_available_workers","message":"No available workers (all circuits open or unhealthy)","param":null}}"#,
        ),
        (
            500,
            r#"{"error":{"type":"server_error","code":"call_upstream_connection_failed","message":"error sending request for url (http://127.0.0.1:8001/v1/chat/completions). URL: http://127.0.0.1:8001/v1/chat/completions","param":null}}"#,
        ),
        (503, "No available workers (all circuits open or unhealthy)"),
        (500, "Request failed: error sending request for url (http://127.0.0.1:8001/v1/chat/completions)"),
        (
            500,
            r#"{"error":{"code":500,"message":"proxy error: Could not establish connection","type":"server_error"}}"#,
        ),
        (503, "upstream connect error or disconnect/reset before headers. reset reason: connection failure"),
        (503, "no healthy upstream"),
        (
            500,
            r#"{"error":{"message":"litellm.InternalServerError: InternalServerError: OpenAIException - Connection error.. Received Model Group=m","type":null,"param":null,"code":"500"}}"#,
        ),
    ];
    side_by_side(cases, |(status, body)| {
        let (first, second) = (answering_as_asked(&["m", "alone"]), Backend::vllm(&["m"]));
        let rig = Rig::with(|setup| setup.backend(first.toml()).backend(second.toml().replace("vllm", "openai")));
        let request = json!({"status": status, "body": body});
        let id = rig.session.job("m", request.clone());
        second.next().finish();
        rig.session.outcome(&id).done();
        assert_eq!(run(&rig, "alone", request).error(), "backend_unreachable", "{body}");
    });
}

/// A model that fails on one backend is served by the next that lists it.
#[test]
fn model_that_fails_is_served_by_another_backend_that_lists_it() {
    let failing = Backend::vllm_with(&["m", "n"], |request| match request.json()["model"] == "m" {
        true => Answer::Raw(response(500, "text/plain", "CUDA error")),
        false => answer_of_success(),
    });
    let other = Backend::vllm_with(&["m"], |_| answer_of_success());
    let rig = Rig::with(|setup| setup.backend(failing.toml()).backend(other.toml().replace("vllm", "openai")));
    for _ in 0..3 {
        run(&rig, "m", json!({})).error();
    }
    let offer = rig.session.frame("capabilities", SOON);
    let kinds: Vec<_> = offer["models"].as_array().expect("models").iter().map(|model| &model["backend"]).collect();
    assert_eq!((offered(&offer), kinds), (vec!["m", "n"], vec![&json!("openai"), &json!("vllm")]));
    run(&rig, "m", json!({})).done();
    run(&rig, "n", json!({})).done();
    assert_eq!(other.posts(), 1);
}

/// Like gonka-ai/gonka#1421: a saturated engine misses the deadline of its health check, and a healthy node is restarted.
#[test]
fn slow_server_too_busy_for_probes_stays_offered_while_bytes_of_its_streams_flow() {
    let hangs = Arc::new(AtomicBool::new(false));
    let is_hanging = hangs.clone();
    let backend = Backend::new(move |request| match request.line().as_str() {
        "POST /v1/chat/completions" if request.json()["status"].is_u64() => {
            Answer::Raw(response(404, "text/plain", "no such model"))
        }
        "POST /v1/chat/completions" => Answer::Hold,
        _ if is_hanging.load(Ordering::SeqCst) => Answer::Hold,
        _ => Answer::Json(200, json!({"data": [{"id": "m"}]})),
    });
    let rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let mut stream = backend.next();
    stream.start_sse();
    stream.chunk("data: 1\n\n");
    hangs.store(true, Ordering::SeqCst);
    start_a_probe(&rig, "m");
    // Two probes without an answer, a byte each now and then.
    for _ in 0..2 {
        let mut probe = backend.next();
        assert_eq!(probe.request.method, "GET");
        stream.chunk("data: 2\n\n");
        probe.wait_hang_up();
    }
    rig.session.assert_no_frame("an offer without the model", QUIET, is_offer);
    stream.chunk("data: [DONE]\n\n");
    stream.end();
    rig.session.outcome(&id).done();
    // Without streams, the second probe in a row without an answer ends the offer.
    for _ in 0..2 {
        let mut probe = backend.next();
        probe.wait_hang_up();
    }
    assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]));
}

#[test]
fn slow_quarantine_of_a_gateway_that_goes_on_listing_doubles_with_each_relapse() {
    let backend = Backend::vllm_with(&["m"], |_| Answer::Raw(response(502, "text/plain", "")));
    let rig = Rig::new(&backend);
    let mut quarantines = Vec::new();
    for _ in 0..2 {
        for _ in 0..3 {
            run(&rig, "m", json!({})).error();
        }
        assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]));
        let withdrawn = Instant::now();
        assert_eq!(offered(&rig.session.frame("capabilities", secs(20))), ["m"]);
        quarantines.push(withdrawn.elapsed());
    }
    // A probe that comes too early puts off the next by up to 6 s.
    assert!(quarantines[0] < ms(7900) && quarantines[1] > ms(7900), "{quarantines:?}");
}
