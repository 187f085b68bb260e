//! The agent for minutes or hours: random jobs for backends that misbehave, through a link that is cut, stalled and
//! trickled. Every byte is checked, every job's end is held against what its backends were seen to do, and at the end the
//! agent must weigh what it weighed when it was warm.
//!
//! Started by `scripts/soak`. All chance comes from `SOAK_SEED`; with the same seed every job gets the same treatment,
//! though not at the same instant.

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

use std::sync::{Arc, Barrier};
use std::time::Duration;

use fleet::Fleet;
use link_faults::Weather;
use play_log::Board;
use rng::Rng;

use crate::support::{FaultProxy, Setup, secs};

const MAX_CONCURRENT: usize = 32;
const DRAIN: Duration = secs(10);

/// What the coordinator knows of the world around the agent.
struct World {
    weather: Arc<Weather>,
    board: Arc<Board>,
    fleet: Arc<Fleet>,
}

#[test]
#[ignore = "takes minutes; scripts/soak starts it"]
fn soak() {
    let minutes = number("SOAK_MINUTES").unwrap_or(2);
    let seed = number("SOAK_SEED").unwrap_or_else(random_seed);
    println!("soak: {minutes} minutes, SOAK_SEED={seed}");
    let weather: Arc<Weather> = Arc::default();
    let board = Arc::new(Board::new(Arc::clone(&weather)));
    let fleet = Fleet::new(Arc::clone(&board), Arc::clone(&weather));
    let world = World { weather, board, fleet };
    let door = crate::support::Coordinator::new();
    let link = FaultProxy::to(door.address());
    let started = Barrier::new(2);
    std::thread::scope(|scope| {
        // Also when a check panics: the others must not wait for ever.
        let _over = Over(&world.weather);
        scope.spawn(|| world.fleet.run(Rng::of(seed, "fleet"), &started));
        scope.spawn(|| link_faults::disturb(&link, &world.weather, Rng::of(seed, "link")));
        started.wait();
        let limits = format!("max_concurrent = {MAX_CONCURRENT}\ndrain_seconds = {}", DRAIN.as_secs());
        let setup = Setup::new(&format!("ws://{}/provider/connect", link.address())).limits(&limits);
        let mut coordinator = coordinator::Coordinator {
            world: &world,
            agent: world.fleet.configure(setup).start_at_level(Some("info")),
            door,
            tally: totals::Tally::new(),
            rng: Rng::of(seed, "coordinator"),
            timetable: coordinator::Timetable::new(minutes),
        };
        coordinator.run();
        coordinator.tally.check_vitals();
        coordinator.tally.conclude(seed, &world.board);
    });
}

struct Over<'a>(&'a Weather);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} should be a number: {text}")))
}

fn random_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0 >> 32
}
