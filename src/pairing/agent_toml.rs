//! The `agent.toml` that a pairing leaves behind: a new text, in which the values that the pairing does not decide stand as the
//! old one spells them.
//!
//! Written anew rather than edited: TOML has four ways to spell a table, and an edit would have to know its way around all of
//! them to put a key in. What is lost are the comments of the old file, which its copy keeps.
//!
//! Invariants: no key of the old file is lost but those that the pairing decides; a host token is in it by its ends alone. Pure
//! functions; whoever writes the text to a file reads it once more before.

use std::borrow::Cow;
use std::fmt::{Arguments, Write as _};

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::{CoordinatorUrls, ModelTerms, Paired};
use crate::config::{BackendConfig, KEY_PATH_DEFAULT, MAX_CONCURRENT_RANGE, without_mark};
use crate::logging::{redact, sanitize_for_log};

/// Prices when neither the pairing nor the old file has any, USDC micro-units per million tokens.
const INPUT_DEFAULT: u64 = 500_000;
const OUTPUT_DEFAULT: u64 = 750_000;
/// Jobs at a time, likewise.
const MAX_CONCURRENT_DEFAULT: u32 = 4;

/// The tables that have a place of their own in the new text.
const KNOWN: [&str; 7] = ["operator", "coordinator", "identity", "backends", "pricing", "limits", "observability"];

/// The new text. `old` is the text of the file so far, empty when there is none; `found` are backends that it does not have.
///
/// # Errors
/// `old` is not TOML.
pub fn text(old: &str, site: &CoordinatorUrls, paired: &Paired, found: &[BackendConfig]) -> Result<String, String> {
    let old = without_mark(old);
    let table = DeTable::parse(old).map_err(|e| e.message().to_owned())?;
    let root = table.get_ref();
    let mut file = Writer { old, new: String::new() };
    file.head(site, paired);
    file.keys(root, &KNOWN);
    file.operator(root);
    file.coordinator(root, site);
    file.identity(root);
    file.backends(root, found);
    file.pricing(root, &paired.models);
    file.limits(root, paired.models.first());
    file.observability(root);
    file.tables("", root, &KNOWN);
    Ok(file.new)
}

struct Writer<'a> {
    /// The old text, which the spans are of.
    old: &'a str,
    new: String,
}

type Entry<'a> = (&'a Spanned<DeString<'a>>, &'a Spanned<DeValue<'a>>);

