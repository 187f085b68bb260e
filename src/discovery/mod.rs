//! The offer of the agent: the backends are probed, their models priced, and the result published as a [`Catalog`].
//!
//! [`ProbeRounds`], driven by the housekeeping thread, owns the state of the backends ([`BackendStatus`]) and alone publishes
//! catalogs. Each round probes all backends concurrently, so a hung backend delays only itself. Readers take a snapshot and hold no
//! lock. A [`BackendHandle`] records how a backend's jobs end: a backend or a model that fails them is withdrawn from the offer,
//! regardless of the health check, a model only after a trial (`health` and `trial` say when).

mod catalog;
mod local;
mod model_health;
mod health;
mod trial;
mod backend_handle;
mod backend_status;
mod probe_threads;
mod prober;

use std::collections::HashSet;
use std::sync::Arc;

use serde::Serialize;

pub use backend_handle::{BackendHandle, Slot};
pub use backend_status::BackendStatus;
pub use catalog::{Catalog, Listing, OfferFeed};
pub use health::Verdict;
pub use local::{LocalBackend, LocalServers, find_local};
pub use probe_threads::probe_all;
pub use prober::{ProbeRounds, Prober};

use crate::backend::{Backend, BackendModel, HttpBackend, MODELS_MAX, ProbedModels};
use crate::config::{BackendConfig, Pricing};

/// An offered model, with its backend and prices; an entry of the `capabilities` frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ResolvedModel {
    /// The id that jobs request.
    pub model_id: String,
    /// USDC micro-units per million input tokens.
    pub input_per_1m: u64,
    /// USDC micro-units per million output tokens.
    pub output_per_1m: u64,
    /// Limit of concurrent jobs.
    pub max_concurrent: u32,
    /// The kind of the model's backend.
    pub backend: String,
    /// The context window in tokens, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_window: Option<u32>,
}

/// A backend and its offered models.
#[derive(Clone)]
pub struct DiscoveredBackend {
    /// Runs the jobs.
    pub backend: Arc<dyn Backend>,
    /// The models of the backend, priced.
    pub models: Vec<ResolvedModel>,
}

/// A configured backend, and the limits of its offer.
#[derive(Clone)]
pub struct BackendOffer {
    /// The backend.
    pub backend: Arc<dyn Backend>,
    /// The models to offer; `None` for all.
    pub allowed_models: Option<Vec<String>>,
    /// Limit of concurrent jobs; `None` for the agent's limit.
    pub max_concurrent: Option<u32>,
}

/// The terms that apply to all backends.
#[derive(Debug, Clone)]
pub struct OfferTerms {
    /// The operator's prices.
    pub pricing: Pricing,
    /// The agent's limit of concurrent jobs.
    pub max_concurrent: u32,
}

/// Creates the backend of a `[[backends]]` entry.
pub fn configured_backend(config: &BackendConfig) -> Arc<dyn Backend> {
    Arc::new(HttpBackend::new(config.kind, config.url.clone(), config.api_key_env.as_deref()))
}

impl BackendOffer {
    /// The offer of a `[[backends]]` entry.
    pub fn configured(config: &BackendConfig) -> BackendOffer {
        BackendOffer {
            backend: configured_backend(config),
            allowed_models: config.models.clone(),
            max_concurrent: config.max_concurrent,
        }
    }

    /// The backend's limit of concurrent jobs.
    pub fn slots_max(&self, terms: &OfferTerms) -> u32 {
        self.max_concurrent.unwrap_or(terms.max_concurrent).min(terms.max_concurrent)
    }

    /// Applies `models` to the probed models: leaves out those that it does not name, and includes excluded ones that are offered if
    /// it names them.
    pub fn select(&self, probed: ProbedModels) -> ProbedModels {
        let Some(named) = &self.allowed_models else { return probed };
        let named: HashSet<&str> = named.iter().map(String::as_str).collect();
        let ProbedModels { mut models, mut excluded, limit } = probed;
        excluded.retain(|excluded| named.contains(&*excluded.model.model_id));
        models.retain(|model| named.contains(&*model.model_id));
        models.extend(
            excluded.extract_if(.., |excluded| excluded.reason.yields_to_name()).map(|excluded| excluded.model),
        );
        ProbedModels { models, excluded, limit }
    }

    /// Prices the selected models. Drops those with a price of 0, and duplicates.
    pub fn price(&self, selected: Vec<BackendModel>, terms: &OfferTerms) -> DiscoveredBackend {
        let mut seen = HashSet::new();
        let mut models: Vec<ResolvedModel> = Vec::new();
        for model in selected {
            let price = terms.pricing.of(&model.model_id);
            if models.len() == MODELS_MAX {
                break;
            }
            if !seen.insert(model.model_id.clone()) || price.input_per_1m == 0 || price.output_per_1m == 0 {
                continue;
            }
            models.push(ResolvedModel {
                model_id: model.model_id,
                input_per_1m: price.input_per_1m,
                output_per_1m: price.output_per_1m,
                max_concurrent: terms.max_concurrent,
                backend: self.backend.kind().to_owned(),
                context_window: model.context_window,
            });
        }
        DiscoveredBackend { backend: self.backend.clone(), models }
    }
}
