//! Quotes words for a POSIX shell, in command lines that are shown to the operator.

/// `text` as one word of a POSIX shell, quoted if necessary.
pub fn shell_quote(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_quote_quotes_only_where_necessary() {
        for (text, expected) in [
            ("/a/b-1.toml", "/a/b-1.toml"),
            ("", "''"),
            ("it's", r"'it'\''s'"),
            ("~/a", "'~/a'"),
            ("a b", "'a b'"),
            ("$x", "'$x'"),
        ] {
            assert_eq!(shell_quote(text), expected);
        }
    }
}
