//! Tests of the real binary between scripted peers over loopback sockets, and of the library's contract. The modules:
mod backends; // the probe requests of each kind, and the resulting offer
mod cancel; // how soon a cancel, deadline or session end reaches the backend
mod cli; // commands, options, exit codes, stdout and stderr
mod config; // agent.toml: accepted files, and the errors of the others
mod contract; // the library's fixed names and behaviors
mod cron; // `run --cron`: leave alone, start, take over
mod crash; // SIGKILL at any moment
mod demo; // the local coordinator and its front door
mod doctor; // `doctor`: the broken layer and its fix
mod failures; // broken responses of a backend: what is relayed, which error code follows
mod failover; // several backends for one model
mod faults_backend; // faults of a backend: the job ends once, nothing leaks
mod faults_box; // faults of disks, clocks, descriptors and threads
mod faults_coordinator; // faults of the coordinator and the link
mod field; // what real servers, networks and machines were seen to send
mod footprint; // threads, memory and wake-ups
mod handshake; // from the dial to the first `capabilities`
mod health; // how failed jobs affect the offer
mod identity; // the identity file
mod jobs; // admission, cancel, deadlines, the terminal frame
mod logfile; // the log file, and faults of its disk
mod matrix; // FAULTS.md and the tests that it names
mod probes; // how probes affect the offer
mod proxy; // HTTPS_PROXY and its relatives
mod reconnect; // how sessions end, and the delay before the next
mod refusals; // error responses of a backend
mod relay; // the response's bytes, and the usage read from them
mod request; // the request that the backend receives
mod service; // the supervisor: crontab, systemd unit, start and stop
mod setup; // the pairing, and the agent.toml that it writes
mod session; // everything else on a live session
mod shutdown; // signals and the drain
mod soak; // random load and faults for minutes or hours
mod status; // `status`, `pause` and `resume`
#[path = "../support/mod.rs"]
mod support; // the scripted peers, shared with the bench
mod token_limit; // max_tokens_per_minute
mod tls; // wss and its certificates
