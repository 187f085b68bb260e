//! What real servers, gateways, networks and machines were seen to send, each as a test named for the situation. A comment names the
//! public thread that reported it, where one is known.

mod answers; // responses to a job
mod health; // which failures count against which backend and model
mod machine; // the clock, the disk, locks, cron, systemd
mod neighbors; // other users of the machine, and other clients of the demo
mod network; // proxies, addresses, and a coordinator that responds otherwise than expected
mod offer; // listings and probes
mod root; // root's commands on files of other users
mod requests; // the size of requests and listings
