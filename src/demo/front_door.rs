//! The front door: an OpenAI- and Anthropic-compatible API in front of the local coordinator, as a customer of the market would use.
//!
//! Invariants: a streaming client receives the bytes of the backend unchanged. If a job fails after its first byte, an error event is
//! appended, so that the client notices the truncated stream. A client that disconnects, even before the first byte, cancels its job.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use uuid::Uuid;

use super::agent_protocol::OfferedModel;
use super::assemble;
use super::coordinator::{Coordinator, CoordinatorError, Format, Job, JobOrder};
use super::job_events::JobEvent;
use crate::http_server::HttpServer;
use crate::http_server::connection::{Exchange, percent_decoded};

/// Time limit of a request; a model that has to be loaded may take minutes.
const JOB_DEADLINE: Duration = Duration::from_secs(600);

/// Interval of checks whether the client is still connected.
const CLIENT_POLL: Duration = Duration::from_millis(100);

/// Limit of a response that is assembled for a non-streaming client, in bytes.
const RESPONSE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Serves the front door on this socket, until the server is dropped.
pub(super) fn start(listener: TcpListener, coordinator: Arc<Coordinator>) -> io::Result<HttpServer> {
    let handle = move |exchange: &mut Exchange<'_>| handle(&coordinator, exchange);
    HttpServer::start(listener, "demo-door", Arc::new(handle))
}

/// An error response.
struct ErrorResponse {
    status: u16,
    code: String,
    message: String,
}

impl ErrorResponse {
    fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        Self { status, code: code.to_owned(), message: message.into() }
    }

    fn from_job(code: String, message: String) -> Self {
        let status = backend_status(&code, &message).unwrap_or_else(|| status_of(&code));
        Self { status, code, message }
    }

    /// One body for both formats: OpenAI's clients read `error`, Anthropic's read `type` as well.
    fn body(&self) -> Value {
        let kind = if self.status < 500 { "invalid_request_error" } else { "api_error" };
        let error = json!({"message": self.message, "type": kind, "param": null, "code": self.code});
        json!({"type": "error", "error": error})
    }
}

impl From<CoordinatorError> for ErrorResponse {
    fn from(error: CoordinatorError) -> Self {
        let status = match error {
            CoordinatorError::NoAgent | CoordinatorError::NoOffer(..) => 503,
            CoordinatorError::Send(_) => 502,
            CoordinatorError::Start(_) => 500,
        };
        Self::new(status, "no_agent", error.to_string())
    }
}

/// The HTTP status for an error code of the protocol.
fn status_of(code: &str) -> u16 {
    match code {
        "model_not_loaded" => 404,
        "out_of_capacity" => 429,
        "backend_unreachable" | "auth_rejected_by_backend" => 502,
        "backend_timeout" => 504,
        _ => 500, // `internal`, and codes of newer agents
    }
}

/// The status with which the backend rejected the request, as the agent's message quotes it: clients retry a 500, but not a 400.
fn backend_status(code: &str, message: &str) -> Option<u16> {
    const QUOTES: [&str; 2] = ["the backend rejected the request: HTTP ", "the backend failed: HTTP "];
    let quoted = QUOTES.iter().find_map(|quote| message.strip_prefix(quote)).filter(|_| code == "internal")?;
    let digits = quoted.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok().filter(|status| (400..600).contains(status))
}

fn handle(coordinator: &Coordinator, exchange: &mut Exchange<'_>) {
    if let Err(error) = route(coordinator, exchange) {
        respond_error(exchange, &error);
    }
}

fn route(coordinator: &Coordinator, exchange: &mut Exchange<'_>) -> Result<(), ErrorResponse> {
    match (exchange.method(), exchange.path()) {
        ("GET", "/health") => health(coordinator, exchange),
        ("GET", "/v1/models") => exchange.respond_json(200, &listing(&offered(coordinator))),
        ("POST", "/v1/chat/completions") => return complete(coordinator, exchange, Format::Openai),
        ("POST", "/v1/messages") => return complete(coordinator, exchange, Format::Anthropic),
        (_, path @ ("/health" | "/v1/models" | "/v1/chat/completions" | "/v1/messages")) => {
            let message = format!("`{path}` does not support this method");
            return Err(ErrorResponse::new(405, "method_not_allowed", message));
        }
        (_, path) => match path.strip_prefix("/v1/models/").map(percent_decoded) {
            Some(model_id) => exchange.respond_json(200, &one_model(coordinator, &model_id)?),
            None => return Err(ErrorResponse::new(404, "not_found", format!("no such path: `{path}`"))),
        },
    }
    Ok(())
}

