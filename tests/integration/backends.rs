//! The probe requests for each kind of backend, and what is offered as a result.

use std::collections::HashMap;
use std::time::Instant;

use serde_json::{Value, json};

use crate::support::*;

/// `model_id` → `(backend, context_window)` of an offer.
fn offered(capabilities: &Value) -> Vec<(String, String, Option<u64>)> {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let models = capabilities["models"].as_array().expect("models");
    models.iter().map(|m| (text(&m["model_id"]), text(&m["backend"]), m["context_window"].as_u64())).collect()
}

fn ids(capabilities: &Value) -> Vec<String> {
    offered(capabilities).into_iter().map(|(id, ..)| id).collect()
}

fn listing(ids: &[&str]) -> Value {
    json!({"object": "list", "data": ids.iter().map(|id| json!({"id": id})).collect::<Vec<_>>()})
}

/// Answers these requests, holds jobs, and answers 404 to all others.
fn scripted(answers: &[(&str, Value)]) -> Backend {
    let answers: HashMap<String, Value> =
        answers.iter().map(|(line, value)| ((*line).to_owned(), value.clone())).collect();
    Backend::new(move |request| match answers.get(&request.line()) {
        Some(answer) => Answer::Json(200, answer.clone()),
        None if request.method == "POST" && !request.target.starts_with("/api/show") => Answer::Hold,
        None => Answer::Json(404, json!({"error": "not found"})),
    })
}

fn with_kind(setup: Setup, kind: &str, url: &str) -> Setup {
    let key = if ["venice", "openrouter"].contains(&kind) { "\napi_key_env = \"THE_KEY\"" } else { "" };
    setup.backend(format!("kind = \"{kind}\"\nurl = \"{url}\"{key}")).env("THE_KEY", "sk-hosted")
}

#[test]
fn probe_of_each_kind_makes_the_requests_of_that_kind() {
    struct Case {
        kind: &'static str,
        base: &'static str,
        answers: Vec<(&'static str, Value)>,
        window: Option<u64>,
        /// Some of the probe's requests.
        asked: &'static [&'static str],
    }
    let list = || listing(&["m"]);
    let cases = vec![
        Case {
            kind: "vllm",
            base: "",
            answers: vec![
                ("GET /health", json!({})),
                ("GET /v1/models", json!({"data": [{"id": "m", "max_model_len": 4096}]})),
            ],
            window: Some(4096),
            asked: &["GET /health", "GET /v1/models"],
        },
        Case {
            kind: "llamacpp",
            base: "",
            answers: vec![
                ("GET /health", json!({"status": "ok"})),
                ("GET /v1/models", json!({"data": [{"id": "m", "meta": {"n_ctx_train": 131_072}}]})),
                ("GET /props", json!({"default_generation_settings": {"n_ctx": 2048}})),
            ],
            window: Some(2048),
            asked: &["GET /health", "GET /v1/models", "GET /props"],
        },
        Case {
            kind: "lmstudio",
            base: "",
            answers: vec![
                ("GET /v1/models", list()),
                (
                    "GET /api/v0/models",
                    json!({"data": [{"id": "m", "loaded_context_length": 8192, "max_context_length": 32_768}]}),
                ),
            ],
            window: Some(8192),
            asked: &["GET /v1/models", "GET /api/v0/models"],
        },
        Case {
            kind: "ollama",
            base: "",
            answers: vec![
                ("GET /api/tags", json!({"models": []})),
                ("GET /v1/models", list()),
                ("GET /api/ps", json!({"models": [{"name": "m", "model": "m", "context_length": 4096}]})),
            ],
            window: Some(4096),
            asked: &["GET /api/tags", "GET /v1/models", "GET /api/ps"],
        },
        Case {
            kind: "openai",
            base: "",
            answers: vec![("GET /v1/models", json!({"data": [{"id": "m", "context_window": 1000}]}))],
            window: Some(1000),
            asked: &["GET /v1/models"],
        },
        Case {
            kind: "venice",
            base: "/api/v1",
            answers: vec![("GET /api/v1/models", list())],
            window: None,
            asked: &["GET /api/v1/models"],
        },
        Case {
            kind: "openrouter",
            base: "/api/v1",
            answers: vec![("GET /api/v1/models", json!({"data": [{"id": "m", "context_length": 65_536}]}))],
            window: Some(65_536),
            asked: &["GET /api/v1/models"],
        },
    ];
    for case in cases {
        let backend = scripted(&case.answers);
        let url = format!("{}{}", backend.url(), case.base);
        let rig = Rig::with(|setup| with_kind(setup, case.kind, &url));
        assert_eq!(offered(&rig.session.capabilities), [("m".to_owned(), case.kind.to_owned(), case.window)]);
        let api = if case.base.is_empty() { "/v1" } else { case.base };
        for (format, route) in [("openai", "chat/completions"), ("anthropic", "messages")] {
            let id = uuid::Uuid::new_v4().to_string();
            let mut frame = job(&id, "m", json!({"messages": []}));
            frame["format"] = json!(format);
            rig.session.send(&frame);
            let held = backend.next();
            assert_eq!(held.request.line(), format!("POST {api}/{route}"), "{}", case.kind);
            held.finish();
            rig.session.outcome(&id).done();
        }
        let seen = backend.seen();
        for line in case.asked {
            assert!(seen.iter().any(|request| request.line() == *line), "{} was not asked {line}", case.kind);
        }
        let hosted = !case.base.is_empty();
        let key = hosted.then_some("Bearer sk-hosted");
        assert!(seen.iter().all(|request| request.header("authorization") == key), "the key of {}", case.kind);
        let posts: Vec<_> = seen.iter().filter(|r| r.method == "POST" && !r.target.starts_with("/api/show")).collect();
        assert_eq!(posts.len(), 2, "a probe must not cost a completion: {posts:?}");
    }
}

