//! What a process costs, and the clock that all processes of the machine share.

use std::fs;
use std::io;

use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use crate::support::procfs;

/// The monotonic clock, in nanoseconds; comparable between processes.
pub fn now_ns() -> u64 {
    read_ns(ClockId::CLOCK_MONOTONIC).expect("there is always a monotonic clock")
}

fn read_ns(clock: ClockId) -> io::Result<u64> {
    let time = clock_gettime(clock)?;
    Ok(time.tv_sec().unsigned_abs() * 1_000_000_000 + time.tv_nsec().unsigned_abs())
}

/// User and system time of a process, of ended threads, too. `/proc/PID/stat` has the same in steps of 10 ms, too coarse for the
/// windows here.
#[derive(Clone, Copy)]
pub struct CpuClock(ClockId);

impl CpuClock {
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self(clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))?))
    }

    /// In nanoseconds; an error after the process has ended.
    pub fn read_ns(self) -> io::Result<u64> {
        read_ns(self.0)
    }
}

/// Resident memory, in MiB.
pub struct Memory {
    pub rss: f64,
    /// A page shared by `n` processes counts as `1/n`.
    pub pss: f64,
}

impl Memory {
    /// From the page tables: with many threads, the counters in `/proc/PID/status` lag behind.
    pub fn of(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let mib = |key| Ok::<_, io::Error>(procfs::number(&text, key)? as f64 / 1024.0);
        Ok(Self { rss: mib("Rss:")?, pss: mib("Pss:")? })
    }
}

pub struct Threads {
    pub count: usize,
    /// Context switches of the present threads, voluntary and not. Each voluntary one ends in a wake-up.
    pub switches: u64,
}

impl Threads {
    pub fn of(pid: u32) -> io::Result<Self> {
        let mut threads = Self { count: 0, switches: 0 };
        for status in procfs::read_each_thread(pid, "status")? {
            threads.count += 1;
            for key in ["voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:"] {
                threads.switches += procfs::number(&status, key)?;
            }
        }
        Ok(threads)
    }
}