impl Writer<'_> {
    fn line(&mut self, line: &str) {
        self.new.push_str(line);
        self.new.push('\n');
    }

    fn put(&mut self, line: Arguments<'_>) {
        // A string takes whatever is written to it.
        let _ = self.new.write_fmt(line);
        self.new.push('\n');
    }

    fn head(&mut self, site: &CoordinatorUrls, paired: &Paired) {
        let known = |text: &Option<String>, show: fn(&str) -> String| {
            text.as_deref().map_or_else(|| "none was given".to_owned(), show)
        };
        let (provider_id, host_token) =
            (known(&paired.provider_id, sanitize_for_log), known(&paired.host_token, redact));
        self.line("# Written by `usepod-agent setup`. Edit it as you like: a later setup keeps what is not its own to decide, and");
        self.line("# leaves a copy of this file beside it. `usepod-agent validate` checks it.");
        self.line("#");
        self.put(format_args!("# paired with:  {}", sanitize_for_log(site.base())));
        self.put(format_args!("# provider_id:  {provider_id}"));
        self.put(format_args!("# host token:   {host_token}"));
    }

    fn operator(&mut self, root: &DeTable<'_>) {
        self.line("\n[operator]                            # who runs this; all of it may be left out");
        let hints = [
            ("display_name", "# display_name = \"BlueBoxRig-01\""),
            ("wallet", "# wallet = \"…\""),
            ("contact_email", "# contact_email = \"…\""),
        ];
        self.rest_of("operator", section(root, "operator"), &[], &hints);
    }

    fn coordinator(&mut self, root: &DeTable<'_>, site: &CoordinatorUrls) {
        self.line("\n[coordinator]                         # where the agent dials; no port is opened");
        self.put(format_args!("url = {}", quoted(&site.connect())));
        // A code is of the time before: the pairing has enrolled this identity.
        let decided = ["url", "enrollment_code"];
        let hint = "# ca_file = \"/etc/ssl/own-ca.pem\"      # trusted beside the roots of the web";
        self.rest_of("coordinator", section(root, "coordinator"), &decided, &[("ca_file", hint)]);
    }

    fn identity(&mut self, root: &DeTable<'_>) {
        self.line("\n[identity]                            # keep a copy of that file: it is who you are");
        let hint = format!("# key_path = \"{KEY_PATH_DEFAULT}\"");
        self.rest_of("identity", section(root, "identity"), &[], &[("key_path", &hint)]);
    }

    fn backends(&mut self, root: &DeTable<'_>, found: &[BackendConfig]) {
        let old = root.get("backends").and_then(|value| value.get_ref().as_array());
        let old: Vec<&DeTable<'_>> = old.into_iter().flatten().filter_map(|entry| entry.get_ref().as_table()).collect();
        self.line("\n# The servers whose models are offered. Of two that list a model, the kind that comes first serves it: vllm,");
        self.line("# llamacpp, lmstudio, ollama, openai, venice, openrouter.");
        for table in &old {
            self.line("[[backends]]");
            self.contents("backends", table, &[]);
        }
        for backend in found {
            self.line("[[backends]]");
            self.put(format_args!("kind = {}", quoted(backend.kind.name())));
            if let Some(url) = &backend.url {
                self.put(format_args!("url = {}", quoted(url.as_str())));
            }
        }
        if old.is_empty() && found.is_empty() {
            self.line("# [[backends]]");
            self.line("# kind = \"llamacpp\"");
            self.line("# url = \"http://localhost:8080\"");
        }
        self.line("# models = [\"only-this-one\"]          # of a backend: offer nothing else of it");
        self.line("# max_concurrent = 4                  # of a backend: jobs of it at a time");
    }

    fn pricing(&mut self, root: &DeTable<'_>, models: &[ModelTerms]) {
        let table = section(root, "pricing");
        self.line(
            "\n[pricing]                             # USDC micro-units per million tokens: 500_000 is 0.50 USDC",
        );
        // A default of 0 would offer nothing of what the pairing does not name.
        let of_first =
            |price: fn(&ModelTerms) -> Option<u64>| models.first().and_then(price).filter(|price| *price > 0);
        let defaults = [
            ("default_input_per_1m", of_first(|m| m.input_per_1m), INPUT_DEFAULT),
            ("default_output_per_1m", of_first(|m| m.output_per_1m), OUTPUT_DEFAULT),
        ];
        for (key, of_first, otherwise) in defaults {
            if let Some(value) = table.and_then(|table| table.get(key)) {
                let value = self.verbatim(value);
                self.put(format_args!("{key} = {value}"));
            } else if let Some(price) = of_first {
                self.put(format_args!("{key} = {price}"));
            } else {
                self.put(format_args!("{key} = {otherwise}        # the pairing named none; set your own"));
            }
        }
        let own = table.and_then(|table| section(table, "models"));
        if let Some(table) = table {
            self.keys(table, &["default_input_per_1m", "default_output_per_1m", "models"]);
        }
        self.line(
            "\n[pricing.models]                      # those of single models; one whose price is 0 is not offered",
        );
        for ModelTerms { model_id, input_per_1m, output_per_1m, .. } in models {
            let own = own.and_then(|own| section(own, model_id));
            let mut terms = Vec::new();
            for (key, price) in [("input_per_1m", input_per_1m), ("output_per_1m", output_per_1m)] {
                // What the pairing does not say of it stays as it was.
                let kept = || own.and_then(|own| own.get(key)).map(|value| self.verbatim(value));
                terms
                    .extend(price.map(|price| price.to_string()).or_else(kept).map(|price| format!("{key} = {price}")));
            }
            let others = own.map_or_else(Vec::new, |own| ordered(own, &["input_per_1m", "output_per_1m"]));
            for (key, value) in others.into_iter().filter(|(_, value)| !self.is_section(value)) {
                terms.push(format!("{} = {}", plain_or_quoted(key.get_ref()), self.verbatim(value)));
            }
            if !terms.is_empty() {
                self.put(format_args!("{} = {{ {} }}", quoted(model_id), terms.join(", ")));
            }
        }
        if let Some(own) = own {
            let decided: Vec<&str> = models.iter().map(|model| model.model_id.as_str()).collect();
            self.contents("pricing.models", own, &decided);
        } else if models.is_empty() {
            self.line("# \"my-big-model\" = { input_per_1m = 900_000, output_per_1m = 1_800_000 }");
        }
        if let Some(table) = table {
            self.tables("pricing", table, &["models"]);
        }
    }

    fn limits(&mut self, root: &DeTable<'_>, first: Option<&ModelTerms>) {
        self.line("\n[limits]");
        let table = section(root, "limits");
        let own = table.and_then(|table| table.get("max_concurrent")).map(|value| self.verbatim(value));
        let of_first = first.and_then(|model| model.max_concurrent).filter(|jobs| *jobs > 0);
        let of_first = of_first.map(|jobs| jobs.min(u64::from(*MAX_CONCURRENT_RANGE.end())).to_string());
        let jobs = of_first.or(own).unwrap_or_else(|| MAX_CONCURRENT_DEFAULT.to_string());
        self.put(format_args!("max_concurrent = {jobs}                    # jobs at a time, 1 to 256"));
        let drain = "# drain_seconds = 30                  # for jobs in flight when the agent is stopped";
        let tokens =
            "# max_tokens_per_minute = 200_000     # prompts and answers of the last 60 s; beyond, jobs are refused";
        let hints = [("drain_seconds", drain), ("max_tokens_per_minute", tokens)];
        self.rest_of("limits", table, &["max_concurrent"], &hints);
    }

    fn observability(&mut self, root: &DeTable<'_>) {
        self.line("\n[observability]");
        let level = "# log_level = \"info\"                  # off, error, warn, info, debug or trace";
        let file =
            "# log_file = \"~/.usepod-agent/agent.log\"    # in place of stderr; 8 MB, and one older of that size";
        let hints = [("log_level", level), ("log_file", file)];
        self.rest_of("observability", section(root, "observability"), &[], &hints);
    }

    /// What stands in a table, but for the keys that are decided, and how one would write those that are not there.
    fn rest_of(&mut self, path: &str, table: Option<&DeTable<'_>>, decided: &[&str], hints: &[(&str, &str)]) {
        if let Some(table) = table {
            self.keys(table, decided);
        }
        for (_, hint) in hints.iter().filter(|(key, _)| table.is_none_or(|table| !table.contains_key(*key))) {
            self.line(hint);
        }
        if let Some(table) = table {
            self.tables(path, table, decided);
        }
    }

    /// What stands in a table, but for the keys that somebody else writes.
    fn contents(&mut self, path: &str, table: &DeTable<'_>, except: &[&str]) {
        self.keys(table, except);
        self.tables(path, table, except);
    }

    /// The keys whose values stand behind them.
    fn keys(&mut self, table: &DeTable<'_>, except: &[&str]) {
        for (key, value) in ordered(table, except) {
            if !self.is_section(value) {
                let value = self.verbatim(value);
                self.put(format_args!("{} = {value}", plain_or_quoted(key.get_ref())));
            }
        }
    }

    /// The tables below a table, and those below them.
    fn tables(&mut self, path: &str, table: &DeTable<'_>, except: &[&str]) {
        for (key, value) in ordered(table, except) {
            if !self.is_section(value) {
                continue;
            }
            let key = plain_or_quoted(key.get_ref());
            let path = if path.is_empty() { key.into_owned() } else { format!("{path}.{key}") };
            match value.get_ref() {
                DeValue::Array(entries) => {
                    for entry in entries.iter().filter_map(|entry| entry.get_ref().as_table()) {
                        self.put(format_args!("\n[[{path}]]"));
                        self.contents(&path, entry, &[]);
                    }
                }
                DeValue::Table(table) => {
                    self.put(format_args!("\n[{path}]"));
                    self.contents(&path, table, &[]);
                }
                _ => {}
            }
        }
    }

    /// Whether a value has headers or dotted keys in the old text, in place of standing behind its key.
    fn is_section(&self, value: &Spanned<DeValue<'_>>) -> bool {
        let in_braces = |value: &Spanned<DeValue<'_>>| self.verbatim(value).starts_with('{');
        match value.get_ref() {
            DeValue::Table(_) => !in_braces(value),
            DeValue::Array(entries) => {
                !entries.is_empty() && entries.iter().all(|entry| entry.get_ref().is_table() && !in_braces(entry))
            }
            _ => false,
        }
    }

    /// A value as the old text spells it.
    fn verbatim(&self, value: &Spanned<DeValue<'_>>) -> String {
        self.old.get(value.span()).unwrap_or_default().to_owned()
    }
}

