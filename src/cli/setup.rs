//! `setup`: from nothing to an `agent.toml`, with a code that a person enters on a page.
//!
//! Invariant: `agent.toml` is as it was until the pairing is done, and is then replaced as a whole by a text that was read back
//! first; what it was before is kept beside it.

use std::fs;
use std::io::{self, IsTerminal, stdout};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::select;
use log::LevelFilter;

use super::args::{Globals, Setup};
use super::countdown::Countdown;
use super::run::{create_folder, heed_signals};
use super::{CliError, backends_of, print, say, validate};
use crate::agent::shutdown::Stop;
use crate::backend::{BackendModel, BaseUrl, Kind};
use crate::config::{BackendConfig, Config, FILE_BYTES_MAX};
use crate::discovery::{LocalBackend, find_local, probe_all};
use crate::instance::identity::Identity;
use crate::instance::{AgentPaths, LockOwner};
use crate::logging;
use crate::logging::{redact, sanitize_for_log};
use crate::pairing::{
    self, Advertised, BASE_DEFAULT, CoordinatorUrls, Event, Paired, PairingClient, PairingHandle, agent_toml,
};
use crate::sys::files;
use crate::sys::shell_quote;

/// While there is nothing to redraw.
const LONG: Duration = Duration::from_secs(3600);

/// The file to write, and what it says so far.
struct ConfigTarget {
    path: PathBuf,
    /// Named by `--config`, so that the next commands have to name it too.
    is_named: bool,
    old: Option<(String, Config)>,
}

/// Pairs, and writes the file.
pub fn run(globals: &Globals, options: &Setup) -> Result<(), CliError> {
    let site = site(globals, options)?;
    logging::start(globals.log_level.unwrap_or(LevelFilter::Warn), None);
    let target = target(globals)?;
    let key_path = match &target.old {
        Some((_, config)) => config.key_path.clone(),
        None => Config::usual_key_path().ok_or_else(no_home)?,
    };
    // Before a person enters a code that would be lost.
    files::create_folder_of(&target.path)
        .and_then(|()| files::check_writable(&target.path))
        .map_err(|e| cannot_write(&target.path, &e))?;
    create_folder(&key_path)?;
    let is_new = !key_path.exists();
    let identity = Identity::load_or_create(&key_path)?;
    let stop = Arc::new(Stop::default());
    heed_signals(&stop)?;

    say(format_args!("usepod-agent setup: pairs this machine with {}\n\n", site.base()));
    say(format_args!("  identity     {}{}\n", key_path.display(), if is_new { " (new)" } else { "" }));
    let (mut found, advertised) = discover_backends(target.old.as_ref().map(|(_, config)| config));
    let roots = target.old.as_ref().map(|(_, config)| config.coordinator.roots.clone()).unwrap_or_default();
    let server = PairingClient::new(site.clone(), &roots);
    let hearing = pairing::start(server, identity.public_key_base64(), advertised)
        .map_err(|e| CliError::Runtime(format!("failed to start a thread: {e}")))?;
    let paired = wait(&hearing, &stop, &site)?;

    // As it is by now: the file may have been edited while the code was waited for.
    let target = self::target(globals)?;
    let named = target.old.as_ref().map_or(&[][..], |(_, config)| &config.backends);
    found.retain(|found| !named.iter().any(|named| is_same_server(named, found)));
    let config = write(&target, &site, &paired, &found)?;
    tell_offer(&paired, &config);
    tell_next(&target, &site, &key_path);
    Ok(())
}

fn site(globals: &Globals, options: &Setup) -> Result<CoordinatorUrls, CliError> {
    let given = options.coordinator.as_deref().unwrap_or(BASE_DEFAULT);
    let fault =
        |what: &str, fix: &str| CliError::Usage(format!("`--coordinator {}`: {what}; {fix}", sanitize_for_log(given)));
    let site =
        CoordinatorUrls::parse(given).map_err(|what| fault(what, "write it as https://HOST, or leave it out"))?;
    if !site.is_private() && !globals.allow_insecure {
        let fix = "use https://, or add --allow-insecure if you trust the network between";
        return Err(fault("http:// is not encrypted, and the host token would be readable on its way", fix));
    }
    Ok(site)
}

fn target(globals: &Globals) -> Result<ConfigTarget, CliError> {
    let usual = Config::usual_place();
    let path = match &globals.config {
        Some(named) => Config::named(named),
        None => usual.clone().ok_or_else(no_home)?,
    };
    let is_named = usual.as_ref() != Some(&path);
    // Something is there even if it cannot be read: then that is told, and it is not replaced.
    let old = match fs::metadata(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        _ => {
            let text = Config::read(&path)?;
            // Its coordinator is not dialled, so that ws:// there is no risk.
            let config = Config::parse(&text, &path, true)?;
            Some((text, config))
        }
    };
    Ok(ConfigTarget { path, is_named, old })
}

