//! The page of `status`. The texts come from a file, so each is sanitized before it is printed.

use super::Report;
use crate::backend::summary;
use crate::cli::offer::{OfferRow, table};
use crate::logging::sanitize_for_log as text;
use crate::observe::{Jobs, LastError, LastJob, State, Tokens};
use crate::sys::datetime;
use crate::sys::printable::printable;
use crate::sys::terminal::{Terminal, wrap};

/// Maximum number of models listed by name; an agent may have hundreds.
const MODELS_SHOWN: usize = 20;
/// Width of the labels, in characters.
const LABEL_WIDTH: usize = 15;
/// Printed instead of a figure that does not exist yet.
const NONE_YET: &str = "none yet";

const GREEN: &str = "32";
const YELLOW: &str = "33";

/// Renders the page.
pub fn page(report: &Report, terminal: Terminal) -> String {
    let Report { state, has_file, is_running, notes, .. } = report;
    let mut page = Page { text: String::new(), terminal, now: present(state) };
    headline(&mut page, state, *is_running);
    for note in notes {
        page.advice(&text(note));
    }
    // Backends and figures of an agent that has ended say nothing about the present.
    if *is_running && *has_file {
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
    /// The present in Unix seconds, as [`present`] returns it.
    now: i64,
}

/// The present by the wall clock that showed the dates in the state, which may have been corrected since. Only a state of another
/// version, or of an earlier boot, is compared with the wall clock of this moment.
fn present(state: &State) -> i64 {
    let counted = || {
        let age = i64::try_from(state.age()?.as_secs()).ok()?;
        datetime::parse_rfc3339(&state.written_at)?.checked_add(age)
    };
    counted().unwrap_or_else(datetime::now)
}

impl Page {
    fn line(&mut self, label: &str, text: &str) {
        self.add(&wrap(&format!("{:LABEL_WIDTH$}", format!("  {label}")), text, self.terminal.width));
    }

    /// The time since a date in the state, with no-break spaces; `None` if `date` is not a date.
    fn ago(&self, date: &str) -> Option<String> {
        let passed = self.now - datetime::parse_rfc3339(date)?;
        Some(datetime::format_duration(u64::try_from(passed).unwrap_or(0)).replace(' ', "\u{a0}"))
    }

    fn advice(&mut self, text: &str) {
        self.add(&wrap("  -> ", text, self.terminal.width));
    }

    /// Adds text. Only the page's own colors bypass this function.
    fn add(&mut self, text: &str) {
        self.text += &printable(text);
    }
}

/// Prints the state of the agent, and what the operator can do about it.
fn headline(page: &mut Page, state: &State, is_running: bool) {
    let name = text(&state.state);
    let since =
        state.since.as_deref().and_then(|date| page.ago(date)).map_or_else(String::new, |ago| format!(" for {ago}"));
    let reason = state.reason.as_deref().map_or_else(String::new, |reason| format!(": {}", text(reason)));
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
        "unknown" if is_running => (format!("running, and whether it serves is unknown{reason}"), ""),
        "unknown" => (format!("whether an agent is running is unknown{reason}"), ""),
        "starting" => ("not serving: the agent has just started".to_owned(), ""),
        "stopped" => ("not running: stopped by the operator".to_owned(), "`usepod-agent service start` starts it"),
        "not_running" => {
            let seen = if state.age().is_none() && !state.boot_id.is_empty() {
                " (last seen before the last boot)".to_owned()
            } else {
                page.ago(&state.written_at).map_or_else(String::new, |ago| format!(" (last seen {ago} ago)"))
            };
            (format!("not running{seen}"), "`usepod-agent service status` shows what should start it")
        }
        _ => (format!("not serving: {name}{since}{reason}"), ""),
    };
    let color = if name == "serving" { GREEN } else { YELLOW };
    let what = wrap("", &what, page.terminal.width);
    page.text += &format!("{}\n", page.terminal.styled(color, printable(&what).trim_end()));
    if !advice.is_empty() {
        page.advice(advice);
    }
    if state.paused && name != "paused" {
        page.advice("the agent is also paused: `usepod-agent resume` ends the pause");
    }
}

