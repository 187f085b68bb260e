//! Maps the errors of `ureq` to causes of failure.

use super::resolver::NoThread;
use crate::backend::BackendError;

/// `EMFILE` and `ENFILE`: this process or the machine is out of file descriptors, which says nothing about the backend.
const NO_DESCRIPTOR: [i32; 2] = [24, 23];

/// Maps the error of an exchange without any response.
pub fn connect_error(e: ureq::Error) -> BackendError {
    match e {
        ureq::Error::Timeout(ureq::Timeout::Global) => BackendError::DeadlinePassed,
        ureq::Error::Protocol(_) | ureq::Error::LargeResponseHeader(..) => BackendError::NotHttp(e.to_string()),
        ureq::Error::Io(e) if e.raw_os_error().is_some_and(|code| NO_DESCRIPTOR.contains(&code)) => {
            BackendError::Exhausted(e.to_string())
        }
        ureq::Error::Other(e) if e.is::<NoThread>() => BackendError::Exhausted(e.to_string()),
        ureq::Error::Io(e) => BackendError::Unreachable(e.to_string()),
        e => BackendError::Unreachable(e.to_string()),
    }
}
