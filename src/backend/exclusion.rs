//! Listed models that are not offered, and why.

use std::fmt;

use super::BackendModel;
use crate::logging::sanitize_for_log;

/// Maximum number of models per backend; OpenRouter has about 500.
pub const MODELS_MAX: usize = 1000;
/// Maximum length of a model id, in bytes. File names, which some servers use as ids, have at most 255.
pub const MODEL_ID_BYTES_MAX: usize = 512;
/// The maximum number of models that a summary names; the others are counted.
const NAMES_MAX: usize = 6;

/// The models that a backend lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProbedModels {
    /// The models that can be offered.
    pub models: Vec<BackendModel>,
    /// The models that cannot be offered, with the reasons.
    pub excluded: Vec<ExcludedModel>,
    /// The limit that the listing exceeds; entries beyond it are ignored.
    pub limit: Option<ListingLimit>,
}

/// A listed model that is not offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExcludedModel {
    /// The model.
    pub model: BackendModel,
    /// Why it is not offered.
    pub reason: Exclusion,
}

/// Why a listed model is not offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exclusion {
    /// The model serves another purpose than chat, in the server's words.
    NotChat(String),
    /// The listed model runs on another host, on the operator's account there. Offered if the configuration names it.
    Remote(String),
}

/// A limit of listings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListingLimit {
    /// [`MODELS_MAX`].
    Models,
    /// The size of a response to a probe.
    Bytes,
    /// `MODEL_ID_BYTES_MAX`.
    IdLength,
}

impl Exclusion {
    /// Whether the model is offered if `models` of its backend names it.
    pub fn yields_to_name(&self) -> bool {
        matches!(self, Exclusion::Remote(_))
    }
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exclusion::NotChat(purpose) => write!(f, "not a chat model: {}", sanitize_for_log(purpose)),
            Exclusion::Remote(host) => {
                write!(f, "runs on {}, on your account: name it in `models` to offer it", sanitize_for_log(host))
            }
        }
    }
}

impl fmt::Display for ListingLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListingLimit::Models => write!(f, "lists more than {MODELS_MAX} models: the others are ignored"),
            ListingLimit::Bytes => f.write_str("its listing exceeds 1 MiB: the rest is ignored"),
            ListingLimit::IdLength => write!(f, "models with ids above {MODEL_ID_BYTES_MAX} bytes are ignored"),
        }
    }
}

impl From<Vec<BackendModel>> for ProbedModels {
    fn from(models: Vec<BackendModel>) -> ProbedModels {
        ProbedModels { models, ..ProbedModels::default() }
    }
}

impl ProbedModels {
    /// The number of listed models.
    pub fn count(&self) -> usize {
        self.models.len() + self.excluded.len()
    }

    /// Which models are not offered and why, for the operator; `None` if all are offered.
    pub fn exclusions(&self) -> Option<String> {
        let excluded = self.excluded.iter().map(|excluded| (&*excluded.model.model_id, excluded.reason.to_string()));
        summary(excluded, self.limit.map(|limit| limit.to_string()))
    }
}

/// The exclusions as one line: the first names with their reasons, the number of the others, and the exceeded limit.
pub fn summary<'a>(
    excluded: impl ExactSizeIterator<Item = (&'a str, String)>,
    limit: Option<String>,
) -> Option<String> {
    let more = excluded.len().saturating_sub(NAMES_MAX);
    let named = excluded.take(NAMES_MAX).map(|(id, reason)| format!("{} ({reason})", sanitize_for_log(id)));
    let mut names = named.collect::<Vec<_>>().join(", ");
    if more > 0 {
        names += &format!(", and {more} more");
    }
    let names = (!names.is_empty()).then(|| format!("not offered: {names}"));
    let parts: Vec<String> = names.into_iter().chain(limit).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_names_a_few_models_and_is_printable() {
        let reason = |_| ("m\u{1b}", Exclusion::NotChat("embed\nding".into()).to_string());
        let text = summary((0..9).map(reason).collect::<Vec<_>>().into_iter(), Some(ListingLimit::Models.to_string()));
        let text = text.expect("a summary");
        assert!(text.starts_with("not offered: m\\u{1b} (not a chat model: embed\\nding), "), "{text}");
        assert!(text.ends_with(", and 3 more; lists more than 1000 models: the others are ignored"), "{text}");
        assert_eq!(summary([].into_iter(), None), None);
    }
}