fn agent(page: &mut Page, state: &State) {
    let up = page.ago(&state.started_at).map_or_else(String::new, |up| format!(", up {up}"));
    let who = state.provider_id.as_deref().map_or_else(|| "not yet enrolled".to_owned(), text);
    page.line("agent", &format!("{}, pid {}{up}, {who}", text(&state.agent_version), state.pid));
    let since = state
        .connection_since
        .as_deref()
        .and_then(|date| page.ago(date))
        .map_or_else(String::new, |ago| format!(" for {ago}"));
    let link = if state.connected { "connected" } else { "not connected" };
    page.line("coordinator", &format!("{}, {link}{since}", text(&state.coordinator)));
}

fn backends(page: &mut Page, state: &State) {
    let mut label = "backends";
    for backend in &state.backends {
        let since = backend
            .since
            .as_deref()
            .and_then(|date| page.ago(date))
            .map_or_else(String::new, |ago| format!(" for {ago}"));
        let condition = match &backend.error {
            _ if backend.offered => format!("healthy{since}, {} model(s)", backend.models.unwrap_or_default()),
            Some(why) => format!("not offered{since}: {}", text(why)),
            None => "not queried yet".to_owned(),
        };
        let last_error = backend.last_error.as_ref().filter(|_| backend.offered);
        let last = last_error
            .and_then(|error| Some(format!("; last error {} ago: {}", page.ago(&error.at)?, text(&error.message))))
            .unwrap_or_default();
        let excluded = backend.not_offered.iter().map(|model| (model.model_id.as_str(), text(&model.reason)));
        let excluded = summary(excluded, backend.listing_limit.as_deref().map(text)).filter(|_| backend.offered);
        let excluded = excluded.map_or_else(String::new, |excluded| format!("; {excluded}"));
        page.line(label, &format!("{}: {condition}{excluded}{last}", text(&backend.id)));
        label = "";
    }
}

fn models(page: &mut Page, state: &State) {
    let models = &state.models;
    if models.is_empty() {
        return page.line("offered", "nothing");
    }
    page.line("offered", &format!("{} model(s), prices in USDC per million tokens", models.len()));
    let shown = &models[..models.len().min(MODELS_SHOWN)];
    let texts: Vec<_> = shown.iter().map(|model| (text(&model.model_id), text(&model.backend))).collect();
    let rows: Vec<OfferRow<'_>> = shown
        .iter()
        .zip(&texts)
        .map(|(model, (model_id, backend))| OfferRow {
            model_id,
            input_per_1m: model.input_per_1m,
            output_per_1m: model.output_per_1m,
            context_window: model.context_window.map(u64::from),
            max_concurrent: model.max_concurrent.into(),
            backend,
        })
        .collect();
    page.add(&table(&rows, 4, page.terminal.width));
    if let Some(more) = models.len().checked_sub(MODELS_SHOWN).filter(|more| *more > 0) {
        page.add(&wrap("    ", &format!("and {more} more: `usepod-agent status --json`"), page.terminal.width));
    }
}

