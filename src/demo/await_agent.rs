//! `demo --await-agent`: runs the coordinator and its front door for a separate agent, and prints changes of its offer.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use super::agent_sessions::Offer;
use super::coordinator::Coordinator;
use super::output::Output;
use super::{DemoError, STOP_POLL, backends, bind_door, front_door};
use crate::agent::shutdown::Stop;

/// Serves until `stop`: agents at `listen`, clients at the front door.
///
/// # Errors
/// An address is not available.
pub fn run(listen: SocketAddr, port: Option<u16>, stop: &Stop, out: &mut dyn Write) -> Result<(), DemoError> {
    let listener = TcpListener::bind(listen).map_err(|source| DemoError::Listen {
        address: listen,
        option: "--listen",
        source,
    })?;
    let coordinator = Arc::new(Coordinator::serve(listener)?);
    let door = front_door::start(bind_door(port)?, coordinator.clone())?;
    let base = coordinator.base();
    let mut output = Output::new(out);
    output.line(format_args!(
        "usepod-agent {} demo: a coordinator on this machine, waiting for an agent\n",
        env!("CARGO_PKG_VERSION")
    ));
    output.line(format_args!("  coordinator  {base}"));
    output.line(format_args!("  front door   http://{}/v1\n", door.address));
    output.line(format_args!("Pair an agent, in another terminal:"));
    output.line(format_args!("  usepod-agent setup --coordinator {base}"));
    output.line(format_args!("then enter its code at {base}/host/pair, or run:"));
    output.line(format_args!("  curl {base}/host/pair -d code=CODE\n"));
    output.line(format_args!("Ctrl-C ends the demo.\n"));
    show_offers(&coordinator, stop, &mut output);
    Ok(())
}

fn show_offers(coordinator: &Coordinator, stop: &Stop, output: &mut Output<'_>) {
    let mut shown: Option<Offer> = None;
    while !stop.is_requested() {
        let offer = coordinator.offer();
        if offer != shown {
            match &offer {
                Some(offer) => output.line(format_args!("  agent        {}", described(offer))),
                None => output.line(format_args!("  agent        disconnected: {}", coordinator.last_seen())),
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
