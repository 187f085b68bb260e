//! The library's fixed names and behaviors, with backends implemented in the test.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arbtest::arbtest;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use provider_agent::backend::{
    Backend, BackendError, BackendHealth, BackendModel, BackendResult, BaseUrl, HttpBackend, Job, JobResult, JobSink,
    Kind, WireFormat,
};
use provider_agent::discovery::{DiscoveredBackend, ResolvedModel};
use provider_agent::job_executor::JobExecutor;
use serde_json::{Value, json};
use tungstenite::Message;
use uuid::Uuid;

use crate::support::{Answer, QUIET, Request, SOON, ms, response, side_by_side, sse, wait_until};

type Execute = dyn Fn(&Job, &mut dyn JobSink) -> BackendResult<JobResult> + Send + Sync;

/// Implements the required methods only, so that a new one without a default body would not compile here.
struct Scripted {
    execute: Box<Execute>,
    begun: AtomicU32,
    ended: AtomicU32,
}

impl Scripted {
    fn new(execute: impl Fn(&Job, &mut dyn JobSink) -> BackendResult<JobResult> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { execute: Box::new(execute), begun: AtomicU32::new(0), ended: AtomicU32::new(0) })
    }
}

impl Backend for Scripted {
    fn kind(&self) -> &'static str {
        "vllm"
    }

    fn id(&self) -> &str {
        "scripted"
    }

    fn list_models(&self) -> BackendResult<Vec<BackendModel>> {
        Ok(vec![BackendModel { model_id: "m".to_owned(), context_window: Some(8192), native: true }])
    }

    fn health(&self) -> BackendResult<BackendHealth> {
        Ok(BackendHealth { reachable: true, latency_ms: Some(1), last_error: None })
    }

    fn execute(&self, job: &Job, sink: &mut dyn JobSink) -> BackendResult<JobResult> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        let result = (self.execute)(job, sink);
        if result.is_ok() {
            self.ended.fetch_add(1, Ordering::SeqCst);
        }
        result
    }
}

/// A sink needs only `send_chunk`.
struct Gathered(Vec<u8>);

impl JobSink for Gathered {
    fn send_chunk(&mut self, bytes: &[u8]) -> BackendResult<()> {
        self.0.extend(bytes);
        Ok(())
    }
}

struct Bench {
    executor: JobExecutor,
    out: Receiver<Message>,
}

impl Bench {
    fn new(backend: Arc<dyn Backend>, max_concurrent: u32) -> Self {
        let (sender, out) = unbounded();
        let model = ResolvedModel {
            model_id: "m".to_owned(),
            input_per_1m: 500_000,
            output_per_1m: 750_000,
            max_concurrent,
            backend: backend.kind().to_owned(),
            context_window: None,
        };
        let backends = vec![DiscoveredBackend { backend, models: vec![model] }];
        Self { executor: JobExecutor::new(backends, max_concurrent, sender), out }
    }

    fn dispatch(&self, model: &str) -> Uuid {
        let job = job(model);
        let id = job.job_id;
        self.executor.dispatch(job);
        id
    }

    fn next(&self) -> Value {
        read(&self.out.recv_timeout(SOON).unwrap_or_else(|_| panic!("no frame within {SOON:?}")))
    }

    fn assert_no_more(&self) {
        if let Ok(message) = self.out.recv_timeout(QUIET) {
            panic!("a frame that must not come: {message}");
        }
    }

    fn wait_idle(&self) {
        wait_until("queue_depth is 0", || self.executor.queue_depth() == 0);
    }
}

fn job(model: &str) -> Job {
    Job {
        job_id: Uuid::new_v4(),
        model_id: model.to_owned(),
        request: json!({"messages": []}),
        format: WireFormat::Openai,
        deadline_ms: 60_000,
    }
}

fn read(message: &Message) -> Value {
    assert!(message.is_text(), "every answer is a text message: {message:?}");
    let text = message.to_text().expect("UTF-8");
    serde_json::from_str(text).unwrap_or_else(|e| panic!("not JSON ({e}): {text}"))
}

fn assert_error(frame: &Value, id: Uuid, code: &str) {
    assert_eq!(
        (&frame["type"], &frame["job_id"], &frame["error_code"]),
        (&json!("job_error"), &json!(id.to_string()), &json!(code)),
        "{frame}"
    );
    assert!(frame["message"].is_string() && frame["tokens_emitted"].is_u64(), "{frame}");
}

