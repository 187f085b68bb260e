//! `setup`: pairs this machine by a code that a person enters on a web page, and writes `agent.toml`.
//!
//! Invariant: `agent.toml` is unchanged until the pairing has succeeded. The file is then replaced atomically by a text that was
//! parsed first, and the previous text is kept beside it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::select;
use log::LevelFilter;

use super::args::{Globals, Setup};
use super::countdown::Countdown;
use super::run::{create_folder, install_signal_handler};
use super::{CliError, backends_of, print, print_raw, validate};
use crate::agent::shutdown::Stop;
use crate::backend::{BackendModel, BaseUrl, Kind};
use crate::config::{BackendConfig, Config, FILE_BYTES_MAX};
use crate::discovery::{LocalBackend, LocalServers, find_local, probe_all};
use crate::instance::identity::Identity;
use crate::instance::{AgentPaths, running_agent};
use crate::logging;
use crate::logging::{redact, sanitize_for_log};
use crate::pairing::{
    self, Advertised, BASE_DEFAULT, CoordinatorUrls, Event, Paired, PairingClient, PairingHandle, agent_toml,
};
use crate::sys::files;
use crate::sys::shell_quote;
use crate::sys::terminal::{Terminal, wrap};

/// How long to wait for an event while there is no countdown to redraw.
const NO_REDRAW: Duration = Duration::from_secs(3600);
const BOLD: &str = "1";

/// The file to write, and its current content.
struct ConfigTarget {
    path: PathBuf,
    /// Whether `--config` named the file, so that the next commands must name it too.
    is_named: bool,
    old: Option<(String, Config)>,
}

/// Pairs this machine and writes the file.
pub fn run(globals: &Globals, options: &Setup) -> Result<(), CliError> {
    let urls = coordinator_urls(globals, options)?;
    logging::start(globals.log_level.unwrap_or(LevelFilter::Warn), None);
    let target = config_target(globals)?;
    let key_path = match &target.old {
        Some((_, config)) => config.key_path.clone(),
        None => Config::default_key_path().ok_or_else(no_home)?,
    };
    // Checked before a person enters a code in vain.
    files::create_folder_of(&target.path)
        .and_then(|()| files::check_writable(&target.path))
        .map_err(|e| cannot_write(&target.path, &e))?;
    create_folder(&key_path)?;
    let is_new = !key_path.exists();
    let identity = Identity::load_or_create(&key_path)?;
    let stop = Arc::new(Stop::default());
    install_signal_handler(&stop)?;

    print(&wrap("", &format!("usepod-agent setup: pairing this machine with {}", urls.base()), width()));
    out!("\n");
    print_line("identity", &format!("{}{}", key_path.display(), if is_new { " (new)" } else { "" }));
    let (mut found, advertised) = discover_backends(target.old.as_ref().map(|(_, config)| config));
    let roots = target.old.as_ref().map(|(_, config)| config.coordinator.roots.clone()).unwrap_or_default();
    let client = PairingClient::new(urls.clone(), &roots);
    let pairing = pairing::start(client, identity.public_key_base64(), advertised)
        .map_err(|e| CliError::Runtime(format!("failed to start a thread: {e}")))?;
    let paired = await_pairing(&pairing, &stop, &urls)?;

    // Read again, because the file may have been edited in the meantime.
    let target = config_target(globals)?;
    let named = target.old.as_ref().map_or(&[][..], |(_, config)| &config.backends);
    found.retain(|found| !named.iter().any(|named| is_same_server(named, found)));
    let config = write(&target, &urls, &paired, &found)?;
    print_offer(&paired, &config);
    print_next(&target, &urls, &key_path);
    Ok(())
}

fn coordinator_urls(globals: &Globals, options: &Setup) -> Result<CoordinatorUrls, CliError> {
    let given = options.coordinator.as_deref().unwrap_or(BASE_DEFAULT);
    let fault =
        |what: &str, fix: &str| CliError::Usage(format!("`--coordinator {}`: {what}; {fix}", sanitize_for_log(given)));
    let urls = CoordinatorUrls::parse(given).map_err(|what| fault(what, "write it as https://HOST, or omit it"))?;
    if !urls.is_private() && !globals.allow_insecure {
        let fix = "use https://, or add --allow-insecure if you trust the network";
        return Err(fault("http:// is not encrypted, so others could read the host token", fix));
    }
    Ok(urls)
}