fn jobs(page: &mut Page, state: &State) {
    let Jobs { in_flight, done, failed, cancelled, lost, refused, refused_by_cause } = &state.jobs;
    let causes: Vec<String> =
        refused_by_cause.iter().map(|(cause, count)| format!("{count} {}", text(cause).replace('_', " "))).collect();
    let causes = if causes.is_empty() { String::new() } else { format!(" ({})", causes.join(", ")) };
    if state.jobs == Jobs::default() {
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
    let Tokens { input, output } = state.tokens;
    page.line("tokens", &if input + output == 0 { NONE_YET.into() } else { format!("{input} in, {output} out") });
    let (p50, p95, speed) = (state.p50_latency_ms, state.p95_latency_ms, state.tokens_per_sec_p50);
    let has_speed = speed > 0.0;
    let speed_text = if has_speed { format!(", {speed:.1} tokens/s") } else { String::new() };
    let latency = match (p50 > 0 || p95 > 0 || has_speed, done + failed > 0) {
        (true, _) => format!("p50 {p50} ms, p95 {p95} ms{speed_text} (jobs of the last 5 minutes)"),
        (false, true) => "no job in the last 5 minutes".into(),
        (false, false) => NONE_YET.into(),
    };
    page.line("latency", &latency);
    if let Some(LastJob { at, model_id, outcome, duration_ms }) = &state.last_job
        && let Some(ago) = page.ago(at)
    {
        let model = model_id.as_deref().map(text).unwrap_or_default();
        page.line("last job", &format!("{ago} ago: {model} {}, {duration_ms} ms", text(outcome)));
    }
    if let Some(LastError { at, code, message }) = &state.last_error
        && let Some(ago) = page.ago(at)
    {
        page.line("last error", &format!("{ago} ago: {}: {}", text(code), text(message)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::{Backend, BackendError, Model, NotOffered};

    const PLAIN: Terminal = Terminal { width: 60, is_utf8: false, is_live: false, has_color: false };

    fn shown(state: &State, is_running: bool) -> String {
        page(&Report { state: state.clone(), has_file: true, is_running, ..Report::default() }, PLAIN)
    }

    #[test]
    fn page_says_none_yet_for_missing_figures_and_omits_those_of_a_stopped_agent() {
        let backend = Backend {
            id: "vllm".to_owned(),
            offered: true,
            models: Some(1),
            since: Some("2020-01-01T00:00:00Z".to_owned()),
            ..Backend::default()
        };
        let mut state = State { state: "serving".to_owned(), backends: vec![backend], ..State::default() };
        let fresh = shown(&state, true);
        assert_eq!(fresh.matches("none yet").count(), 3, "{fresh}");
        assert!(!fresh.contains("p50") && fresh.contains("vllm: healthy for"), "{fresh}");
        state.jobs.done = 1;
        assert!(shown(&state, true).contains("latency      no job in the last 5 minutes"));
        state.p95_latency_ms = 7;
        assert!(shown(&state, true).contains("p50 0 ms, p95 7 ms (jobs"));
        state.state = "stopped".to_owned();
        let stopped = shown(&state, false);
        assert!(!stopped.contains("healthy") && !stopped.contains("jobs"), "{stopped}");
    }

    #[test]
    fn page_has_no_escapes_whatever_the_state_file_contains() {
        let hostile = || "\u{1b}[2J".to_owned();
        let at = || "2020-01-01T00:00:00Z".to_owned();
        let backend = Backend { id: hostile(), error: Some(hostile()), ..Backend::default() };
        let healthy = Backend {
            offered: true,
            last_error: Some(BackendError { at: at(), message: hostile() }),
            not_offered: vec![NotOffered { model_id: hostile(), reason: hostile() }],
            listing_limit: Some(hostile()),
            ..Backend::default()
        };
        let state = State {
            state: hostile(),
            since: Some(hostile()),
            reason: Some(hostile()),
            agent_version: hostile(),
            coordinator: hostile(),
            provider_id: Some(hostile()),
            backends: vec![backend, healthy],
            models: vec![Model { model_id: hostile(), backend: hostile(), ..Model::default() }],
            jobs: Jobs { refused_by_cause: [(hostile(), 1)].into(), ..Jobs::default() },
            last_job: Some(LastJob { at: at(), model_id: Some(hostile()), outcome: hostile(), duration_ms: 0 }),
            last_error: Some(LastError { at: at(), code: hostile(), message: hostile() }),
            ..State::default()
        };
        for is_running in [true, false] {
            assert!(!shown(&state, is_running).contains('\u{1b}'));
            shown(&State::default(), is_running);
        }
    }
}
