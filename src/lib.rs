//! The provider agent: it offers the models of local inference servers on a market, over one outbound WebSocket, runs the
//! chat jobs that it is handed, and streams the answers back byte for byte.
//!
//! Everything is synchronous and threaded; there is no runtime.
//!
//! ```text
//!  coordinator ══wss══╗                                               ╔══wss══▶ coordinator
//!                     ▼ ReadHalf (blocks without a lock)               ║ WriteHalf (only this thread writes)
//!  main = supervisor + session ──control (pong, refusal, offer)──▶ writer ◀── tick 15 s → heartbeat, ping
//!    │ job             │ job_cancel                                   ▲
//!    ▼                 ▼                                              │ data, bounded: the backpressure
//!  JobExecutor      JobTable: out of it, marked, woken                │
//!    │                                                                │
//!    ▼                                                                │
//!  job-0 … job-N (on demand, small stacks, idle exit) ─── ureq ⇄ backend
//!  prober: keeps the catalog true, writes      signals: 1st → drain, 2nd → stop now
//!    the state file, heeds a pause
//!  deadlines: there while jobs are, wakes those whose time is over
//! ```
//!
//! # Invariants
//! - The reader blocks on nothing but its socket: a cancel never waits behind the data it is to stop.
//! - Only the writer writes. Control never waits behind a flood of chunks.
//! - Every queue, buffer, retry and wait has a named limit; memory is bounded whatever the other side does.
//! - Backpressure, not loss: a slow coordinator fills the data lane, which blocks the workers, which stop reading their
//!   backends.
//! - Every accepted job ends with exactly one terminal frame, or with none after a cancel or at the end of its session.
//! - The end of a session ends its jobs.
//! - No lock is held across a blocking send, a join or I/O.
//! - Whoever serves waits for no disk: the log and the state file are written by threads that serve nobody.
//! - The lock file tells a working agent from a hung one, also on a full disk: its beat needs the writer, the coordinator and
//!   the reader, or an attempt to connect.
//! - Prompts, completions, keys, seeds and enrollment codes are never logged, at any level.
//!
//! # Limits
//! | what | limit |
//! |---|---|
//! | a message or frame from the coordinator | [`link::MESSAGE_BYTES_MAX`] |
//! | connect, TLS and upgrade together | [`link::CONNECT_TIMEOUT`] |
//! | silence before a link counts as dead | [`link::STALL_TIMEOUT`] |
//! | frames of jobs that wait for the socket | [`job_executor::DATA_LANE_MAX`] |
//! | control messages that wait for the socket | [`job_executor::CONTROL_LANE_MAX`] |
//! | requests in flight, together | [`job_executor::REQUEST_BYTES_MAX`] |
//! | what one backend connection has read and not passed on | `INPUT_MAX` in `backend::tcp`, twice that for a head |
//! | tasks that wait for a worker | `TASKS_MAX` in `worker_pool` |
//! | JSON values in one request | `VALUES_MAX` in `protocol` |
//! | log lines that wait to be written | `QUEUE_LINES_MAX` in `logging` |
//! | a log file, and the one before it | `FILE_BYTES_MAX` in `logging::file` |
//! | jobs at a time | [`config::MAX_CONCURRENT_RANGE`] |

pub mod cli;
pub mod doctor;
pub mod demo;
pub mod service;
pub mod pairing;

pub mod agent;
pub mod observe;
pub mod job_executor;
pub mod link;
pub mod discovery;
pub mod backend;

pub mod config;
pub mod instance;
mod http_server;
pub mod logging;
pub mod net;
pub mod sys;
