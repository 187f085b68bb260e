//! The provider id that `setup` records in a comment of `agent.toml`, as 0.3.5 does.
//!
//! The comment changes nothing about what is offered. It only shows that this machine has been paired: a missing identity file is
//! then a disk that is not mounted, or a lost key, and not a first start.

/// The start of the comment.
pub const PROVIDER_ID_COMMENT: &str = "# provider_id:  ";
/// Maximum length of an id, in bytes.
const ID_BYTES_MAX: usize = 256;

/// The id in the first such comment, whatever its spacing and quotes.
pub fn provider_id(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let comment = line.trim_start().strip_prefix('#')?.trim_start_matches(['#', ' ', '\t']);
        let value = comment.strip_prefix("provider_id")?.trim_start().strip_prefix([':', '='])?;
        let id = value.trim().trim_matches(['"', '\'', '`']);
        // Excludes prose, such as `none was given`.
        let is_id = !id.is_empty() && id.len() <= ID_BYTES_MAX && !id.contains(char::is_whitespace);
        (is_id && !id.starts_with('<')).then(|| id.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn provider_id_is_found_in_a_comment_only() {
        let cases = [
            ("# provider_id:  prov_1\n[coordinator]\n", Some("prov_1")),
            ("[coordinator]\n  #provider_id = \"prov-1\"\r\n", Some("prov-1")),
            ("## provider_id: 'prov_1'\n# provider_id: prov_2", Some("prov_1")),
            ("# provider_id:  none was given\n", None),
            ("# provider_id: <not yet enrolled>\n", None),
            ("# provider_id:\n", None),
            ("# the provider_id: prov_1\n", None),
            ("provider_id = \"prov_1\"\n", None),
            ("", None),
        ];
        for (text, id) in cases {
            assert_eq!(provider_id(text).as_deref(), id, "{text}");
        }
        assert!(PROVIDER_ID_COMMENT.starts_with("# provider_id:"));
    }
}
