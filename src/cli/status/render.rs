//! The page of `status`. The state is read key by key, because the agent that wrote it may be older or newer.

use serde_json::Value;

use crate::cli::offer::{OfferRow, table};
use crate::logging::sanitize_for_log;
use crate::sys::datetime;
use crate::sys::terminal::{Terminal, wrap};

/// Models that are listed by name; an agent may have hundreds.
const MODELS_SHOWN: usize = 20;
/// Characters before the text of a line.
const LABEL_WIDTH: usize = 15;
/// In the place of a figure that does not exist yet.
const NONE_YET: &str = "none yet";

const GREEN: &str = "32";
const YELLOW: &str = "33";

/// Renders the page.
pub fn page(state: &Value, terminal: Terminal) -> String {
    let mut page = Page { text: String::new(), terminal };
    headline(&mut page, state);
    // What the last agent saw of its backends and did says nothing about now.
    if state["running"] == true {
        agent(&mut page, state);
        backends(&mut page, state);
        models(&mut page, state);
        jobs(&mut page, state);
    }
    page.text
}

struct Page {
    text: String,
    terminal: Terminal,
}

impl Page {
    fn line(&mut self, label: &str, text: &str) {
        self.text += &wrap(&format!("{:LABEL_WIDTH$}", format!("  {label}")), text, self.terminal.width);
    }

    fn advice(&mut self, text: &str) {
        self.text += &wrap("  -> ", text, self.terminal.width);
    }
}

/// What the agent does, and what the operator can do about it.
fn headline(page: &mut Page, state: &Value) {
    let name = text(&state["state"]);
    let since = ago(&state["since"]).map_or_else(String::new, |ago| format!(" for {ago}"));
    let reason = match text(&state["reason"]) {
        reason if reason.is_empty() => reason,
        reason => format!(": {reason}"),
    };
    let (what, advice) = match name.as_str() {
        "serving" => (format!("serving{since}"), ""),
        "connecting" => (
            format!("not serving: connecting to the coordinator{since}{reason}"),
            "the agent keeps trying; `usepod-agent doctor` checks each step of the connection",
        ),
        "rejected" => (
            format!("not serving: rejected by the coordinator{since}{reason}"),
            "`usepod-agent enroll` prints the identity of this agent; `usepod-agent setup` pairs it",
        ),
        "no_healthy_backend" => (
            format!("not serving: no healthy backend{since}{reason}"),
            "models are offered as soon as a backend answers; `usepod-agent doctor` says what is wrong with each backend",
        ),
        "no_models" => (
            format!("not serving: no model to offer{since}{reason}"),
            "`usepod-agent validate` prints what each backend lists, and the prices",
        ),
        "paused" => (format!("not serving: paused by the operator{since}"), "`usepod-agent resume` ends the pause"),
        "draining" => (format!("not serving: draining{since}{reason}"), ""),
        "throttled" => (
            format!("not serving: throttled by the token limit{since}{reason}"),
            "jobs are refused until the last minute's tokens are below `[limits] max_tokens_per_minute`",
        ),
        "hung" => (
            format!("not serving: hung{reason}"),
            "`usepod-agent service restart` replaces it; cron does so within a minute",
        ),
        "unknown" => (format!("running, and whether it serves is unknown{reason}"), ""),
        "starting" => ("not serving: the agent has just started".to_owned(), ""),
        "stopped" => ("not running: stopped by the operator".to_owned(), "`usepod-agent service start` starts it"),
        "not_running" => {
            let seen = ago(&state["written_at"]).map_or_else(String::new, |ago| format!(" (last seen {ago} ago)"));
            (format!("not running{seen}"), "`usepod-agent service status` shows what should start it")
        }
        _ => (format!("not serving: {name}{since}{reason}"), ""),
    };
    let color = if name == "serving" { GREEN } else { YELLOW };
    let what = wrap("", &what, page.terminal.width);
    page.text += &format!("{}\n", page.terminal.styled(color, what.trim_end()));
    if !advice.is_empty() {
        page.advice(advice);
    }
    if state["paused"] == true && name != "paused" {
        page.advice("the agent is also paused: `usepod-agent resume` ends the pause");
    }
}

