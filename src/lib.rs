//! The provider agent: offers the models of local inference servers on a market over one outbound WebSocket, runs the chat
//! jobs that the coordinator sends, and streams the answers back byte for byte.
//!
//! Everything is synchronous and threaded; there is no async runtime.
//!
//! ```text
//!  coordinator ══wss══╗                                               ╔══wss══▶ coordinator
//!                     ▼ ReadHalf (blocks without a lock)               ║ WriteHalf (only this thread writes)
//!  main = agent + session ──control (pong, rejection, offer)────▶ writer ◀── every 15 s: heartbeat, ping
//!    │ job             │ job_cancel                                   ▲
//!    ▼                 ▼                                              │ data, bounded: the backpressure
//!  JobExecutor      JobTable: removed, marked, interrupted            │
//!    │                                                                │
//!    ▼                                                                │
//!  job-0 … job-N (on demand, small stacks, exit when idle) ─── ureq ⇄ backend
//!  housekeeping: probes the backends, writes   signals: 1st → drain, 2nd → stop now
//!    the state file, applies a pause
//!  deadlines: interrupts jobs whose deadline has passed; runs only while there are jobs
//! ```
//!
//! # Invariants
//! - The reader blocks only in its socket: a cancel never waits behind the data of the job that it cancels.
//! - Only the writer writes. Control frames never wait behind data.
//! - Every queue, buffer, retry and wait has a named limit, so memory is bounded whatever the peer does.
//! - Backpressure, not loss: a slow coordinator fills the data lane, which blocks the workers, which stop reading their
//!   backends.
//! - Every accepted job ends with exactly one terminal frame, or with none after a cancel or at the end of its session.
//! - When a session ends, its jobs end.
//! - No lock is held across a blocking send, a join or I/O.
//! - Job-serving threads never wait for the disk; the log and the state file are written by dedicated threads.
//! - The lock file distinguishes a working agent from a hung one, even on a full disk; if it is out of date, the agent is asked over
//!   its wake socket. Liveness is recorded only after a heartbeat was written and data was received from the coordinator, or while the
//!   agent tries to connect.
//! - A request is never parsed into a tree, and is copied only once, out of its frame: requests take the memory of their text, plus
//!   one frame.
//! - Prompts, completions, keys, seeds and enrollment codes are never logged, at any level.
//!
//! # Modules
//! Dependencies run downwards in the list of modules below: a module uses only the modules listed after it.
//!
//! # Limits
//! | resource | limit |
//! |---|---|
//! | a message or frame from the coordinator | [`link::MESSAGE_BYTES_MAX`] |
//! | connect, TLS and upgrade together | [`link::CONNECT_TIMEOUT`] |
//! | silence before a link counts as dead | [`link::STALL_TIMEOUT`] |
//! | queued job frames | [`link::write_queues::DATA_LANE_MAX`] |
//! | queued control messages | [`link::write_queues::CONTROL_LANE_MAX`] |
//! | requests in flight, total size | [`job_executor::REQUEST_BYTES_MAX`] |
//! | jobs that wait for the first offer | number and total size as for jobs in flight; 5 s (`FIRST_OFFER_TIMEOUT` in `agent::session`) |
//! | addresses of a host name | `ADDRESSES_MAX` in `net::resolve` |
//! | the head of a response to a dial, and the body of a refusal | `HEAD_BYTES_MAX`, `BODY_BYTES_MAX` in [`link::response`] |
//! | input buffer of a backend connection | `INPUT_MAX` in `backend::http::tcp`; twice that for a response head |
//! | wait for the end of a complete response | `DONE_GRACE` and `FINISHED_GRACE` in `backend::stream::completion` |
//! | tasks queued for a worker | `TASKS_MAX` in `worker_pool` |
//! | JSON values in one request, and their depth | `VALUES_MAX` and `DEPTH_MAX` in `backend::raw_job` |
//! | log lines of a warning that a peer can repeat | `INTERVAL` in `logging::repeats` |
//! | queued log lines | `QUEUE_LINES_MAX` in `logging` |
//! | a log file, and its rotated predecessor | `FILE_BYTES_MAX` in `logging::file` |
//! | concurrent jobs | [`config::MAX_CONCURRENT_RANGE`] |

// The operator's commands and tools.
pub mod cli;
pub mod doctor;
pub mod demo;
pub mod service;
pub mod pairing;

// The agent: from the connection down to one request to a backend.
pub mod agent;
pub mod observe;
pub mod job_executor;
pub mod link;
pub mod discovery;
pub mod config;
pub mod backend;

// The foundation that all of the above use.
pub mod instance;
mod http_server;
pub mod logging;
pub mod net;
pub mod sys;
