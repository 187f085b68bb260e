//! The cause that an unsuccessful HTTP response indicates, based on the responses of real servers and gateways.
//!
//! Some statuses suffice. For the others the text decides, because servers agree on words more than on statuses: Ollama and a
//! llama.cpp router answer 500 if they cannot load a model, LM Studio 400, vLLM 404.

use serde_json::Value;

use super::error::{BackendError, HttpStatus, truncated_body};

/// The statuses from 520 are those of Cloudflare: it cannot reach the server, or not in time. 408 is a gateway's timeout.
const GATEWAY_STATUSES: [u16; 14] = [408, 502, 504, 520, 521, 522, 523, 524, 525, 526, 527, 530, 598, 599];

/// 402: the account of a hosted server is out of credit. 529: Anthropic, NVIDIA.
const OVERLOADED_STATUSES: [u16; 4] = [402, 429, 509, 529];

/// Texts, in lower case. Each entry lists words that must all occur.
type Texts = &'static [&'static [&'static str]];

/// The model cannot be loaded, or was unloaded.
const LOAD_FAILED: Texts = &[
    &["failed to load model"],
    &["failed to load the model"],
    &["model failed to load"],
    &["model name=", "failed to load"],
    &["error loading model"],
    &["error loading the model"],
    &["unable to load model"],
    &["unable to load the model"],
    &["could not load model"],
    &["could not load the model"],
    &["cannot load model"],
    &["model is unloaded"],
    &["model unloaded"],
    &["model was unloaded"],
    &["model has crashed"],
    &["insufficient system resources"],
    &["requires more system memory"],
    &["llama runner process"],
];

/// The model is being loaded.
const LOADING: Texts =
    &[&["loading model"], &["loading the model"], &["model is loading"], &["currently loading"], &["still loading"]];

/// The server does not have the model.
const MODEL_MISSING: Texts = &[
    &["no models loaded"],
    &["no model loaded"],
    &["no model is loaded"],
    &["model is not loaded"],
    &["model_not_found"],
    &["model", "not found"],
    &["model", "does not exist"],
];

/// The server has no capacity for another request.
const OVERLOADED: Texts = &[
    &["overloaded"],
    &["server busy"],
    &["server is busy"],
    &["at capacity"],
    &["too many requests"],
    &["too many concurrent"],
    &["queue is full"],
    &["no slot available"],
];

/// A gateway has no server to pass the request to, or cannot reach it. Texts of smg and the routers of SGLang and vLLM (written with
/// `reqwest`), llama.cpp's router, LiteLLM, Envoy, and proxies written in Go and JavaScript.
const UNREACHABLE: Texts = &[
    &["connection refused"],
    &["econnrefused"],
    &["no healthy"],
    &["upstream connect error"],
    &["no_available_workers"],
    &["no available workers"],
    &["no available servers"],
    &["no workers are"],
    &["error sending request"],
    &["upstream_connection_failed"],
    &["proxy error"],
    &["could not establish connection"],
    &["apiconnectionerror"],
    &["connection error"],
    &["fetch failed"],
];

/// The server rejects the request, although the status is a 5xx. llama.cpp does so for a picture for a text model, messages or tools
/// of the wrong type, an unknown `reasoning_format`, and `/v1/messages` without messages; transformers for a bad temperature.
const REQUEST_REJECTED: Texts = &[
    &["is not supported"],
    &["are not supported"],
    &["does not support"],
    &["unsupported"],
    &["failed to parse"],
    &["is required"],
    &["missing required"],
    &["unknown reasoning"],
    &["unknown tool"],
    &["cannot use"],
    &["must alternate"],
    &["must be a"],
    &["has to be"],
    &["exceeds", "context"],
    &["json.exception"],
    &["validation error"],
    &["invalid request"],
    &["invalid_request_error"],
    &["badrequesterror"],
];

/// The length of the beginning of a 5xx response that is searched for these texts, in bytes. The rest may quote the request, and a
/// customer must not be able to blame a failure on the backend.
const BLAME_MAX: usize = 160;

/// The server does not know the path of the request.
const ROUTE_MISSING: Texts = &[
    &["unexpected endpoint or method"],
    &["unknown endpoint"],
    &["invalid url ("],
    &["unknown request url"],
    &["unrecognized request url"],
    &["cannot post /"],
    &["route post", "not found"],
    &["no route matched"],
    &["requested url was not found"],
    &["endpoint", "does not exist"],
    &["route", "could not be found"],
];

/// The paths of jobs. A 404 that names one, and no model, is about the path.
const JOB_PATHS: [&str; 2] = ["/messages", "/chat/completions"];

/// The beginnings of messages that say that the model cannot chat. Only the beginning is compared: the rest may quote the request.
const CANNOT_CHAT: [&str; 5] = [
    "the model does not support chat completions",
    "the model does not support the chat completions",
    "this server does not support completions",
    "this server does not support chat completions",
    "this is not a chat model",
];

/// The words of messages that say only that the path or the method is unknown.
const BARE_WORDS: &str = "404 405 501 http error unknown no such this the requested page file resource endpoint route path url method \
    does was could be not found exist allowed implemented supported on server";

impl BackendError {
    /// The cause that an unsuccessful HTTP response indicates.
    pub fn from_status(status: u16, body: &[u8]) -> BackendError {
        let response = HttpStatus { status, body: truncated_body(body) };
        let text = response.body.to_ascii_lowercase();
        let says = |texts| contains_any(&text, texts);
        let beginning = String::from_utf8_lossy(&text.as_bytes()[..text.len().min(BLAME_MAX)]);
        let blames = |texts| contains_any(&beginning, texts);
        // Most texts with these statuses are about the request, and quote it.
        let means = |texts| if matches!(status, 400 | 422) { blames(texts) } else { says(texts) };
        match status {
            400 | 404 | 422 | 500 | 501 if cannot_chat(&response.body) => BackendError::CannotChat(response),
            401 | 403 => BackendError::AuthRejected(response),
            413 => BackendError::BadRequest(response),
            _ if OVERLOADED_STATUSES.contains(&status) => BackendError::Overloaded(response),
            _ if GATEWAY_STATUSES.contains(&status) => BackendError::BadGateway(response),
            // The path exists, but not for this method.
            405 => BackendError::RouteNotFound(response),
            // Only these: the text of a 400 may quote the request.
            404 | 501 if says(ROUTE_MISSING) => BackendError::RouteNotFound(response),
            _ if means(LOAD_FAILED) => BackendError::LoadFailed(response),
            503 if text.contains("loading") => BackendError::Loading(response),
            _ if means(LOADING) => BackendError::Loading(response),
            400..500 if means(MODEL_MISSING) => BackendError::ModelNotFound(response),
            404 | 501 if is_bare(&response.body) || names_path(&text) => BackendError::RouteNotFound(response),
            404 | 410 => BackendError::ModelNotFound(response),
            400 | 422 => BackendError::BadRequest(response),
            500 if blames(REQUEST_REJECTED) => BackendError::BadRequest(response),
            500.. if blames(UNREACHABLE) => BackendError::BadGateway(response),
            500.. if status == 503 || says(OVERLOADED) => BackendError::Overloaded(response),
            _ => BackendError::Status(response),
        }
    }

    /// The cause that a response with a successful status indicates if it contains an error with this message instead of an answer.
    /// LM Studio sends one for an unknown path.
    pub fn from_reported(status: u16, message: &str) -> BackendError {
        let body = truncated_body(message.as_bytes());
        let text = body.to_ascii_lowercase();
        let has_words = text.contains(|c: char| c.is_ascii_alphanumeric());
        match contains_any(&text, ROUTE_MISSING) || (has_words && is_bare_text(&text)) {
            true => BackendError::RouteNotFound(HttpStatus { status, body }),
            false => BackendError::ReportedError(body),
        }
    }
}

fn contains_any(text: &str, texts: Texts) -> bool {
    texts.iter().any(|words| words.iter().all(|word| text.contains(word)))
}

/// Whether an error body, in lower case, names the path of a job and no model.
fn names_path(text: &str) -> bool {
    JOB_PATHS.iter().any(|path| text.contains(path)) && !text.contains("model")
}

/// Whether an error body says only that the path or the method is unknown. A text about a missing model or file would name it.
fn is_bare(body: &str) -> bool {
    // The page of a web server, which does not know models.
    if body.starts_with('<') {
        return true;
    }
    is_bare_text(&message_of(body))
}

/// The message of an error body, in lower case. Empty if a JSON body contains none.
fn message_of(body: &str) -> String {
    let json: Option<Value> = serde_json::from_str(body).ok();
    let message = json.as_ref().map_or(Some(body), |json| {
        let messages = [&json["detail"], &json["error"]["message"], &json["message"], &json["error"]];
        messages.into_iter().find_map(Value::as_str)
    });
    message.unwrap_or_default().to_ascii_lowercase()
}

/// Whether an error body says that the model cannot chat.
fn cannot_chat(body: &str) -> bool {
    let message = message_of(body);
    // Ollama: `"nomic-embed-text" does not support chat`.
    let rest = message.strip_prefix('"').and_then(|rest| rest.split_once('"')).map(|(_, rest)| rest);
    rest == Some(" does not support chat") || CANNOT_CHAT.iter().any(|start| message.starts_with(start))
}

fn is_bare_text(message: &str) -> bool {
    message
        .split(|c: char| !c.is_ascii_alphanumeric())
        .all(|word| word.is_empty() || BARE_WORDS.split(' ').any(|bare| bare == word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Fault;

    #[test]
    fn cause_follows_from_the_status_or_the_text() {
        use BackendError::{BadGateway, LoadFailed, ModelNotFound, Overloaded, RouteNotFound, Status};
        type Cause = fn(HttpStatus) -> BackendError;

        let cases: &[(u16, &str, Cause)] = &[
            (509, "", Overloaded),
            (500, r#"{"error":"Server busy: the queue is full"}"#, Overloaded),
            (527, "", BadGateway),
            (598, "", BadGateway),
            (500, r#"{"error":"dial tcp 127.0.0.1:9999: connect: connection refused"}"#, BadGateway),
            (500, r#"{"error":"error loading model /models/blobs/sha256-1"}"#, LoadFailed),
            (500, r#"{"error":"unable to load model: /models/blobs/sha256-1"}"#, LoadFailed),
            (400, r#"{"error":"Model loading was stopped due to insufficient system resources."}"#, LoadFailed),
            (
                404,
                r#"{"error":{"code":"DeploymentNotFound","message":"The API deployment does not exist."}}"#,
                ModelNotFound,
            ),
            (410, "deprecated", ModelNotFound),
            (404, r#"{"error":{"message":"Unknown request URL: POST /v1/messages. Please check it."}}"#, RouteNotFound),
            (404, r#"{"message":"no Route matched with those values"}"#, RouteNotFound),
            (404, r#"{"error":{"code":404,"message":"Resource not found","type":""}}"#, RouteNotFound),
            (404, r#"{"status":404,"error":"Not Found","path":"/v1/messages"}"#, RouteNotFound),
            (404, r#"{"error":"This endpoint does not exist."}"#, RouteNotFound),
            (405, "", RouteNotFound),
            (501, r#"{"error":{"code":501,"message":"This server does not support embeddings."}}"#, Status),
        ];
        for (status, body, cause) in cases {
            let response = HttpStatus { status: *status, body: (*body).to_owned() };
            assert_eq!(BackendError::from_status(*status, body.as_bytes()), cause(response));
        }
    }

    #[test]
    fn beginning_of_a_500_says_whose_failure_it_is() {
        let table = [
            (
                r#"{"error":{"code":500,"message":"image input is not supported - hint: …","type":"server_error"}}"#,
                Fault::Neither,
            ),
            (r#"{"error":"this model does not support images"}"#, Fault::Neither),
            (r#"{"detail":"`temperature` (=-1.0) has to be a strictly positive float"}"#, Fault::Neither),
            ("the request exceeds the available context size", Fault::Neither),
            (r#"{"error":{"message":"litellm.BadRequestError: no","code":"500"}}"#, Fault::Neither),
            (r#"{"error":{"code":500,"message":"proxy error: Could not establish connection"}}"#, Fault::Backend),
            ("Request failed: error sending request for url (http://127.0.0.1:8001/)", Fault::Backend),
            (r#"{"error":"dial tcp 127.0.0.1:5800: connect: connection refused"}"#, Fault::Backend),
            ("Internal Server Error", Fault::Model),
            ("CUDA error: operation not supported", Fault::Model),
            ("", Fault::Model),
        ];
        for (body, fault) in table {
            let error = BackendError::from_status(500, body.as_bytes());
            assert_eq!((error.fault(), error.is_requesters_fault()), (fault, fault == Fault::Neither), "{body}");
        }
        // A customer cannot choose: what is quoted counts neither way.
        let quoting =
            |words: &str| format!("{{\"error\":\"{} {words}\"}}", "an unexpected exception occurred ".repeat(6));
        for words in ["connection refused", "proxy error", "is not supported"] {
            assert_eq!(BackendError::from_status(500, quoting(words).as_bytes()).fault(), Fault::Model, "{words}");
        }
    }
}
