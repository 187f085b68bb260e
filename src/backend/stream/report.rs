//! What the JSON of a response says about it: its usage, its end, and its failure.

use serde_json::Value;

use super::usage::Usage;
use crate::backend::{BackendError, BackendResult, truncated_body};

/// How far a response has come.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Progress {
    /// The generation has not ended.
    #[default]
    Open,
    /// The generation has ended, as a `finish_reason` or an error says. Usage may follow.
    Finished,
    /// The end marker has come.
    Done,
}

/// The report of one response.
#[derive(Debug, Default)]
pub struct Report {
    usage: Usage,
    /// Counts from other fields, used only if there is no `usage`.
    fallback: Usage,
    progress: Progress,
    failure: Option<BackendError>,
}

impl Report {
    /// Reads the next event of a stream. `text` is its JSON.
    pub fn read_event(&mut self, event: &Value, text: &[u8]) {
        self.read_usage(event);
        if let Some(message) = error_of(event, text) {
            self.fail(&message);
        }
        self.read_finish_reasons(event);
        self.read_stop_reason(&event["delta"]);
        if event["type"] == "message_stop" {
            self.end();
        }
    }

    /// Reads a response that is one JSON text and has this HTTP status.
    ///
    /// # Errors
    /// The text is not JSON, or contains no answer.
    pub fn of_body(text: &[u8], status: u16) -> BackendResult<Report> {
        let Ok(body) = serde_json::from_slice::<Value>(text) else {
            return Err(BackendError::BadAnswer("its JSON is not complete".into()));
        };
        if !is_answer(&body) {
            let other = [&body["detail"], &body["message"]].into_iter().find_map(Value::as_str);
            return Err(match error_of(&body, text).or(other.map(str::to_owned)) {
                Some(message) => BackendError::from_reported(status, &message),
                None => BackendError::BadAnswer("it is JSON without an answer".into()),
            });
        }
        let mut report = Report::default();
        report.read_usage(&body);
        report.read_finish_reasons(&body);
        report.read_stop_reason(&body);
        Ok(report)
    }

    /// The end marker has come.
    pub fn end(&mut self) {
        self.progress = Progress::Done;
    }

    /// The backend reported an error. Keeps the first message; an `event: error` line before it has none, nor has a
    /// `finish_reason`.
    pub fn fail(&mut self, message: &str) {
        match &self.failure {
            Some(BackendError::ReportedError(earlier)) if !earlier.is_empty() => {}
            _ => self.fail_with(BackendError::ReportedError(truncated_body(message.as_bytes()))),
        }
    }

    fn fail_with(&mut self, failure: BackendError) {
        self.failure = Some(failure);
        self.progress = self.progress.max(Progress::Finished);
    }

    /// How far the response has come.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// The token counts so far.
    pub fn usage(&self) -> Usage {
        self.usage.or(self.fallback)
    }

    /// The output tokens so far.
    pub fn output_tokens(&self) -> u32 {
        self.usage.output.or(self.fallback.output).unwrap_or(0)
    }

    /// The failure, if the response contains one.
    pub fn take_failure(&mut self) -> Option<BackendError> {
        self.failure.take()
    }

    fn read_usage(&mut self, message: &Value) {
        self.usage.merge(&message["usage"]);
        self.usage.merge(&message["message"]["usage"]);
        self.fallback.merge(&message["x_groq"]["usage"]);
        self.fallback.merge_timings(&message["timings"]);
        for choice in choices_of(message) {
            // Moonshot.
            self.fallback.merge(&choice["usage"]);
        }
    }

    /// Reads the `stop_reason` of an Anthropic response.
    fn read_stop_reason(&mut self, message: &Value) {
        if message["stop_reason"].as_str().is_some_and(names_failure) {
            self.fail_for_reason(message);
        }
    }

    /// The response, or one of its choices, says that the generation failed, perhaps without a message.
    fn fail_for_reason(&mut self, choice: &Value) {
        match error_of(choice, b"") {
            Some(message) => self.fail(&message),
            None if self.failure.is_none() => self.fail_with(BackendError::Aborted),
            None => {}
        }
    }

    fn read_finish_reasons(&mut self, message: &Value) {
        for choice in choices_of(message) {
            let reason = &choice["finish_reason"];
            // SGLang's own API sends an object.
            let name = reason.as_str().or_else(|| reason["type"].as_str());
            match name {
                // Some gateways send an empty reason with every delta.
                Some("") => {}
                Some(name) if names_failure(name) => self.fail_for_reason(choice),
                _ if reason.is_null() => {}
                _ => self.progress = self.progress.max(Progress::Finished),
            }
        }
    }
}

/// Whether a `finish_reason` or `stop_reason` says that the generation failed: `abort` (vLLM, SGLang), `error` (Mistral, OpenRouter),
/// `network_error` (Z.ai), `insufficient_system_resource` (DeepSeek).
fn names_failure(reason: &str) -> bool {
    let reason = reason.to_ascii_lowercase();
    ["abort", "error", "insufficient_system_resource"].iter().any(|failure| reason.contains(failure))
}

fn choices_of(message: &Value) -> &[Value] {
    message["choices"].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// The message of the error that an event or a body contains. `text` is its JSON.
fn error_of(message: &Value, text: &[u8]) -> Option<String> {
    let error = [&message["error"], &message["x_groq"]["error"]].into_iter().find(|error| !error.is_null());
    match error {
        Some(error) => Some(error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned)),
        None if message["type"] == "error" || message["object"] == "error" => Some(truncated_body(text)),
        None => None,
    }
}

/// Whether a body contains an answer. An empty list is one only if the body contains no error.
fn is_answer(body: &Value) -> bool {
    let has_error = !body["error"].is_null();
    ["choices", "content"].iter().any(|key| match &body[*key] {
        Value::Null => false,
        Value::Array(parts) => !(has_error && parts.is_empty()),
        _ => true,
    })
}
