//! A customer without any agent: a child that asks the backend itself, a thread and a connection a stream.
//!
//! The bench writes orders and questions to its stdin, a line each, and reads what it saw from its stdout. The child ends with
//! its stdin.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use crate::Result;
use crate::client::{Count, Customer, Seen};
use crate::event::{Receipt, Tally};
use crate::http_client::Answer;
use crate::job::{Order, Script};
use crate::process::now_ns;

/// For an answer of the child.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

const STACK_BYTES: usize = 64 << 10;

/// The child.
pub fn run(backend_port: u16) -> Result<()> {
    let tally = Arc::new(Tally::default());
    for line in std::io::stdin().lines() {
        let line = line?;
        match line.as_str() {
            "count" => say(&format!("count {} {}", tally.events.load(Relaxed), tally.bytes.load(Relaxed))),
            "record" => tally.record(),
            "latencies" => {
                let latencies: String = tally.take_latencies_us().iter().map(|us| format!(" {us:.2}")).collect();
                say(&format!("latencies{latencies}"));
            }
            _ => {
                let order = Order::find(&line).ok_or("no order")?;
                let tally = Arc::clone(&tally);
                thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
                    if let Err(error) = stream(order, backend_port, &tally) {
                        say(&format!("failed {error}"));
                    }
                })?;
            }
        }
    }
    Ok(())
}

fn stream(order: Order, backend_port: u16, tally: &Tally) -> std::io::Result<()> {
    let request = order.request();
    let began_ns = now_ns();
    let mut receipt = Receipt::default();
    let mut answer = Answer::to(request.as_bytes(), backend_port)?;
    while let Some(body) = answer.next()? {
        let at_ns = now_ns();
        if receipt.bytes == 0 {
            say(&format!("first {} {at_ns} {began_ns}", order.seq));
        }
        match order.script {
            Script::Flood { .. } => receipt.count(body.len(), tally),
            _ => receipt.take(body, at_ns, tally),
        }
    }
    say(&format!("done {} {} {}", order.seq, now_ns(), receipt.bytes));
    Ok(())
}

/// A line to the bench, which is gone when it cannot be written.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// The bench's end of the child.
pub struct Direct {
    input: ChildStdin,
    seen: Receiver<Seen>,
    answers: Receiver<String>,
}

impl Direct {
    pub fn new(input: ChildStdin, output: ChildStdout) -> Result<Self> {
        let (seen_sender, seen) = mpsc::channel();
        let (answer_sender, answers) = mpsc::channel();
        thread::Builder::new().name("direct".into()).spawn(move || {
            for line in BufReader::new(output).lines().map_while(std::io::Result::ok) {
                sort(line, &seen_sender, &answer_sender);
            }
            let _ = seen_sender.send(Seen::Gone);
        })?;
        Ok(Self { input, seen, answers })
    }

    fn ask(&mut self, question: &str) -> Result<String> {
        writeln!(self.input, "{question}")?;
        Ok(self.answers.recv_timeout(ANSWER_TIMEOUT).map_err(|_| format!("no answer to `{question}`"))?)
    }
}

fn sort(line: String, seen: &Sender<Seen>, answers: &Sender<String>) {
    let _ = match event(&line) {
        Some(event) => seen.send(event).map_err(drop),
        None => answers.send(line).map_err(drop),
    };
}

fn event(line: &str) -> Option<Seen> {
    let (kind, rest) = line.split_once(' ')?;
    let mut numbers = rest.split(' ').map_while(|number| number.parse().ok());
    let mut number = || numbers.next();
    match kind {
        "first" => Some(Seen::First { seq: number()?, at_ns: number()?, began_ns: number() }),
        "done" => Some(Seen::Done { seq: number()?, at_ns: number()?, bytes: number()? }),
        "failed" => Some(Seen::Failed(rest.to_owned())),
        _ => None,
    }
}

impl Customer for Direct {
    fn order(&mut self, order: Order) -> Result<u64> {
        writeln!(self.input, "{order}")?;
        Ok(now_ns())
    }

    fn cancel(&mut self, _seq: u64) -> Result<u64> {
        Err("there is no agent to cancel a job".into())
    }

    fn seen(&self) -> &Receiver<Seen> {
        &self.seen
    }

    fn count(&mut self) -> Result<Count> {
        let answer = self.ask("count")?;
        let mut numbers = answer.split(' ').skip(1).map(str::parse);
        let mut number = || numbers.next().ok_or("a short count");
        Ok(Count { events: number()??, bytes: number()?? })
    }

    fn record(&mut self) -> Result<()> {
        Ok(writeln!(self.input, "record")?)
    }

    fn latencies_us(&mut self) -> Result<Vec<f64>> {
        let answer = self.ask("latencies")?;
        Ok(answer.split(' ').skip(1).map(str::parse).collect::<Result<_, _>>()?)
    }
}