#[test]
fn job_for_an_unserved_model_is_refused_with_one_frame() {
    let backend = Scripted::new(|_, _| Ok(JobResult::default()));
    let bench = Bench::new(backend.clone(), 4);
    let id = bench.dispatch("another");
    assert_error(&bench.next(), id, "model_not_loaded");
    bench.assert_no_more();
    assert_eq!((backend.begun.load(Ordering::SeqCst), bench.executor.queue_depth()), (0, 0));
}

#[test]
fn served_job_sends_its_chunks_in_order_then_its_tokens() {
    let backend = Scripted::new(|_, sink| {
        sink.send_chunk(b"hello ")?;
        sink.send_chunk(b"world")?;
        Ok(JobResult { input_tokens: Some(7), output_tokens: Some(13), duration_ms: 42 })
    });
    let bench = Bench::new(backend.clone(), 4);
    let id = bench.dispatch("m").to_string();
    for data in ["aGVsbG8g", "d29ybGQ="] {
        assert_eq!(bench.next(), json!({"type": "job_chunk", "job_id": id, "data": data}));
    }
    let done = bench.next();
    assert_eq!((&done["type"], &done["job_id"]), (&json!("job_done"), &json!(id)));
    assert_eq!(done["tokens"], json!({"input": 7, "output": 13, "input_tokens": 7, "output_tokens": 13}), "{done}");
    assert!(done["duration_ms"].is_u64(), "{done}");
    bench.assert_no_more();
    assert_eq!(backend.begun.load(Ordering::SeqCst), 1, "runs of the backend");
    bench.wait_idle();
}

#[test]
fn backend_gets_the_job_as_it_was_dispatched() {
    let (sender, seen) = unbounded();
    let backend = Scripted::new(move |job, _| {
        let format = matches!(job.format, WireFormat::Anthropic);
        let _ = sender.send((job.job_id, job.model_id.clone(), job.request.clone(), format));
        Ok(JobResult::default())
    });
    let bench = Bench::new(backend, 1);
    let given = Job { format: WireFormat::Anthropic, request: json!({"n": 1.5}), ..job("m") };
    let id = given.job_id;
    bench.executor.dispatch(given);
    let got = seen.recv_timeout(SOON).expect("the backend to run");
    assert_eq!(got, (id, "m".to_owned(), json!({"n": 1.5}), true));
}

#[test]
fn job_above_the_limit_is_refused_while_the_first_continues() {
    let (release, gate) = bounded::<()>(0);
    let backend = Scripted::new(move |_, sink| {
        let _ = gate.recv_timeout(SOON);
        sink.send_chunk(b"late")?;
        Ok(JobResult::default())
    });
    let bench = Bench::new(backend, 1);
    let first = bench.dispatch("m");
    let second = bench.dispatch("m");
    assert_error(&bench.next(), second, "out_of_capacity");
    assert_eq!(bench.executor.queue_depth(), 1);
    release.send(()).expect("the first job still waits");
    assert_eq!(bench.next()["data"], "bGF0ZQ==");
    let done = bench.next();
    assert_eq!((&done["type"], &done["job_id"]), (&json!("job_done"), &json!(first.to_string())));
    bench.assert_no_more();
}

#[test]
fn cancel_stops_a_job_within_300_ms_and_no_frame_follows() {
    let backend = Scripted::new(|_, sink| {
        for _ in 0..50 {
            sink.send_chunk(b"x")?;
            std::thread::sleep(ms(50));
        }
        Ok(JobResult::default())
    });
    let bench = Bench::new(backend.clone(), 1);
    let id = bench.dispatch("m");
    assert_eq!(bench.next()["type"], "job_chunk");
    let cancelled = Instant::now();
    bench.executor.cancel(id);
    bench.wait_idle();
    assert!(cancelled.elapsed() < ms(300), "queue_depth was 0 only after {:?}", cancelled.elapsed());
    // Chunks sent before the cancel was seen may still arrive; a terminal frame may not.
    let deadline = Instant::now() + ms(3000);
    while let Ok(message) = bench.out.recv_deadline(deadline) {
        assert_eq!(read(&message)["type"], "job_chunk", "{message}");
    }
    assert_eq!(backend.ended.load(Ordering::SeqCst), 0, "execute must not run to its end");
}