fn config_target(globals: &Globals) -> Result<ConfigTarget, CliError> {
    let usual = Config::default_path();
    let path = match &globals.config {
        Some(named) => Config::named(named),
        None => usual.clone().ok_or_else(no_home)?,
    };
    let is_named = usual.as_ref() != Some(&path);
    // A file that exists but cannot be read is an error, and is not replaced.
    let old = match fs::metadata(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        _ => {
            let text = Config::read(&path)?;
            // `setup` does not connect to the configured coordinator, so ws:// is no risk.
            let config = Config::parse(&text, &path, true)?;
            Some((text, config))
        }
    };
    Ok(ConfigTarget { path, is_named, old })
}

fn no_home() -> CliError {
    CliError::Usage("HOME is not set, so there is no folder for agent.toml and the identity; set HOME".into())
}

fn cannot_write(path: &Path, e: &io::Error) -> CliError {
    let path = path.display();
    CliError::Runtime(format!(
        "failed to write `{path}`: {e}; fix the permissions of its folder, or name another file with --config FILE"
    ))
}

/// Returns the local servers that `agent.toml` does not name, and all backends to advertise to the coordinator.
fn discover_backends(config: Option<&Config>) -> (Vec<BackendConfig>, Vec<Advertised>) {
    let named = config.map_or(&[][..], |config| &config.backends);
    let mut advertised = Vec::new();
    let offered = config.map(backends_of).unwrap_or_default();
    let backends: Vec<_> = offered.iter().map(|offered| offered.backend.clone()).collect();
    for ((config, offered), answer) in named.iter().zip(&offered).zip(probe_all(&backends)) {
        let id = offered.backend.id();
        match offered.backend.ready().and(answer) {
            Ok(probed) => {
                advertised.push(self::advertised(config, offered.select(probed).models));
                print_backend(id, advertised.last());
            }
            Err(e) => print_line("backend", &format!("{id}: kept, but not serving now: {}", e.for_operator())),
        }
    }
    let is_new = |found: &BackendConfig| !named.iter().any(|named| is_same_server(named, found));
    let mut configs = Vec::new();
    let LocalServers { found, needing_key } = find_local();
    for LocalBackend { config, models } in found.into_iter().filter(|found| is_new(&found.config)) {
        advertised.push(self::advertised(&config, models));
        let url = config.url.as_ref().map_or("", BaseUrl::as_str);
        print_backend(&format!("{} at {url}", config.kind), advertised.last());
        configs.push(config);
    }
    for config in needing_key.iter().filter(|config| is_new(config)) {
        print_line("backend", &key_wanted(config));
    }
    if advertised.is_empty() {
        print_line("backend", "no server is answering; pairing works without one");
    }
    (configs, advertised)
}

/// What to do about a server that rejects requests without an API key.
fn key_wanted(config: &BackendConfig) -> String {
    let (kind, url) = (config.kind, config.url.as_ref().map_or("", BaseUrl::as_str));
    let port = url.rsplit_once(':').map_or(url, |(_, port)| port);
    let variable = format!("{}_API_KEY", kind.name().to_ascii_uppercase());
    format!(
        "a server at :{port} wants a key: api_key_env; if it is yours, put the key in an environment variable and add it to \
         agent.toml: `[[backends]]`, `kind = \"{kind}\"`, `url = \"{url}\"`, `api_key_env = \"{variable}\"`"
    )
}

fn advertised(config: &BackendConfig, models: Vec<BackendModel>) -> Advertised {
    let url = config.url.as_ref().map(BaseUrl::as_str).or(config.kind.hosted_url()).unwrap_or_default().to_owned();
    Advertised { kind: config.kind, url, models: models.into_iter().map(|model| model.model_id).collect() }
}

