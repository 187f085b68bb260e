//! The layout of the report, and what it does not show.

use super::*;

/// The report of a machine on which most checks fail, with these variables set.
fn broken_report(variables: &[(&str, &str)]) -> String {
    let setup = setup(&format!("wss://{}/", nobody_at("127.0.0.75")));
    let setup = setup.backend(format!("kind = \"ollama\"\nurl = \"http://{}\"", nobody_at("127.0.0.76")));
    let setup = variables.iter().fold(setup, |setup, (name, value)| setup.env(name, value));
    Report::by(&setup, &[]).text
}

#[test]
fn report_fits_80_and_60_columns() {
    for width in [80, 60] {
        assert_fits(&broken_report(&[("COLUMNS", &width.to_string())]), width);
    }
}

#[test]
fn marks_are_words_without_a_utf8_locale() {
    for locale in [[("LC_ALL", "C"), ("LANG", "en_US.UTF-8")], [("LC_CTYPE", "POSIX"), ("LANG", "")]] {
        let text = broken_report(&locale);
        assert!(text.is_ascii(), "{text}");
        for line in ["\n  ok   config ", "\n  FAIL tcp ", "\n  skip tls ", "skipped: needs tcp"] {
            assert!(text.contains(line), "no `{line}` in:\n{text}");
        }
    }
}

/// On a terminal of `script`, of util-linux.
#[test]
fn color_needs_a_terminal_and_the_absence_of_no_color() {
    let home = Scratch::new();
    for (variables, is_colored) in [
        (&[("TERM", "xterm")][..], true),
        (&[("TERM", "xterm"), ("NO_COLOR", "1")], false),
        (&[("TERM", "dumb")], false),
    ] {
        let mut script = std::process::Command::new("script");
        script.arg("-qec").arg(format!("'{}' doctor", binary().display())).arg("/dev/null").current_dir(home.path());
        script.env_clear().env("HOME", home.path()).envs(variables.iter().copied());
        let output = script.stdin(std::process::Stdio::null()).output().expect("script, of util-linux");
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text.contains("\u{1b}[31mFAIL\u{1b}[0m config"), is_colored, "{variables:?}: {text}");
        assert!(text.contains("config "), "{variables:?}: {text}");
    }
    let (_, text) = Agent::run(home.path(), &["doctor"]).finish(SOON);
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn output_shows_no_secret() {
    let coordinator = coordinator(Some(0));
    let code = "POD-ENROLL-0123-4567-89ab";
    let echo = server(|request| {
        let key = request.header("authorization").unwrap_or_default().to_owned();
        (request.method == "POST").then(|| Answer::Json(401, json!({"error": format!("bad key {key}")})))
    });
    let setup = setup(&coordinator.url())
        .coordinator(&format!("enrollment_code = \"{code}\""))
        .backend(format!("{}\napi_key_env = \"THE_KEY\"", echo.toml()))
        .env("THE_KEY", "sk-secret-123");
    let report = Report::by(&setup, &["--log-level", "trace"]);
    report.assert_only_broken("completion", &["rejected the API key"], "api_key_env");
    let identity = fs::read_to_string(setup.identity()).expect("the identity");
    let seed = identity.lines().find_map(|line| line.strip_prefix("secret: ")).expect("the seed");
    for secret in [code, "sk-secret-123", seed] {
        assert!(!report.text.contains(secret), "`{secret}` is in the output:\n{}", report.text);
    }
}

#[test]
fn output_shows_no_control_characters_of_others() {
    let coordinator = coordinator(Some(0));
    let backend = server(|request| {
        let models = json!({"data": [{"id": "a\u{1b}[2Jb\nc"}]});
        (request.target == "/v1/models").then(|| Answer::Json(200, models))
    });
    let report = Report::by(&setup(&coordinator.url()).backend(backend.toml()), &["--no-inference"]);
    report.assert_well();
    assert!(!report.text.chars().any(|c| c.is_control() && c != '\n'), "{:?}", report.text);
    report.line('✓', "models", &["a", "b", "c"]);
}
