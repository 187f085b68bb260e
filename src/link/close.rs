//! Describes why the coordinator closed the connection.

use tungstenite::protocol::CloseFrame;

use crate::logging::sanitize_for_log;

/// The code and reason of a close frame, for a log line.
pub fn describe(frame: &CloseFrame) -> String {
    let meaning = match frame.reason.as_str() {
        "drain:deploy" => ", the coordinator is being deployed",
        "drain:operator" => ", an operator asked for it",
        _ => "",
    };
    format!("closed with {} \"{}\"{meaning}", u16::from(frame.code), sanitize_for_log(frame.reason.as_str()))
}
