//! Which failures count against which backend, and for how long.
