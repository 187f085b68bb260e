//! What the demo asks, and the answer that it shows.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::agent_protocol::JobEnd;
use super::assemble;
use super::overhead::{OverheadMeter, Through};
use super::sse::EventSplitter;
use super::{DemoError, Output};

/// The longest answer that the demo shows.
pub(super) const ANSWER_TOKENS_MAX: u32 = 128;

/// After so long without a byte the operator is told why that may be.
const PATIENCE: Duration = Duration::from_secs(3);

/// A request of the demo.
pub(super) fn request(model_id: &str, prompt: &str, tokens_max: u32) -> Value {
    json!({
        "model": model_id,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens_max,
        "stream": true,
        "stream_options": {"include_usage": true},
    })
}

/// Waits for the answer and prints its text as it comes.
pub(super) fn print(
    meter: &OverheadMeter<'_>,
    through: &mut Through,
    page: &mut Output<'_>,
) -> Result<JobEnd, DemoError> {
    let asked_at = Instant::now();
    let mut splitter = EventSplitter::default();
    let (mut bytes, mut visible, mut patient) = (0, false, true);
    let end = meter.receive(through, &mut |chunk| {
        bytes += chunk.len();
        splitter.push(chunk, |data| visible |= show(data, page));
        if bytes == 0 && asked_at.elapsed() > PATIENCE && std::mem::take(&mut patient) {
            page.line(format_args!("(nothing yet: a model that is not loaded may take minutes; Ctrl-C gives up)"));
        }
    });
    if end.is_ok() && !visible {
        page.answer("(an answer without text)");
    }
    page.line(format_args!(""));
    end
}

/// Prints what an event adds to the answer; whether it was anything.
fn show(data: &str, page: &mut Output<'_>) -> bool {
    let Ok(event) = serde_json::from_str::<Value>(data) else { return false };
    let text = assemble::delta_text(&event);
    page.answer(&text);
    !text.is_empty()
}