fn no_home() -> CliError {
    CliError::Usage("there is no HOME for agent.toml and the identity; set HOME".into())
}

fn cannot_write(path: &Path, e: &io::Error) -> CliError {
    let path = path.display();
    CliError::Runtime(format!(
        "failed to write `{path}`: {e}; fix the rights of its folder, or name another --config FILE"
    ))
}

/// The servers that nobody has named yet, and all that is told to the coordinator.
fn discover_backends(config: Option<&Config>) -> (Vec<BackendConfig>, Vec<Advertised>) {
    let named = config.map_or(&[][..], |config| &config.backends);
    let mut advertised = Vec::new();
    let offered = config.map(backends_of).unwrap_or_default();
    let backends: Vec<_> = offered.iter().map(|offered| offered.backend.clone()).collect();
    for ((config, offered), answer) in named.iter().zip(&offered).zip(probe_all(&backends)) {
        let id = offered.backend.id();
        match offered.backend.ready().and(answer) {
            Ok(models) => {
                let allowed = |model: &BackendModel| {
                    offered.allowed_models.as_ref().is_none_or(|only| only.contains(&model.model_id))
                };
                advertised.push(told(config, models.into_iter().filter(allowed).collect()));
                tell_backend(id, advertised.last());
            }
            Err(e) => say(format_args!("  backend      {id}: kept, but does not serve now: {e}\n")),
        }
    }
    let is_new = |found: &LocalBackend| !named.iter().any(|named| is_same_server(named, &found.config));
    let mut configs = Vec::new();
    for LocalBackend { config, models } in find_local().into_iter().filter(is_new) {
        advertised.push(told(&config, models));
        let url = config.url.as_ref().map_or("", BaseUrl::as_str);
        tell_backend(&format!("{} at {url}", config.kind), advertised.last());
        configs.push(config);
    }
    if advertised.is_empty() {
        print("  backend      no server answers now; pairing works without one\n");
    }
    (configs, advertised)
}

fn told(config: &BackendConfig, models: Vec<BackendModel>) -> Advertised {
    let url = config.url.as_ref().map(BaseUrl::as_str).or(config.kind.hosted_url()).unwrap_or_default().to_owned();
    Advertised { kind: config.kind, url, models: models.into_iter().map(|model| model.model_id).collect() }
}

fn tell_backend(id: &str, advertised: Option<&Advertised>) {
    let models = advertised.map_or(&[][..], |advertised| &advertised.models);
    let names: Vec<String> = models.iter().take(3).map(|name| sanitize_for_log(name)).collect();
    let more = if models.len() > names.len() { ", …" } else { "" };
    say(format_args!("  backend      {id}: {} model(s): {}{more}\n", models.len(), names.join(", ")));
}

fn usual_addresses() -> String {
    let of = |kind: Kind| kind.default_urls().iter().map(move |url| format!("  {kind} at {url}\n"));
    Kind::ALL.into_iter().flat_map(of).collect()
}

/// Whether both are the same process: whatever kind it is said to be, and by whichever of its names this machine is called.
fn is_same_server(one: &BackendConfig, other: &BackendConfig) -> bool {
    let place = |config: &BackendConfig| {
        let root = config.url.as_ref()?.root().to_ascii_lowercase();
        Some(root.replace("//127.0.0.1", "//localhost").replace("//[::1]", "//localhost"))
    };
    place(one).is_some_and(|one| Some(one) == place(other))
}

