use std::path::Path;

use toml_edit::Key;

use super::*;
use crate::backend::{BaseUrl, Kind};
use crate::config::Config;

fn model(id: &str, input: u64, output: u64, jobs: u64) -> ModelTerms {
    let model_id = id.to_owned();
    ModelTerms { model_id, input_per_1m: Some(input), output_per_1m: Some(output), max_concurrent: Some(jobs) }
}

fn paired(models: Vec<ModelTerms>) -> Paired {
    Paired { host_token: Some("host-secret-0123456789".to_owned()), provider_id: Some("prov_1".to_owned()), models }
}

fn written(old: &str, paired: &Paired, found: &[BackendConfig]) -> (String, Config) {
    let text = text(old, &CoordinatorUrls::parse("https://c.example").expect("a site"), paired, found).expect("TOML");
    let config = Config::parse(&text, Path::new("x"), false).unwrap_or_else(|e| panic!("{e}:\n{text}"));
    (text, config)
}

#[test]
fn a_first_file_is_complete_and_shows_no_token() {
    let found = [BackendConfig::at(Kind::LlamaCpp, BaseUrl::parse("http://localhost:8080").expect("a URL"))];
    let (text, config) = written("", &paired(vec![model("m", 7, 8, 3), model("n", 0, 1, 9)]), &found);
    assert_eq!(config.coordinator.url.to_string(), "wss://c.example/provider/connect");
    assert_eq!((config.pricing.default.input_per_1m, config.pricing.default.output_per_1m), (7, 8));
    assert_eq!((config.pricing.of("n").input_per_1m, config.limits.max_concurrent), (0, 3));
    assert_eq!((config.backends.len(), config.backends[0].kind), (1, Kind::LlamaCpp));
    assert!(text.contains("prov_1") && !text.contains("secret"), "{text}");
    // The same pairing over it changes nothing.
    assert_eq!(written(&text, &paired(vec![model("m", 7, 8, 3), model("n", 0, 1, 9)]), &[]).0, text);
}

#[test]
fn without_models_there_are_defaults() {
    let (_, config) = written("", &Paired::default(), &[]);
    assert_eq!((config.pricing.default.input_per_1m, config.pricing.default.output_per_1m), (500_000, 750_000));
    assert_eq!((config.limits.max_concurrent, config.backends.len()), (4, 0));
    let (_, config) = written("", &paired(vec![model("free", 0, 0, 0)]), &[]);
    assert_eq!((config.pricing.default.input_per_1m, config.limits.max_concurrent), (500_000, 4));
    let (_, config) = written("", &paired(vec![model("m", 1, 1, 100_000)]), &[]);
    assert_eq!(config.limits.max_concurrent, 256);
}

/// Every way to write a table, and unknown keys.
const OLD: &str = r#"
odd.dotted = 1
list = [
  1, # a comment in it
  "two",
]
operator = { display_name = 'Rig "1"', "odd key" = 1979-05-27T07:32:00Z }
# Where it dials.
coordinator.url = "wss://old/"    # theirs
coordinator.enrollment_code = "POD-ENROLL-1"
coordinator.odd = """
two
lines"""
backends = [
  { kind = "openrouter", api_key_env = "K", models = ["a", "b"], markup = 0.05 },
  { kind = "vllm", url = "http://h:1", max_concurrent = 0x10 },
]
[identity]
key_path = "/keys/\u00e9.key"
[pricing]
default_input_per_1m = 1_000
default_output_per_1m = 2_000
odd = true
[pricing.models]
mine = { input_per_1m = 5, output_per_1m = 6 }
paired.input_per_1m = 1   # low
[pricing.models."also.mine"]
input_per_1m = 9

  [limits] # of this box
max_concurrent = 200  # of a big box
drain_seconds = 7
[observability]
log_level = "debug"
prometheus_addr = "127.0.0.1:9090"
[[plugins]]
name = "x"
[plugins.sub]
deep = [[1, 2], [{ a = 1 }]]
[[plugins]]
name = "y"
# The end.
"#;