fn offered(coordinator: &Coordinator) -> Vec<OfferedModel> {
    coordinator.offer().map(|offer| offer.models).unwrap_or_default()
}

fn health(coordinator: &Coordinator, exchange: &mut Exchange<'_>) {
    match coordinator.offer() {
        Some(offer) => exchange.respond_json(200, &json!({"status": "ok", "models": offer.models.len()})),
        None => exchange.respond_json(503, &json!({"status": "no agent"})),
    }
}

fn listing(models: &[OfferedModel]) -> Value {
    json!({"object": "list", "data": models.iter().map(listed).collect::<Vec<_>>()})
}

fn listed(model: &OfferedModel) -> Value {
    let mut entry = json!({"id": model.model_id, "object": "model", "created": 0, "owned_by": model.backend});
    if let Some(tokens) = model.context_window {
        entry["context_length"] = tokens.into();
    }
    entry
}

fn one_model(coordinator: &Coordinator, model_id: &str) -> Result<Value, ErrorResponse> {
    let not_found = || ErrorResponse::new(404, "model_not_found", format!("no model `{model_id}` is offered"));
    offered(coordinator).iter().find(|model| model.model_id == model_id).map(listed).ok_or_else(not_found)
}

fn respond_error(exchange: &mut Exchange<'_>, error: &ErrorResponse) {
    exchange.respond_json(error.status, &error.body());
}

/// The keys of a request that matter here. The request itself is passed on byte for byte.
#[derive(Deserialize)]
struct RequestKeys<'a> {
    model: String,
    #[serde(borrow, rename = "stream")]
    is_streamed: Option<&'a RawValue>,
}

fn complete(coordinator: &Coordinator, exchange: &mut Exchange<'_>, format: Format) -> Result<(), ErrorResponse> {
    let invalid = |status, message: &str| ErrorResponse::new(status, "invalid_body", message);
    let body = exchange.read_body().map_err(|bad| invalid(bad.status, &bad.message))?;
    let request: Box<RawValue> =
        serde_json::from_slice(&body).map_err(|error| invalid(400, &format!("the body is not JSON: {error}")))?;
    if !request.get().starts_with('{') {
        return Err(invalid(400, "the body is not a JSON object"));
    }
    let Ok(RequestKeys { model: model_id, is_streamed }) = serde_json::from_str(request.get()) else {
        return Err(invalid(400, "the body has no string `model`; GET /v1/models lists them"));
    };
    let is_streamed = is_streamed.is_some_and(|is_streamed| is_streamed.get() == "true");
    // Jobs for models that are not offered are also sent, to show that the agent rejects them.
    let order = JobOrder { job_id: Uuid::new_v4(), model_id, request, format, deadline: JOB_DEADLINE };
    let mut job = coordinator.submit(order)?;
    let served = if is_streamed { stream(exchange, &mut job, format) } else { whole(exchange, &mut job, format) };
    if let Err(error) = served {
        job.cancel();
        log::info!("an HTTP client disconnected before the end of its response; its job is cancelled: {error}");
    }
    Ok(())
}

/// The events of a job, as long as its client is connected, which is checked every [`CLIENT_POLL`], however fast events come.
struct Events<'a> {
    job: &'a mut Job,
    checked_at: Instant,
}

impl<'a> Events<'a> {
    fn of(job: &'a mut Job) -> Self {
        Self { job, checked_at: Instant::now() }
    }