#[test]
fn context_window_is_the_one_that_is_served_or_left_out() {
    let health = || ("GET /health", json!({}));
    let list = || ("GET /v1/models", listing(&["m"]));
    let entry = |entry: Value| ("GET /v1/models", json!({"data": [entry]}));
    let props = |n_ctx: Value| ("GET /props", json!({"default_generation_settings": {"n_ctx": n_ctx}}));
    let lmstudio = |entry: Value| ("GET /api/v0/models", json!({"data": [entry]}));
    type Answers = Vec<(&'static str, Value)>;
    let cases: Vec<(&str, Answers, Option<u64>)> = vec![
        (
            "vllm",
            vec![health(), entry(json!({"id": "m", "context_length": 1, "max_model_len": 2, "context_window": 3}))],
            Some(1),
        ),
        (
            "vllm",
            vec![health(), entry(json!({"id": "m", "context_length": "1", "max_model_len": 2, "context_window": 3}))],
            Some(2),
        ),
        ("vllm", vec![health(), entry(json!({"id": "m", "context_length": null, "context_window": 3}))], Some(3)),
        ("vllm", vec![health(), list()], None),
        // The window that the model was trained with is not the one that is configured; 0 means unknown.
        ("llamacpp", vec![health(), entry(json!({"id": "m", "meta": {"n_ctx_train": 99}})), props(json!(0))], None),
        ("llamacpp", vec![health(), entry(json!({"id": "m", "meta": {"n_ctx_train": 99}}))], None),
        // Older builds: one bare object.
        ("llamacpp", vec![health(), ("GET /v1/models", json!({"id": "m"})), props(json!(512))], Some(512)),
        // A router needs the model's name, and must not load the model for a probe.
        (
            "llamacpp",
            vec![
                health(),
                entry(json!({"id": "m", "status": {"value": "loaded"}})),
                props(json!(0)),
                ("GET /props?model=m&autoload=false", json!({"default_generation_settings": {"n_ctx": 777}})),
            ],
            Some(777),
        ),
        ("lmstudio", vec![list(), lmstudio(json!({"id": "m", "max_context_length": 5}))], Some(5)),
        ("lmstudio", vec![list(), lmstudio(json!({"id": "other", "max_context_length": 5}))], None),
        ("lmstudio", vec![list()], None),
        // The window that the model supports is not the one that is configured.
        (
            "ollama",
            vec![
                ("GET /api/tags", json!({})),
                list(),
                ("GET /api/ps", json!({"models": []})),
                (
                    "POST /api/show",
                    json!({"parameters": "stop \"x\"\nnum_ctx                        2048",
                           "model_info": {"llama.context_length": 131_072}}),
                ),
            ],
            Some(2048),
        ),
        (
            "ollama",
            vec![
                ("GET /api/tags", json!({})),
                list(),
                ("GET /api/ps", json!({"models": []})),
                ("POST /api/show", json!({"model_info": {"llama.context_length": 131_072}})),
            ],
            None,
        ),
    ];
    for (kind, answers, window) in cases {
        let backend = scripted(&answers);
        let rig = Rig::with(|setup| with_kind(setup, kind, &backend.url()));
        let expected = [("m".to_owned(), kind.to_owned(), window)];
        assert_eq!(offered(&rig.session.capabilities), expected, "{kind}: {answers:?}");
        let autoload =
            backend.seen().iter().any(|r| r.target.contains("model=") && !r.target.contains("autoload=false"));
        assert!(!autoload, "a probe that makes a router load a model");
    }
}

#[test]
fn base_urls_work_with_and_without_slash_path_and_v1() {
    // kind, what follows the address in the config, what goes before the routes.
    let cases = [
        ("vllm", "", "/v1"),
        ("vllm", "/", "/v1"),
        ("vllm", "/gpu/7", "/gpu/7/v1"),
        ("vllm", "/gpu/7/", "/gpu/7/v1"),
        ("openai", "", "/v1"),
        ("openai", "/", "/v1"),
        ("openai", "/v1", "/v1"),
        ("openai", "/v1/", "/v1"),
        ("openai", "/router", "/router/v1"),
        ("openai", "/router/v1", "/router/v1"),
        ("openrouter", "", ""),
        ("openrouter", "/", ""),
        ("openrouter", "/api/v1", "/api/v1"),
        ("openrouter", "/api/v1/", "/api/v1"),
    ];
    for (kind, suffix, api) in cases {
        let backend = Backend::new(move |request| match request.target.rsplit('/').next() {
            Some("health" | "models") => Answer::Json(200, listing(&["m"])),
            Some("readiness") => Answer::Json(404, json!({})),
            _ => Answer::Hold,
        });
        let rig = Rig::with(|setup| with_kind(setup, kind, &format!("{}{suffix}", backend.url())));
        assert_eq!(ids(&rig.session.capabilities), ["m"], "{kind} at {suffix:?}");
        let id = rig.session.job("m", json!({}));
        let held = backend.next();
        assert_eq!(held.request.target, format!("{api}/chat/completions"), "{kind} at {suffix:?}");
        held.finish();
        rig.session.outcome(&id).done();
        if kind == "vllm" {
            backend.wait_for(&format!("GET {}health", api.trim_end_matches("v1")), 1);
        }
        backend.wait_for(&format!("GET {api}/models"), 1);
    }
}

#[test]
fn backend_is_offered_if_the_health_check_of_its_kind_passes() {
    // kind, health check, its status, whether the backend is offered.
    let cases = [
        ("vllm", "GET /health", 200, true),
        ("vllm", "GET /health", 404, true),
        ("vllm", "GET /health", 500, false),
        ("vllm", "GET /health", 503, false),
        ("vllm", "GET /health", 302, false),
        ("llamacpp", "GET /health", 404, true),
        ("llamacpp", "GET /health", 500, false),
        ("ollama", "GET /api/tags", 500, false),
        ("lmstudio", "GET /v1/models", 500, false),
        ("openai", "GET /v1/models", 401, false),
        ("openrouter", "GET /models", 500, false),
    ];
    for (kind, line, status, is_offered) in cases {
        let elsewhere = Backend::vllm(&["m"]);
        let location = format!("HTTP/1.1 302 Found\r\nLocation: {}/\r\nContent-Length: 0\r\n\r\n", elsewhere.url());
        let backend = Backend::new(move |request| match request.line() {
            asked if asked == line && status == 302 => Answer::Raw(location.clone().into_bytes()),
            asked if asked == line => Answer::Json(status, json!({})),
            _ => Answer::Json(200, listing(&["m"])),
        });
        let rig = Rig::with(|setup| with_kind(setup, kind, &backend.url()));
        let expected: &[&str] = if is_offered { &["m"] } else { &[] };
        assert_eq!(ids(&rig.session.capabilities), expected, "{kind} whose {line} answers {status}");
        assert_eq!(elsewhere.connections(), 0, "a redirect was followed");
    }
}

#[test]
fn invalid_listing_offers_nothing_and_affects_no_other_backend() {
    let healthy = Backend::vllm(&["healthy"]);
    for body in
        ["", "null", "[]", "{}", "<html>", r#"{"data":7}"#, r#"{"data":[7,{},{"id":7},{"id":""},null]}"#, "\u{1}"]
    {
        let broken = Backend::new(move |_| Answer::Raw(response(200, "application/json", body)));
        let rig = Rig::with(|setup| setup.backend(broken.toml()).backend(healthy.toml()));
        assert_eq!(ids(&rig.session.capabilities), ["healthy"], "beside a backend that lists {body:?}");
    }
}

#[test]
fn offer_names_the_kind_of_the_lowest_rank_of_several_backends_with_a_model() {
    let kinds = ["vllm", "llamacpp", "lmstudio", "ollama", "openai", "venice", "openrouter"];
    // Model 0 is on all of them, model 1 on all but the first, and so on.
    let backends: Vec<_> = (0..kinds.len())
        .map(|rank| {
            let models: Vec<_> = (0..=rank).map(|n| format!("model-{n}")).collect();
            let list = listing(&models.iter().map(String::as_str).collect::<Vec<_>>());
            Backend::new(move |request| match request.method.as_str() {
                "GET" => Answer::Json(200, list.clone()),
                _ if request.target == "/api/show" => Answer::Json(404, json!({})),
                _ => Answer::Hold,
            })
        })
        .collect();
    let rig = Rig::with(|setup| {
        let in_config = kinds.iter().zip(&backends).rev();
        in_config.fold(setup, |setup, (kind, backend)| with_kind(setup, kind, &backend.url()))
    });
    let got: Vec<_> = offered(&rig.session.capabilities).into_iter().map(|(id, kind, _)| (id, kind)).collect();
    let expected: Vec<_> =
        kinds.iter().enumerate().map(|(n, kind)| (format!("model-{n}"), (*kind).to_owned())).collect();
    assert_eq!(got, expected);
    for (n, backend) in backends.iter().enumerate() {
        let id = rig.session.job(&format!("model-{n}"), json!({}));
        backend.next().finish();
        rig.session.outcome(&id).done();
    }
}

#[test]
fn offer_is_sorted_without_duplicates_unpriced_and_unlisted_models() {
    let backend = Backend::vllm(&["z", "a", "free-in", "free-out", "b", "a", "B"]);
    let rig = Rig::with(|setup| {
        setup.backend(backend.toml()).pricing(
            "[pricing.models]\n\
             free-in = { input_per_1m = 0, output_per_1m = 5 }\n\
             free-out = { input_per_1m = 5, output_per_1m = 0 }\n\
             never-listed = { input_per_1m = 5, output_per_1m = 5 }",
        )
    });
    assert_eq!(ids(&rig.session.capabilities), ["B", "a", "b", "z"]);
}

#[test]
fn model_may_have_any_name() {
    let names = ["a \"quoted\" one", "back\\slash", "new\nline", "naïve/模型:🦙", "org/Model-7B_Q4.gguf"];
    let backend = Backend::vllm(&names);
    let rig = Rig::new(&backend);
    for name in names {
        assert!(ids(&rig.session.capabilities).iter().any(|id| id == name), "{name:?} is not offered");
        let id = rig.session.job(name, json!({}));
        let held = backend.next();
        assert_eq!(held.request.json()["model"], name);
        held.finish();
        rig.session.outcome(&id).done();
    }
}

#[test]
fn allow_list_offers_only_what_it_names_and_an_empty_one_nothing() {
    let backend = Backend::vllm(&["a", "b", "c"]);
    for (models, expected) in [("[\"c\", \"a\", \"not-there\"]", &["a", "c"][..]), ("[]", &[]), ("[\"A\"]", &[])] {
        let rig = Rig::with(|setup| setup.backend(format!("{}\nmodels = {models}", backend.toml())));
        assert_eq!(ids(&rig.session.capabilities), expected, "models = {models}");
        let id = rig.session.job("b", json!({}));
        assert_eq!(rig.session.outcome(&id).error(), "model_not_loaded", "models = {models}");
    }
}

#[test]
fn hosted_backend_without_its_key_is_not_offered_and_validate_says_why() {
    let backend = scripted(&[("GET /models", listing(&["hosted"]))]);
    let rig = Rig::with(|setup| {
        setup.backend(format!("kind = \"openrouter\"\nurl = \"{}\"\napi_key_env = \"NOT_SET\"", backend.url()))
    });
    assert_eq!(ids(&rig.session.capabilities), [""; 0]);
    let id = rig.session.job("hosted", json!({}));
    let outcome = rig.session.outcome(&id);
    assert_eq!(outcome.error(), "auth_rejected_by_backend");
    assert!(outcome.message().contains("NOT_SET"), "the message names the variable: {}", outcome.message());
    backend.assert_none(QUIET);
}

#[test]
fn llamacpp_router_offers_only_its_loaded_models() {
    let entry = |status: &str| json!({"id": status, "status": {"value": status}});
    let statuses = ["loaded", "unloaded", "sleeping", "loading", "downloading", "failed"];
    let list = json!({"data": statuses.map(entry)});
    let backend = scripted(&[("GET /health", json!({})), ("GET /v1/models", list)]);
    let rig = Rig::with(|setup| with_kind(setup, "llamacpp", &backend.url()));
    assert_eq!(ids(&rig.session.capabilities), ["loaded", "sleeping"]);
}

/// An endless listing takes bounded memory and does not affect other backends.
#[test]
fn endless_listing_is_given_up() {
    let endless = Backend::new(|request| match request.target.as_str() {
        "/health" => Answer::Json(200, json!({})),
        _ => Answer::Hold,
    });
    let healthy = Backend::vllm(&["m"]);
    let coordinator = Coordinator::new();
    let agent = Setup::new(&coordinator.url()).backend(endless.toml()).backend(healthy.toml()).start();
    let mut held = endless.next();
    held.start_sse();
    let flood = held.flood();
    let session = coordinator.session();
    assert_eq!(ids(&session.capabilities), ["m"]);
    flood.join().expect("the flood to end with its probe");
    assert!(agent.peak_kib() < 64 << 10, "an endless listing took {} KiB of memory", agent.peak_kib());
}

/// Holds every request.
fn hung() -> Backend {
    Backend::new(|_| Answer::Hold)
}

#[test]
fn hung_backend_delays_no_other() {
    let (first, second, healthy) = (hung(), hung(), Backend::vllm(&["m"]));
    let began = Instant::now();
    let rig = Rig::with(|setup| setup.backend(first.toml()).backend(second.toml()).backend(healthy.toml()));
    assert!(began.elapsed() < ms(2500), "the offer of the healthy backend came after {:?}", began.elapsed());
    assert_eq!(ids(&rig.session.capabilities), ["m"]);
    let id = rig.session.job("m", json!({}));
    healthy.next().finish();
    rig.session.outcome(&id).done();

    // It answers late, but within its 3 s: what it has comes in a second offer.
    for list in [json!({}), listing(&["late"])] {
        let mut held = first.next();
        held.send(response(200, "application/json", list.to_string()));
        held.keep();
    }
    assert_eq!(ids(&rig.session.frame("capabilities", SOON)), ["late", "m"]);
}

#[test]
fn probes_run_in_parallel_and_take_at_most_three_seconds() {
    let backends = [hung(), hung(), hung()];
    let began = Instant::now();
    let rig = Rig::with(|setup| backends.iter().fold(setup, |setup, backend| setup.backend(backend.toml())));
    let took = began.elapsed();
    assert!(took > ms(2500) && took < ms(5000), "three hung backends were waited for {took:?}");
    assert_eq!(ids(&rig.session.capabilities), [""; 0]);
}
