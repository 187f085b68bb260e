//! WebSocket frames, as far as the two ends of the bench need them: whole, never fragmented, of any length.

use crate::Result;

pub const TEXT: u8 = 1;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;

/// Appends a frame; a client's is masked.
pub fn push_frame(out: &mut Vec<u8>, opcode: u8, mask: Option<[u8; 4]>, payload: &[&[u8]]) {
    let masked = if mask.is_some() { MASKED } else { 0 };
    let length: usize = payload.iter().map(|part| part.len()).sum();
    out.push(FIN | opcode);
    match length {
        0..126 => out.push(masked | length as u8),
        126..0x1_0000 => {
            out.push(masked | 126);
            out.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            out.push(masked | 127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(mask.as_ref().map_or(&[], |mask| mask));
    let start = out.len();
    payload.iter().for_each(|part| out.extend_from_slice(part));
    if let Some(mask) = mask {
        apply_mask(&mut out[start..], mask);
    }
}

fn apply_mask(payload: &mut [u8], mask: [u8; 4]) {
    let word = u64::from_ne_bytes([mask, mask].concat().try_into().expect("four and four bytes"));
    let (words, rest) = payload.as_chunks_mut::<8>();
    for bytes in words {
        *bytes = (u64::from_ne_bytes(*bytes) ^ word).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.into_iter().cycle()) {
        *byte ^= mask;
    }
}

/// Bytes from the socket, of which frames are taken.
#[derive(Default)]
pub struct Frames {
    buffer: Vec<u8>,
    taken: usize,
}

impl Frames {
    /// Where to append what came; frames handed out before are gone.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        self.buffer.drain(..std::mem::take(&mut self.taken));
        &mut self.buffer
    }

    /// Takes the head of the HTTP message that comes before the first frame, when it is whole.
    pub fn next_head(&mut self) -> Option<String> {
        let head = self.buffer[self.taken..].windows(4).position(|end| end == b"\r\n\r\n")? + 4;
        let text = String::from_utf8_lossy(&self.buffer[self.taken..][..head]).into_owned();
        self.taken += head;
        Some(text)
    }

    /// The opcode and the unmasked payload of the next frame, when it is whole. Errors on what the bench does not speak.
    pub fn next(&mut self) -> Result<Option<(u8, &[u8])>> {
        let Some(frame) = Frame::parse(&self.buffer[self.taken..])? else { return Ok(None) };
        let payload = self.taken + frame.payload_at..self.taken + frame.end;
        self.taken += frame.end;
        let payload = &mut self.buffer[payload];
        if let Some(mask) = frame.mask {
            apply_mask(payload, mask);
        }
        Ok(Some((frame.opcode, payload)))
    }
}

struct Frame {
    opcode: u8,
    mask: Option<[u8; 4]>,
    payload_at: usize,
    end: usize,
}

impl Frame {
    fn parse(bytes: &[u8]) -> Result<Option<Self>> {
        let Some((&[first, second], rest)) = bytes.split_first_chunk::<2>() else { return Ok(None) };
        if first & !0x0f != FIN {
            return Err("a fragmented or extended frame".into());
        }
        let (length, mut payload_at) = match second & !MASKED {
            126 => match rest.first_chunk() {
                Some(length) => (usize::from(u16::from_be_bytes(*length)), 4),
                None => return Ok(None),
            },
            127 => match rest.first_chunk() {
                Some(length) => (usize::try_from(u64::from_be_bytes(*length))?, 10),
                None => return Ok(None),
            },
            length => (usize::from(length), 2),
        };
        let mut mask = None;
        if second & MASKED != 0 {
            mask = bytes.get(payload_at..).and_then(<[u8]>::first_chunk).copied();
            payload_at += 4;
        }
        let end = payload_at + length;
        Ok((bytes.len() >= end).then_some(Self { opcode: first & 0x0f, mask, payload_at, end }))
    }
}
