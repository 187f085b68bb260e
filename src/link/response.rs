//! HTTP responses to the requests of a dial: their heads, and what a refusal says.
//!
//! Invariants: the bytes and the time for reading a response are bounded. The texts of a [`Refusal`] are printable.

use std::fmt;
use std::io::{self, Read};
use std::time::Duration;

use tungstenite::http::{HeaderMap, HeaderName, HeaderValue};

use crate::logging::sanitize_for_log;
use crate::sys::datetime;

/// Maximum length of the head of a response, in bytes.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Size of one read, in bytes.
const READ_BYTES: usize = 1 << 10;
/// Maximum number of bytes of a refusal's body that are read.
const BODY_BYTES_MAX: usize = 4 << 10;
/// Time limit for reading the body of a refusal.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum length of a text in a refusal, in characters: `status` prints 200 characters of the whole error.
const TEXT_CHARS_MAX: usize = 90;
/// Maximum delay that a `Retry-After` can request.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);

/// What to do about a response that is not the coordinator's, such as a captive portal's.
pub const FROM_BETWEEN: &str = "something in between answers: log in there, or correct the URL";

/// The head of a response.
pub struct Head {
    /// The status code.
    pub status: u16,
    /// The status line, as sent.
    status_line: String,
    /// The valid headers.
    pub headers: HeaderMap,
}

/// Reads the head of the final response, behind interim ones such as 103, which all count towards `HEAD_BYTES_MAX`. Also returns
/// the bytes after it that were read with it. `None` if the response is not HTTP.
///
/// # Errors
/// The stream failed.
pub fn read_head(stream: &mut impl Read) -> io::Result<Option<(Head, Vec<u8>)>> {
    let mut bytes = Vec::new();
    let mut left = HEAD_BYTES_MAX;
    let mut chunk = [0; READ_BYTES];
    loop {
        while let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            match parse_head(&bytes) {
                Some(head) if bytes.len() <= left && !head.is_interim() => return Ok(Some((head, rest))),
                Some(_) if bytes.len() <= left => left -= bytes.len(),
                _ => return Ok(None),
            }
            bytes = rest;
        }
        let read = if bytes.len() < left { stream.read(&mut chunk)? } else { 0 };
        if read == 0 {
            return Ok(None);
        }
        bytes.extend_from_slice(&chunk[..read]);
    }
}

/// Only the status line must be valid: some proxies send malformed headers. Those are left out.
fn parse_head(head: &[u8]) -> Option<Head> {
    // At most a header a line.
    let lines = memchr::memchr_iter(b'\n', head).count();
    let mut headers = vec![httparse::EMPTY_HEADER; lines];
    let mut response = httparse::Response::new(&mut headers);
    // After an error, `response` has the status if that was valid, and `headers` are those before the error.
    let _ = httparse::ParserConfig::default()
        .allow_spaces_after_header_name_in_responses(true)
        .allow_obsolete_multiline_headers_in_responses(true)
        .ignore_invalid_headers_in_responses(true)
        .parse_response(&mut response, head);
    let header = |header: &httparse::Header<'_>| {
        Some((HeaderName::from_bytes(header.name.as_bytes()).ok()?, HeaderValue::from_bytes(header.value).ok()?))
    };
    Some(Head {
        status: response.code?,
        status_line: String::from_utf8_lossy(head).lines().next()?.to_owned(),
        headers: response.headers.iter().filter_map(header).collect(),
    })
}

impl Head {
    /// Whether another response follows. Behind 101, it is another protocol.
    fn is_interim(&self) -> bool {
        (100..200).contains(&self.status) && self.status != 101
    }

    /// The value of a header, if it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok().map(str::trim)
    }

    /// `Retry-After`, in either of its forms, at most [`RETRY_AFTER_MAX`]. A date is relative to the server's own clock, if it sent
    /// its `Date`.
    fn retry_after(&self) -> Option<Duration> {
        let value = self.header("retry-after")?;
        let seconds = value.parse().ok().or_else(|| {
            let now = self.header("date").and_then(datetime::parse_http).unwrap_or_else(datetime::now);
            u64::try_from(datetime::parse_http(value)?.saturating_sub(now)).ok()
        })?;
        Some(Duration::from_secs(seconds).min(RETRY_AFTER_MAX))
    }
}