/// The lines that are only in `old`, and the lines that are only in `new`; common lines must be in the same order.
fn changed<'a>(old: &'a str, new: &'a str) -> [Vec<&'a str>; 2] {
    let (of_old, of_new): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    let (kept, gone) = of_old.iter().filter(|line| !line.is_empty()).partition::<Vec<&str>, _>(|l| of_new.contains(l));
    let (left, added) = of_new.iter().filter(|line| !line.is_empty()).partition::<Vec<&str>, _>(|l| of_old.contains(l));
    assert_eq!(kept, left);
    [gone, added]
}

const HEAD: [&str; 3] = ["# paired with:  https://c.example", "# provider_id:  prov_1", "# host token:   host…6789"];

#[test]
fn an_old_file_keeps_everything_but_what_the_pairing_decides() {
    let (text, config) = written(OLD, &paired(vec![model("paired", 3, 4, 5)]), &[]);
    let [gone, new] = changed(OLD, &text);
    assert_eq!(
        gone,
        [
            "coordinator.url = \"wss://old/\"    # theirs",
            "coordinator.enrollment_code = \"POD-ENROLL-1\"",
            "paired.input_per_1m = 1   # low",
            "max_concurrent = 200  # of a big box",
        ]
    );
    let decided = [
        "coordinator.url = \"wss://c.example/provider/connect\"    # theirs",
        "paired.input_per_1m = 3   # low",
        "paired.output_per_1m = 4",
        "max_concurrent = 5  # of a big box",
    ];
    assert_eq!(new, [&HEAD[..], &decided].concat());
    let price = |id| (config.pricing.of(id).input_per_1m, config.pricing.of(id).output_per_1m);
    assert_eq!(
        [price("mine"), price("also.mine"), price("paired"), price("?")],
        [(5, 6), (9, 2000), (3, 4), (1000, 2000)]
    );
    assert_eq!((config.limits.max_concurrent, config.limits.drain.as_secs()), (5, 7));
    assert_eq!(config.key_path, Path::new("/keys/\u{e9}.key"));
    // The same pairing again changes nothing, and another pairing changes only its own lines.
    assert_eq!(written(&text, &paired(vec![model("paired", 3, 4, 5)]), &[]).0, text);
    let other = Paired { provider_id: Some("prov_2".to_owned()), ..paired(vec![model("paired", 3, 8, 5)]) };
    let (repaired, _) = written(&text, &other, &[]);
    let [gone, new] = changed(&text, &repaired);
    assert_eq!(gone, [HEAD[1], "paired.output_per_1m = 4"]);
    assert_eq!(new, ["# provider_id:  prov_2", "paired.output_per_1m = 8"]);
    // Without models, the pairing sets no limit.
    assert_eq!(written(OLD, &Paired::default(), &[]).1.limits.max_concurrent, 200);
}

#[test]
fn line_ends_a_byte_order_mark_and_a_last_line_without_an_end_stay() {
    let lines = OLD.lines().map(|line| format!("{line}\r\n")).collect::<String>();
    for old in [lines.as_str(), lines.trim_end(), OLD.trim_end(), &format!("\u{feff}{OLD}")] {
        let (text, _) = written(old, &paired(vec![model("paired", 3, 4, 5)]), &[]);
        let plain = written(OLD, &paired(vec![model("paired", 3, 4, 5)]), &[]).0;
        assert_eq!(text.replace("\r\n", "\n").trim_start_matches('\u{feff}').trim_end(), plain.trim_end());
        assert_eq!(text.matches('\n').count(), text.matches(if old.contains('\r') { "\r\n" } else { "\n" }).count());
        assert_eq!(text.starts_with('\u{feff}'), old.starts_with('\u{feff}'));
        assert_eq!(text.ends_with('\n'), old.ends_with('\n'));
        assert_eq!(written(&text, &paired(vec![model("paired", 3, 4, 5)]), &[]).0, text);
    }
}

