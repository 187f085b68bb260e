//! Suggests the name that a misspelled name was probably meant to be.

/// Two names are similar if at most one letter in this many differs.
const LETTERS_PER_EDIT: usize = 3;
/// Maximum number of bytes compared per name.
const COMPARED_MAX: usize = 80;

/// Returns the most similar of `names`, if one is similar enough; if several are equally similar, the first.
pub fn nearest<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let mut nearest: Option<(usize, &str)> = None;
    for name in names {
        let distance = distance(wanted, name);
        let is_similar = distance <= wanted.len().max(name.len()) / LETTERS_PER_EDIT;
        if is_similar && nearest.is_none_or(|(least, _)| distance < least) {
            nearest = Some((distance, name));
        }
    }
    nearest.map(|(_, name)| name)
}

/// Returns the Levenshtein distance in bytes, ignoring case; 0 if one name is a prefix of the other.
fn distance(a: &str, b: &str) -> usize {
    let letters = |text: &str| -> Vec<u8> { text.bytes().take(COMPARED_MAX).map(|b| b.to_ascii_lowercase()).collect() };
    let (a, b) = (letters(a), letters(b));
    if !a.is_empty() && !b.is_empty() && (a.starts_with(&b) || b.starts_with(&a)) {
        return 0;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let changed = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_is_a_name_that_could_have_been_meant() {
        let listed = ["llama3.2:latest", "qwen2.5-coder:7b", "mistral"];
        for (wanted, expected) in [
            ("llama3.2", Some("llama3.2:latest")),
            ("Mistral", Some("mistral")),
            ("qwen2.5-codr:7b", Some("qwen2.5-coder:7b")),
            ("gpt-oss-120b", None),
            ("", None),
        ] {
            assert_eq!(nearest(wanted, listed), expected, "{wanted}");
        }
        assert_eq!(nearest("x", []), None);
        assert_eq!((distance("kitten", "sitting"), distance("", "abc"), distance("a", "A")), (3, 3, 0));
    }
}
