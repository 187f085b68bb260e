//! `demo --await-agent`: the coordinator and its front door, for an agent from outside.
//!
//! Who runs here: the caller's thread, which looks at the offer and prints what changes.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use super::agent_sessions::Offer;
use super::coordinator::Coordinator;
use super::front_door::FrontDoor;
use super::output::Output;
use super::{DemoError, STOP_POLL, backends, bind_door};
use crate::agent::shutdown::Stop;

/// Serves until `stop`: agents at `listen`, clients at the front door.
///
/// # Errors
/// An address cannot be had.
pub fn run(listen: SocketAddr, port: Option<u16>, stop: &Stop, out: &mut dyn Write) -> Result<(), DemoError> {
    let listener = TcpListener::bind(listen).map_err(|source| DemoError::Listen { address: listen, source })?;
    let coordinator = Arc::new(Coordinator::serve(listener)?);
    let door = FrontDoor::start(bind_door(port)?, coordinator.clone())?;
    let base = coordinator.base();
    let mut page = Output::new(out);
    page.line(format_args!(
        "usepod-agent {} demo: a coordinator on this machine, which waits for an agent\n",
        env!("CARGO_PKG_VERSION")
    ));
    page.line(format_args!("  coordinator  {base}"));
    page.line(format_args!("  front door   http://{}/v1\n", door.address()));
    page.line(format_args!("Pair an agent, in another terminal:"));
    page.line(format_args!("  usepod-agent setup --coordinator {base} --allow-insecure"));
    page.line(format_args!("then enter its code at {base}/host/pair, or so:"));
    page.line(format_args!("  curl {base}/host/pair -d code=CODE\n"));
    page.line(format_args!("Ctrl-C ends the demo.\n"));
    show_offers(&coordinator, stop, &mut page);
    Ok(())
}

fn show_offers(coordinator: &Coordinator, stop: &Stop, page: &mut Output<'_>) {
    let mut shown: Option<Offer> = None;
    while !stop.is_requested() {
        let offer = coordinator.offer();
        if offer != shown {
            match &offer {
                Some(offer) => page.line(format_args!("  agent        {}", described(offer))),
                None => page.line(format_args!("  agent        gone: {}", coordinator.last_seen())),
            }
            shown = offer;
        }
        let _ = stop.signal().recv_timeout(STOP_POLL);
    }
}

fn described(offer: &Offer) -> String {
    let Offer { models, agent_version, provider_id, .. } = offer;
    let names: Vec<String> = models.iter().map(|model| crate::logging::sanitize_for_log(&model.model_id)).collect();
    let separator = if names.is_empty() { "" } else { ": " };
    let counted = backends::counted(names.len());
    format!(
        "{provider_id} ({}) offers {counted}{separator}{}",
        crate::logging::sanitize_for_log(agent_version),
        names.join(", ")
    )
}