#[test]
fn mixed_line_ends_become_lf() {
    let plain = written(OLD, &paired(vec![model("paired", 3, 4, 5)]), &[]).0;
    // One line of the text in CRLF; all lines but those of a string in CRLF; a string's alone in CRLF.
    let crlf = OLD.replace('\n', "\r\n");
    for old in [
        OLD.replacen('\n', "\r\n", 1),
        crlf.replace("\"\"\"\r\ntwo\r\nlines", "\"\"\"\ntwo\nlines"),
        OLD.replace("\"\"\"\ntwo\nlines", "\"\"\"\r\ntwo\r\nlines"),
    ] {
        assert_eq!(written(&old, &paired(vec![model("paired", 3, 4, 5)]), &[]).0, plain);
    }
}

#[test]
fn every_spelling_of_a_table_takes_what_is_new() {
    const PRICES: &str = "default_input_per_1m = 1\ndefault_output_per_1m = 2\n";
    let backends = "[[backends]]\nkind = \"llamacpp\"\nurl = \"http://localhost:8080\"\n";
    let found = [BackendConfig::at(Kind::LlamaCpp, BaseUrl::parse("http://localhost:8080").expect("a URL"))];
    let cases = [
        // No table for the models, the limits and the backends.
        (
            format!("[coordinator]\nurl = \"wss://c\"\n[pricing]\n{PRICES}# the end\n"),
            format!(
                "[coordinator]\nurl = \"wss://c.example/provider/connect\"\n[pricing]\n{PRICES}\n[pricing.models]\n\
                 m = {{ input_per_1m = 3, output_per_1m = 4 }}\n\n{backends}\n[limits]\nmax_concurrent = 5\n# the end\n"
            ),
        ),
        // Inline tables, with and without spaces.
        (
            "backends = [\n  { kind = \"vllm\", url = \"http://h:1\" }, # mine\n]\n\
             coordinator = { url = \"wss://c\", enrollment_code = \"C\" }\nlimits = {}\n\
             pricing = { default_input_per_1m = 1, default_output_per_1m = 2, models = {m={input_per_1m=1}} }\n"
                .to_owned(),
            "backends = [\n  { kind = \"vllm\", url = \"http://h:1\" }, { kind = \"llamacpp\", url = \"http://localhost:8080\" }, # mine\n]\n\
             coordinator = { url = \"wss://c.example/provider/connect\"}\nlimits = { max_concurrent = 5 }\n\
             pricing = { default_input_per_1m = 1, default_output_per_1m = 2, models = {m={input_per_1m=3, output_per_1m = 4 }} }\n"
                .to_owned(),
        ),
        // Dotted keys.
        (
            "coordinator.url = \"wss://c\"\npricing.default_input_per_1m = 1\npricing.default_output_per_1m = 2\n\
             limits.drain_seconds = 1\n[[backends]]\nkind = \"vllm\"\nurl = \"http://h:1\"\n# the end\n"
                .to_owned(),
            format!(
                "coordinator.url = \"wss://c.example/provider/connect\"\npricing.default_input_per_1m = 1\n\
                 pricing.default_output_per_1m = 2\nlimits.drain_seconds = 1\nlimits.max_concurrent = 5\n\n\
                 [pricing.models]\nm = {{ input_per_1m = 3, output_per_1m = 4 }}\n\
                 [[backends]]\nkind = \"vllm\"\nurl = \"http://h:1\"\n\n{backends}# the end\n"
            ),
        ),
        // A separate table for each model, and a comment that remains when the code is removed.
        (
            format!(
                "[pricing]\n{PRICES}[pricing.models.\"x\"] # dear\ninput_per_1m = 9\n[pricing.models.m]\n\
                 output_per_1m = 0x4 # hex\n[limits]\n[coordinator]\nurl = 'wss://c'\n# of May\nenrollment_code = \"C\"\n"
            ),
            format!(
                "[pricing]\n{PRICES}[pricing.models.\"x\"] # dear\ninput_per_1m = 9\n[pricing.models.m]\n\
                 output_per_1m = 0x4 # hex\ninput_per_1m = 3\n[limits]\nmax_concurrent = 5\n[coordinator]\n# of May\n\
                 url = \"wss://c.example/provider/connect\"\n\n{backends}"
            ),
        ),
        // The same, with other models.
        (
            format!(
                "[limits]\n[pricing]\n{PRICES}[pricing.models.\"x\"] # dear\ninput_per_1m = 9\n[coordinator]\nurl = 'wss://c'\n"
            ),
            format!(
                "[limits]\nmax_concurrent = 5\n[pricing]\n{PRICES}\n[pricing.models]\n\
                 m = {{ input_per_1m = 3, output_per_1m = 4 }}\n[pricing.models.\"x\"] # dear\ninput_per_1m = 9\n[coordinator]\n\
                 url = \"wss://c.example/provider/connect\"\n\n{backends}"
            ),
        ),
    ];
    for (old, new) in cases {
        let (text, config) = written(&old, &paired(vec![model("m", 3, 4, 5)]), &found);
        assert_eq!(text.strip_prefix(&format!("{}\n\n", HEAD.join("\n"))), Some(new.as_str()), "{text}");
        assert_eq!((config.pricing.of("m").output_per_1m, config.limits.max_concurrent), (4, 5));
        assert_eq!(config.backends.last().map(|backend| backend.kind), Some(Kind::LlamaCpp));
        assert_eq!(written(&text, &paired(vec![model("m", 3, 4, 5)]), &[]).0, text);
    }
}

