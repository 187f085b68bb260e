//! Large requests and listings: what they cost in memory.