fn print_backend(id: &str, advertised: Option<&Advertised>) {
    let models = advertised.map_or(&[][..], |advertised| &advertised.models);
    let names: Vec<String> = models.iter().take(3).map(|name| sanitize_for_log(name)).collect();
    let more = match models.len() > names.len() {
        true => format!(", {}", Terminal::of_stdout().ellipsis()),
        false => String::new(),
    };
    print_line("backend", &format!("{id}: {} model(s): {}{more}", models.len(), names.join(", ")));
}

fn print_line(label: &str, text: &str) {
    print(&wrap(&format!("  {label:13}"), text, width()));
}

fn width() -> usize {
    Terminal::of_stdout().width
}

fn usual_addresses() -> String {
    let of = |kind: Kind| kind.default_urls().iter().map(move |url| format!("  {kind} at {url}\n"));
    Kind::ALL.into_iter().flat_map(of).collect()
}

/// Whether both are the same server, regardless of the kind and of the name for this machine in the URL.
fn is_same_server(one: &BackendConfig, other: &BackendConfig) -> bool {
    let place = |config: &BackendConfig| {
        let root = config.url.as_ref()?.root().to_ascii_lowercase();
        Some(root.replace("//127.0.0.1", "//localhost").replace("//[::1]", "//localhost"))
    };
    place(one).is_some_and(|one| Some(one) == place(other))
}

/// Prints the events of the pairing until it ends.
fn await_pairing(pairing: &PairingHandle, stop: &Stop, urls: &CoordinatorUrls) -> Result<Paired, CliError> {
    let terminal = Terminal::of_stdout();
    let mut countdown: Option<Countdown> = None;
    loop {
        let redraw_in = countdown.as_mut().map_or(NO_REDRAW, Countdown::show);
        let is_over = select! {
            recv(pairing.ready()) -> ready => ready.is_err(),
            recv(stop.signal()) -> _ => {
                clear(&mut countdown);
                return Err(failed("stopped before the pairing was complete; agent.toml is unchanged"));
            }
            default(redraw_in) => false,
        };
        for event in pairing.drain_events() {
            clear(&mut countdown);
            match event {
                Event::Issued(issued) => {
                    print_code(&issued.code, urls, terminal);
                    countdown = Some(Countdown::new(issued.lifetime, terminal));
                }
                Event::Retrying(why) => print(&wrap("  ", &format!("{why}; trying again"), terminal.width)),
                Event::Recovered => print("  the coordinator answers again\n"),
                Event::Paired(paired) => return Ok(paired),
                Event::Expired => {
                    return Err(failed(
                        "the code expired before it was entered; run `usepod-agent setup` again and enter the new code within \
                         10 minutes",
                    ));
                }
                Event::Failed(why) => {
                    let base = urls.base();
                    return Err(CliError::Runtime(format!(
                        "{why}; check the network and that {base} is the right coordinator (--coordinator URL), then run setup \
                         again"
                    )));
                }
            }
        }
        if is_over {
            return Err(failed("the pairing ended without a result, which is a bug; run setup again"));
        }
    }
}

fn failed(why: &str) -> CliError {
    CliError::Runtime(why.to_owned())
}

fn clear(countdown: &mut Option<Countdown>) {
    if let Some(countdown) = countdown {
        countdown.clear();
    }
}

fn print_code(code: &str, urls: &CoordinatorUrls, terminal: Terminal) {
    let code = sanitize_for_log(code);
    let [top_left, top_right, bottom_left, bottom_right, side, line] = match terminal.is_utf8 {
        true => ["┌", "┐", "└", "┘", "│", "─"],
        false => ["+", "+", "+", "+", "|", "-"],
    };
    let rule = line.repeat(code.chars().count() + 4);
    let bold = terminal.styled(BOLD, &code);
    out!("\n  Open   {}\n  and enter this code:\n\n", urls.page());
    print_raw(&format!(
        "      {top_left}{rule}{top_right}\n      {side}  {bold}  {side}\n      {bottom_left}{rule}{bottom_right}\n\n"
    ));
}