#[test]
fn cancel_of_an_unknown_or_finished_job_does_nothing() {
    let bench = Bench::new(Scripted::new(|_, _| Ok(JobResult::default())), 1);
    bench.executor.cancel(Uuid::new_v4());
    for _ in 0..3 {
        let id = bench.dispatch("m");
        assert_eq!(bench.next()["type"], "job_done");
        bench.executor.cancel(id);
        assert_eq!(bench.executor.queue_depth(), 0);
    }
    bench.assert_no_more();
}

#[test]
fn panic_in_a_backend_fails_only_that_job() {
    let backend = Scripted::new(|job, sink| {
        sink.send_chunk(b"x")?;
        assert!(job.request["panic"] != true, "as the test wants it");
        Ok(JobResult::default())
    });
    let bench = Bench::new(backend, 1);
    for _ in 0..5 {
        let bad = Job { request: json!({"panic": true}), ..job("m") };
        let id = bad.job_id;
        bench.executor.dispatch(bad);
        assert_eq!(bench.next()["type"], "job_chunk");
        assert_error(&bench.next(), id, "internal");
        bench.dispatch("m");
        assert_eq!(bench.next()["type"], "job_chunk");
        assert_eq!(bench.next()["type"], "job_done");
    }
    bench.assert_no_more();
    assert_eq!(bench.executor.queue_depth(), 0);
}

type Gate = (Sender<()>, Receiver<()>);

/// Blocks each job until the test releases it by its id.
#[derive(Clone, Default)]
struct Gates(Arc<Mutex<HashMap<Uuid, Gate>>>);

impl Gates {
    fn of(&self, id: Uuid) -> Gate {
        self.0.lock().expect("gates").entry(id).or_insert_with(|| bounded(1)).clone()
    }

    fn open(&self, id: Uuid) {
        let _ = self.of(id).0.try_send(());
    }

    fn backend(&self) -> Arc<Scripted> {
        let gates = self.clone();
        Scripted::new(move |job, sink| {
            let _ = gates.of(job.job_id).1.recv_timeout(SOON);
            sink.send_chunk(b"x")?;
            Ok(JobResult::default())
        })
    }
}

/// Checks the count after each step of random sequences.
#[test]
fn queue_depth_is_right_in_every_order_of_dispatch_completion_and_cancel() {
    arbtest(|u| {
        let limit = u.int_in_range(1..=4)?;
        let gates = Gates::default();
        let bench = Bench::new(gates.backend(), limit);
        let mut running = Vec::new();
        for _ in 0..u.int_in_range(0..=24)? {
            match u.int_in_range(0..=3)? {
                0 | 1 => {
                    let id = bench.dispatch("m");
                    if running.len() < limit as usize {
                        running.push(id);
                    } else {
                        assert_error(&bench.next(), id, "out_of_capacity");
                    }
                }
                2 if !running.is_empty() => {
                    let id = running.swap_remove(u.choose_index(running.len())?);
                    gates.open(id);
                    assert_eq!(bench.next()["type"], "job_chunk");
                    let done = bench.next();
                    assert_eq!((&done["type"], &done["job_id"]), (&json!("job_done"), &json!(id.to_string())));
                }
                3 if !running.is_empty() => {
                    let id = running.swap_remove(u.choose_index(running.len())?);
                    bench.executor.cancel(id);
                    gates.open(id);
                }
                _ => {}
            }
            assert_eq!(bench.executor.queue_depth() as usize, running.len(), "queue_depth after a step");
        }
        for id in running {
            bench.executor.cancel(id);
            gates.open(id);
        }
        assert_eq!(bench.executor.queue_depth(), 0);
        assert!(bench.out.is_empty(), "a frame nobody waited for: {:?}", bench.out.try_recv());
        Ok(())
    })
    .budget_ms(1500);
}

