//! The state of an agent, for people. It is read as it comes, key by key: the agent that wrote it may be older or newer.

use std::fmt::Write as _;

use serde_json::Value;

use crate::cli::format_usdc;
use crate::logging::sanitize_for_log;
use crate::sys::datetime;

/// Models that are listed by name; an agent may have hundreds.
const MODELS_SHOWN: usize = 20;

/// The page.
pub fn of(state: &Value) -> String {
    let mut page = String::new();
    headline(&mut page, state);
    if state["running"] == true {
        agent(&mut page, state);
    }
    backends(&mut page, state);
    if state["running"] == true {
        models(&mut page, state);
        jobs(&mut page, state);
    }
    page
}

/// What it is, and what to do about it.
fn headline(page: &mut String, state: &Value) {
    let name = text(&state["state"]);
    let since = ago(&state["since"]).map_or_else(String::new, |ago| format!(", for {ago}"));
    let reason = match text(&state["reason"]) {
        reason if reason.is_empty() => reason,
        reason => format!(": {reason}"),
    };
    let (what, advice) = match name.as_str() {
        "serving" => (format!("serving{since}"), ""),
        "connecting" => (
            format!("not serving: connecting to the coordinator{since}{reason}"),
            "it tries again by itself; `usepod-agent doctor` looks at each step of the way",
        ),
        "rejected" => (
            format!("not serving: rejected by the coordinator{since}{reason}"),
            "`usepod-agent enroll` shows who this agent says it is; pair it with `usepod-agent setup`",
        ),
        "no_healthy_backend" => (
            format!("not serving: no healthy backend{since}{reason}"),
            "it is offered as soon as a backend answers; `usepod-agent doctor` says what is wrong with each",
        ),
        "no_models" => (
            format!("not serving: no model to offer{since}{reason}"),
            "`usepod-agent validate` shows what each backend lists, and at which prices",
        ),
        "paused" => (format!("not serving: paused by the operator{since}"), "`usepod-agent resume` ends it"),
        "draining" => (format!("not serving: draining{since}{reason}"), ""),
        "throttled" => (
            format!("not serving: throttled by the token limit{since}{reason}"),
            "jobs are refused until the minute has room; `[limits] max_tokens_per_minute` sets it",
        ),
        "hung" => (
            format!("not serving: hung{reason}"),
            "`usepod-agent service restart`; under cron it is replaced by itself",
        ),
        "unknown" => (format!("running, and whether it serves is unknown{reason}"), ""),
        "starting" => ("not serving: it has just started".to_owned(), ""),
        "stopped" => {
            ("not running: stopped by the operator".to_owned(), "`usepod-agent service start` starts it again")
        }
        "not_running" => {
            let seen = ago(&state["written_at"]).map_or_else(String::new, |ago| format!(" (last seen {ago} ago)"));
            (format!("not running{seen}"), "`usepod-agent service status` shows who should start it")
        }
        _ => (format!("not serving: {name}{since}{reason}"), ""),
    };
    let _ = writeln!(page, "{what}");
    if !advice.is_empty() {
        let _ = writeln!(page, "  -> {advice}");
    }
    if state["paused"] == true && name != "paused" {
        let _ = writeln!(page, "  -> it is paused too: `usepod-agent resume` ends it");
    }
}

fn agent(page: &mut String, state: &Value) {
    let up = ago(&state["started_at"]).map_or_else(String::new, |up| format!(", up {up}"));
    let who = match text(&state["provider_id"]) {
        id if id.is_empty() => "not yet enrolled".to_owned(),
        id => id,
    };
    let _ = writeln!(page, "  agent        {}, pid {}{up}, {who}", text(&state["agent_version"]), state["pid"]);
    let since = ago(&state["connection_since"]).unwrap_or_default();
    let link = if state["connected"] == true { "connected" } else { "not connected" };
    let _ = writeln!(page, "  coordinator  {}, {link} for {since}", text(&state["coordinator"]));
}

