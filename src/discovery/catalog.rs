//! The catalog: the offered models, and the backends that serve each model.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::backend_handle::BackendHandle;
use super::{DiscoveredBackend, ResolvedModel};
use crate::backend::Kind;

/// A consistent view of the offer. A job is routed to the backend that was offered for its model, or to another of the same
/// kind; other backends that list the model receive the job only if those cannot take it.
#[derive(Default)]
pub struct Catalog {
    /// The offered models, by `model_id`.
    pub offer: Vec<ResolvedModel>,
    /// The backends for each model, by rank.
    routes: HashMap<String, Vec<Arc<BackendHandle>>>,
}

/// The models of one backend.
pub struct Listing {
    /// The backend.
    pub backend: Arc<BackendHandle>,
    /// The models of the backend, priced.
    pub models: Vec<ResolvedModel>,
}

impl Listing {
    /// The listing of a backend with this limit of concurrent jobs.
    pub fn of(discovered: DiscoveredBackend, slots_max: u32) -> Listing {
        Listing { backend: BackendHandle::new(discovered.backend, slots_max), models: discovered.models }
    }
}

impl Catalog {
    /// Offers the models of `serving`. If several backends list a model, the one with the lowest rank is offered, then the first.
    /// Models of `standby` are not offered. A job that was sent while they were, and that no other backend can serve, is still
    /// routed there, so that it reports the actual error.
    pub fn new(serving: Vec<Listing>, standby: Vec<Listing>) -> Catalog {
        let mut catalog = Catalog::default();
        catalog.offer = catalog.route(serving);
        for model in &mut catalog.offer {
            let slots = catalog.routes[&model.model_id].iter().fold(0, |sum: u32, b| sum.saturating_add(b.slots_max));
            model.max_concurrent = model.max_concurrent.min(slots);
        }
        catalog.route(standby);
        catalog
    }

    /// Adds routes for the models that have none. Returns these models, sorted by id.
    fn route(&mut self, mut listings: Vec<Listing>) -> Vec<ResolvedModel> {
        let mut added: BTreeMap<String, (ResolvedModel, Vec<Arc<BackendHandle>>)> = BTreeMap::new();
        listings.sort_by_key(|listing| rank(&listing.backend));
        for Listing { backend, models } in listings {
            for model in models.into_iter().filter(|model| !self.routes.contains_key(&model.model_id)) {
                let (_, backends) = added.entry(model.model_id.clone()).or_insert_with(|| (model, Vec::new()));
                backends.push(backend.clone());
            }
        }
        let with_route = |(model_id, (model, backends))| (model, (model_id, backends));
        let (models, routes): (_, Vec<_>) = added.into_iter().map(with_route).unzip();
        self.routes.extend(routes);
        models
    }

    /// The backends for a job of `model_id`, in order of preference; within a rank, by free slots. Empty if no backend lists the
    /// model.
    pub fn candidates(&self, model_id: &str) -> Vec<Arc<BackendHandle>> {
        let mut route = self.routes.get(model_id).cloned().unwrap_or_default();
        // Cached, because the number of free slots changes during the sort, and a sort may panic on changing keys.
        route.sort_by_cached_key(|backend| (rank(backend), Reverse(backend.slots_free())));
        route
    }
}

fn rank(handle: &BackendHandle) -> usize {
    Kind::rank_of(handle.backend.kind())
}

/// The current catalog, and the listener for changes of the offer.
#[derive(Default)]
pub struct OfferFeed {
    newest: RwLock<Arc<Catalog>>,
    listener: Mutex<Option<Listener>>,
    /// Whether the operator has paused the offer. Changed only under the listener's lock.
    paused: AtomicBool,
}

/// Called with each new offer; must not block.
type Listener = Box<dyn Fn(&[ResolvedModel]) + Send>;

impl OfferFeed {
    /// A feed with a fixed catalog.
    pub fn fixed(catalog: Catalog) -> OfferFeed {
        OfferFeed { newest: RwLock::new(Arc::new(catalog)), ..OfferFeed::default() }
    }

    /// The current catalog.
    pub fn snapshot(&self) -> Arc<Catalog> {
        self.newest.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The offer of a catalog: empty while paused.
    pub fn visible_offer<'a>(&self, catalog: &'a Catalog) -> &'a [ResolvedModel] {
        if self.is_paused() { &[] } else { &catalog.offer }
    }

    /// Whether the operator has paused the offer.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// Pauses or resumes the offer. Returns whether the state has changed.
    pub fn set_paused(&self, paused: bool) -> bool {
        let listener = self.listener();
        let is_change = self.paused.swap(paused, Ordering::SeqCst) != paused;
        if let Some(listener) = listener.as_ref().filter(|_| is_change) {
            listener(self.visible_offer(&self.snapshot()));
        }
        is_change
    }

    /// Calls `listener` with the current offer and after each change. Replaces the previous listener.
    pub fn listen(&self, listener: impl Fn(&[ResolvedModel]) + Send + 'static) {
        // Locked throughout, so that no change is missed.
        let mut slot = self.listener();
        listener(self.visible_offer(&self.snapshot()));
        *slot = Some(Box::new(listener));
    }

    /// Removes the listener.
    pub fn stop_listening(&self) {
        *self.listener() = None;
    }

    /// Replaces the catalog. Returns whether the offer has changed.
    pub(super) fn publish(&self, catalog: Catalog) -> bool {
        let catalog = Arc::new(catalog);
        let listener = self.listener();
        let previous =
            std::mem::replace(&mut *self.newest.write().unwrap_or_else(PoisonError::into_inner), catalog.clone());
        let is_change = previous.offer != catalog.offer;
        if let Some(listener) = listener.as_ref().filter(|_| is_change && !self.is_paused()) {
            listener(&catalog.offer);
        }
        is_change
    }

    fn listener(&self) -> MutexGuard<'_, Option<Listener>> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::HttpBackend;

    fn listing(model_id: &str) -> Listing {
        let model = ResolvedModel {
            model_id: model_id.to_owned(),
            input_per_1m: 1,
            output_per_1m: 1,
            max_concurrent: 256,
            backend: "vllm".to_owned(),
            context_window: None,
        };
        let backend = Arc::new(HttpBackend::new(Kind::Vllm, None, None));
        Listing::of(DiscoveredBackend { backend, models: vec![model] }, 256)
    }

    #[test]
    fn candidates_are_found_while_slots_change() {
        let catalog = Catalog::new((0..64).map(|_| listing("m")).collect(), Vec::new());
        let backends = catalog.candidates("m");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for turn in 0..2 {
                let (backends, over) = (&backends, &over);
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        let slots: Vec<_> =
                            backends.iter().skip(turn).step_by(2).map(|m| m.try_acquire_slot()).collect();
                        drop(slots);
                    }
                });
            }
            let routes = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                (0..5_000).for_each(|_| assert_eq!(catalog.candidates("m").len(), backends.len()));
            }));
            over.store(true, Ordering::Relaxed);
            routes.expect("no panic");
        });
    }
}
