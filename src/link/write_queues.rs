//! The two queues of the writer thread, called lanes, and the limit of each.
//!
//! The control lane carries the messages that must not wait behind data: replies, pongs, the offer. Sending on the control lane
//! never blocks; at its limit it returns an error. The data lane carries the frames of jobs. A full data lane blocks its senders:
//! this is the backpressure that makes workers stop reading their backends.

use std::sync::Arc;

use crossbeam_channel::{Receiver, bounded, unbounded};

use super::waking_channel::{Parker, WakingSender};

/// Capacity of the data lane: at most 22 KiB per frame, 1.4 MiB in total, plus one frame per blocked worker. Doubling it did
/// not raise throughput.
pub const DATA_LANE_MAX: usize = 64;
/// Limit of replies and raw bytes in the control lane: about 250 bytes each, so 8 MiB. The lane reaches it only if the
/// coordinator does not read.
pub const CONTROL_LANE_MAX: usize = 32 << 10;

/// A message in the control lane.
pub enum Control {
    /// A frame that belongs to no job in flight, such as a rejection.
    Text(String),
    /// The offer. The writer skips it if it equals the last one sent, or after [`Control::Withdraw`].
    Offer(String),
    /// The empty offer of an agent that is stopping.
    Withdraw(String),
    /// Bytes that the reading half must send: a pong, the reply to a close, a TLS alert.
    Raw(Vec<u8>),
    /// Write all queued data, then Close(1000), and end.
    Close,
    /// Write the messages queued in this lane, then end.
    Finish,
}

impl Control {
    /// Whether the coordinator causes messages of this kind, and so decides how many are queued. There are only a few of the
    /// others per session, and [`Control::Finish`] must be accepted even when the lane is full.
    fn is_limited(&self) -> bool {
        matches!(self, Control::Text(_) | Control::Raw(_))
    }
}

/// The reason why a control message was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// The lane is at its limit.
    #[error("the coordinator sends requests but does not read the replies; {CONTROL_LANE_MAX} are waiting")]
    Full,
    /// The writer has ended.
    #[error("the connection no longer accepts data")]
    Closed,
}

/// Decides whether a queued frame is still written.
pub trait Claim: Send + Sync {
    /// The writer calls this immediately before it writes the frame. If it returns false, the frame is dropped.
    fn begin_write(&self) -> bool;
}

/// A message in the data lane.
pub struct Frame {
    /// The JSON text.
    pub text: String,
    /// Checked immediately before the text is written.
    pub claim: Arc<dyn Claim>,
}

/// The sending end of the control lane.
#[derive(Clone)]
pub struct ControlSender(WakingSender<Control>);

impl ControlSender {
    /// Queues a message without blocking.
    ///
    /// # Errors
    /// [`LaneError::Full`] for a reply or raw bytes at [`CONTROL_LANE_MAX`]; [`LaneError::Closed`].
    pub fn send(&self, control: Control) -> Result<(), LaneError> {
        if control.is_limited() && self.0.len() >= CONTROL_LANE_MAX {
            return Err(LaneError::Full);
        }
        self.0.send(control).map_err(|_| LaneError::Closed)
    }
}

/// Both lanes, and the parker of the receiving thread.
pub struct Lanes {
    /// The control lane, which the writer reads before the data lane.
    pub control: ControlSender,
    pub(super) control_receiver: Receiver<Control>,
    /// The data lane, which keeps the order of its frames.
    pub data: WakingSender<Frame>,
    pub(super) data_receiver: Receiver<Frame>,
    pub(super) parker: Parker,
}

impl Default for Lanes {
    fn default() -> Self {
        let parker = Parker::default();
        // Unbounded, because a bounded channel allocates its whole capacity at once; `ControlSender` enforces the limit.
        let (control, control_receiver) = unbounded();
        let (data, data_receiver) = bounded(DATA_LANE_MAX);
        let control = ControlSender(WakingSender::new(control, &parker));
        let data = WakingSender::new(data, &parker);
        Lanes { control, control_receiver, data, data_receiver, parker }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_lane_takes_no_reply_beyond_its_limit_but_still_a_finish() {
        let lanes = Lanes::default();
        let reply = || lanes.control.send(Control::Text(String::new()));
        for _ in 0..CONTROL_LANE_MAX {
            assert_eq!(reply(), Ok(()));
        }
        assert_eq!(reply(), Err(LaneError::Full));
        assert_eq!(lanes.control.send(Control::Raw(Vec::new())), Err(LaneError::Full));
        assert_eq!(lanes.control.send(Control::Finish), Ok(()));
        let Lanes { control, control_receiver, .. } = lanes;
        drop(control_receiver);
        assert_eq!(control.send(Control::Text(String::new())), Err(LaneError::Closed));
    }
}
