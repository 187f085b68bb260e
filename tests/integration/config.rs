//! `agent.toml`: each file in `tests/data/config` is accepted, or refused with an error that names the fix. The first lines of
//! each file say what is expected.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::*;

/// The files of a folder below `tests/data`, at least `least` of them.
pub fn data_files(folder: &str, least: usize) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(folder);
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("failed to read {}: {e}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    assert!(files.len() >= least, "{} holds {} files", folder.display(), files.len());
    files
}

/// The value of a `# name: value` comment at the top of a file.
fn header<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let comments = text.lines().take_while(|line| line.starts_with('#'));
    comments
        .map(|line| line.trim_start_matches(['#', ' ']))
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// Runs `validate` with its own home and without internet access.
fn validate(file: &Path) -> Ran {
    let home = Scratch::new();
    let proxy = format!("http://{}", nobody_at("127.0.0.8"));
    let config = file.to_str().expect("a path in UTF-8");
    cli(home.path(), &["validate", "--config", config], &[("HTTPS_PROXY", &proxy)])
}

#[test]
fn valid_files_are_accepted() {
    for file in data_files("config/valid", 10) {
        let text = fs::read_to_string(&file).expect("a data file");
        let backends = header(&text, "backends").expect("# backends:");
        let Ran { code, stdout, stderr } = validate(&file);
        let name = file.display();
        assert_eq!(code, Some(0), "{name}: {stderr}");
        let expected = format!("ok: parsed {backends} backend(s)");
        assert_eq!(stdout.lines().next(), Some(expected.as_str()), "{name}");
    }
}

#[test]
fn invalid_files_are_refused_with_line_key_value_and_fix() {
    for file in data_files("config/invalid", 25) {
        let text = fs::read_to_string(&file).expect("a data file");
        let Ran { code, stdout, stderr } = validate(&file);
        let name = file.file_name().and_then(|name| name.to_str()).expect("a name");
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{name}: {stderr}");
        let place = match header(&text, "line").expect("# line:") {
            "-" => name.to_owned(),
            line => format!("{name}:{line}:"),
        };
        let words = header(&text, "expect").expect("# expect:").split(" | ").chain([place.as_str()]);
        for word in words {
            assert!(stderr.contains(word), "{name}: `{word}` is not in the error: {stderr}");
        }
        for secret in header(&text, "forbid").into_iter().flat_map(|list| list.split(" | ")) {
            assert!(!stderr.contains(secret), "{name}: the error shows a secret: {stderr}");
        }
    }
}

#[test]
fn unreadable_file_is_named() {
    let scratch = Scratch::new();
    let cases = [
        ("there-is-none.toml", None),
        ("binary.toml", Some(&[0xff, 0xfe, 0x00][..])),
        ("empty.toml", Some(b"")),
        ("a-folder/file.toml", Some(b"")),
    ];
    for (name, content) in cases {
        let path = match content {
            Some(content) => scratch.write(name, content),
            None => scratch.join(name),
        };
        let path = if name.contains('/') { path.parent().expect("a folder").to_owned() } else { path };
        let Ran { code, stdout, stderr } = validate(&path);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{name}: {stderr}");
        assert!(stderr.contains(path.to_str().expect("UTF-8")), "{name}: {stderr}");
    }
}

#[test]
fn validate_prints_what_would_be_offered_and_at_which_prices() {
    let backend = Backend::vllm(&["cheap", "dear", "free"]);
    let setup = Setup::new("wss://coordinator.example/").backend(backend.toml()).pricing(
        "[pricing.models]\ndear = { input_per_1m = 12_345_678, output_per_1m = 2_000_000 }\n\
             free = { input_per_1m = 0, output_per_1m = 1 }",
    );
    let Ran { code, stdout, stderr } = validate(&setup.write());
    assert_eq!(code, Some(0), "{stderr}");
    let line = |model: &str| stdout.lines().find(|line| line.contains(model)).map(str::to_owned);
    let cheap = line("cheap").unwrap_or_else(|| panic!("no line for `cheap`: {stdout}"));
    assert!(cheap.contains("0.50") && cheap.contains("0.75") && cheap.contains("vllm"), "{cheap}");
    let dear = line("dear").unwrap_or_else(|| panic!("no line for `dear`: {stdout}"));
    assert!(dear.contains("12.345678") && dear.contains("2.00"), "{dear}");
    assert_eq!(line("free"), None, "a model whose price is 0 is not offered: {stdout}");
}

#[test]
fn validate_names_an_unreachable_backend_and_accepts_the_file() {
    let address = nobody_at("127.0.0.9");
    let setup =
        Setup::new("wss://coordinator.example/").backend(format!("kind = \"ollama\"\nurl = \"http://{address}\""));
    let Ran { code, stdout, stderr } = validate(&setup.write());
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains(&address) && stdout.to_lowercase().contains("refused"), "{stdout}");
}
