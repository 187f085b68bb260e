//! A session: one authenticated connection, from `auth_ok` to its end. A session runs in the caller's thread, which reads the
//! socket. The first offer is sent when the backends have been probed; until then, jobs wait in `EarlyJobs`.
//!
//! Invariants: the reading thread blocks only on its socket; everything it sends is queued for the writer. When a session
//! ends, its jobs end: no backend computes answers that cannot be delivered.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError, bounded, select};
use tungstenite::protocol::CloseFrame;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Error as WsError, Message};

use super::drain::{SessionHandle, WRITER_TIMEOUT};
use super::early_jobs::EarlyJobs;
use super::shutdown::{ActiveState, Stop};
use crate::discovery::{OfferFeed, Prober};
use crate::job_executor::stats::JobStats;
use crate::job_executor::token_limit::TokenLimit;
use crate::job_executor::{ExecutorDeps, JobExecutor, REQUEST_BYTES_MAX, RejectReason, SessionOutbox};
use crate::link::protocol::{self, Inbound, OfferLimits};
use crate::link::write_queues::{Control, ControlSender, LaneError, Lanes};
use crate::link::writer::Writer;
use crate::link::{Link, MESSAGE_BYTES_MAX, ReadHalf, STALL_TIMEOUT, close};
use crate::logging::sanitize_for_log;
use crate::observe::LiveState;
use crate::sys::{malloc, threads};

/// How long the first offer waits for the probes; their own timeouts are shorter.
const FIRST_OFFER_TIMEOUT: Duration = Duration::from_secs(5);

/// Size from which the memory of a frame is returned to the system, in bytes.
const LARGE_FRAME_BYTES: usize = 256 << 10;

const _: () = assert!(REQUEST_BYTES_MAX >= MESSAGE_BYTES_MAX);

/// How a session ended.
#[derive(Debug)]
pub enum SessionEnd {
    /// The coordinator announced the end, or closed without a reason.
    Planned(String),
    /// The agent is stopping.
    Stopped,
    /// For any other reason.
    Unexpected(String),
}

/// The objects that a session uses and does not own.
pub struct Context<'a> {
    /// The offer.
    pub offers: &'a Arc<OfferFeed>,
    /// Probes backends whose jobs fail.
    pub prober: &'a Prober,
    /// How the jobs of all sessions ended.
    pub stats: &'a Arc<JobStats>,
    /// `max_tokens_per_minute`, for all sessions together.
    pub token_limit: &'a Arc<TokenLimit>,
    /// The live state, which the session updates.
    pub live: &'a Arc<LiveState>,
    /// Sent with the offer.
    pub limits: OfferLimits,
    /// How long jobs in flight may take when the agent stops.
    pub drain: Duration,
    /// The request to stop.
    pub stop: &'a Arc<Stop>,
}

/// Serves jobs until the connection ends. `first_offer` disconnects when the first offer can be made.
pub fn serve(mut half: ReadHalf, first_offer: &Receiver<()>, context: &Context<'_>) -> SessionEnd {
    // From now on, a stop must close the connection gracefully instead of shutting the socket down.
    context.stop.set_active(ActiveState::Nothing);
    if let Err(e) = half.set_deadline(None) {
        return SessionEnd::Unexpected(e.to_string());
    }
    let lanes = Lanes::default();
    let outbox = Box::new(SessionOutbox::new(&lanes));
    let executor = Arc::new(JobExecutor::with_outbox(
        context.limits.max_concurrent_total,
        outbox,
        ExecutorDeps {
            offers: context.offers.clone(),
            stats: context.stats.clone(),
            token_limit: context.token_limit.clone(),
            prober: Some(context.prober.clone()),
            on_throttled: Some(Box::new({
                let live = context.live.clone();
                move || live.throttled()
            })),
        },
    ));
    let link = half.link();
    let write_half = half.split(queue_raw(lanes.control.clone()));
    let heartbeat = heartbeat_source(&executor, context, link.clone());
    let writer = match Writer::spawn(write_half, lanes, heartbeat) {
        Ok(writer) => writer,
        Err(e) => return SessionEnd::Unexpected(format!("failed to start the writer thread: {e}")),
    };
    let (ended_sender, ended) = bounded(0);
    let early_jobs = Arc::new(EarlyJobs::new(executor.clone(), context.limits.max_concurrent_total));
    let announcement = Announcement {
        offers: context.offers.clone(),
        control: writer.control.clone(),
        limits: context.limits,
        early_jobs: early_jobs.clone(),
    };
    let handle = SessionHandle {
        executor: executor.clone(),
        early_jobs: early_jobs.clone(),
        control: writer.control.clone(),
        link: link.clone(),
        limits: context.limits,
        drain_timeout: context.drain,
        writer_ended: writer.ended.clone(),
        session_ended: ended,
        live: context.live.clone(),
    };
    context.stop.set_active(ActiveState::Session(Arc::new(handle)));
    let (reading, reading_ended) = bounded(0);
    let announcing = announcement.when_ready(first_offer.clone(), reading_ended);
    let end = read_loop(&mut half, &early_jobs);
    drop(reading);
    // Joined, so that it does not announce to this session during the next one.
    announcing.map(JoinHandle::join);
    context.offers.stop_listening();
    executor.cancel_all();
    let _ = writer.control.send(Control::Finish);
    if writer.ended.recv_timeout(WRITER_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
        crate::debug!("the writer is blocked in a dead socket");
    }
    link.shutdown();
    writer.join();
    drop(ended_sender);
    if context.stop.is_requested() { SessionEnd::Stopped } else { end }
}

