//! Wrappers around the operating system: files, threads, memory, dates, the terminal, printable text, the user, shell quoting,
//! sockets, systemd's notifications.

pub mod datetime;
pub mod edit_distance;
pub mod file_access;
pub mod files;
pub mod jitter;
pub mod malloc;
pub mod moment;
pub mod oom;
pub mod operator_path;
pub mod permissions;
pub mod printable;
pub mod process;
pub mod sd_notify;
pub mod shell_quote;
pub mod sockets;
pub mod terminal;
pub mod threads;
pub mod user;
