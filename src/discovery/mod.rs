//! What can be offered right now: probes of the backends, prices, and the catalog that the rest of the agent reads.
//!
//! [`ProbeRounds`], driven by the agent's housekeeping thread, owns the state of the backends ([`BackendStatus`]) and alone publishes a
//! [`Catalog`]; each round probes all of them side by side, so a hung backend delays nobody but itself. Readers take a snapshot and hold no lock. How the
//! jobs of a backend go is kept in its [`BackendHandle`]: one that fails them is not offered, whatever its health check says.

mod catalog;
mod local;
mod backend_handle;
mod backend_status;
mod prober;

use std::collections::HashSet;
use std::sync::Arc;

pub use backend_handle::{BackendHandle, Slot};
pub use backend_status::BackendStatus;
pub use catalog::{Catalog, Listing, OfferFeed};
pub use local::{LocalBackend, find_local};
pub use prober::{ProbeRounds, Prober, probe_all};

use crate::backend::{Backend, BackendModel, HttpBackend};
use crate::config::{BackendConfig, Pricing};

/// The most models of one backend: OpenRouter has some 500.
const MODELS_MAX: usize = 4096;

/// A model that is offered: by which backend, and at which prices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedModel {
    /// The name that jobs ask for.
    pub model_id: String,
    /// USDC micro-units per million input tokens.
    pub input_per_1m: u64,
    /// USDC micro-units per million output tokens.
    pub output_per_1m: u64,
    /// Jobs of it at a time.
    pub max_concurrent: u32,
    /// The kind of its backend.
    pub backend: String,
    /// Tokens, where the server says.
    pub context_window: Option<u32>,
}

/// A backend and what it offers.
#[derive(Clone)]
pub struct DiscoveredBackend {
    /// Where its jobs go.
    pub backend: Arc<dyn Backend>,
    /// Its models, each with a price.
    pub models: Vec<ResolvedModel>,
}

/// A backend that may be offered, as configured.
#[derive(Clone)]
pub struct BackendOffer {
    /// The backend.
    pub backend: Arc<dyn Backend>,
    /// Only these of its models; `None` for all of them.
    pub allowed_models: Option<Vec<String>>,
    /// Jobs that it may run at a time; `None` for as many as there are.
    pub max_concurrent: Option<u32>,
}

/// What does not depend on a backend.
#[derive(Debug, Clone)]
pub struct OfferTerms {
    /// The operator's prices.
    pub pricing: Pricing,
    /// Jobs in flight, over all models.
    pub max_concurrent: u32,
}

/// The backend that a `[[backends]]` entry describes.
pub fn configured_backend(config: &BackendConfig) -> Arc<dyn Backend> {
    Arc::new(HttpBackend::new(config.kind, config.url.clone(), config.api_key_env.as_deref()))
}

impl BackendOffer {
    /// What a `[[backends]]` entry offers.
    pub fn configured(config: &BackendConfig) -> BackendOffer {
        BackendOffer {
            backend: configured_backend(config),
            allowed_models: config.models.clone(),
            max_concurrent: config.max_concurrent,
        }
    }

    /// Jobs that it may run at a time.
    pub fn slots_max(&self, terms: &OfferTerms) -> u32 {
        self.max_concurrent.unwrap_or(terms.max_concurrent).min(terms.max_concurrent)
    }

    /// Prices what the backend listed. A model with a price of 0 is dropped, and so is a second one of the same name.
    pub fn price(&self, listed: Vec<BackendModel>, terms: &OfferTerms) -> DiscoveredBackend {
        let allowed = |id: &str| self.allowed_models.as_ref().is_none_or(|only| only.iter().any(|m| m == id));
        let mut seen = HashSet::new();
        let mut models: Vec<ResolvedModel> = Vec::new();
        for model in listed {
            let price = terms.pricing.of(&model.model_id);
            if models.len() == MODELS_MAX {
                log::warn!("{}: only the first {MODELS_MAX} models are offered", self.backend.id());
                break;
            }
            if !seen.insert(model.model_id.clone())
                || !allowed(&model.model_id)
                || price.input_per_1m == 0
                || price.output_per_1m == 0
            {
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
