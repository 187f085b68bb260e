//! What the operator can do about a backend, by cause and by kind.

use crate::backend::{BackendError, Kind};

/// What mends it, by cause.
pub fn fix_of(e: &BackendError, kind: Kind) -> String {
    let fix = match e {
        BackendError::Unreachable(_) => {
            return format!("start it ({}), or correct `url` of this backend", start_of(kind));
        }
        BackendError::Loading(_) => "wait until it is through, and look at its log if that takes minutes",
        BackendError::ProbeTimeout(_) => "it hangs or is overloaded: look at its log, start it again",
        BackendError::NotHttp(_) => "something else listens there: correct `url` of this backend",
        BackendError::BadGateway(_) => "start what is behind the gateway at this address",
        BackendError::AuthRejected(_) => {
            "the server wants a (nother) key: put it into an environment variable, and that one's name into `api_key_env`"
        }
        BackendError::MissingKey(_) => "set that variable where the agent is started",
        BackendError::ModelNotFound(_) | BackendError::BadAnswer(_) => {
            "is `url` of this backend the server's own address, and `kind` what it is?"
        }
        BackendError::Overloaded(_) => "it is full, or your account is empty: try again when it is quiet",
        BackendError::DeadlinePassed => {
            "a job has so long, as a rule: load the model beforehand and keep it loaded, or offer a smaller one"
        }
        BackendError::BadRequest(_) => {
            "if it is no chat model, leave it out: name the others in `models` of this backend"
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
        Kind::OpenAi => "whatever serves it",
        Kind::Venice | Kind::OpenRouter => "it is hosted: is this box online?",
    }
}

pub fn load_fix(kind: Kind) -> &'static str {
    match kind {
        Kind::Ollama => "ollama run MODEL \"\", and OLLAMA_KEEP_ALIVE=-1 for the server; or leave it out of `models`",
        Kind::LmStudio => "lms load MODEL; or leave it out of `models`",
        _ => "load it on the server, or leave it out of `models`",
    }
}

pub fn no_model_fix(kind: Kind) -> &'static str {
    match kind {
        Kind::Ollama => "ollama pull MODEL",
        Kind::LmStudio => "lms get MODEL, lms load MODEL",
        _ => "have the server load one",
    }
}
