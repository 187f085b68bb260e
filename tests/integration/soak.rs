//! Soak test: runs the agent for minutes or hours with random jobs, misbehaving backends, and a link that is cut, stalled and
//! trickled. Every byte is checked, the oracle compares every job's end with what its backends did, and at the end the agent
//! must use no more threads, descriptors and memory than after the warm-up.
//!
//! Started by `scripts/soak`. All randomness derives from `SOAK_SEED`: the same seed gives every job the same treatment, though
//! not at the same instant.

mod play_log;
mod coordinator;
mod fleet;
mod job;
mod ledger;
mod rng;
mod script;
mod stream;
mod totals;
mod oracle;
mod link_faults;
mod coordinator_actions;

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::bounded;
use fleet::Fleet;
use link_faults::LinkFaults;
use play_log::PlayLog;
use rng::Rng;

use crate::support::{FaultProxy, SOON, Setup, secs};

const MAX_CONCURRENT: usize = 32;
const DRAIN: Duration = secs(10);

/// The agent's surroundings, which the scripted coordinator shares with the other actors.
struct World {
    link_faults: Arc<LinkFaults>,
    play_log: Arc<PlayLog>,
    fleet: Arc<Fleet>,
}

#[test]
#[ignore = "takes minutes; scripts/soak starts it"]
fn soak() {
    let minutes = number("SOAK_MINUTES").unwrap_or(2);
    let seed = number("SOAK_SEED").unwrap_or_else(random_seed);
    println!("soak: {minutes} minutes, SOAK_SEED={seed}");
    let link_faults: Arc<LinkFaults> = Arc::default();
    let play_log = Arc::new(PlayLog::new(Arc::clone(&link_faults)));
    let fleet = Fleet::new(Arc::clone(&play_log), Arc::clone(&link_faults));
    let world = World { link_faults, play_log, fleet };
    let listener = crate::support::Coordinator::new();
    let link = FaultProxy::to(listener.address());
    let (started, has_started) = bounded(1);
    std::thread::scope(|scope| {
        // Stops the other threads when a check panics, too.
        let _stop = StopOnDrop(&world.link_faults);
        scope.spawn(|| world.fleet.run(Rng::of(seed, "fleet"), started));
        scope.spawn(|| link_faults::disturb(&link, &world.link_faults, Rng::of(seed, "link")));
        has_started.recv_timeout(SOON).expect("the backends");
        let limits = format!("max_concurrent = {MAX_CONCURRENT}\ndrain_seconds = {}", DRAIN.as_secs());
        let setup = Setup::new(&format!("ws://{}/provider/connect", link.address())).limits(&limits);
        let mut coordinator = coordinator::Coordinator {
            world: &world,
            agent: world.fleet.configure(setup).start_at_level(Some("info")),
            listener,
            totals: totals::Totals::new(),
            rng: Rng::of(seed, "coordinator"),
            timetable: coordinator::Timetable::new(minutes),
        };
        coordinator.run();
        coordinator.totals.check_leaks();
        coordinator.totals.conclude(seed, &world.play_log);
    });
}

struct StopOnDrop<'a>(&'a LinkFaults);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} should be a number: {text}")))
}

fn random_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0 >> 32
}
