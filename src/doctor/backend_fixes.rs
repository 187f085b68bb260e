//! The fixes for the errors of backends, by error and by kind.

use crate::backend::{BackendError, Kind};

/// The fix for an error of a backend of this kind.
pub fn fix_of(e: &BackendError, kind: Kind) -> String {
    let fix = match e {
        BackendError::Unreachable(_) => {
            return format!("start it ({}), or correct `url` of this backend", start_of(kind));
        }
        BackendError::Loading(_) => "wait until the model is loaded; if that takes minutes, look at the server's log",
        BackendError::ProbeTimeout(_) => "the server hangs or is overloaded: look at its log, or restart it",
        BackendError::NotHttp(_) => "something else is listening there: correct `url` of this backend",
        BackendError::BadGateway(_) => "start the server behind the gateway at this address",
        BackendError::AuthRejected(_) => {
            "the server needs a valid API key: put it into an environment variable, and set `api_key_env` to its name"
        }
        BackendError::MissingKey(_) => "set that variable in the environment of the agent",
        BackendError::ModelNotFound(_)
        | BackendError::RouteNotFound(_)
        | BackendError::FormatNotServed(..)
        | BackendError::BadAnswer(_) => {
            "check that `url` of this backend is the address of the server, and `kind` its kind"
        }
        BackendError::LoadFailed(_) => {
            "look at the server's log: it may lack memory; or exclude the model with `models` of this backend"
        }
        BackendError::NotReady(_) => "check the servers behind this gateway: it says that it cannot reach any",
        BackendError::Overloaded(_) => "the server is at capacity, or your account is out of credit: try again later",
        BackendError::DeadlinePassed => {
            "jobs usually have this deadline: load the model in advance and keep it loaded, or offer a smaller one"
        }
        BackendError::BadRequest(_) | BackendError::CannotChat(_) => {
            "if this is not a chat model, exclude it: list the others in `models` of this backend"
        }
        BackendError::Exhausted(_) => "ulimit -n; ulimit -u; free -m",
        _ => "look at the server's log",
    };
    fix.into()
}

fn start_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Vllm => "vllm serve MODEL --port 8000",
        Kind::LlamaCpp => "llama-server -m MODEL.gguf --port 8080",
        Kind::LmStudio => "lms server start",
        Kind::Ollama => "ollama serve",
        Kind::OpenAi => "your server",
        Kind::Venice | Kind::OpenRouter => "it is hosted: check that this machine is online",
    }
}

pub fn load_fix(kind: Kind) -> &'static str {
    match kind {
        Kind::Ollama => "ollama run MODEL \"\", and OLLAMA_KEEP_ALIVE=-1 for the server; or exclude it with `models`",
        Kind::LmStudio => "lms load MODEL; or exclude it with `models`",
        _ => "load it on the server, or exclude it with `models`",
    }
}

pub fn no_model_fix(kind: Kind) -> &'static str {
    match kind {
        Kind::Ollama => "ollama pull MODEL",
        Kind::LmStudio => "lms get MODEL, lms load MODEL",
        _ => "load a model on the server",
    }
}