/// Shows what is heard, until the end.
fn wait(hearing: &PairingHandle, stop: &Stop, site: &CoordinatorUrls) -> Result<Paired, CliError> {
    let mut countdown: Option<Countdown> = None;
    loop {
        let holds = countdown.as_mut().map_or(LONG, Countdown::show);
        let is_over = select! {
            recv(hearing.bell()) -> ring => ring.is_err(),
            recv(stop.signal()) -> _ => {
                clear(&mut countdown);
                return Err(failed("stopped before the pairing was done; agent.toml is as it was"));
            }
            default(holds) => false,
        };
        for event in hearing.drain_events() {
            clear(&mut countdown);
            match event {
                Event::Issued(issued) => {
                    tell_code(&issued.code, site);
                    countdown = Some(Countdown::new(issued.lifetime));
                }
                Event::Trouble(why) => say(format_args!("  {why}\n  trying again\n")),
                Event::TroubleOver => print("  it answers again\n"),
                Event::Paired(paired) => return Ok(paired),
                Event::Expired => {
                    return Err(failed(
                        "the code has expired before it was entered; run `usepod-agent setup` again, and enter the new code \
                         within 10 minutes",
                    ));
                }
                Event::Failed(why) => {
                    let base = site.base();
                    return Err(CliError::Runtime(format!(
                        "{why}; check the network, and that {base} is the coordinator that you mean (--coordinator URL), then \
                         run setup again"
                    )));
                }
            }
        }
        if is_over {
            return Err(failed("the pairing ended by itself, which is a bug; run setup again"));
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

fn tell_code(code: &str, site: &CoordinatorUrls) {
    let code = sanitize_for_log(code);
    let rule = "─".repeat(code.chars().count() + 4);
    let (bold, plain) = if stdout().is_terminal() { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
    say(format_args!(
        "\n  Open   {}\n  and enter this code:\n\n      ┌{rule}┐\n      │  {bold}{code}{plain}  │\n      └{rule}┘\n\n",
        site.page()
    ));
}

/// Replaces the file, and keeps what it was.
fn write(
    target: &ConfigTarget,
    site: &CoordinatorUrls,
    paired: &Paired,
    found: &[BackendConfig],
) -> Result<Config, CliError> {
    let ConfigTarget { path, old, .. } = target;
    let old = old.as_ref().map_or("", |(text, _)| text);
    let bug = |what: &str| CliError::Runtime(format!("{what}, which is a bug; agent.toml is as it was"));
    let text =
        agent_toml::text(old, site, paired, found).map_err(|e| bug(&format!("the old file cannot be read: {e}")))?;
    let config = Config::parse(&text, path, !site.is_encrypted())
        .map_err(|e| bug(&format!("the new file would be refused ({e})")))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(bug("the new file would be too long"));
    }
    let provider_id =
        paired.provider_id.as_deref().map_or_else(|| "an agent without an id".to_owned(), sanitize_for_log);
    let token =
        paired.host_token.as_deref().map_or_else(String::new, |token| format!(" (host token {})", redact(token)));
    say(format_args!("  Paired as {provider_id}{token}.\n\n"));
    if text == old {
        say(format_args!("  {} says so already\n", path.display()));
        return Ok(config);
    }
    let copy = if old.is_empty() { None } else { Some(keep(path, old)?) };
    files::write_atomic(path, text.as_bytes()).map_err(|e| cannot_write(path, &e))?;
    say(format_args!("  wrote        {}\n", path.display()));
    if let Some(copy) = copy {
        say(format_args!("  kept         {}: what it was before\n", copy.display()));
    }
    Ok(config)
}

/// Keeps the old text as `.bak`. Another one that is there already, and may be all that is left of a file made by hand, gets a
/// number.
fn keep(path: &Path, old: &str) -> Result<PathBuf, CliError> {
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

fn tell_offer(paired: &Paired, config: &Config) {
    let (report, offer) = validate::offer(config);
    say(format_args!("\n{report}"));
    if offer.is_empty() && !config.backends.is_empty() {
        print("Nothing is offered until one of these serves; the agent looks for that by itself.\n");
    } else if offer.is_empty() {
        say(format_args!(
            "Nothing is offered until a server runs that [[backends]] names: start one and run setup again, or write it\n\
             there. Usual addresses:\n{}",
            usual_addresses()
        ));
    }
    let is_offered = |id: &str| offer.iter().any(|model| model.model_id == id);
    let absent: Vec<String> = paired
        .models
        .iter()
        .filter(|model| !is_offered(&model.model_id))
        .map(|model| sanitize_for_log(&model.model_id))
        .collect();
    if !absent.is_empty() {
        say(format_args!("Has terms, but is not offered now: {}\n", absent.join(", ")));
    }
}

fn tell_next(target: &ConfigTarget, site: &CoordinatorUrls, key_path: &Path) {
    let named = if target.is_named {
        format!(" --config {}", shell_quote::shell_quote(&absolute(&target.path)))
    } else {
        String::new()
    };
    let insecure = if site.is_encrypted() { "" } else { " --allow-insecure" };
    print("\nNext:\n");
    if let Some(running) = LockOwner::running(&AgentPaths::beside(key_path)) {
        say(format_args!("  An agent runs as pid {} and has not read the new file: stop it first.\n", running.pid));
    }
    // What is installed knows its file.
    say(format_args!(
        "  usepod-agent service install{named}{insecure}\n  usepod-agent service start\n  usepod-agent status --watch{named}\n"
    ));
}

/// For a command that may be typed elsewhere.
fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}
