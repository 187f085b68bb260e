//! The catalog: which models are offered, and which backend a job for one goes to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{DiscoveredBackend, ResolvedModel};
use crate::backend::{Backend, Kind};

/// One consistent view. A job goes to the very backend that was advertised for its model, and to the others that list it
/// only when that one cannot take it.
#[derive(Default)]
pub struct Catalog {
    /// What is offered, by `model_id`.
    pub offer: Vec<ResolvedModel>,
    /// The advertised one first.
    routes: HashMap<String, Vec<Arc<dyn Backend>>>,
}

impl Catalog {
    /// `serving` is offered: of two that list a model, the kind of the lesser rank, then the first given. `standby` is
    /// not; but a job that was sent while it still was goes there all the same, for a true answer.
    pub fn new(serving: Vec<DiscoveredBackend>, standby: Vec<DiscoveredBackend>) -> Catalog {
        let mut catalog = Catalog::default();
        catalog.offer = catalog.route(serving);
        catalog.offer.sort_unstable_by(|a, b| a.model_id.cmp(&b.model_id));
        catalog.route(standby);
        catalog
    }

    /// Adds the backends behind those that are there; returns the models that had none.
    fn route(&mut self, mut backends: Vec<DiscoveredBackend>) -> Vec<ResolvedModel> {
        backends.sort_by_key(|d| Kind::rank_of(d.backend.kind()));
        let mut routed = Vec::new();
        for DiscoveredBackend { backend, models } in backends {
            for model in models {
                let route = self.routes.entry(model.model_id.clone()).or_default();
                route.push(backend.clone());
                if route.len() == 1 {
                    routed.push(model);
                }
            }
        }
        routed
    }

    /// Where jobs for `model_id` go, in order of preference; empty when nobody lists it.
    pub fn backends_of(&self, model_id: &str) -> &[Arc<dyn Backend>] {
        self.routes.get(model_id).map(Vec::as_slice).unwrap_or_default()
    }
}

/// The newest catalog, and whoever wants to know when the offer changes.
#[derive(Default)]
pub struct Offers {
    newest: RwLock<Arc<Catalog>>,
    listener: Mutex<Option<Listener>>,
}

/// Called with each new offer; must not block.
type Listener = Box<dyn Fn(&Catalog) + Send>;

impl Offers {
    /// With a catalog that nobody is going to replace.
    pub fn fixed(catalog: Catalog) -> Offers {
        Offers { newest: RwLock::new(Arc::new(catalog)), listener: Mutex::default() }
    }

    /// The newest.
    pub fn snapshot(&self) -> Arc<Catalog> {
        self.newest.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Calls `listener` with the newest catalog now, and with each whose offer differs from here on. Replaces the
    /// listener before.
    pub fn listen(&self, listener: impl Fn(&Catalog) + Send + 'static) {
        // Locked throughout, so that no publication falls between the first call and the next.
        let mut slot = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        listener(&self.snapshot());
        *slot = Some(Box::new(listener));
    }

    /// Ends what [`Offers::listen`] began.
    pub fn stop_listening(&self) {
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Replaces the catalog.
    pub(super) fn publish(&self, catalog: Catalog) {
        let catalog = Arc::new(catalog);
        let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        let before =
            std::mem::replace(&mut *self.newest.write().unwrap_or_else(PoisonError::into_inner), catalog.clone());
        if let Some(listener) = listener.as_ref().filter(|_| before.offer != catalog.offer) {
            listener(&catalog);
        }
    }
}
