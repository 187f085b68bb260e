//! The demo's request, and the response that it shows.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::assemble;
use super::job_events::JobEnd;
use super::overhead::{OverheadMeter, Through};
use super::sse::EventSplitter;
use super::{DemoError, Output};

/// Token limit of the response.
pub(super) const RESPONSE_TOKENS_MAX: u32 = 128;

/// Time without a byte after which the possible reason is shown.
const SLOW_HINT_AFTER: Duration = Duration::from_secs(3);

/// Builds a request.
pub(super) fn request(model_id: &str, prompt: &str, tokens_max: u32) -> Value {
    json!({
        "model": model_id,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens_max,
        "stream": true,
        "stream_options": {"include_usage": true},
    })
}

/// Waits for the response, and prints its text as it arrives.
pub(super) fn print(
    meter: &OverheadMeter<'_>,
    through: &mut Through,
    output: &mut Output<'_>,
) -> Result<JobEnd, DemoError> {
    let started = Instant::now();
    let mut splitter = EventSplitter::default();
    let (mut bytes, mut visible, mut hint_due) = (0, false, true);
    let end = meter.receive(through, &mut |chunk| {
        bytes += chunk.len();
        for data in splitter.push(chunk) {
            visible |= show(&data, output);
        }
        if bytes == 0 && started.elapsed() > SLOW_HINT_AFTER && std::mem::take(&mut hint_due) {
            output.line(format_args!("(no response yet: loading a model may take minutes; Ctrl-C cancels)"));
        }
    });
    if end.is_ok() && !visible {
        output.response_text("(a response without text)");
    }
    output.line(format_args!(""));
    end
}

/// Prints the text of an event. Returns whether there was any.
fn show(data: &str, output: &mut Output<'_>) -> bool {
    let Ok(event) = serde_json::from_str::<Value>(data) else { return false };
    let text = assemble::delta_text(&event);
    output.response_text(&text);
    !text.is_empty()
}
