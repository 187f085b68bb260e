//! The `agent.toml` that a pairing leaves behind: a complete, commented file if there was none, otherwise the operator's file
//! with only those values changed that the pairing decides.
//!
//! Invariants: an existing file keeps its comments, key order, spelling, line ends and unknown keys. One exception: dotted keys
//! of the same table that are not adjacent are grouped, because `toml_edit` writes them so. A host token is only shown redacted.
//! Pure functions; the caller parses the text again before writing it.

use toml_edit::{
    ArrayOfTables, DocumentMut, InlineTable, Item, RawString, Table, TableLike, TomlError, Value, table, value,
};

use super::{CoordinatorUrls, ModelTerms, Paired};
use crate::config::{BackendConfig, KEY_PATH_DEFAULT, MAX_CONCURRENT_RANGE, without_bom};
use crate::logging::{redact, sanitize_for_log};

/// Prices of a new file when the pairing names none, USDC micro-units per million tokens.
const INPUT_DEFAULT: u64 = 500_000;
const OUTPUT_DEFAULT: u64 = 750_000;
/// Jobs at a time, likewise.
const MAX_CONCURRENT_DEFAULT: u32 = 4;

/// Start of the comment lines that record the pairing.
const PAIRED_WITH: &str = "# paired with:  ";
const PROVIDER_ID: &str = "# provider_id:  ";
const HOST_TOKEN: &str = "# host token:   ";

/// Returns the new text of the file. `old` is the present text, empty if there is no file; `found` lists discovered backends
/// that it does not name.
///
/// # Errors
/// `old` is not TOML, or has a value where a table belongs.
pub fn text(old: &str, urls: &CoordinatorUrls, paired: &Paired, found: &[BackendConfig]) -> Result<String, String> {
    if old.is_empty() {
        return edit(&new_file(paired, found), urls, paired, &[]);
    }
    let body = without_bom(old);
    let mark = &old[..old.len() - body.len()];
    let mut new = edit(body, urls, paired, found)?;
    // `toml_edit` ends every line with a `\n`.
    if !body.ends_with('\n') {
        new.truncate(new.trim_end_matches('\n').len());
    }
    if body.contains("\r\n") {
        new = new.replace('\n', "\r\n");
    }
    Ok(format!("{mark}{new}"))
}

/// Returns a complete, commented file, for [`edit`] to fill in what the pairing decides.
fn new_file(Paired { models, .. }: &Paired, found: &[BackendConfig]) -> String {
    let backends = if found.is_empty() {
        "# [[backends]]\n# kind = \"llamacpp\"\n# url = \"http://localhost:8080\"\n".to_owned()
    } else {
        found.iter().map(|backend| format!("[[backends]]\n{}", backend_table(backend))).collect()
    };
    let default_price = |of_model: fn(&ModelTerms) -> Option<u64>, otherwise: u64| {
        // With a default of 0, models that the pairing does not name would not be offered.
        match models.first().and_then(of_model).filter(|price| *price > 0) {
            Some(price) => price.to_string(),
            None => format!("{otherwise}        # the pairing named none; set your own"),
        }
    };
    let input = default_price(|model| model.input_per_1m, INPUT_DEFAULT);
    let output = default_price(|model| model.output_per_1m, OUTPUT_DEFAULT);
    let model_hint = if models.is_empty() {
        "# \"my-big-model\" = { input_per_1m = 900_000, output_per_1m = 1_800_000 }\n"
    } else {
        ""
    };
    format!(
        r#"# Written by `usepod-agent setup`. Edit it as you like: a later setup keeps what is not its own to decide, and
# leaves a copy of this file beside it. `usepod-agent validate` checks it.
#
{PAIRED_WITH}
{PROVIDER_ID}
{HOST_TOKEN}

[operator]                            # who runs this; all of it may be left out
# display_name = "BlueBoxRig-01"
# wallet = "…"
# contact_email = "…"

[coordinator]                         # where the agent dials; no port is opened
url = ""
# ca_file = "/etc/ssl/own-ca.pem"      # trusted beside the roots of the web

[identity]                            # keep a copy of that file: it is who you are
# key_path = "{KEY_PATH_DEFAULT}"

# The servers whose models are offered. Of two that list a model, the kind that comes first serves it: vllm,
# llamacpp, lmstudio, ollama, openai, venice, openrouter.
{backends}# models = ["only-this-one"]          # of a backend: offer nothing else of it
# max_concurrent = 4                  # of a backend: jobs of it at a time

[pricing]                             # USDC micro-units per million tokens: 500_000 is 0.50 USDC
default_input_per_1m = {input}
default_output_per_1m = {output}

[pricing.models]                      # those of single models; one whose price is 0 is not offered
{model_hint}
[limits]
max_concurrent = {MAX_CONCURRENT_DEFAULT}                    # jobs at a time, 1 to 256
# drain_seconds = 30                  # for jobs in flight when the agent is stopped
# max_tokens_per_minute = 200_000     # prompts and answers of the last 60 s; beyond, jobs are refused

[observability]
# log_level = "info"                  # off, error, warn, info, debug or trace
# log_file = "~/.usepod-agent/agent.log"    # in place of stderr; 8 MB, and one older of that size
"#
    )
}

