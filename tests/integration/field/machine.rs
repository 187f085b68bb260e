//! The clock, the disk, locks, cron and systemd, as they are on real machines.