/// Replaces the file, and keeps its previous content as `.bak`.
fn write(
    target: &ConfigTarget,
    urls: &CoordinatorUrls,
    paired: &Paired,
    found: &[BackendConfig],
) -> Result<Config, CliError> {
    let ConfigTarget { path, old, .. } = target;
    let old = old.as_ref().map_or("", |(text, _)| text);
    let bug = |what: &str| CliError::Runtime(format!("{what}, which is a bug; agent.toml is unchanged"));
    let text =
        agent_toml::text(old, urls, paired, found).map_err(|e| bug(&format!("the old file cannot be read: {e}")))?;
    let config = Config::parse(&text, path, !urls.is_encrypted())
        .map_err(|e| bug(&format!("the new file would be refused ({e})")))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(bug("the new file would be too long"));
    }
    let provider_id =
        paired.provider_id.as_deref().map_or_else(|| "an agent without an id".to_owned(), sanitize_for_log);
    let token = paired.host_token.as_deref().map_or_else(String::new, |token| {
        format!(" (host token {})", redact(token).replace('…', Terminal::of_stdout().ellipsis()))
    });
    print(&wrap("  ", &format!("Paired as {provider_id}{token}."), width()));
    out!("\n");
    if text == old {
        print_line("unchanged", &path.display().to_string());
        return Ok(config);
    }
    let backup = if old.is_empty() { None } else { Some(back_up(path, old)?) };
    files::write_atomic(path, text.as_bytes()).map_err(|e| cannot_write(path, &e))?;
    print_line("wrote", &path.display().to_string());
    if let Some(backup) = backup {
        print_line("backup", &format!("{}, the previous file", backup.display()));
    }
    Ok(config)
}

/// Keeps the old text as `.bak`. An earlier `.bak`, which may be the only copy of a handwritten file, is renamed to `.bak.1`, and
/// so on.
fn back_up(path: &Path, old: &str) -> Result<PathBuf, CliError> {
    let copy = files::with_suffix(path, ".bak");
    let kept = match files::read_bounded(&copy, FILE_BYTES_MAX) {
        Ok(earlier) if earlier == old.as_bytes() => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => files::write_atomic(&copy, old.as_bytes()),
        _ => {
            let mut numbered = (1..).map(|n: u32| files::with_suffix(path, &format!(".bak.{n}")));
            let free = numbered.find(|path| fs::symlink_metadata(path).is_err()).unwrap_or_else(|| copy.clone());
            fs::rename(&copy, free).and_then(|()| files::write_atomic(&copy, old.as_bytes()))
        }
    };
    kept.map_err(|e| cannot_write(&copy, &e))?;
    Ok(copy)
}

fn print_offer(paired: &Paired, config: &Config) {
    let (report, offer) = validate::offer(config);
    out!("\n{report}");
    if offer.is_empty() && !config.backends.is_empty() {
        print(&wrap("", "Nothing is offered until one of these backends serves; the agent keeps checking.", width()));
    } else if offer.is_empty() {
        let what = "Nothing is offered until a server in [[backends]] is running: start one and run setup again, or add it to \
                    [[backends]]. Usual addresses:";
        out!("{}{}", wrap("", what, width()), usual_addresses());
    }
    let is_offered = |id: &str| offer.iter().any(|model| model.model_id == id);
    let absent: Vec<String> = paired
        .models
        .iter()
        .filter(|model| !is_offered(&model.model_id))
        .map(|model| sanitize_for_log(&model.model_id))
        .collect();
    if !absent.is_empty() {
        print(&wrap("", &format!("Has terms, but is not offered now: {}", absent.join(", ")), width()));
    }
}

fn print_next(target: &ConfigTarget, urls: &CoordinatorUrls, key_path: &Path) {
    let named = if target.is_named {
        format!(" --config {}", shell_quote::shell_quote(&absolute(&target.path)))
    } else {
        String::new()
    };
    let insecure = if urls.is_private() { "" } else { " --allow-insecure" };
    out!("\nNext:\n");
    if let Ok(Some(running)) = running_agent(&AgentPaths::beside(key_path)) {
        let what = format!("The agent that is running, pid {}, has not read the new file: stop it first.", running.pid);
        print(&wrap("  ", &what, width()));
    }
    // The installed service names its file. The lines are commands, so they are not wrapped.
    out!("  usepod-agent service install{named}{insecure}\n");
    out!("  usepod-agent service start\n");
    out!("  usepod-agent status --watch{named}\n");
}

/// A path that is valid in any working folder.
fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}