/// Applies what the pairing decides to the text of a file.
fn edit(old: &str, urls: &CoordinatorUrls, paired: &Paired, found: &[BackendConfig]) -> Result<String, String> {
    let mut document: DocumentMut =
        with_head(old, urls, paired).parse().map_err(|e: TomlError| e.message().to_owned())?;
    let root = document.as_item_mut();
    edit_coordinator(entry(root, "coordinator", table())?, urls)?;
    add_backends(root, found)?;
    edit_prices(entry(root, "pricing", table())?, &paired.models)?;
    if let Some(jobs) = paired.models.first().and_then(|model| model.max_concurrent).filter(|jobs| *jobs > 0) {
        let jobs = jobs.min(u64::from(*MAX_CONCURRENT_RANGE.end()));
        set(entry(root, "limits", table())?, "max_concurrent", integer(jobs))?;
    }
    Ok(document.to_string())
}

/// Records the pairing in the comment at the top, in place of an earlier one.
fn with_head(text: &str, urls: &CoordinatorUrls, paired: &Paired) -> String {
    let known = |text: &Option<String>, show: fn(&str) -> String| {
        text.as_deref().map_or_else(|| "none was given".to_owned(), show)
    };
    let facts = [
        (PAIRED_WITH, sanitize_for_log(urls.base())),
        (PROVIDER_ID, known(&paired.provider_id, sanitize_for_log)),
        (HOST_TOKEN, known(&paired.host_token, redact)),
    ];
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let head = lines.iter().take_while(|line| line.is_empty() || line.starts_with('#')).count();
    let mut new = String::new();
    for (label, fact) in facts {
        match lines[..head].iter_mut().find(|line| line.starts_with(label)) {
            Some(line) => *line = format!("{label}{fact}"),
            None => new.extend([label, &fact, "\n"]),
        }
    }
    if !new.is_empty() {
        new.push('\n');
    }
    new + &lines.join("\n") + "\n"
}

fn edit_coordinator(coordinator: &mut Item, urls: &CoordinatorUrls) -> Result<(), String> {
    set(coordinator, "url", urls.connect().into())?;
    // The pairing has enrolled this identity: the code is used up.
    let coordinator = as_table(coordinator)?;
    let comment = coordinator.key("enrollment_code").and_then(|key| key.leaf_decor().prefix()?.as_str());
    let comment = comment.filter(|text| text.contains('#')).map(str::to_owned);
    coordinator.remove("enrollment_code");
    // The comment above it may be about something else.
    if let (Some(comment), Some(mut url)) = (comment, coordinator.key_mut("url")) {
        let decor = url.leaf_decor_mut();
        let own = decor.prefix().and_then(RawString::as_str).unwrap_or_default();
        decor.set_prefix(comment + own);
    }
    Ok(())
}

fn add_backends(root: &mut Item, found: &[BackendConfig]) -> Result<(), String> {
    if found.is_empty() {
        return Ok(());
    }
    let backends = entry(root, "backends", Item::ArrayOfTables(ArrayOfTables::new()))?;
    for backend in found.iter().map(backend_table) {
        match backends {
            Item::ArrayOfTables(tables) => tables.push(backend),
            Item::Value(Value::Array(list)) => list.push(backend.into_inline_table()),
            other => return Err(format!("backends is of type {}", other.type_name())),
        }
    }
    Ok(())
}

fn backend_table(backend: &BackendConfig) -> Table {
    let url = backend.url.as_ref().map(|url| ("url", value(url.as_str())));
    [("kind", value(backend.kind.name()))].into_iter().chain(url).collect()
}

/// Sets the prices that the pairing names; a price that it does not name stays.
fn edit_prices(pricing: &mut Item, models: &[ModelTerms]) -> Result<(), String> {
    for ModelTerms { model_id, input_per_1m, output_per_1m, .. } in models {
        for (key, price) in [("input_per_1m", input_per_1m), ("output_per_1m", output_per_1m)] {
            if let Some(price) = price {
                let of_models = entry(pricing, "models", table())?;
                set(entry(of_models, model_id, InlineTable::new().into())?, key, integer(*price))?;
            }
        }
    }
    Ok(())
}

/// Returns an entry of a table, however the table is spelled; inserts `absent` if there is none.
fn entry<'a>(table: &'a mut Item, key: &str, absent: Item) -> Result<&'a mut Item, String> {
    let table = as_table(table)?;
    if !table.contains_key(key) {
        table.insert(key, absent);
    }
    table.get_mut(key).ok_or_else(|| format!("{key} is missing"))
}

