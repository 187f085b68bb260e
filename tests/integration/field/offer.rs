//! Listings and probes of real servers.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use crate::support::*;

/// `model_id` and `context_window` of an offer.
fn windows(offer: &Value) -> Vec<(String, Option<u64>)> {
    let models = offer["models"].as_array().expect("models");
    models.iter().map(|m| (m["model_id"].as_str().expect("an id").to_owned(), m["context_window"].as_u64())).collect()
}

fn ids(offer: &Value) -> Vec<String> {
    windows(offer).into_iter().map(|(id, _)| id).collect()
}

fn toml(kind: &str, backend: &Backend) -> String {
    format!("kind = \"{kind}\"\nurl = \"{}\"", backend.url())
}

/// Answers these requests, `{}` to health checks, and 404 to all others; holds jobs.
fn scripted(answers: &[(&str, Value)]) -> Backend {
    let answers: Vec<_> = answers.iter().map(|(line, answer)| ((*line).to_owned(), answer.clone())).collect();
    Backend::new(move |request| match answers.iter().find(|(line, _)| *line == request.line()) {
        Some((_, answer)) => Answer::Json(200, answer.clone()),
        None if request.line() == "POST /v1/chat/completions" => Answer::Hold,
        None if ["/health", "/api/tags"].contains(&request.target.as_str()) => Answer::Json(200, json!({})),
        None => Answer::Json(404, json!({"error": "not found"})),
    })
}

fn listing(ids: &[&str]) -> Value {
    json!({"object": "list", "data": ids.iter().map(|id| json!({"id": id, "object": "model"})).collect::<Vec<_>>()})
}

