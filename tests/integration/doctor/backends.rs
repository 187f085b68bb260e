//! The layers of the backends.

use serde_json::json;

use super::*;

#[test]
fn backend_faults_are_reported_by_their_cause() {
    let loading = || server(|r| (r.target == "/health").then(|| Answer::Json(503, json!({"error": "Loading model"}))));
    let failing = || server(|r| (r.method == "POST").then(|| Answer::Json(500, json!({"error": "out of memory"}))));
    let refusing = || server(|r| (r.target == "/v1/models").then(|| Answer::Json(401, json!({"error": "no key"}))));
    let empty = || server(|r| (r.target == "/v1/models").then(|| Answer::Json(200, json!({"data": []}))));
    let garbage = || server(|r| (r.target == "/health").then(|| Answer::RawThenClose(b"220 smtp\r\n".to_vec())));
    let fine = || server(|_| None);
    let cases: [(Backend, &str, &str, &str, &str, &str); 9] = [
        (loading(), "llamacpp", "", "health", "loading its model", "wait"),
        (garbage(), "vllm", "", "health", "HTTP", "correct `url`"),
        (refusing(), "llamacpp", "", "models", "rejected the API key", "api_key_env"),
        (empty(), "ollama", "", "models", "lists 0 model", "ollama pull"),
        (failing(), "vllm", "", "completion", "out of memory", "log"),
        (fine(), "vllm", "models = [\"m\", \"N\"]", "models", "model unknown: the server does not list `N`", "\"n\""),
        (fine(), "vllm", "models = [\"other-model\"]\n#", "models", "other-model", "it lists: m, n"),
        (fine(), "vllm", "models = []", "models", "none of them to offer", "remove `models`"),
        (fine(), "vllm", "api_key_env = \"NO_SUCH_KEY\"", "key", "NO_SUCH_KEY", "export NO_SUCH_KEY="),
    ];
    let coordinator = coordinator(Some(0));
    side_by_side(cases, |(backend, kind, more, layer, words, fix)| {
        let toml = format!("kind = \"{kind}\"\nurl = \"{}\"\n{more}", backend.url());
        let report = Report::by(&setup(&coordinator.url()).backend(toml), &[]);
        let (_, printed_fix) = report.line('✗', layer, &[words]);
        assert!(printed_fix.contains(fix), "no `{fix}` for {layer}:\n{}", report.text);
        assert_eq!(report.code, Some(1));
        assert!(report.text.lines().last().is_some_and(|verdict| verdict.contains(&format!("begin with {layer}: "))));
    });
}

#[test]
fn models_that_are_not_offered_are_reported_with_the_reason() {
    let server = |chat: bool| {
        server(move |request| {
            let embeddings = json!({"id": "e", "type": "embeddings"});
            let all = if chat { json!([{"id": "m"}, embeddings]) } else { json!([embeddings]) };
            (request.target == "/v1/models").then(|| Answer::Json(200, json!({"data": all})))
        })
    };
    let coordinator = coordinator(Some(0));
    side_by_side([true, false], |chat| {
        let backend = server(chat);
        let toml = format!("kind = \"lmstudio\"\nurl = \"{}\"", backend.url());
        let report = Report::by(&setup(&coordinator.url()).backend(toml), &["--no-inference"]);
        let mark = if chat { '-' } else { '✗' };
        report.line(mark, "models", &["not offered: e (not a chat model: embeddings)"]);
        if chat { report.assert_well() } else { report.assert_only_broken("models", &["lists 1"], "lms load") }
    });
}

#[test]
fn backend_that_is_down_is_reported_with_its_address_and_start_command() {
    let coordinator = coordinator(Some(0));
    let cases =
        [("vllm", "vllm serve"), ("llamacpp", "llama-server"), ("lmstudio", "lms server"), ("ollama", "ollama serve")];
    side_by_side(cases, |(kind, start)| {
        let nobody = nobody_at("127.0.0.74");
        let toml = format!("kind = \"{kind}\"\nurl = \"http://{nobody}\"");
        let report = Report::by(&setup(&coordinator.url()).backend(toml), &[]);
        report.assert_only_broken("health", &["refused"], start);
        assert!(report.text.contains(&format!("backend {kind} at http://{nobody}")), "{}", report.text);
        report.assert_skipped(&["models", "completion"]);
    });
}