/// Queues the bytes that the reading half must send: pongs, close replies, TLS alerts.
fn queue_raw(control: ControlSender) -> impl Fn(Vec<u8>) -> io::Result<()> + Send + 'static {
    move |bytes| control.send(Control::Raw(bytes)).map_err(io::Error::other)
}

/// The first offer, and those that follow.
struct Announcement {
    offers: Arc<OfferFeed>,
    control: ControlSender,
    limits: OfferLimits,
    early_jobs: Arc<EarlyJobs>,
}

impl Announcement {
    /// Announces the offer once `first_offer` disconnects, or after [`FIRST_OFFER_TIMEOUT`]. Waits on a thread of its own, which ends
    /// early when `session_ended` disconnects.
    fn when_ready(self, first_offer: Receiver<()>, session_ended: Receiver<()>) -> Option<JoinHandle<()>> {
        if first_offer.try_recv() == Err(TryRecvError::Disconnected) {
            self.announce();
            return None;
        }
        let announcement = Arc::new(self);
        let waiting = announcement.clone();
        let wait = move || {
            select! {
                recv(first_offer) -> _ => waiting.announce(),
                recv(session_ended) -> _ => {}
                default(FIRST_OFFER_TIMEOUT) => waiting.announce(),
            }
        };
        let thread = threads::spawn("first-offer", wait);
        thread.inspect_err(|_| announcement.announce()).ok()
    }

    /// Sends the offer now and whenever it changes, and releases the jobs that wait for it.
    fn announce(&self) {
        let (control, limits) = (self.control.clone(), self.limits);
        self.offers.listen(move |offer| {
            log::info!("offering {} model(s)", offer.len());
            let _ = control.send(Control::Offer(protocol::capabilities(offer, limits)));
        });
        self.early_jobs.release();
    }
}

/// Builds the heartbeats. A heartbeat is a sign of life if data has arrived since the previous one: both the reader and the writer
/// then work. Every received byte counts, because a large message may take minutes.
fn heartbeat_source(
    executor: &Arc<JobExecutor>,
    context: &Context<'_>,
    link: Arc<Link>,
) -> impl Fn() -> String + Send + use<> {
    // Weak, so that the writer does not keep the jobs of an ended session alive.
    let executor = Arc::downgrade(executor);
    let in_flight = move || executor.upgrade().map_or(0, |executor| executor.queue_depth());
    context.live.set_in_flight_source(in_flight.clone());
    let (stats, live) = (context.stats.clone(), context.live.clone());
    move || {
        if link.take_received() {
            live.mark_alive();
        } else {
            live.mark_changed();
        }
        stats.heartbeat(in_flight()).to_frame()
    }
}

fn read_loop(half: &mut ReadHalf, early_jobs: &EarlyJobs) -> SessionEnd {
    loop {
        match half.read() {
            Ok(Message::Text(text)) => {
                if let Err(e) = handle_frame(&text, early_jobs) {
                    return SessionEnd::Unexpected(e.to_string());
                }
            }
            Ok(Message::Binary(_)) => {
                crate::log_repeatable!(log::Level::Warn, "ignored a binary message from the coordinator")
            }
            Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
            Ok(Message::Close(frame)) => {
                half.flush();
                return session_end(frame);
            }
            Err(WsError::Io(e)) if e.kind() == std::io::ErrorKind::TimedOut => {
                let silence = STALL_TIMEOUT.as_secs();
                return SessionEnd::Unexpected(format!("received nothing from the coordinator for {silence} s"));
            }
            Err(e) => return SessionEnd::Unexpected(e.to_string()),
        }
    }
}

fn handle_frame(text: &str, early_jobs: &EarlyJobs) -> Result<(), LaneError> {
    if text.len() >= LARGE_FRAME_BYTES {
        malloc::request_trim();
    }
    match protocol::parse(text) {
        Ok(Inbound::Job(job)) => {
            crate::debug!("job {} for model `{}`", job.job_id, sanitize_for_log(&job.model_id));
            early_jobs.dispatch(*job)
        }
        Ok(Inbound::UnreadableJob(job_id, why)) => {
            crate::log_repeatable!(log::Level::Warn, "rejected job {job_id}: {why}");
            early_jobs.reject(job_id, RejectReason::Unreadable, why)
        }
        Ok(Inbound::JobCancel(job_id)) => {
            early_jobs.cancel(job_id);
            Ok(())
        }
        Ok(Inbound::Other(kind)) => {
            crate::debug!("ignored a frame of type `{}`", sanitize_for_log(&kind));
            Ok(())
        }
        Ok(Inbound::AuthChallenge(_) | Inbound::AuthOk(_) | Inbound::AuthFailed(_)) => {
            crate::debug!("ignored a handshake frame during the session");
            Ok(())
        }
        Err(e) => {
            crate::log_repeatable!(log::Level::Warn, "ignored a frame from the coordinator: {e}");
            Ok(())
        }
    }
}

fn session_end(frame: Option<CloseFrame>) -> SessionEnd {
    match frame {
        None => SessionEnd::Planned("closed without a reason".into()),
        Some(frame) if frame.code == CloseCode::Away => SessionEnd::Planned(close::describe(&frame)),
        Some(frame) => SessionEnd::Unexpected(close::describe(&frame)),
    }
}