/// Sets a value and keeps the comment beside it. An equal value keeps its spelling.
fn set(table: &mut Item, key: &str, mut new: Value) -> Result<(), String> {
    if let Item::Value(Value::InlineTable(table)) = table
        && !table.contains_key(key)
    {
        // `toml_edit` counts the space before the closing brace to the last value.
        if let Some((_, last)) = table.iter_mut().last() {
            let decor = last.decor_mut();
            if decor.suffix().and_then(RawString::as_str).is_some_and(|suffix| suffix.trim().is_empty()) {
                decor.set_suffix("");
            }
        }
    }
    let table = as_table(table)?;
    match table.get_mut(key) {
        Some(Item::Value(old)) => {
            let is_same = match (&*old, &new) {
                (Value::Integer(old), Value::Integer(new)) => old.value() == new.value(),
                (Value::String(old), Value::String(new)) => old.value() == new.value(),
                _ => false,
            };
            if !is_same {
                *new.decor_mut() = old.decor().clone();
                *old = new;
            }
        }
        _ => {
            table.insert(key, new.into());
        }
    }
    Ok(())
}

fn as_table(item: &mut Item) -> Result<&mut dyn TableLike, String> {
    let kind = item.type_name();
    item.as_table_like_mut().ok_or_else(|| format!("a {kind} stands where a table belongs"))
}

/// Converts a number; TOML has none above `i64::MAX`.
fn integer(number: u64) -> Value {
    i64::try_from(number).unwrap_or(i64::MAX).into()
}

#[cfg(test)]
mod tests {
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
        let text =
            text(old, &CoordinatorUrls::parse("https://c.example").expect("a site"), paired, found).expect("TOML");
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

    /// Every way to spell a table, and keys that nobody knows.
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

    /// The lines that are only in `old`, and those only in `new`; what both have is in the same order.
    fn changed<'a>(old: &'a str, new: &'a str) -> [Vec<&'a str>; 2] {
        let (of_old, of_new): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
        let (kept, gone) =
            of_old.iter().filter(|line| !line.is_empty()).partition::<Vec<&str>, _>(|l| of_new.contains(l));
        let (left, added) =
            of_new.iter().filter(|line| !line.is_empty()).partition::<Vec<&str>, _>(|l| of_old.contains(l));
        assert_eq!(kept, left);
        [gone, added]
    }

    const HEAD: [&str; 3] =
        ["# paired with:  https://c.example", "# provider_id:  prov_1", "# host token:   host…6789"];

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
        // The same pairing over it changes nothing, and another one nothing but its own lines.
        assert_eq!(written(&text, &paired(vec![model("paired", 3, 4, 5)]), &[]).0, text);
        let other = Paired { provider_id: Some("prov_2".to_owned()), ..paired(vec![model("paired", 3, 8, 5)]) };
        let (repaired, _) = written(&text, &other, &[]);
        let [gone, new] = changed(&text, &repaired);
        assert_eq!(gone, [HEAD[1], "paired.output_per_1m = 4"]);
        assert_eq!(new, ["# provider_id:  prov_2", "paired.output_per_1m = 8"]);
        // Without models the pairing decides no limit.
        assert_eq!(written(OLD, &Paired::default(), &[]).1.limits.max_concurrent, 200);
    }

    #[test]
    fn line_ends_a_byte_order_mark_and_a_last_line_without_an_end_stay() {
        let lines = OLD.lines().map(|line| format!("{line}\r\n")).collect::<String>();
        for old in [lines.as_str(), lines.trim_end(), OLD.trim_end(), &format!("\u{feff}{OLD}")] {
            let (text, _) = written(old, &paired(vec![model("paired", 3, 4, 5)]), &[]);
            let plain = written(OLD, &paired(vec![model("paired", 3, 4, 5)]), &[]).0;
            assert_eq!(text.replace("\r\n", "\n").trim_start_matches('\u{feff}').trim_end(), plain.trim_end());
            assert_eq!(
                text.matches('\n').count(),
                text.matches(if old.contains('\r') { "\r\n" } else { "\n" }).count()
            );
            assert_eq!(text.starts_with('\u{feff}'), old.starts_with('\u{feff}'));
            assert_eq!(text.ends_with('\n'), old.ends_with('\n'));
            assert_eq!(written(&text, &paired(vec![model("paired", 3, 4, 5)]), &[]).0, text);
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
            // In braces, with and without room.
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
            // Dotted.
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
            // A table of its own for each model, and a comment that the code leaves behind.
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
            // The same, of other models.
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
            let paired =
                Paired { host_token: Some(host_token.clone()), provider_id: Some(provider_id.clone()), models };
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
}