#[test]
fn what_the_pairing_does_not_say_of_a_model_stays() {
    let old = "[coordinator]\nurl = \"wss://c\"\n[pricing]\ndefault_input_per_1m = 1\ndefault_output_per_1m = 2\n\
               [pricing.models]\nm = { input_per_1m = 7, output_per_1m = 0x8, \"my note\" = \"}\" }\nn = {}\n";
    let terms = |id: &str, input| {
        let model_id = id.to_owned();
        ModelTerms { model_id, input_per_1m: input, output_per_1m: None, max_concurrent: None }
    };
    let (text, config) = written(old, &paired(vec![terms("m", Some(5)), terms("n", None)]), &[]);
    assert!(text.contains("\nm = { input_per_1m = 5, output_per_1m = 0x8, \"my note\" = \"}\" }\n"), "{text}");
    assert_eq!((config.pricing.of("m").output_per_1m, config.pricing.of("n").input_per_1m), (8, 1));
}

#[test]
fn no_text_from_outside_breaks_the_file_or_leaves_its_place() {
    arbtest::arbtest(|u| {
        let texts: [String; 5] = u.arbitrary()?;
        let [id, provider_id, host_token, name, odd] = &texts;
        let other = format!("{id}+");
        let models = vec![model(id, u.arbitrary::<u32>()?.into(), 2, u.arbitrary()?), model(&other, 3, 4, 5)];
        let prices = models.clone();
        let paired = Paired { host_token: Some(host_token.clone()), provider_id: Some(provider_id.clone()), models };
        let old = format!(
            "[operator]\ndisplay_name = {}\n[coordinator]\nurl = \"wss://c\"\n[{}]\nx = 1\n[pricing]\n\
             default_input_per_1m = 1\ndefault_output_per_1m = 2\n[pricing.models]\n{} = {{}}\n",
            Value::from(name),
            Key::new(format!("odd {odd}")),
            Key::new(odd)
        );
        let (text, config) = written(&old, &paired, &[]);
        assert_eq!(config.pricing.of(id).input_per_1m, prices[0].input_per_1m.unwrap_or_default(), "{text}");
        let document: DocumentMut = text.parse().expect("TOML");
        assert_eq!(document["operator"]["display_name"].as_str(), Some(name.as_str()), "{text}");
        assert!(document.contains_key(&format!("odd {odd}")), "{text}");
        Ok(())
    });
}
