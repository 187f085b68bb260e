//! Error responses of a backend: their status and text, complete or not.

use serde_json::json;

use crate::support::*;

/// Like a web server with a limit for bodies: the response comes first, and the rest of the request is never read.
#[test]
fn slow_early_413_is_read_although_the_connection_breaks() {
    let backend = Backend::vllm_with(&["m"], |_| Answer::RawThenClose(response(413, "text/plain", "over the limit")));
    backend.leave_unread(usize::MAX);
    let rig = Rig::new(&backend);
    let picture = "x".repeat(20_000_000);
    let id = uuid::Uuid::new_v4().to_string();
    // As text, as building so large a value takes an unoptimized test too long.
    rig.session.send_text(&job(&id, "m", json!({"picture": "PICTURE"})).to_string().replace("PICTURE", &picture));
    let outcome = rig.session.outcome(&id);
    assert_eq!((outcome.error(), outcome.chunks.len()), ("internal", 0), "{}", outcome.end);
    assert!(outcome.message().contains("413"), "{}", outcome.message());
    assert!(outcome.message().contains("over the limit"), "{}", outcome.message());
}

/// A backend with this key gives these answers; neither frames nor the log may show the start of the key.
fn assert_kept(key: &str, answers: Vec<Vec<u8>>) {
    let backend = Backend::vllm(&["m"]);
    let rig =
        Rig::with(|setup| setup.backend(format!("{}\napi_key_env = \"THE_KEY\"", backend.toml())).env("THE_KEY", key));
    for answer in answers {
        let id = rig.session.job("m", json!({}));
        let mut held = backend.next();
        held.send(answer);
        held.keep();
        let outcome = rig.session.outcome(&id);
        assert!(["auth_rejected_by_backend", "internal"].contains(&outcome.error()), "{}", outcome.end);
        assert!(!outcome.message().contains(&key[..10]), "a key of {} bytes: {}", key.len(), outcome.end);
        assert!(outcome.message().len() < 600, "{}", outcome.message());
    }
    assert!(!rig.agent.stderr.text().contains(&key[..10]), "the key is in the log, which is at level debug");
}

#[test]
fn key_that_the_backend_repeats_is_not_passed_on() {
    let key = format!("sk-{}", "0123456789".repeat(10));
    let text = |text: String| response(401, "text/plain", text);
    let answers = vec![
        response(401, "application/json", json!({"error": {"message": format!("bad key Bearer {key}")}}).to_string()),
        text(format!("{key} is no key, and {key} neither")),
        text([&"x".repeat(450), key.as_str()].concat()),
        text([&"x".repeat(2000), key.as_str()].concat()),
        response(500, "text/plain", &key),
    ];
    assert_kept(&key, answers);
}

/// Only the beginning of an answer is read, which may cut the key; the part is as secret as the whole.
#[test]
fn key_fragment_that_the_backend_repeats_is_not_passed_on() {
    let key = format!("sk-{}", "0123456789".repeat(10));
    assert_kept(&key, vec![response(401, "text/plain", key.repeat(40))]);
    // Tokens with claims can be this long.
    let key = format!("sk-{}", "0123456789".repeat(300));
    assert_kept(&key, vec![response(401, "text/plain", format!("bad key Bearer {key}"))]);
}

#[test]
fn key_that_the_backend_repeats_is_not_printed_by_validate() {
    let key = format!("sk-{}", "0123456789".repeat(4));
    let answer = response(401, "text/plain", format!("bad key Bearer {key}"));
    let backend = Backend::new(move |_| Answer::Raw(answer.clone()));
    let setup = Setup::new("ws://127.0.0.1:1/").backend(format!("{}\napi_key_env = \"THE_KEY\"", backend.toml()));
    let config = setup.write();
    let arguments = ["validate", "--allow-insecure", "--config", config.to_str().expect("UTF-8")];
    let ran = cli(setup.scratch.path(), &arguments, &[("THE_KEY", &key)]);
    for text in [ran.stdout, ran.stderr] {
        assert!(!text.contains(&key[..10]), "the key was printed: {text}");
    }
}

#[test]
fn truncated_error_body_still_gives_the_cause() {
    let cut = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n\
               {\"error\":{\"message\":\"Loading model\",";
    let backend = Backend::vllm_with(&["m"], move |_| Answer::RawThenClose(cut.into()));
    let rig = Rig::new(&backend);
    let id = rig.session.job("m", json!({}));
    let outcome = rig.session.outcome(&id);
    assert_eq!(outcome.error(), "model_not_loaded", "{}", outcome.end);
    assert!(outcome.message().contains("Loading model"), "{}", outcome.message());
}