fn backends(page: &mut String, state: &Value) {
    let mut label = "backends";
    for backend in list(&state["backends"]) {
        let since = ago(&backend["since"]).map_or_else(String::new, |ago| format!(" for {ago}"));
        let condition = match (backend["offered"] == true, backend["error"].as_str()) {
            (true, _) => format!("healthy{since}, {} model(s)", backend["models"]),
            (false, Some(why)) => format!("not offered{since}: {}", sanitize_for_log(why)),
            (false, None) => "not asked yet".to_owned(),
        };
        let last_error = &backend["last_error"];
        let last = match (backend["offered"] == true, ago(&last_error["at"])) {
            (true, Some(ago)) => format!("; last error {ago} ago: {}", text(&last_error["message"])),
            _ => String::new(),
        };
        let _ = writeln!(page, "  {label:<12} {}: {condition}{last}", text(&backend["id"]));
        label = "";
    }
}

fn models(page: &mut String, state: &Value) {
    let models = list(&state["models"]);
    let _ = writeln!(page, "  offered      {} model(s), USDC per million tokens", models.len());
    let width = models.iter().take(MODELS_SHOWN).map(|model| text(&model["model_id"]).chars().count()).max();
    for model in models.iter().take(MODELS_SHOWN) {
        let price = |key: &str| format_usdc(model[key].as_u64().unwrap_or_default());
        let window = model["context_window"].as_u64().map_or_else(|| "unknown".to_owned(), |tokens| tokens.to_string());
        let _ = writeln!(
            page,
            "               {:width$}  input {}  output {}  context {window}  up to {} at a time  {}",
            text(&model["model_id"]),
            price("input_per_1m"),
            price("output_per_1m"),
            model["max_concurrent"],
            text(&model["backend"]),
            width = width.unwrap_or_default(),
        );
    }
    if let Some(more) = models.len().checked_sub(MODELS_SHOWN).filter(|more| *more > 0) {
        let _ = writeln!(page, "               and {more} more: `usepod-agent status --json`");
    }
}

fn jobs(page: &mut String, state: &Value) {
    let jobs = &state["jobs"];
    let causes = jobs["refused_by_cause"].as_object();
    let causes: Vec<String> = causes
        .into_iter()
        .flatten()
        .map(|(cause, count)| format!("{count} {}", sanitize_for_log(cause).replace('_', " ")))
        .collect();
    let causes = if causes.is_empty() { String::new() } else { format!(" ({})", causes.join(", ")) };
    let _ = writeln!(
        page,
        "  jobs         {} in flight, {} done, {} failed, {} cancelled, {} lost with a session, {} refused{causes}",
        jobs["in_flight"], jobs["done"], jobs["failed"], jobs["cancelled"], jobs["lost"], jobs["refused"],
    );
    let _ = writeln!(page, "  tokens       {} in, {} out", state["tokens"]["input"], state["tokens"]["output"]);
    let _ = writeln!(
        page,
        "  latency      p50 {} ms, p95 {} ms, {} tokens/s (jobs of the last 5 minutes)",
        state["p50_latency_ms"], state["p95_latency_ms"], state["tokens_per_sec_p50"],
    );
    let last = &state["last_job"];
    if let Some(ago) = ago(&last["at"]) {
        let (model, outcome) = (text(&last["model_id"]), text(&last["outcome"]));
        let _ = writeln!(page, "  last job     {ago} ago: {model} {outcome}, {} ms", last["duration_ms"]);
    }
    let last = &state["last_error"];
    if let Some(ago) = ago(&last["at"]) {
        let _ = writeln!(page, "  last error   {ago} ago: {}: {}", text(&last["code"]), text(&last["message"]));
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A string, fit for a terminal.
fn text(value: &Value) -> String {
    value.as_str().map(sanitize_for_log).unwrap_or_default()
}

/// How long ago a date was; nothing for what is none, or still to come.
fn ago(date: &Value) -> Option<String> {
    let passed = datetime::now() - datetime::parse_rfc3339(date.as_str()?)?;
    Some(datetime::format_duration(u64::try_from(passed).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_state_makes_a_page_without_escapes_or_a_panic() {
        let hostile = serde_json::json!({
            "running": true, "state": "\u{1b}[2J", "since": 7, "backends": [1, {"id": "\u{1b}]0;x"}], "models": [null],
            "jobs": {"refused_by_cause": {"\u{1b}": 1}}, "last_job": {}, "last_error": {"message": "a\nb"},
        });
        for state in [hostile, Value::Null, serde_json::json!([]), serde_json::json!({"running": true})] {
            assert!(!of(&state).contains('\u{1b}'));
        }
    }
}
