//! The client without an agent: a child process that calls the backend itself, with a thread and a connection per stream.
//!
//! The bench writes jobs and commands to its stdin, one per line, and reads events and answers from its stdout. The child ends
//! with its stdin.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use crate::Result;
use crate::client::{Client, ClientEvent};
use crate::http_client::Response;
use crate::job::{Job, Script};
use crate::process::now_ns;
use crate::received::{Received, ReceivedStream, Totals};

/// For the child's answer to a command.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

const STACK_BYTES: usize = 64 << 10;

/// The child.
pub fn run(backend_port: u16) -> Result<()> {
    let received = Arc::new(Received::default());
    for line in std::io::stdin().lines() {
        let line = line?;
        match line.as_str() {
            "totals" => {
                let totals = received.totals();
                print(&format!("totals {} {}", totals.events, totals.bytes));
            }
            "record" => received.start_recording(),
            "latencies" => {
                let latencies: String = received.take_latencies_us().iter().map(|us| format!(" {us:.2}")).collect();
                print(&format!("latencies{latencies}"));
            }
            _ => {
                let job = Job::find(&line).ok_or("neither a job nor a command")?;
                let received = Arc::clone(&received);
                thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
                    if let Err(error) = stream(job, backend_port, &received) {
                        print(&format!("failed {error}"));
                    }
                })?;
            }
        }
    }
    Ok(())
}

fn stream(job: Job, backend_port: u16, received: &Received) -> std::io::Result<()> {
    let request = job.request();
    let began_ns = now_ns();
    let mut stream = ReceivedStream::default();
    let mut response = Response::to(request.as_bytes(), backend_port)?;
    while let Some(body) = response.next()? {
        let at_ns = now_ns();
        if stream.bytes == 0 {
            print(&format!("first {} {at_ns} {began_ns}", job.id));
        }
        match job.script {
            Script::Flood { .. } => stream.count(body.len(), received),
            _ => stream.parse(body, at_ns, received),
        }
    }
    print(&format!("done {} {} {}", job.id, now_ns(), stream.bytes));
    Ok(())
}

/// A line for the bench. If it cannot be written, the bench has ended.
fn print(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// The bench's end of the pipes.
pub struct DirectClient {
    input: ChildStdin,
    events: Receiver<ClientEvent>,
    answers: Receiver<String>,
}

impl DirectClient {
    pub fn new(input: ChildStdin, output: ChildStdout) -> Result<Self> {
        let (event_sender, events) = mpsc::channel();
        let (answer_sender, answers) = mpsc::channel();
        thread::Builder::new().name("direct".into()).spawn(move || {
            for line in BufReader::new(output).lines().map_while(std::io::Result::ok) {
                dispatch(line, &event_sender, &answer_sender);
            }
            let _ = event_sender.send(ClientEvent::Closed);
        })?;
        Ok(Self { input, events, answers })
    }

    fn command(&mut self, command: &str) -> Result<String> {
        writeln!(self.input, "{command}")?;
        Ok(self.answers.recv_timeout(ANSWER_TIMEOUT).map_err(|_| format!("no answer to `{command}`"))?)
    }
}

fn dispatch(line: String, events: &Sender<ClientEvent>, answers: &Sender<String>) {
    let _ = match parse_event(&line) {
        Some(event) => events.send(event).map_err(drop),
        None => answers.send(line).map_err(drop),
    };
}

fn parse_event(line: &str) -> Option<ClientEvent> {
    let (kind, rest) = line.split_once(' ')?;
    let mut numbers = rest.split(' ').map_while(|number| number.parse().ok());
    let mut number = || numbers.next();
    match kind {
        "first" => Some(ClientEvent::First { job_id: number()?, at_ns: number()?, began_ns: number() }),
        "done" => Some(ClientEvent::Done { job_id: number()?, at_ns: number()?, bytes: number()? }),
        "failed" => Some(ClientEvent::Failed(rest.to_owned())),
        _ => None,
    }
}

impl Client for DirectClient {
    fn submit(&mut self, job: Job) -> Result<u64> {
        writeln!(self.input, "{job}")?;
        Ok(now_ns())
    }

    fn cancel(&mut self, _job_id: u64) -> Result<u64> {
        Err("without an agent no job can be cancelled".into())
    }

    fn events(&self) -> &Receiver<ClientEvent> {
        &self.events
    }

    fn totals(&mut self) -> Result<Totals> {
        let answer = self.command("totals")?;
        let mut numbers = answer.split(' ').skip(1).map(str::parse);
        let mut number = || numbers.next().ok_or("a short answer to `totals`");
        Ok(Totals { events: number()??, bytes: number()?? })
    }

    fn start_recording(&mut self) -> Result<()> {
        Ok(writeln!(self.input, "record")?)
    }

    fn take_latencies_us(&mut self) -> Result<Vec<f64>> {
        let answer = self.command("latencies")?;
        Ok(answer.split(' ').skip(1).map(str::parse).collect::<Result<_, _>>()?)
    }
}
