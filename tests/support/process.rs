//! What the operating system says about a process, and the clock that all processes of the machine share.

use std::fs;
use std::io;

use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// The monotonic clock, in nanoseconds. Times that two processes took of it may be compared.
pub fn now_ns() -> u64 {
    read_ns(ClockId::CLOCK_MONOTONIC).expect("there is always a monotonic clock")
}

fn read_ns(clock: ClockId) -> io::Result<u64> {
    let time = clock_gettime(clock)?;
    Ok(time.tv_sec().unsigned_abs() * 1_000_000_000 + time.tv_nsec().unsigned_abs())
}

/// User and system time of all threads of a process, those that ended included. `/proc/PID/stat` shows the same in steps of
/// 10 ms, too coarse for the windows here.
#[derive(Clone, Copy)]
pub struct CpuClock(ClockId);

impl CpuClock {
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self(clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))?))
    }

    /// In nanoseconds. Errors when the process has ended.
    pub fn read_ns(self) -> io::Result<u64> {
        read_ns(self.0)
    }
}

/// Resident memory, in MiB.
pub struct Memory {
    pub rss: f64,
    /// Shared pages count by the part that is this process's.
    pub pss: f64,
}

impl Memory {
    /// From the page tables: the counters in `/proc/PID/status` lag behind with many threads.
    pub fn of(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let mib = |key| Ok::<_, io::Error>(field(&text, key)? as f64 / 1024.0);
        Ok(Self { rss: mib("Rss:")?, pss: mib("Pss:")? })
    }
}

pub struct Threads {
    pub count: usize,
    /// Voluntary and involuntary context switches of the threads that are there: each voluntary one ends in a wake-up.
    pub switches: u64,
}

impl Threads {
    pub fn of(pid: u32) -> io::Result<Self> {
        let mut threads = Self { count: 0, switches: 0 };
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            // A thread may end between the listing and the reading.
            let Ok(status) = fs::read_to_string(task?.path().join("status")) else { continue };
            threads.count += 1;
            threads.switches +=
                field(&status, "voluntary_ctxt_switches:")? + field(&status, "nonvoluntary_ctxt_switches:")?;
        }
        Ok(threads)
    }
}

fn field(text: &str, key: &str) -> io::Result<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)).and_then(|rest| rest.split_whitespace().next());
    value
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no number at {key} in /proc")))
}

/// Where the figures are from; without the host's name.
pub struct Machine {
    pub cpu: String,
    pub cpus: usize,
    pub kernel: String,
}

impl Machine {
    pub fn this() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cpu: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: kernel.trim().to_owned(),
        }
    }
}