/// The entries in the order of the old text.
fn ordered<'a>(table: &'a DeTable<'a>, except: &[&str]) -> Vec<Entry<'a>> {
    let mut entries: Vec<Entry<'a>> = Vec::with_capacity(table.len());
    for (key, value) in table.iter().filter(|(key, _)| !except.contains(&key.get_ref().as_ref())) {
        let at = entries.partition_point(|(earlier, _)| earlier.span().start < key.span().start);
        entries.insert(at, (key, value));
    }
    entries
}

fn section<'a>(table: &'a DeTable<'a>, key: &str) -> Option<&'a DeTable<'a>> {
    table.get(key)?.get_ref().as_table()
}

fn plain_or_quoted(key: &str) -> Cow<'_, str> {
    let is_plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    if is_plain { key.into() } else { quoted(key).into() }
}

/// A text as TOML has it, on one line.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => {
                // A string takes whatever is written to it.
                let _ = write!(quoted, "\\u{:04X}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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
coordinator.url = "wss://old/"
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
paired.input_per_1m = 1
[pricing.models."also.mine"]
input_per_1m = 9
[limits]
max_concurrent = 200
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
"#;

    #[test]
    fn what_is_made_by_hand_survives_in_whatever_spelling() {
        let (text, config) = written(OLD, &paired(vec![model("paired", 3, 4, 5)]), &[]);
        let (was, is) = (DeTable::parse(OLD).expect("TOML"), DeTable::parse(&text).expect("TOML"));
        let (was, is) = (was.get_ref(), is.get_ref());
        for key in ["odd", "list", "operator", "backends", "identity", "observability", "plugins"] {
            assert_eq!(plain(&is[key]), plain(&was[key]), "{key}:\n{text}");
        }
        assert_eq!(is["coordinator"].get_ref()["odd"].get_ref().as_str(), Some("two\nlines"));
        assert!(!text.contains("ENROLL") && !text.contains("wss://old"), "{text}");
        let price = |id| (config.pricing.of(id).input_per_1m, config.pricing.of(id).output_per_1m);
        assert_eq!(
            [price("mine"), price("also.mine"), price("paired"), price("?")],
            [(5, 6), (9, 2000), (3, 4), (1000, 2000)]
        );
        assert_eq!((config.limits.max_concurrent, config.limits.drain.as_secs()), (5, 7));
        assert_eq!(config.key_path, Path::new("/keys/\u{e9}.key"));
        // Once more over its own work: nothing more is lost, nothing is gained.
        assert_eq!(written(&text, &paired(vec![model("paired", 3, 4, 5)]), &[]).0, text);
        // Without models the pairing decides no limit.
        assert_eq!(written(OLD, &Paired::default(), &[]).1.limits.max_concurrent, 200);
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
        assert!(text.contains("\n\"m\" = { input_per_1m = 5, output_per_1m = 0x8, \"my note\" = \"}\" }\n"), "{text}");
        assert_eq!((config.pricing.of("m").output_per_1m, config.pricing.of("n").input_per_1m), (8, 1));
    }

    /// A value without its place.
    fn plain(value: &Spanned<DeValue<'_>>) -> String {
        match value.get_ref() {
            DeValue::Table(table) => {
                let entry = |(key, value): Entry<'_>| format!("{:?}: {}", key.get_ref(), plain(value));
                format!("{{{}}}", table.iter().map(entry).collect::<Vec<_>>().join(", "))
            }
            DeValue::Array(entries) => format!("[{}]", entries.iter().map(plain).collect::<Vec<_>>().join(", ")),
            scalar => format!("{scalar:?}"),
        }
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
                "[operator]\ndisplay_name = {}\n[coordinator]\nurl = \"wss://c\"\n[{}]\nx = 1\n[pricing.models]\n{} = {{}}\n",
                quoted(name),
                quoted(&format!("odd {odd}")),
                quoted(odd)
            );
            let (text, config) = written(&old, &paired, &[]);
            assert_eq!(config.pricing.of(id).input_per_1m, prices[0].input_per_1m.unwrap_or_default(), "{text}");
            let is = DeTable::parse(&text).expect("TOML");
            let operator = is.get_ref()["operator"].get_ref();
            assert_eq!(operator["display_name"].get_ref().as_str(), Some(name.as_str()), "{text}");
            assert!(is.get_ref().contains_key(format!("odd {odd}").as_str()), "{text}");
            Ok(())
        });
    }
}