fn agent(page: &mut Page, state: &Value) {
    let up = ago(&state["started_at"]).map_or_else(String::new, |up| format!(", up {up}"));
    let who = match text(&state["provider_id"]) {
        id if id.is_empty() => "not yet enrolled".to_owned(),
        id => id,
    };
    page.line("agent", &format!("{}, pid {}{up}, {who}", text(&state["agent_version"]), state["pid"]));
    let since = ago(&state["connection_since"]).map_or_else(String::new, |ago| format!(" for {ago}"));
    let link = if state["connected"] == true { "connected" } else { "not connected" };
    page.line("coordinator", &format!("{}, {link}{since}", text(&state["coordinator"])));
}

fn backends(page: &mut Page, state: &Value) {
    let mut label = "backends";
    for backend in list(&state["backends"]) {
        let since = ago(&backend["since"]).map_or_else(String::new, |ago| format!(" for {ago}"));
        let condition = match (backend["offered"] == true, backend["error"].as_str()) {
            (true, _) => format!("healthy{since}, {} model(s)", backend["models"]),
            (false, Some(why)) => format!("not offered{since}: {}", sanitize_for_log(why)),
            (false, None) => "not queried yet".to_owned(),
        };
        let last_error = &backend["last_error"];
        let last = match (backend["offered"] == true, ago(&last_error["at"])) {
            (true, Some(ago)) => format!("; last error {ago} ago: {}", text(&last_error["message"])),
            _ => String::new(),
        };
        page.line(label, &format!("{}: {condition}{last}", text(&backend["id"])));
        label = "";
    }
}

fn models(page: &mut Page, state: &Value) {
    let models = list(&state["models"]);
    if models.is_empty() {
        return page.line("offered", "nothing");
    }
    page.line("offered", &format!("{} model(s), prices in USDC per million tokens", models.len()));
    let shown = &models[..models.len().min(MODELS_SHOWN)];
    let texts: Vec<_> = shown.iter().map(|model| (text(&model["model_id"]), text(&model["backend"]))).collect();
    let rows: Vec<OfferRow<'_>> = shown
        .iter()
        .zip(&texts)
        .map(|(model, (model_id, backend))| OfferRow {
            model_id,
            input_per_1m: model["input_per_1m"].as_u64().unwrap_or_default(),
            output_per_1m: model["output_per_1m"].as_u64().unwrap_or_default(),
            context_window: model["context_window"].as_u64(),
            max_concurrent: model["max_concurrent"].as_u64().unwrap_or_default(),
            backend,
        })
        .collect();
    page.text += &table(&rows, 4, page.terminal.width);
    if let Some(more) = models.len().checked_sub(MODELS_SHOWN).filter(|more| *more > 0) {
        page.text += &wrap("    ", &format!("and {more} more: `usepod-agent status --json`"), page.terminal.width);
    }
}

