//! How probes affect the offer during a session.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::support::*;

/// Starts a round of probes, by a job whose model is missing.
fn start_a_probe(rig: &Rig, backend: &Backend, model: &str) {
    let id = rig.session.job(model, json!({}));
    let mut held = backend.next();
    held.send(response(404, "text/plain", "no such model"));
    held.keep();
    assert_eq!(rig.session.outcome(&id).error(), "model_not_loaded");
}

#[test]
fn slow_probe_without_an_answer_ends_the_offer_only_the_second_time() {
    let hangs = Arc::new(AtomicBool::new(false));
    let is_hanging = Arc::clone(&hangs);
    let backend = Backend::new(move |request| match request.line().as_str() {
        "POST /v1/chat/completions" => Answer::Hold,
        _ if is_hanging.load(Ordering::SeqCst) => Answer::Hold,
        _ => Answer::Json(200, json!({"data": [{"id": "m"}]})),
    });
    let rig = Rig::new(&backend);
    hangs.store(true, Ordering::SeqCst);
    start_a_probe(&rig, &backend, "m");
    let mut first = backend.next();
    assert_eq!(first.request.method, "GET");
    first.wait_hang_up();
    rig.session.assert_no_frame("another offer after one probe", QUIET, is_offer);
    let id = rig.session.job("m", json!({}));
    backend.next().finish();
    rig.session.outcome(&id).done();

    let mut second = backend.next();
    assert_eq!(second.request.method, "GET");
    second.wait_hang_up();
    assert_eq!(rig.session.frame("capabilities", SOON)["models"], json!([]));

    hangs.store(false, Ordering::SeqCst);
    let back = rig.session.frame("capabilities", SOON);
    assert_eq!(back["models"][0]["model_id"], "m", "{back}");
}

#[test]
fn context_window_that_cannot_be_probed_in_time_stays_unchanged() {
    let hangs = Arc::new(AtomicBool::new(false));
    let is_hanging = Arc::clone(&hangs);
    let list = json!({"data": [{"id": "a"}, {"id": "b"}, {"id": "c"}]});
    let backend = Backend::new(move |request| match request.line().as_str() {
        "GET /v1/models" => Answer::Json(200, list.clone()),
        "POST /api/show" if !is_hanging.load(Ordering::SeqCst) => {
            Answer::Json(200, json!({"parameters": "num_ctx 8192"}))
        }
        "POST /api/show" | "POST /v1/chat/completions" => Answer::Hold,
        _ => Answer::Json(200, json!({"models": []})),
    });
    let rig = Rig::with(|setup| setup.backend(format!("kind = \"ollama\"\nurl = \"{}\"", backend.url())));
    let windows = |offer: &Value| {
        let models = offer["models"].as_array().expect("models");
        models.iter().map(|model| model["context_window"].as_u64()).collect::<Vec<_>>()
    };
    assert_eq!(windows(&rig.session.capabilities), [Some(8192); 3], "{}", rig.session.capabilities);

    hangs.store(true, Ordering::SeqCst);
    start_a_probe(&rig, &backend, "a");
    let mut held = backend.next();
    assert_eq!(held.request.line(), "POST /api/show");
    held.wait_hang_up();
    rig.session.assert_no_frame("an offer without the windows", QUIET, is_offer);
    let asked = backend.seen().iter().filter(|request| request.line() == "POST /api/show").count();
    assert_eq!(asked, 4, "once the time of a probe is over, nothing more is asked");
}

#[test]
fn slow_listing_of_100_000_models_is_offered_in_part_within_the_handshake() {
    let data: Vec<_> = (0..100_000).map(|n| json!({"id": format!("model-{n}")})).collect();
    let list = response(200, "application/json", json!({"data": data}).to_string());
    let backend = Backend::new(move |request| match request.line().as_str() {
        "GET /health" => Answer::Json(200, json!({})),
        "GET /v1/models" => Answer::Raw(list.clone()),
        _ => Answer::Hold,
    });
    // The handshake, which includes the first offer, has 10 s.
    let rig = Rig::new(&backend);
    let offered = rig.session.capabilities["models"].as_array().map_or(0, Vec::len);
    assert!((1000..10_000).contains(&offered), "{offered} models of 100 000");
    let id = rig.session.job("model-7", json!({}));
    backend.next().finish();
    rig.session.outcome(&id).done();
}