/// A response that refuses a request.
#[derive(Debug)]
pub struct Refusal {
    /// The status code and its reason.
    status: String,
    location: Option<String>,
    /// The minimum delay before the next attempt.
    pub retry_after: Option<Duration>,
    /// Whether the response comes from something in between, such as a captive portal, and not from the coordinator.
    pub is_from_between: bool,
    /// The beginning of the body.
    excerpt: String,
}

impl Refusal {
    /// Reads the beginning of the body, whose first bytes are `body`, from a stream that ends or fails within [`BODY_TIMEOUT`].
    pub fn read(head: &Head, mut body: Vec<u8>, stream: impl Read) -> Refusal {
        let length = head.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(BODY_BYTES_MAX);
        let missing = length.min(BODY_BYTES_MAX).saturating_sub(body.len());
        // Whatever was read before an error is kept.
        let _ = stream.take(missing as u64).read_to_end(&mut body);
        let is_chunked = head.header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
        let status = head.status_line.split_once(' ').map_or("", |(_, status)| status);
        Refusal {
            status: shown(status),
            location: head.headers.get("location").map(|value| shown(&String::from_utf8_lossy(value.as_bytes()))),
            retry_after: head.retry_after(),
            is_from_between: matches!(head.status, 200..=399 | 511),
            excerpt: excerpt(&body, is_chunked),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HTTP {}", self.status)?;
        if let Some(location) = &self.location {
            write!(f, " to {location}")?;
        }
        if let Some(time) = self.retry_after {
            write!(f, ", to be tried again after {} s", time.as_secs())?;
        }
        if self.is_from_between {
            write!(f, "; {FROM_BETWEEN}")?;
        }
        if !self.excerpt.is_empty() {
            write!(f, "; it says: {}", self.excerpt)?;
        }
        Ok(())
    }
}

/// The text of a body, on one line: without the tags of HTML, and without the size of its first chunk.
fn excerpt(body: &[u8], is_chunked: bool) -> String {
    let text = String::from_utf8_lossy(body);
    let text = if is_chunked { text.split_once('\n').map_or("", |(_, text)| text) } else { &text };
    if !text.trim_start().starts_with('<') {
        return shown(text);
    }
    let pieces = text.split('<').map(|piece| piece.split_once('>').map_or("", |(_, text)| text));
    shown(&pieces.collect::<Vec<_>>().join(" "))
}

fn shown(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut shown: String = words.chars().take(TEXT_CHARS_MAX).collect();
    if shown.len() < words.len() {
        shown.push('…');
    }
    sanitize_for_log(&shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head_of(text: &[u8]) -> Option<Head> {
        read_head(&mut &*text).expect("a slice can be read").map(|(head, _)| head)
    }

    #[test]
    fn read_head_needs_a_valid_status_line_only() {
        let many = b"a:b\r\n".repeat(1000);
        let headers: [&[u8]; 8] = [
            b"",
            b"Proxy-Agent : x\r\n",
            b"Via: a\r\n\tb\r\n",
            b" folded\r\n",
            b"no colon\r\n",
            b"Pr\xe9sent: x\r\n",
            b"X: \x01\r\n",
            &many,
        ];
        for header in headers {
            let text = [b"HTTP/1.1 200 OK\r\n", header, b"Date: today\r\n\r\n"].concat();
            let head = head_of(&text).unwrap_or_else(|| panic!("refused: {}", header.escape_ascii()));
            assert_eq!((head.status, head.status_line.as_str()), (200, "HTTP/1.1 200 OK"));
            assert_eq!(head.header("date"), Some("today"));
        }
        assert_eq!(head_of(b"HTTP/1.0 407 No\r\nDate: today\r\nX: \0\r\n\r\n").map(|head| head.status), Some(407));
        assert!(head_of(b"SSH-2.0-OpenSSH_9.6\r\n\r\n").is_none());
    }

    #[test]
    fn read_head_skips_interim_responses_up_to_a_limit() {
        let interim = "HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n";
        let text = format!("HTTP/1.1 100 Continue\r\n\r\n{interim}HTTP/1.1 101 Switching\r\n\r\nframes");
        let (head, rest) = read_head(&mut text.as_bytes()).expect("a slice").expect("a head");
        assert_eq!((head.status, &rest[..]), (101, &b"frames"[..]));
        assert!(head_of(interim.as_bytes()).is_none());
        assert!(head_of(format!("{}HTTP/1.1 101 Switching\r\n\r\n", interim.repeat(1000)).as_bytes()).is_none());
    }

    #[test]
    fn read_head_is_bounded() {
        let of_length = |length: usize| {
            let start = b"HTTP/1.1 200 OK\r\n".to_vec();
            let filler = vec![b'a'; length - start.len() - 6];
            head_of(&[start, b"a:".to_vec(), filler, b"\r\n\r\n".to_vec()].concat())
        };
        assert!(of_length(HEAD_BYTES_MAX).is_some());
        assert!(of_length(HEAD_BYTES_MAX + 1).is_none());
        assert!(of_length(HEAD_BYTES_MAX * 9).is_none());
    }

    #[test]
    fn read_head_takes_as_many_headers_as_fit() {
        let start = b"HTTP/1.1 200 OK\n";
        let headers = b"a:\n".repeat((HEAD_BYTES_MAX - start.len() - 20) / 3);
        let head = head_of(&[&start[..], &headers, b"Date: now\r\n\r\n"].concat()).expect("HTTP");
        assert!(head.headers.contains_key("date"));
    }

    #[test]
    fn read_head_returns_what_follows_in_whatever_pieces_it_comes() {
        let text = b"HTTP/1.1 101 OK\r\na: b\r\n\r\nrest\r\n\r\n";
        for piece in 1..text.len() {
            struct Pieces<'a>(std::slice::Chunks<'a, u8>);
            impl Read for Pieces<'_> {
                fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                    self.0.next().map_or(Ok(0), |mut piece| piece.read(buffer))
                }
            }
            let mut pieces = Pieces(text.chunks(piece));
            let (head, mut rest) = read_head(&mut pieces).expect("readable").expect("HTTP");
            pieces.read_to_end(&mut rest).expect("readable");
            assert_eq!((head.header("a"), &*rest), (Some("b"), &b"rest\r\n\r\n"[..]));
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_and_at_most_five_minutes() {
        let of = |headers: &str| {
            let head = head_of(format!("HTTP/1.1 503 Busy\r\n{headers}\r\n\r\n").as_bytes()).expect("HTTP");
            head.retry_after().map(|time| time.as_secs())
        };
        assert_eq!(of("Retry-After: 12"), Some(12));
        assert_eq!(of("Retry-After: 86400"), Some(300));
        assert_eq!(of("Retry-After: -1"), None);
        assert_eq!(of("Retry-After: soon"), None);
        assert_eq!(of("Retry-After: 99999999999999999999"), None);
        let date = "Date: Fri, 27 Nov 2026 10:00:00 GMT\r\n";
        assert_eq!(of(&format!("{date}Retry-After: Fri, 27 Nov 2026 10:00:40 GMT")), Some(40));
        assert_eq!(of(&format!("{date}Retry-After: Fri, 27 Nov 2026 09:00:00 GMT")), None);
        assert_eq!(of("Retry-After: Fri, 27 Nov 2099 10:00:00 GMT"), Some(300));
    }

    #[test]
    fn refusal_is_a_short_printable_line() {
        let text = |head: &str, body: &str| {
            let head = head_of(format!("HTTP/1.1 {head}\r\n\r\n").as_bytes()).expect("HTTP");
            Refusal::read(&head, Vec::new(), body.as_bytes()).to_string()
        };
        assert_eq!(
            text("403 Forbidden", "{\"error\":\n \"key\x1b[2J\"}"),
            "HTTP 403 Forbidden; it says: {\"error\": \"key\\u{1b}[2J\"}"
        );
        let portal = text("302 Found\r\nLocation: http://portal/x", "<html>\n<b>Log</b> in</html>");
        assert_eq!(
            portal,
            "HTTP 302 Found to http://portal/x; something in between answers: log in there, or correct the URL; it says: Log in"
        );
        assert_eq!(
            text("500 E\r\nTransfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n"),
            "HTTP 500 E; it says: hello 0"
        );
        assert_eq!(text("500 E\r\nContent-Length: 2", "hello"), "HTTP 500 E; it says: he");
        let long = text("500 E\r\nLocation: x", &"é ".repeat(10_000));
        assert!(long.chars().count() < 130 && long.ends_with('…'), "{long}");
    }
}
