//! The catalog: which models are offered, and which backend a job for one goes to.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::backend_handle::BackendHandle;
use super::{DiscoveredBackend, ResolvedModel};
use crate::backend::Kind;

/// One consistent view. A job goes to the very backend that was advertised for its model, or to its equals of the same kind,
/// and to the others that list it only when those cannot take it.
#[derive(Default)]
pub struct Catalog {
    /// What is offered, by `model_id`.
    pub offer: Vec<ResolvedModel>,
    /// In order of preference.
    routes: BTreeMap<String, Vec<Tier>>,
}

/// Members of equal rank, in the order of the file.
struct Tier {
    rank: usize,
    members: Vec<Arc<BackendHandle>>,
}

/// What one member lists.
pub struct Listing {
    /// Who.
    pub member: Arc<BackendHandle>,
    /// Its models, each with a price.
    pub models: Vec<ResolvedModel>,
}

impl Listing {
    /// Of a backend that may run so many jobs at a time.
    pub fn of(discovered: DiscoveredBackend, slots_max: u32) -> Listing {
        Listing { member: BackendHandle::new(discovered.backend, slots_max), models: discovered.models }
    }
}

impl Catalog {
    /// `serving` is offered: of two that list a model, the kind of the lesser rank, then the first given. `standby` is
    /// not; but a job that was sent while it still was, and that nobody else can serve, goes there all the same, for a true
    /// answer.
    pub fn new(serving: Vec<Listing>, standby: Vec<Listing>) -> Catalog {
        let mut catalog = Catalog::default();
        catalog.offer = catalog.route(serving);
        for model in &mut catalog.offer {
            let members = catalog.routes[&model.model_id].iter().flat_map(|tier| &tier.members);
            let slots = members.fold(0, |sum: u32, member| sum.saturating_add(member.slots_max));
            model.max_concurrent = model.max_concurrent.min(slots);
        }
        catalog.route(standby);
        catalog
    }

    /// Adds the members for the models that have none yet; returns those models, by their names.
    fn route(&mut self, mut listings: Vec<Listing>) -> Vec<ResolvedModel> {
        let rank_of = |member: &BackendHandle| Kind::rank_of(member.backend.kind());
        let mut added: BTreeMap<String, (ResolvedModel, Vec<Tier>)> = BTreeMap::new();
        listings.sort_by_key(|listing| rank_of(&listing.member));
        for Listing { member, models } in listings {
            let rank = rank_of(&member);
            for model in models.into_iter().filter(|model| !self.routes.contains_key(&model.model_id)) {
                let (_, tiers) = added.entry(model.model_id.clone()).or_insert_with(|| (model, Vec::new()));
                match tiers.last_mut() {
                    Some(tier) if tier.rank == rank => tier.members.push(member.clone()),
                    _ => tiers.push(Tier { rank, members: vec![member.clone()] }),
                }
            }
        }
        let mut first_listed = Vec::new();
        for (model_id, (model, tiers)) in added {
            self.routes.insert(model_id, tiers);
            first_listed.push(model);
        }
        first_listed
    }

    /// Where a job for `model_id` may go, in order of preference: of equals the one with the most free slots. Empty when
    /// nobody lists it.
    pub fn candidates(&self, model_id: &str) -> Vec<Arc<BackendHandle>> {
        let mut route = Vec::new();
        for tier in self.routes.get(model_id).into_iter().flatten() {
            let mut equals = tier.members.clone();
            // The keys are cached because they change meanwhile, and a sort may panic on keys that do.
            equals.sort_by_cached_key(|member| Reverse(member.slots_free()));
            route.append(&mut equals);
        }
        route
    }
}

/// The newest catalog, and whoever wants to know when the offer changes.
#[derive(Default)]
pub struct OfferFeed {
    newest: RwLock<Arc<Catalog>>,
    listener: Mutex<Option<Listener>>,
    /// The operator wants nothing to be offered. Changes under the listener's lock alone.
    paused: AtomicBool,
}

/// Called with each new offer; must not block.
type Listener = Box<dyn Fn(&[ResolvedModel]) + Send>;

impl OfferFeed {
    /// With a catalog that nobody is going to replace.
    pub fn fixed(catalog: Catalog) -> OfferFeed {
        OfferFeed { newest: RwLock::new(Arc::new(catalog)), ..OfferFeed::default() }
    }

    /// The newest.
    pub fn snapshot(&self) -> Arc<Catalog> {
        self.newest.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is offered of a catalog: nothing while the agent is paused.
    pub fn visible_offer<'a>(&self, catalog: &'a Catalog) -> &'a [ResolvedModel] {
        if self.is_paused() { &[] } else { &catalog.offer }
    }

    /// Whether the operator wants nothing to be offered.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// OfferFeed nothing from here on, or everything again; true when that is a change.
    pub fn set_paused(&self, paused: bool) -> bool {
        let listener = self.listener();
        let is_change = self.paused.swap(paused, Ordering::SeqCst) != paused;
        if let Some(listener) = listener.as_ref().filter(|_| is_change) {
            listener(self.visible_offer(&self.snapshot()));
        }
        is_change
    }

    /// Calls `listener` with what is offered now, and with each offer that differs from here on. Replaces the listener
    /// before.
    pub fn listen(&self, listener: impl Fn(&[ResolvedModel]) + Send + 'static) {
        // Locked throughout, so that no publication falls between the first call and the next.
        let mut slot = self.listener();
        listener(self.visible_offer(&self.snapshot()));
        *slot = Some(Box::new(listener));
    }

    /// Ends what [`OfferFeed::listen`] began.
    pub fn stop_listening(&self) {
        *self.listener() = None;
    }

    /// Replaces the catalog; true when the offer is another one.
    pub(super) fn publish(&self, catalog: Catalog) -> bool {
        let catalog = Arc::new(catalog);
        let listener = self.listener();
        let before =
            std::mem::replace(&mut *self.newest.write().unwrap_or_else(PoisonError::into_inner), catalog.clone());
        let is_change = before.offer != catalog.offer;
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
    fn a_route_is_found_while_slots_come_and_go() {
        let catalog = Catalog::new((0..64).map(|_| listing("m")).collect(), Vec::new());
        let members = catalog.candidates("m");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for turn in 0..2 {
                let (members, over) = (&members, &over);
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        let slots: Vec<_> =
                            members.iter().skip(turn).step_by(2).map(|m| m.try_acquire_slot()).collect();
                        drop(slots);
                    }
                });
            }
            let routes = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                (0..5_000).for_each(|_| assert_eq!(catalog.candidates("m").len(), members.len()));
            }));
            over.store(true, Ordering::Relaxed);
            routes.expect("no panic");
        });
    }
}
