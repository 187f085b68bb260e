//! The SSE events of a stream: all of one length, each with the time at which it was sent.

/// Length of one event.
pub const EVENT_BYTES: usize = 180;

const HEAD: &[u8] = b"data: {\"id\":\"cmpl-7\",\"object\":\"chat.completion.chunk\",\"created\":1770000000,\
    \"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"";
const FOOT: &[u8] = b"\"},\"finish_reason\":null}]}\n\n";
/// Digits of the send time, in nanoseconds.
const TIME_BYTES: usize = EVENT_BYTES - HEAD.len() - FOOT.len();
const _: () = assert!(TIME_BYTES >= 20, "room for any u64");

/// What follows the last event.
pub const TAIL: &[u8] = b"data: {\"id\":\"cmpl-7\",\"object\":\"chat.completion.chunk\",\"created\":1770000000,\
    \"model\":\"m\",\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":13,\"total_tokens\":20}}\n\ndata: [DONE]\n\n";

/// Appends one event.
pub fn push_event(out: &mut Vec<u8>, sent_ns: u64) {
    out.extend_from_slice(HEAD);
    let start = out.len();
    out.resize(start + TIME_BYTES, b'0');
    let mut rest = sent_ns;
    for digit in out[start..].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    out.extend_from_slice(FOOT);
}

/// When an event was sent; `None` if the bytes are no event.
pub fn sent_ns(event: &[u8]) -> Option<u64> {
    let digits = event.strip_prefix(HEAD)?.strip_suffix(FOOT)?;
    Some(digits.iter().fold(0, |ns: u64, digit| ns.wrapping_mul(10).wrapping_add(u64::from(digit.wrapping_sub(b'0')))))
}