#[test]
fn backend_that_dies_of_a_cancel_is_broken() {
    let is_dead = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let dies = is_dead.clone();
    let backend = server(move |request| {
        let is_long = request.method == "POST" && request.json()["max_tokens"] != 1;
        if is_long {
            dies.store(true, std::sync::atomic::Ordering::SeqCst);
        } else if dies.load(std::sync::atomic::Ordering::SeqCst) {
            return Some(Answer::Json(500, json!({"error": "CUDA error"})));
        }
        None
    });
    let coordinator = coordinator(Some(0));
    let report = Report::by(&setup(&coordinator.url()).backend(backend.toml()), &[]);
    report.assert_only_broken("cancel", &["cancelled job", "CUDA error"], "log");
    report.assert_passed(&["completion"]);
}

#[test]
fn context_window_is_that_of_the_loaded_model_and_an_unloaded_model_is_a_warning() {
    let ollama = server(|request| {
        let ps = json!({"models": [{"name": "n", "context_length": 4096}]});
        (request.target == "/api/ps").then(|| Answer::Json(200, ps))
    });
    let lmstudio = server(|request| {
        let models = json!({"data": [{"id": "m", "state": "not-loaded", "max_context_length": 9},
            {"id": "n", "state": "loaded", "loaded_context_length": 2048}]});
        (request.target == "/api/v0/models").then(|| Answer::Json(200, models))
    });
    let router = server(|request| {
        let models =
            json!({"data": [{"id": "m", "status": {"value": "unloaded"}}, {"id": "n", "status": {"value": "loaded"}}]});
        let props = json!({"default_generation_settings": {"n_ctx": 512}});
        match request.target.as_str() {
            "/v1/models" => Some(Answer::Json(200, models)),
            target if target.starts_with("/props?model=n") => Some(Answer::Json(200, props)),
            _ => None,
        }
    });
    let coordinator = coordinator(Some(0));
    let cases = [
        (ollama, "ollama", "m unknown, n 4096", "first job", "ollama run"),
        (lmstudio, "lmstudio", "m 9, n 2048", "first job", "lms load"),
        (router, "llamacpp", "n 512", "not offered", "load it"),
    ];
    side_by_side(cases, |(backend, kind, windows, words, fix)| {
        let toml = format!("kind = \"{kind}\"\nurl = \"{}\"", backend.url());
        let report = Report::by(&setup(&coordinator.url()).backend(toml), &[]);
        report.assert_well();
        report.line('✓', "window", &[windows]);
        let (_, printed_fix) = report.line('!', "loaded", &[words, ": m"]);
        assert!(printed_fix.contains(fix), "{}", report.text);
        // The test completion uses the loaded model.
        report.line('✓', "completion", &["n: first byte"]);
    });
}

#[test]
fn price_of_0_is_a_warning() {
    let (coordinator, backend) = (coordinator(Some(0)), server(|_| None));
    let setup = setup(&coordinator.url()).backend(backend.toml());
    let setup = setup.pricing("[pricing.models]\nn = { input_per_1m = 0, output_per_1m = 1 }");
    let report = Report::by(&setup, &["--no-inference"]);
    report.assert_well();
    report.line('!', "prices", &["not offered: n"]);
    report.line('✓', "models", &["lists 2, 1 to offer: m"]);
}

#[test]
fn hosted_backend_gets_no_test_completion() {
    let (coordinator, backend) = (coordinator(Some(0)), server(|_| None));
    let toml = format!("kind = \"openrouter\"\nurl = \"{}/v1\"\napi_key_env = \"THE_KEY\"", backend.url());
    let setup = setup(&coordinator.url()).backend(toml).env("THE_KEY", "sk-secret-123");
    let report = Report::by(&setup, &[]);
    report.assert_well();
    report.line('-', "completion", &["costs money"]);
    report.line('✓', "key", &["`THE_KEY`"]);
    assert_eq!(backend.posts(), 0);
}
