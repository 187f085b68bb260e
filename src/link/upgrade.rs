//! The upgrade of a connection to a WebSocket (RFC 6455, section 4). tungstenite's own function drops the stream of a refused
//! upgrade, and with it the body that says why.

use std::io::{self, Read, Write};

use tungstenite::handshake::client::generate_key;
use tungstenite::handshake::derive_accept_key;
use tungstenite::http::Uri;

use super::response::{Head, read_head};

/// Requests the upgrade, and returns the key that the response must confirm.
///
/// # Errors
/// The stream failed.
pub fn request(uri: &Uri, host: &str, stream: &mut impl Write) -> io::Result<String> {
    let key = generate_key();
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    );
    stream.write_all(request.as_bytes())?;
    stream.flush()?;
    Ok(key)
}

/// Reads the response. Also returns the bytes that followed it.
///
/// # Errors
/// The stream failed, or the response is not HTTP.
pub fn response(stream: &mut impl Read) -> io::Result<(Head, Vec<u8>)> {
    read_head(stream)?.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the server's response is not HTTP"))
}

/// Checks a response with status 101 to the request with this key.
///
/// # Errors
/// What is wrong with the response.
pub fn verify(head: &Head, key: &str) -> Result<(), &'static str> {
    let has_token = |name: &str, token: &str| {
        let value = head.header(name).unwrap_or_default();
        value.split(',').any(|listed| listed.trim().eq_ignore_ascii_case(token))
    };
    if !has_token("upgrade", "websocket") || !has_token("connection", "upgrade") {
        return Err("the server switches to another protocol");
    }
    if head.header("sec-websocket-accept") != Some(derive_accept_key(key.as_bytes()).as_str()) {
        return Err("the server's `Sec-WebSocket-Accept` is wrong");
    }
    if head.headers.contains_key("sec-websocket-protocol") || head.headers.contains_key("sec-websocket-extensions") {
        return Err("the server uses a subprotocol or an extension that was not offered");
    }
    Ok(())
}
