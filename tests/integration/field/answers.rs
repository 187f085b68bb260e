//! Responses of real servers to a job.