/// A wrong counter shows in the number of jobs admitted afterwards.
#[test]
fn race_of_cancels_and_completions_leaves_exactly_the_limit() {
    const LIMIT: u32 = 4;
    let gates = Gates::default();
    let gated = gates.backend();
    let backend = Scripted::new(move |job, sink| {
        if job.request["gated"] == true {
            return gated.execute(job, sink);
        }
        sink.send_chunk(b"x")?;
        Ok(JobResult::default())
    });
    let bench = Bench::new(backend, LIMIT);
    let ids: Vec<Vec<Uuid>> = (0..3).map(|_| (0..400).map(|_| Uuid::new_v4()).collect()).collect();
    side_by_side(&ids, |ids| {
        for (n, &id) in ids.iter().enumerate() {
            bench.executor.dispatch(Job { job_id: id, ..job("m") });
            for _ in 0..n % 50 {
                std::hint::spin_loop();
            }
            bench.executor.cancel(id);
        }
    });
    bench.wait_idle();
    let mut ends = HashMap::<String, u32>::new();
    while let Ok(message) = bench.out.recv_timeout(QUIET) {
        let frame = read(&message);
        if frame["type"] != "job_chunk" {
            *ends.entry(frame["job_id"].to_string()).or_default() += 1;
        }
    }
    assert!(ends.values().all(|&n| n == 1), "a job with more than one terminal frame: {ends:?}");

    let gated = |_| {
        let job = Job { request: json!({"gated": true}), ..job("m") };
        let id = job.job_id;
        bench.executor.dispatch(job);
        id
    };
    let admitted: Vec<_> = (0..LIMIT).map(gated).collect();
    assert_eq!(bench.executor.queue_depth(), LIMIT);
    let refused = gated(LIMIT);
    assert_error(&bench.next(), refused, "out_of_capacity");
    for &id in &admitted {
        gates.open(id);
    }
    for _ in 0..2 * LIMIT {
        assert_ne!(bench.next()["type"], "job_error");
    }
    assert_eq!(bench.executor.queue_depth(), 0);
}

/// Backpressure blocks the workers, not the session's reader, which dispatches and cancels.
#[test]
fn dispatch_and_cancel_do_not_block_while_nobody_reads_the_frames() {
    let backend = Scripted::new(|_, sink| {
        loop {
            sink.send_chunk(&[0; 1024])?;
        }
    });
    let (sender, out) = bounded(1);
    let model = ResolvedModel {
        model_id: "m".to_owned(),
        input_per_1m: 1,
        output_per_1m: 1,
        max_concurrent: 2,
        backend: "vllm".to_owned(),
        context_window: None,
    };
    let backends: Vec<DiscoveredBackend> = vec![DiscoveredBackend { backend: backend.clone(), models: vec![model] }];
    let executor = JobExecutor::new(backends, 2, sender);
    let ids: Vec<Uuid> = (0..2)
        .map(|_| {
            let job = job("m");
            let id = job.job_id;
            executor.dispatch(job);
            id
        })
        .collect();
    wait_until("a chunk comes", || !out.is_empty());
    let began = Instant::now();
    executor.dispatch(job("another"));
    for id in ids {
        executor.cancel(id);
    }
    assert_eq!(executor.queue_depth(), 0);
    assert!(began.elapsed() < Duration::from_secs(2), "the caller was blocked for {:?}", began.elapsed());
}

#[test]
fn session_end_stops_its_jobs() {
    let (stopped, seen) = unbounded();
    let backend = Scripted::new(move |_, sink| {
        let error = loop {
            if let Err(error) = sink.send_chunk(b"x") {
                break error;
            }
            std::thread::sleep(ms(5));
        };
        let _ = stopped.send(());
        Err(error)
    });
    let bench = Bench::new(backend, 1);
    bench.dispatch("m");
    bench.next();
    let Bench { executor, out } = bench;
    drop(out);
    seen.recv_timeout(SOON).expect("the sink to report that nobody listens");
    wait_until("queue_depth is 0", || executor.queue_depth() == 0);
}

#[test]
fn http_backend_can_be_driven_without_an_executor() {
    let answer = |_: &Request| Answer::Raw(response(200, "text/event-stream", sse(7, 13)));
    let server = crate::support::Backend::vllm_with(&["m"], answer);
    let url = BaseUrl::parse(&server.url()).expect("a URL");
    let backend: Box<dyn Backend> = Box::new(HttpBackend::new(Kind::Vllm, Some(url), None));
    let mut sink = Gathered(Vec::new());
    let result: Result<JobResult, BackendError> = backend.execute(&job("m"), &mut sink);
    let result = result.unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!((result.input_tokens, result.output_tokens), (Some(7), Some(13)));
    assert_eq!(String::from_utf8_lossy(&sink.0), sse(7, 13));
    assert!(backend.health().is_ok_and(|health| health.reachable));
    assert!(backend.list_models().is_ok_and(|models| models.len() == 1 && models[0].native));
}
