//! WebSocket framing from the server's side, by hand: a second opinion on what the agent writes, and the freedom to
//! write what no library would.

use std::io::{self, Read};

use ring::signature::{ED25519, UnparsedPublicKey};
use serde_json::Value;

use super::unbase64;

pub const CONTINUATION: u8 = 0;
pub const TEXT: u8 = 1;
pub const BINARY: u8 = 2;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

pub struct Frame {
    pub last: bool,
    pub opcode: u8,
    pub payload: Vec<u8>,
}

/// Reads one frame, and insists on what RFC 6455 asks of a client: masked, no reserved bits.
pub fn read_frame(from: &mut impl Read) -> io::Result<Frame> {
    let mut head = [0; 2];
    from.read_exact(&mut head)?;
    if head[0] & 0x70 != 0 || head[1] & 0x80 == 0 {
        return Err(io::Error::other(format!("a client's frame must be masked, without reserved bits: {head:02x?}")));
    }
    let length = match head[1] & 0x7f {
        126 => u64::from(u16::from_be_bytes(read_array(from)?)),
        127 => u64::from_be_bytes(read_array(from)?),
        short => u64::from(short),
    };
    let mask: [u8; 4] = read_array(from)?;
    let mut payload = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    from.read_exact(&mut payload)?;
    unmask(&mut payload, mask);
    Ok(Frame { last: head[0] & 0x80 != 0, opcode: head[0] & 0x0f, payload })
}

/// Eight bytes at a time, for a test is not optimised, and frames come by the hundred megabytes.
fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let key = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (words, rest) = payload.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ key).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
}

fn read_array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// One unmasked frame, as a server sends it.
pub fn encode(opcode: u8, last: bool, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![opcode | if last { 0x80 } else { 0 }];
    match u16::try_from(payload.len()) {
        Ok(short @ 0..126) => frame.push(short as u8),
        Ok(medium) => {
            frame.push(126);
            frame.extend(medium.to_be_bytes());
        }
        Err(_) => {
            frame.push(127);
            frame.extend((payload.len() as u64).to_be_bytes());
        }
    }
    frame.extend(payload);
    frame
}

pub fn close_payload(code: u16, reason: &str) -> Vec<u8> {
    [&code.to_be_bytes()[..], reason.as_bytes()].concat()
}

/// Panics unless `auth` is signed over the nonce's own bytes.
pub fn verify_auth(auth: &Value, nonce: &[u8]) {
    let field = |name: &str| unbase64(auth[name].as_str().unwrap_or_else(|| panic!("no {name} in {auth}")));
    let (key, signature) = (field("pubkey"), field("signature"));
    assert_eq!((key.len(), signature.len()), (32, 64), "lengths of key and signature in {auth}");
    UnparsedPublicKey::new(&ED25519, key)
        .verify(nonce, &signature)
        .unwrap_or_else(|_| panic!("the signature does not verify over the {} nonce bytes: {auth}", nonce.len()));
}
