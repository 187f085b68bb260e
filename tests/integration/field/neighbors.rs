//! Other users of the machine, and other clients of the demo.
