//! The agent from outside: the real binary between scripted peers over loopback sockets, and the library by its
//! contract. A test belongs with the promise it checks:
mod backends; // what each kind is asked, and what is offered of it
mod cancel; // how soon a backend hears that nobody wants its answer any more
mod cli; // commands, options, exit codes, what is printed where
mod config; // agent.toml: what is taken, and how a mistake is named
mod contract; // the library's fixed names and behaviours
mod cron; // the call of each minute: leave alone, start, take over
mod crash; // killed at any moment
mod demo; // the local coordinator and its front door
mod doctor; // which layer is broken, and what mends it
mod failures; // broken answers of a backend: what is relayed, and which error code follows
mod failover; // several backends for one model
mod faults_backend; // what a broken backend costs: its job, and nothing that lasts
mod faults_box; // disks, clocks, descriptors and threads that give out
mod faults_coordinator; // a coordinator, or the way to it, that does its worst
mod footprint; // what an idle agent costs
mod handshake; // from the dial to the first `capabilities`
mod health; // how the offer follows the jobs
mod identity; // the identity file
mod jobs; // admission, cancel, deadlines, the one terminal frame
mod logfile; // where the lines go, and what a broken disk costs
mod matrix; // FAULTS.md and the tests that it names
mod probes; // how the offer follows the backends
mod proxy; // HTTPS_PROXY and its relatives
mod reconnect; // how sessions end, and when the next begins
mod refusals; // the statuses and words of a backend that does not serve
mod relay; // the response's bytes, and what is read off them
mod request; // the job as the backend gets it
mod service; // the supervisor: crontab, systemd unit, start and stop
mod setup; // the pairing, and the agent.toml that it writes
mod session; // everything else that happens on a live session
mod shutdown; // signals and the drain
mod soak; // all of it at once and at random, for minutes or hours
mod status; // what `status` says, pause and resume
#[path = "../support/mod.rs"]
mod support; // the scripted peers, shared with the bench
mod token_limit; // max_tokens_per_minute
mod tls; // wss and its certificates
