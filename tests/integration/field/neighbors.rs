//! Other users of the machine, and other clients of the demo.

use std::fs;

use serde_json::{Value, json};

use crate::support::*;

/// Clears the screen, colors, reorders and hides: with an escape, as a C1 control, with bidirectional and with zero-width characters.
const HOSTILE: &str = "\u{1b}[2J\u{9b}31m\u{7}\u{202e}\u{2066}\u{61c}\u{200b}\u{200d}\u{feff}\u{2060}\u{e0041}\u{2028}";

/// Nothing in the text makes a terminal do more than show it.
#[track_caller]
fn assert_harmless(what: &str, text: &str) {
    let is_hostile = |c: char| (c.is_control() && c != '\n') || (!c.is_ascii() && HOSTILE.contains(c));
    assert!(!text.contains(is_hostile), "{what}: {text:?}");
}

#[track_caller]
fn assert_harmless_run(what: &str, ran: &Ran) {
    assert_harmless(what, &ran.stdout);
    assert_harmless(what, &ran.stderr);
}

/// The text of an identity file whose provider id is `id`, made by an agent.
fn identity_with(home: &Scratch, config: &str, id: &str) -> String {
    cli(home.path(), &["enroll", "-c", config, "--allow-insecure"], &[]);
    let path = home.join(".usepod-agent/identity.key");
    let text = fs::read_to_string(&path).expect("an identity");
    text.replace("-----END", &format!("provider_id: {id}\n-----END"))
}

#[test]
fn names_that_control_a_terminal_are_shown_escaped_by_every_command() {
    let model = format!("m{HOSTILE}");
    let error = format!("no{HOSTILE}");
    let backend = Backend::vllm_with(&[&model], move |_| {
        let event = json!({"choices": [{"delta": {"content": error}, "finish_reason": "stop"}]});
        Answer::Raw(response(200, "text/event-stream", format!("data: {event}\n\ndata: [DONE]\n\n")))
    });
    let failing = Backend::new(|_| Answer::Raw(response(500, "text/plain", format!("why{HOSTILE}"))));
    let setup = Setup::new("wss://never-dialled.example/").backend(backend.toml()).backend(failing.toml());
    let config = setup.write();
    let config = config.to_str().expect("UTF-8");
    let home = &setup.scratch;
    let identity = identity_with(home, config, &format!("prov{}", HOSTILE.replace(['\u{2028}', '\u{feff}'], "")));
    home.write(".usepod-agent/identity.key", identity);

    let enroll = cli(home.path(), &["enroll", "-c", config], &[]);
    assert!(enroll.stdout.contains("prov\\u{1b}[2J\\u{9b}31m"), "{enroll:?}");
    assert_harmless_run("enroll", &enroll);
    let validate = cli(home.path(), &["validate", "-c", config], &[]);
    assert!(validate.stdout.contains("m\\u{1b}[2J") && validate.stdout.contains("why\\u{1b}[2J"), "{validate:?}");
    assert_harmless_run("validate", &validate);
    let demo = cli(home.path(), &["demo", "--once", "--port=0", "-c", config, "--prompt", HOSTILE], &[]);
    assert!(demo.stdout.contains("m\\u{1b}[2J"), "{demo:?}");
    assert_harmless_run("demo", &demo);
    let doctor = cli(home.path(), &["doctor", "-c", config], &[]);
    assert!(doctor.stdout.contains("m\\u{1b}[2J") && doctor.stdout.contains("prov\\u{1b}"), "{doctor:?}");
    assert_harmless_run("doctor", &doctor);
    // Errors, and what they quote of the command line and of the file.
    let missing = format!("/nowhere/{HOSTILE}");
    let file = home.write("bad.toml", setup.toml().replace("500_000", &format!("\"{HOSTILE}\"")));
    for arguments in [
        &["validate", "-c", &missing][..],
        &["validate", "-c", file.to_str().expect("UTF-8")],
        &["run", HOSTILE],
        &["demo", &format!("--{HOSTILE}")],
    ] {
        let ran = cli(home.path(), arguments, &[]);
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert_harmless_run("an error", &ran);
    }
}

#[test]
fn coordinator_text_that_controls_a_terminal_is_shown_escaped_by_setup_and_status_and_in_the_log() {
    let hostile = |what: &str| format!("{what}{HOSTILE}");
    let issued = json!({"pair_code": hostile("CODE"), "poll_token": "poll-token-0123456789", "expires_at": "soon"});
    let model = json!({"model_id": hostile("m"), "input_per_1m": 1, "output_per_1m": 1, "max_concurrent": 1});
    let active = json!({"status": "active", "host_token": hostile("token-0123456789"), "provider_id": hostile("prov"),
                        "model_config": [model]});
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let server = Backend::new(move |request| match request.target.as_str() {
        "/v1/host/pair/issue" => Answer::Json(200, issued.clone()),
        _ if asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 => {
            Answer::Json(500, json!({"error": {"message": format!("busy{HOSTILE}")}}))
        }
        _ => Answer::Json(200, active.clone()),
    });
    let home = Scratch::new();
    let setup = cli_within(secs(30), home.path(), &["setup", "--coordinator", &server.url()], &[]);
    for word in ["CODE\\u{1b}", "prov\\u{1b}", "busy\\u{1b}", "m\\u{1b}"] {
        assert!(setup.stdout.contains(word), "no {word} in {setup:?}");
    }
    assert_harmless_run("setup", &setup);

    let backend = Backend::vllm(&[&hostile("m")]);
    let coordinator = Coordinator::new();
    let setup = Setup::new(&coordinator.url()).backend(backend.toml());
    let agent = setup.start();
    let session = coordinator.accept().authenticate(Some(&hostile("prov")));
    session.send(&json!({"type": hostile("type")}));
    session.send_text(&hostile("no JSON"));
    session.close(1008, &hostile("reason"));
    agent.stderr.wait_line(&["reason"]);
    let session = coordinator.session();
    let config = setup.write();
    let config = ["-c", config.to_str().expect("UTF-8")];
    let status = cli(setup.scratch.path(), &[&["status"], &config[..]].concat(), &[]);
    assert!(status.stdout.contains("m\\u{1b}[2J"), "{status:?}");
    assert_harmless_run("status", &status);
    let status = cli(setup.scratch.path(), &[&["status", "--json"], &config[..]].concat(), &[]);
    assert_harmless_run("status --json", &status);
    let state: Value = serde_json::from_str(&status.stdout).expect("JSON");
    assert_eq!(state["models"][0]["model_id"], hostile("m"), "programs get the name as it is");
    assert_harmless("the log", &agent.stderr.text());
    drop(session);
}