fn command(setup: &Setup, words: &[&str]) -> String {
    let words = [words, &["--allow-insecure", "--config", "agent.toml"]].concat();
    let ran = cli(setup.scratch.path(), &words, &[]);
    assert_ne!(ran.code, Some(2), "{ran:?}");
    // A line may be wrapped anywhere.
    ran.stdout.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Starts a round of probes, by a job whose model the server no longer has.
fn start_a_probe(session: &Session, backend: &Backend, model: &str) {
    let id = session.job(model, json!({}));
    let mut held = backend.next();
    held.send(response(404, "application/json", r#"{"error": {"message": "model not found"}}"#));
    held.keep();
    assert_eq!(session.outcome(&id).error(), "model_not_loaded");
}

/// llama-swap starts the model that `/props?model=` names and ignores `autoload=false` (llama-swap PR#886). It answers `/props`
/// without a model with an error, and may pass on the `status` of a llama.cpp behind it.
#[test]
fn probe_of_llama_swap_starts_no_model() {
    let swap = |id: &str| json!({"id": id, "object": "model", "owned_by": "llama-swap"});
    let routed = |id: &str| json!({"id": id, "status": {"value": "loaded"}});
    let window = json!({"default_generation_settings": {"n_ctx": 4096}});
    let router = json!({"role": "router", "default_generation_settings": {"n_ctx": 0}});
    type Case = (Vec<Value>, Option<Value>, Vec<(&'static str, Option<u64>)>, &'static [&'static str]);
    let cases: Vec<Case> = vec![
        (vec![swap("a"), swap("b")], None, vec![("a", None), ("b", None)], &[]),
        (vec![routed("a"), swap("b")], None, vec![("a", None), ("b", None)], &[]),
        (vec![routed("a"), swap("b")], Some(router), vec![("a", Some(4096)), ("b", None)], &["a"]),
        // A gateway whose `/props` is empty, and a server with a single model.
        (vec![swap("a"), swap("b")], Some(json!({})), vec![("a", None), ("b", None)], &[]),
        (vec![json!({"id": "a"})], Some(window.clone()), vec![("a", Some(4096))], &[]),
    ];
    for (entries, props, expected, asked) in cases {
        let list = json!({"object": "list", "data": entries});
        let (answered, window) = (list.clone(), window.clone());
        let backend = Backend::new(move |request| match (request.line().as_str(), &props) {
            ("GET /health", _) => Answer::Json(200, json!({"status": "ok"})),
            ("GET /v1/models", _) => Answer::Json(200, answered.clone()),
            ("GET /props", Some(props)) => Answer::Json(200, props.clone()),
            (line, _) if line.starts_with("GET /props?model=") => Answer::Json(200, window.clone()),
            _ => Answer::Json(400, json!({"error": "missing model"})),
        });
        let rig = Rig::with(|setup| setup.backend(toml("llamacpp", &backend)));
        let expected: Vec<_> = expected.into_iter().map(|(id, window)| (id.to_owned(), window)).collect();
        assert_eq!(windows(&rig.session.capabilities), expected, "{list}");
        let asked: Vec<_> = asked.iter().map(|id| format!("/props?model={id}&autoload=false")).collect();
        let seen = backend.seen();
        let named: Vec<_> = seen.iter().map(|request| &request.target).filter(|it| it.contains("model=")).collect();
        assert_eq!(named, asked.iter().collect::<Vec<_>>(), "{list}");
    }
}

/// The servers of real embedding, reranking, speech and image models list them like chat models
/// (lmstudio-bug-tracker#618, ollama#13556).
#[test]
fn model_that_cannot_chat_is_not_offered_and_validate_and_status_say_why() {
    let show = |capabilities: Value| json!({"capabilities": capabilities, "parameters": "num_ctx 4096"});
    let entries = |entries: Value| ("GET /v1/models", json!({"object": "list", "data": entries}));
    let vllm =
        |id: &str| json!({"id": id, "object": "model", "owned_by": "vllm", "max_model_len": 512, "parent": null});
    let openapi = |paths: &[&str]| {
        let paths: serde_json::Map<_, _> = paths.iter().map(|path| ((*path).to_owned(), json!({"post": {}}))).collect();
        ("GET /openapi.json", json!({"openapi": "3.1.0", "info": {"title": "FastAPI"}, "paths": paths}))
    };
    type Answers = Vec<(&'static str, Value)>;
    type Ids = &'static [&'static str];
    /// The kind, what the server answers, what is offered, what is not, and a word of the reason.
    type Case = (&'static str, Answers, Ids, Ids, &'static str);
    let cases: Vec<Case> = vec![
        (
            "lmstudio",
            vec![
                ("GET /v1/models", listing(&["chat", "text-embedding-nomic"])),
                (
                    "GET /api/v0/models",
                    json!({"data": [{"id": "text-embedding-nomic", "type": "embeddings", "max_context_length": 2048},
                                    {"id": "chat", "type": "vlm", "max_context_length": 4096}]}),
                ),
            ],
            &["chat"],
            &["text-embedding-nomic"],
            "embeddings",
        ),
        (
            "ollama",
            vec![
                ("GET /v1/models", listing(&["nomic-embed-text:latest"])),
                ("POST /api/show", show(json!(["embedding"]))),
            ],
            &[],
            &["nomic-embed-text:latest"],
            "embedding",
        ),
        (
            "ollama",
            vec![("GET /v1/models", listing(&["llava"])), ("POST /api/show", show(json!(["vision", "completion"])))],
            &["llava"],
            &[],
            "",
        ),
        // Before it stated capabilities, an Ollama showed the family of the architecture.
        (
            "ollama",
            vec![
                ("GET /v1/models", listing(&["all-minilm:latest", "llama3:latest"])),
                (
                    "GET /api/tags",
                    json!({"models": [{"name": "all-minilm:latest", "details": {"family": "bert", "families": ["bert"]}},
                                      {"name": "llama3:latest", "details": {"family": "llama", "families": null}}]}),
                ),
                ("POST /api/show", json!({"parameters": "num_ctx 4096"})),
            ],
            &["llama3:latest"],
            &["all-minilm:latest"],
            "bert",
        ),
        (
            "ollama",
            vec![
                ("GET /v1/models", listing(&["bge-m3:latest"])),
                ("GET /api/tags", json!({"models": [{"model": "bge-m3:latest", "capabilities": ["embedding"]}]})),
                ("POST /api/show", json!({})),
            ],
            &[],
            &["bge-m3:latest"],
            "embedding",
        ),
        // An older Ollama states no capabilities.
        ("ollama", vec![("GET /v1/models", listing(&["llava"])), ("POST /api/show", json!({}))], &["llava"], &[], ""),
        // vLLM's pooling models, and a model that transcribes speech.
        (
            "vllm",
            vec![
                entries(json!([vllm("bge-reranker")])),
                openapi(&["/health", "/v1/models", "/pooling", "/rerank", "/score"]),
            ],
            &[],
            &["bge-reranker"],
            "/pooling",
        ),
        (
            "openai",
            vec![entries(json!([vllm("whisper")])), openapi(&["/v1/models", "/v1/audio/transcriptions"])],
            &[],
            &["whisper"],
            "/v1/audio/transcriptions",
        ),
        (
            "vllm",
            vec![entries(json!([vllm("qwen3")])), openapi(&["/v1/chat/completions", "/pooling", "/v1/embeddings"])],
            &["qwen3"],
            &[],
            "",
        ),
        // Behind a proxy, the routes say nothing.
        ("vllm", vec![entries(json!([vllm("qwen3")])), openapi(&["/health", "/{path}"])], &["qwen3"], &[], ""),
        // A llama.cpp router lists the command line of each model.
        (
            "llamacpp",
            vec![entries(json!([
                {"id": "bge", "status": {"value": "loaded", "args": ["llama-server", "--embeddings", "--port", "0"]}},
                {"id": "jina", "status": {"value": "loaded", "args": ["llama-server", "--reranking"]}},
                {"id": "qwen", "status": {"value": "loaded", "args": ["llama-server", "--ctx-size", "16384"]}},
            ]))],
            &["qwen"],
            &["bge", "jina"],
            "--embeddings",
        ),
        // Gateways and other servers state it in the listing, each in its own key.
        (
            "openai",
            vec![entries(json!([
                {"id": "chat-1", "model_type": "LLM", "model_ability": ["chat"]},
                {"id": "chat-2", "categories": ["llm"]},
                {"id": "chat-3", "architecture": {"input_modalities": ["image", "text"], "output_modalities": ["text"]}},
                {"id": "chat-4", "capabilities": {"completion_chat": true, "classification": false}},
                {"id": "chat-5", "task": "image-text-to-text"},
                {"id": "chat-6", "type": "model", "labels": ["vision", "tool-calling"]},
                {"id": "chat-7", "type": {"unexpected": [1]}, "task": null, "capabilities": 7},
                {"id": "other-1", "model_type": "rerank"},
                {"id": "other-2", "categories": ["speech_to_text"]},
                {"id": "other-3", "architecture": {"output_modalities": ["image"]}},
                {"id": "other-4", "capabilities": {"completion_chat": false, "classification": true}},
                {"id": "other-5", "task": "text-to-speech"},
                {"id": "other-6", "labels": ["reranking"]},
                {"id": "other-7", "type": "embedding"},
                {"id": "other-8", "capabilities": ["embed"]},
                {"id": "other-9", "task": "automatic-speech-recognition"},
            ]))],
            &["chat-1", "chat-2", "chat-3", "chat-4", "chat-5", "chat-6", "chat-7"],
            &["other-1", "other-2", "other-3"],
            "text-to-speech",
        ),
    ];
    for (kind, answers, offered, excluded, reason) in cases {
        let backend = scripted(&answers);
        let rig = Rig::with(|setup| setup.backend(toml(kind, &backend)));
        assert_eq!(ids(&rig.session.capabilities), offered, "{kind}: {answers:?}");
        for model in excluded {
            assert_eq!(rig.session.outcome(&rig.session.job(model, json!({}))).error(), "model_not_loaded");
        }
        let state = command(&rig.setup, &["status", "--json"]);
        for text in [command(&rig.setup, &["validate"]), command(&rig.setup, &["status"]), state] {
            for word in excluded.iter().chain([&reason]) {
                assert!(text.contains(word), "no `{word}` in: {text}");
            }
            assert!(offered.is_empty() || !text.contains("not offered: chat"), "{text}");
        }
    }
}

#[test]
fn model_that_cannot_chat_is_not_offered_even_if_models_names_it() {
    let backend = scripted(&[
        ("GET /v1/models", listing(&["nomic-embed-text:latest", "unnamed:latest"])),
        ("POST /api/show", json!({"capabilities": ["embedding"]})),
    ]);
    let models = "models = [\"nomic-embed-text:latest\"]";
    let rig = Rig::with(|setup| setup.backend(format!("{}\n{models}", toml("ollama", &backend))));
    assert_eq!(ids(&rig.session.capabilities), [""; 0]);
    for word in ["validate", "status"] {
        let text = command(&rig.setup, &[word]);
        assert!(text.contains("nomic-embed-text:latest") && text.contains("embedding"), "{text}");
        assert!(!text.contains("unnamed"), "what `models` leaves out needs no explanation: {text}");
    }
}

/// Servers that do not state a model's purpose reject a chat request: vLLM before its routes depended on the model,
/// llama.cpp with `--embeddings`, Ollama, OpenAI.
#[test]
fn model_that_refuses_to_chat_is_withdrawn_unless_it_has_chatted() {
    const VLLM: &str = "The model does not support Chat Completions API";
    let message = |text: &str| json!({"error": {"message": text, "type": "BadRequestError"}});
    let is_refusal = [
        ("vllm", 400, json!({"object": "error", "message": VLLM, "type": "BadRequestError", "code": 400})),
        ("openai", 501, message(VLLM)),
        ("llamacpp", 501, message("This server does not support completions. Start it without `--embeddings`")),
        ("ollama", 400, message("\"m\" does not support chat")),
        (
            "openai",
            404,
            message("This is not a chat model and thus not supported in the v1/chat/completions endpoint."),
        ),
    ];
    side_by_side(is_refusal, |(kind, status, body)| {
        let list = listing(&["m", "other"]);
        let backend = Backend::new(move |request| match request.line().as_str() {
            "GET /v1/models" => Answer::Json(200, list.clone()),
            "POST /v1/chat/completions" if request.json()["model"] == "m" => Answer::Json(status, body.clone()),
            "POST /v1/chat/completions" => Answer::Hold,
            _ => Answer::Json(404, json!({})),
        });
        let rig = Rig::with(|setup| setup.backend(toml(kind, &backend)));
        assert_eq!(ids(&rig.session.capabilities), ["m", "other"], "{kind}");
        let outcome = rig.session.outcome(&rig.session.job("m", json!({})));
        assert_eq!(outcome.error(), "model_not_loaded", "{kind}: {}", outcome.message());
        assert_eq!(ids(&rig.session.frame("capabilities", SOON)), ["other"], "{kind} {status}");
        let status = command(&rig.setup, &["status"]);
        assert!(status.contains("not offered: m (not a chat model"), "{status}");
    });
    // A request that provokes such a text withdraws nothing.
    let quoted = format!("messages.0.content: invalid value `{VLLM}`");
    let backend = Backend::vllm_with(&["m"], move |request| match request.json()["answer"].as_str() {
        Some("quote") => Answer::Json(400, message(&quoted)),
        Some("refuse") => Answer::Json(400, message(VLLM)),
        _ => Answer::Raw(response(200, "text/event-stream", sse(1, 2))),
    });
    let rig = Rig::new(&backend);
    let run = |answer: &str| rig.session.outcome(&rig.session.job("m", json!({"answer": answer})));
    assert_eq!(run("quote").error(), "internal");
    run("chat").done();
    assert_eq!(run("refuse").error(), "model_not_loaded");
    rig.session.assert_no_frame("an offer without a model that has chatted", QUIET, is_offer);
}

/// Ollama lists models that run on ollama.com, on the operator's account, among the local ones.
#[test]
fn cloud_model_of_ollama_is_offered_only_if_models_names_it() {
    let names = ["local:7b", "mine:latest", "shown:latest", "gpt-oss:120b-cloud", "glm-4.6:cloud", "my-cloud:7b"];
    let list = listing(&names);
    let tags = json!({"models": [
        {"name": "local:7b", "model": "local:7b", "digest": "1"},
        {"name": "mine:latest", "model": "mine:latest", "digest": "2", "remote_model": "gpt-oss:120b",
         "remote_host": "https://ollama.com:443"},
    ]});
    let backend = || {
        let (list, tags) = (list.clone(), tags.clone());
        Backend::new(move |request| match request.line().as_str() {
            "GET /api/tags" => Answer::Json(200, tags.clone()),
            "GET /v1/models" => Answer::Json(200, list.clone()),
            "POST /api/show" if request.json()["model"] == "shown:latest" => {
                Answer::Json(200, json!({"remote_host": "https://ollama.com:443", "capabilities": ["completion"]}))
            }
            "POST /api/show" => {
                Answer::Json(200, json!({"capabilities": ["completion"], "parameters": "num_ctx 8192"}))
            }
            "POST /v1/chat/completions" => Answer::Hold,
            _ => Answer::Json(404, json!({})),
        })
    };
    let unnamed = backend();
    let rig = Rig::with(|setup| setup.backend(toml("ollama", &unnamed)));
    assert_eq!(ids(&rig.session.capabilities), ["local:7b", "my-cloud:7b"]);
    for words in [&["validate"][..], &["status"]] {
        let text = command(&rig.setup, words);
        for word in ["mine:latest", "shown:latest", "gpt-oss:120b-cloud", "glm-4.6:cloud", "models"] {
            assert!(text.contains(word), "no `{word}` in: {text}");
        }
    }
    let named = backend();
    let models = "models = [\"local:7b\", \"mine:latest\", \"glm-4.6:cloud\"]";
    let rig = Rig::with(|setup| setup.backend(format!("{}\n{models}", toml("ollama", &named))));
    assert_eq!(ids(&rig.session.capabilities), ["glm-4.6:cloud", "local:7b", "mine:latest"]);
    let id = rig.session.job("mine:latest", json!({}));
    named.next().finish();
    rig.session.outcome(&id).done();
}

/// Servers in Go write an empty list as null, or leave it out.
#[test]
fn null_listing_is_an_empty_one() {
    for list in [json!({"object": "list", "data": null}), json!({"data": null}), json!({"object": "list"}), json!([])] {
        let backend = scripted(&[("GET /v1/models", list.clone())]);
        let rig = Rig::with(|setup| setup.backend(toml("ollama", &backend)));
        assert_eq!(ids(&rig.session.capabilities), [""; 0]);
        let state: Value = serde_json::from_str(&command(&rig.setup, &["status", "--json"])).expect("JSON");
        assert_eq!(
            (&state["state"], &state["backends"][0]["models"]),
            (&json!("no_models"), &json!(0)),
            "{list}: {state}"
        );
    }
}

/// vLLM lists a LoRA adapter with the name of its base model, and without a window.
#[test]
fn lora_adapter_has_the_window_of_its_parent() {
    let backend = scripted(&[(
        "GET /v1/models",
        json!({"data": [
            {"id": "adapter", "root": "/lora", "parent": "base", "max_model_len": null},
            {"id": "base", "root": "org/base", "parent": null, "max_model_len": 8192},
            {"id": "by-root", "parent": "org/base"},
            {"id": "own", "parent": "base", "max_model_len": 1024},
            {"id": "stacked", "parent": "adapter"},
            {"id": "orphan", "parent": "absent"},
            {"id": "circle", "parent": "circle"},
        ]}),
    )]);
    let rig = Rig::new(&backend);
    let expected = [
        ("adapter", Some(8192)),
        ("base", Some(8192)),
        ("by-root", Some(8192)),
        ("circle", None),
        ("orphan", None),
        ("own", Some(1024)),
        ("stacked", Some(8192)),
    ];
    assert_eq!(windows(&rig.session.capabilities), expected.map(|(id, window)| (id.to_owned(), window)));
}

/// At 60 ms per query, sequential queries would not fit into the time of a probe.
#[test]
fn slow_hundred_ollama_models_are_all_learned_and_not_asked_again() {
    let names: Vec<String> = (0..100).map(|n| format!("m-{n:02}:latest")).collect();
    let list = listing(&names.iter().map(String::as_str).collect::<Vec<_>>());
    // From the second listing on, one model is another one.
    let tags = {
        let (names, listed) = (names.clone(), AtomicUsize::new(0));
        move || {
            let listed = listed.fetch_add(1, Ordering::SeqCst);
            let digest = |n: usize| if n == 7 { format!("{n}-{listed}") } else { n.to_string() };
            let model = |(n, name): (usize, &String)| json!({"name": name, "model": name, "digest": digest(n)});
            json!({"models": names.iter().enumerate().map(model).collect::<Vec<_>>()})
        }
    };
    let concurrent = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let seen_at_once = Arc::clone(&concurrent);
    let backend = Backend::new(move |request| match request.line().as_str() {
        "GET /api/tags" => Answer::Json(200, tags()),
        "GET /v1/models" => Answer::Json(200, list.clone()),
        "POST /api/show" => {
            let (now, most) = &*concurrent;
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(ms(60));
            now.fetch_sub(1, Ordering::SeqCst);
            Answer::Json(200, json!({"parameters": "num_ctx 8192", "capabilities": ["completion"]}))
        }
        "POST /v1/chat/completions" => Answer::Hold,
        _ => Answer::Json(200, json!({"models": []})),
    });
    let rig = Rig::with(|setup| setup.backend(toml("ollama", &backend)));
    let expected: Vec<_> = names.iter().map(|name| (name.clone(), Some(8192))).collect();
    assert_eq!(windows(&rig.session.capabilities), expected);
    let asked = || -> Vec<Value> {
        let seen = backend.seen();
        seen.iter().filter(|it| it.line() == "POST /api/show").map(|it| it.json()["model"].clone()).collect()
    };
    assert_eq!(asked().len(), 100);
    let at_once = seen_at_once.1.load(Ordering::SeqCst);
    assert!((2..=8).contains(&at_once), "{at_once} questions at once");

    start_a_probe(&rig.session, &backend, "m-03:latest");
    backend.wait_for("GET /api/ps", 2);
    backend.wait_for("POST /api/show", 101);
    rig.session.assert_no_frame("an offer without a change", QUIET, is_offer);
    assert_eq!(asked().split_off(100), ["m-07:latest"], "only the model that was replaced");
}

/// The models of a listing are looked up by map, and not each in the other listing.
#[test]
fn slow_listing_of_5_mb_keeps_no_other_backend_from_being_probed() {
    let entry = |n| json!({"id": format!("model-{n}"), "object": "model", "type": "llm", "max_context_length": 4096});
    let list = json!({"object": "list", "data": (0..70_000).map(entry).collect::<Vec<_>>()}).to_string();
    assert!(list.len() > 5_000_000, "{} bytes", list.len());
    let list = response(200, "application/json", list);
    let large = Backend::new(move |_| Answer::Raw(list.clone()));
    let listed = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&listed);
    let small = Backend::new(move |request| match request.line().as_str() {
        "GET /v1/models" if count.fetch_add(1, Ordering::SeqCst) > 0 => {
            Answer::Json(200, listing(&["first", "second"]))
        }
        "GET /v1/models" => Answer::Json(200, listing(&["first"])),
        _ if request.method == "GET" => Answer::Json(404, json!({})),
        _ => Answer::Hold,
    });
    let rig = Rig::with(|setup| setup.backend(toml("lmstudio", &large)).backend(toml("openai", &small)));
    let began = Instant::now();
    start_a_probe(&rig.session, &small, "first");
    let has_second = |offer: &Value| ids(offer).iter().any(|id| id == "second");
    if !has_second(&rig.session.capabilities) {
        rig.session.wait("the second model", SOON, |event| match event {
            Event::Frame(frame) if is_offer(frame) && has_second(frame) => Some(()),
            _ => None,
        });
    }
    assert!(began.elapsed() < SOON);
}

/// At most 1000 models and the first MiB of a listing; ids of at most 512 bytes.
#[test]
fn listing_above_the_limits_is_offered_in_part() {
    let id = |n: usize, length: usize| format!("{n:04}-{}", "x".repeat(length - 5));
    let list = |count: usize, length: usize| json!({"data": (0..count).map(|n| json!({"id": id(n, length)})).collect::<Vec<_>>()});
    let cases = [
        (list(1001, 8), 1000, "1000"),
        // About 1440 bytes each.
        (
            json!({"data": (0..3000).map(|n| json!({"id": id(n, 12), "x": "y".repeat(1400)})).collect::<Vec<_>>()}),
            725,
            "1 MiB",
        ),
        (json!({"data": [{"id": id(1, 512)}, {"id": id(2, 513)}, {"id": id(3, 60_000)}]}), 1, "512 bytes"),
    ];
    for (list, expected, limit) in cases {
        let backend = scripted(&[("GET /v1/models", list)]);
        let rig = Rig::new(&backend);
        let offered = ids(&rig.session.capabilities);
        assert!(offered.len().abs_diff(expected) < 30, "{} models instead of {expected}", offered.len());
        assert!(offered.len() <= 1000 && offered.iter().all(|id| id.len() <= 512));
        for words in [&["validate"][..], &["status"]] {
            let text = command(&rig.setup, words);
            assert!(text.contains(limit), "no `{limit}` in: {}", text.chars().take(2000).collect::<String>());
        }
    }
}

/// JSON of many small values takes 60 times its size once parsed.
#[test]
fn slow_memory_of_a_16_mb_listing_is_bounded() {
    let many = |value: &str| value.repeat((16 << 20) / value.len());
    let listings = [
        format!(r#"{{"data":[{{"id":"m","x":[{}0]}}]}}"#, many("[],")),
        format!(r#"{{"data":[{}{{"id":"m"}}]}}"#, many("[],")),
        format!(r#"{{"data":[{}{{"id":"m"}}]}}"#, many("{\"id\":\"\"},")),
        format!(r#"{{{}"data":[{{"id":"m"}}]}}"#, many("\"k\":0,")),
        format!(r#"{{"data":[{{"id":"m",{}"capabilities":[]}}]}}"#, many("\"k\":{},")),
        format!(r#"{{"data":[{{"id":"m","capabilities":[{}""]}}]}}"#, many("\"chat\",")),
    ];
    let kinds = ["lmstudio", "ollama", "llamacpp"];
    for (list, kind) in listings.into_iter().zip(kinds.into_iter().cycle()) {
        let list = response(200, "application/json", list);
        let large = Backend::new(move |_| Answer::Raw(list.clone()));
        let small = Backend::vllm(&["m"]);
        let rig = Rig::with(|setup| setup.backend(toml(kind, &large)).backend(small.toml()));
        assert_eq!(ids(&rig.session.capabilities), ["m"]);
        rig.agent.stderr.wait_line(&[&large.url()]);
        let peak = rig.agent.peak_kib();
        assert!(peak < 40 << 10, "{peak} KiB of memory");
    }
}

/// A response that arrives byte by byte is abandoned with its probe, and the next round is on time.
#[test]
fn slow_probe_that_trickles_keeps_no_other_backend_from_being_probed() {
    let plain: [(&[u8], &[u8]); 5] = [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n{\"data\":[", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 1000000\r\n\r\n", b"x"),
    ];
    let plain = plain.into_iter().map(|(head, piece)| ("http", head, piece));
    // The header of a TLS handshake record of 16 KiB.
    let tls = ("https", &[0x16, 3, 3, 0x40, 0][..], &[0][..]);
    side_by_side(plain.chain([tls]), |(scheme, head, piece)| {
        let trickling = Trickling::new(head, piece);
        let listed = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&listed);
        let small = Backend::new(move |request| match request.line().as_str() {
            "GET /v1/models" if count.fetch_add(1, Ordering::SeqCst) > 0 => Answer::Json(200, listing(&["a", "b"])),
            "GET /v1/models" => Answer::Json(200, listing(&["a"])),
            _ if request.method == "GET" => Answer::Json(404, json!({})),
            _ => Answer::Hold,
        });
        let first = format!("kind = \"lmstudio\"\nurl = \"{scheme}://{}\"", trickling.address);
        let rig = Rig::with(|setup| setup.backend(first).backend(toml("openai", &small)));
        assert_eq!(ids(&rig.session.capabilities), ["a"]);
        start_a_probe(&rig.session, &small, "a");
        assert_eq!(ids(&rig.session.frame("capabilities", SOON)), ["a", "b"], "{scheme} {head:?}");
        rig.agent.stderr.wait_line(&["not offered", &trickling.address.to_string()]);
    });
}

/// Answers each connection with a head, then with a piece every 20 ms.
struct Trickling {
    address: SocketAddr,
    is_over: Arc<AtomicBool>,
}

impl Trickling {
    fn new(head: &'static [u8], piece: &'static [u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let address = listener.local_addr().expect("an address");
        let is_over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&is_over);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let ended = Arc::clone(&ended);
                std::thread::spawn(move || {
                    let _ = stream.write_all(head);
                    while !ended.load(Ordering::SeqCst) && stream.write_all(piece).is_ok() {
                        std::thread::sleep(ms(20));
                    }
                });
            }
        });
        Self { address, is_over }
    }
}

impl Drop for Trickling {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}