    /// Waits for the next event; `None` after the end. Fails if the client has disconnected.
    fn next(&mut self, client_has_disconnected: impl Fn() -> bool) -> io::Result<Option<JobEvent>> {
        while !self.job.has_ended() {
            let event = self.job.wait(CLIENT_POLL);
            if self.checked_at.elapsed() >= CLIENT_POLL {
                if client_has_disconnected() {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
                self.checked_at = Instant::now();
            }
            if event.is_some() {
                return Ok(event);
            }
        }
        Ok(None)
    }
}

/// Relays the chunks as they arrive. Fails if the client has disconnected.
fn stream(exchange: &mut Exchange<'_>, job: &mut Job, format: Format) -> io::Result<()> {
    let mut events = Events::of(job);
    let first = match events.next(|| exchange.client_has_disconnected())? {
        Some(JobEvent::Chunk(bytes)) => bytes,
        Some(JobEvent::Failed { code, message }) => {
            respond_error(exchange, &ErrorResponse::from_job(code, message));
            return Ok(());
        }
        Some(JobEvent::Done(_)) | None => Vec::new(),
    };
    let content_type = match first.trim_ascii_start().first() {
        Some(b'{') => "application/json", // a proxy in front of the backend did not stream
        _ => "text/event-stream",
    };
    let mut body = exchange.stream(content_type)?;
    body.send(&first)?;
    let mut ended_clean = first.is_empty() || first.ends_with(b"\n\n");
    while let Some(event) = events.next(|| body.client_has_disconnected())? {
        match event {
            JobEvent::Chunk(bytes) => {
                body.send(&bytes)?;
                ended_clean = bytes.ends_with(b"\n\n");
            }
            JobEvent::Done(_) => {}
            JobEvent::Failed { code, message } => {
                body.send(&failure_event(&ErrorResponse::from_job(code, message), format, ended_clean))?;
            }
        }
    }
    body.finish()
}

/// An error event, which clients recognize even if the stream was truncated within a line.
fn failure_event(error: &ErrorResponse, format: Format, ended_clean: bool) -> Vec<u8> {
    let separator = if ended_clean { "" } else { "\n\n" };
    let name = match format {
        Format::Openai => "",
        Format::Anthropic => "event: error\n",
    };
    format!("{separator}{name}data: {}\n\n", error.body()).into_bytes()
}

/// Collects the stream, and responds with one document. Fails if the client has disconnected.
fn whole(exchange: &mut Exchange<'_>, job: &mut Job, format: Format) -> io::Result<()> {
    match collected(exchange, job)?.and_then(|bytes| assembled(&bytes, format)) {
        Ok(document) => exchange.respond_json(200, &document),
        Err(error) => respond_error(exchange, &error),
    }
    Ok(())
}

fn collected(exchange: &Exchange<'_>, job: &mut Job) -> io::Result<Result<Vec<u8>, ErrorResponse>> {
    let mut bytes = Vec::new();
    let mut events = Events::of(job);
    while let Some(event) = events.next(|| exchange.client_has_disconnected())? {
        match event {
            JobEvent::Chunk(chunk) if bytes.len() + chunk.len() > RESPONSE_BYTES_MAX => {
                events.job.cancel();
                let message = "the response is too long for one document; request it with `stream`";
                return Ok(Err(ErrorResponse::new(502, "answer_too_long", message)));
            }
            JobEvent::Chunk(chunk) => bytes.extend_from_slice(&chunk),
            JobEvent::Done(_) => {}
            JobEvent::Failed { code, message } => return Ok(Err(ErrorResponse::from_job(code, message))),
        }
    }
    Ok(Ok(bytes))
}

fn assembled(stream: &[u8], format: Format) -> Result<Value, ErrorResponse> {
    let document = match format {
        Format::Openai => assemble::openai_completion(stream),
        Format::Anthropic => assemble::anthropic_message(stream),
    };
    document.map_err(|error| ErrorResponse::new(502, "bad_answer", error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_of_every_error_code() {
        let expected = [
            ("model_not_loaded", 404),
            ("out_of_capacity", 429),
            ("backend_unreachable", 502),
            ("auth_rejected_by_backend", 502),
            ("backend_timeout", 504),
            ("internal", 500),
            ("something_new", 500),
        ];
        for (code, status) in expected {
            assert_eq!(status_of(code), status, "{code}");
        }
    }

    #[test]
    fn backend_status_is_that_of_a_rejected_request_only() {
        for (code, message, status) in [
            ("internal", "the backend rejected the request: HTTP 422: too long", Some(422)),
            ("internal", "the backend failed: HTTP 529", Some(529)),
            ("internal", "the backend rejected the request: HTTP 4000", None),
            ("internal", "the stream was truncated: HTTP 400", None),
            ("auth_rejected_by_backend", "the backend rejected the request: HTTP 401", None),
        ] {
            assert_eq!(backend_status(code, message), status, "{message}");
        }
    }

    #[test]
    fn failure_event_is_separated_from_a_truncated_line() {
        let error = ErrorResponse::new(500, "internal", "cut");
        let event = String::from_utf8(failure_event(&error, Format::Openai, false)).unwrap();
        assert!(event.starts_with("\n\ndata: {") && event.ends_with("}\n\n"), "{event}");
        let event = String::from_utf8(failure_event(&error, Format::Anthropic, true)).unwrap();
        assert!(event.starts_with("event: error\ndata: {"), "{event}");
    }

    #[test]
    fn listing_has_the_context_length_only_if_known() {
        let mut model = OfferedModel {
            model_id: "m".to_owned(),
            backend: "vllm".to_owned(),
            context_window: None,
            max_concurrent: 1,
        };
        let plain = r#"{"object":"list","data":[{"id":"m","object":"model","created":0,"owned_by":"vllm"}]}"#;
        assert_eq!(listing(&[model.clone()]).to_string(), plain);
        model.context_window = Some(4096);
        assert!(listing(&[model]).to_string().contains(r#""vllm","context_length":4096}"#));
    }
}