fn jobs(page: &mut Page, state: &Value) {
    let jobs = &state["jobs"];
    let causes = jobs["refused_by_cause"].as_object();
    let causes: Vec<String> = causes
        .into_iter()
        .flatten()
        .map(|(cause, count)| format!("{count} {}", sanitize_for_log(cause).replace('_', " ")))
        .collect();
    let causes = if causes.is_empty() { String::new() } else { format!(" ({})", causes.join(", ")) };
    let is_zero = |figures: &[&Value]| figures.iter().all(|figure| figure.as_f64().unwrap_or_default() == 0.0);
    let counts = ["in_flight", "done", "failed", "cancelled", "lost", "refused"].map(|key| &jobs[key]);
    let [in_flight, done, failed, cancelled, lost, refused] = counts;
    if is_zero(&counts) {
        page.line("jobs", NONE_YET);
    } else {
        page.line(
            "jobs",
            &format!(
                "{in_flight} in flight, {done} done, {failed} failed, {cancelled} cancelled, {lost} lost on disconnect, \
                 {refused} refused{causes}"
            ),
        );
    }
    let (input, output) = (&state["tokens"]["input"], &state["tokens"]["output"]);
    page.line("tokens", &if is_zero(&[input, output]) { NONE_YET.into() } else { format!("{input} in, {output} out") });
    let (p50, p95, speed) = (&state["p50_latency_ms"], &state["p95_latency_ms"], &state["tokens_per_sec_p50"]);
    let speed_text =
        if is_zero(&[speed]) { String::new() } else { format!(", {:.1} tokens/s", speed.as_f64().unwrap_or_default()) };
    let latency = match (is_zero(&[p50, p95, speed]), is_zero(&[done, failed])) {
        (true, true) => NONE_YET.into(),
        (true, false) => "no job in the last 5 minutes".into(),
        (false, _) => format!("p50 {p50} ms, p95 {p95} ms{speed_text} (jobs of the last 5 minutes)"),
    };
    page.line("latency", &latency);
    let last = &state["last_job"];
    if let Some(ago) = ago(&last["at"]) {
        let (model, outcome) = (text(&last["model_id"]), text(&last["outcome"]));
        page.line("last job", &format!("{ago} ago: {model} {outcome}, {} ms", last["duration_ms"]));
    }
    let last = &state["last_error"];
    if let Some(ago) = ago(&last["at"]) {
        page.line("last error", &format!("{ago} ago: {}: {}", text(&last["code"]), text(&last["message"])));
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A string without control characters; empty if it is none.
fn text(value: &Value) -> String {
    value.as_str().map(sanitize_for_log).unwrap_or_default()
}

/// The time since a date, with no-break spaces; `None` if it is no date.
fn ago(date: &Value) -> Option<String> {
    let passed = datetime::now() - datetime::parse_rfc3339(date.as_str()?)?;
    Some(datetime::format_duration(u64::try_from(passed).unwrap_or(0)).replace(' ', "\u{a0}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Terminal = Terminal { width: 60, is_utf8: false, is_live: false, has_color: false };

    #[test]
    fn a_figure_that_does_not_exist_yet_is_none_and_a_stopped_agent_has_no_figures() {
        let jobs = serde_json::json!({"in_flight": 0, "done": 0, "failed": 0, "cancelled": 0, "lost": 0, "refused": 0});
        let mut state = serde_json::json!({
            "running": true, "state": "serving", "jobs": jobs, "tokens": {"input": 0, "output": 0},
            "p50_latency_ms": 0, "p95_latency_ms": 0, "tokens_per_sec_p50": 0,
            "backends": [{"id": "vllm", "offered": true, "models": 1, "since": "2020-01-01T00:00:00Z"}],
        });
        let fresh = page(&state, PLAIN);
        assert_eq!(fresh.matches("none yet").count(), 3, "{fresh}");
        assert!(!fresh.contains("p50") && fresh.contains("vllm: healthy for "), "{fresh}");
        state["jobs"]["done"] = 1.into();
        assert!(page(&state, PLAIN).contains("latency      no job in the last 5 minutes"));
        state["p95_latency_ms"] = 7.into();
        assert!(page(&state, PLAIN).contains("p50 0 ms, p95 7 ms (jobs"));
        (state["running"], state["state"]) = (false.into(), "stopped".into());
        let stopped = page(&state, PLAIN);
        assert!(!stopped.contains("healthy") && !stopped.contains("jobs"), "{stopped}");
    }

    #[test]
    fn any_state_makes_a_page_without_escapes_or_a_panic() {
        let hostile = serde_json::json!({
            "running": true, "state": "\u{1b}[2J", "since": 7, "backends": [1, {"id": "\u{1b}]0;x"}], "models": [null],
            "jobs": {"refused_by_cause": {"\u{1b}": 1}}, "last_job": {}, "last_error": {"message": "a\nb"},
        });
        for state in [hostile, Value::Null, serde_json::json!([]), serde_json::json!({"running": true})] {
            assert!(!page(&state, PLAIN).contains('\u{1b}'));
        }
    }
}
