//! The results: a table for people, JSON for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use serde_json::{Map, Value, json};

use crate::subject::Subject;
use crate::workloads::Figures;

/// The values of all rounds, by figure and subject.
#[derive(Default)]
pub struct Results(Vec<Row>);

struct Row {
    /// Workload and figure.
    name: String,
    values: BTreeMap<Subject, Vec<f64>>,
}

impl Results {
    /// Adds one round of a workload.
    pub fn add(&mut self, workload: &str, subject: Subject, figures: Figures) {
        for (figure, value) in figures {
            let name = format!("{workload}/{figure}");
            let row = match self.0.iter().position(|row| row.name == name) {
                Some(row) => row,
                None => {
                    self.0.push(Row { name, values: BTreeMap::new() });
                    self.0.len() - 1
                }
            };
            self.0[row].values.entry(subject).or_default().push(value);
        }
    }

    /// Medians over the rounds, and the ratio of ours to `reference`.
    pub fn table(&self, reference: Subject) -> String {
        let columns = [Subject::Ours, Subject::Peer, Subject::Floor, Subject::Direct];
        self.section(&columns, (Subject::Ours, reference))
    }

    /// The same for TLS, compared to plain TCP; empty if it was not measured.
    pub fn tls_table(&self) -> String {
        self.section(&[Subject::Wss, Subject::Ours], (Subject::Wss, Subject::Ours))
    }

    fn section(&self, columns: &[Subject], ratio: (Subject, Subject)) -> String {
        let mut text = String::new();
        for row in self.0.iter().filter(|row| row.values.contains_key(&columns[0])) {
            let _ = write!(text, "{:38}", row.name);
            for subject in columns {
                let _ = write!(
                    text,
                    "{:>10}",
                    row.values.get(subject).map_or(String::new(), |values| number(median(values.clone())))
                );
            }
            let _ = write!(text, "{}", row.ratio(ratio).unwrap_or_default());
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        if text.is_empty() {
            return text;
        }
        let names: String = columns.iter().map(|subject| format!("{subject:>10}")).collect();
        format!("{:38}{names}{:>14}   lowest to highest\n{text}", "", format!("{}/{}", ratio.0, ratio.1))
    }

    pub fn json(&self) -> Value {
        let by_subject = |row: &Row| -> Value {
            row.values
                .iter()
                .map(|(subject, values)| (subject.name().to_owned(), json!(values)))
                .collect::<Map<_, _>>()
                .into()
        };
        self.0.iter().map(|row| (row.name.clone(), by_subject(row))).collect::<Map<_, _>>().into()
    }
}

impl Row {
    /// The median of the ratios of the rounds, and their range.
    fn ratio(&self, (over, under): (Subject, Subject)) -> Option<String> {
        let (over, under) = (self.values.get(&over)?, self.values.get(&under)?);
        // 0/0 is no ratio, while the infinity of x/0 has to show.
        let mut ratios: Vec<_> = over.iter().zip(under).map(|(over, under)| over / under).collect();
        ratios.retain(|ratio| !ratio.is_nan());
        ratios.sort_by(f64::total_cmp);
        let (lowest, highest) = (ratios.first()?, ratios.last()?);
        let range = format!("{} to {}", number(*lowest), number(*highest));
        Some(format!("{:>14}   {range}", number(median(ratios.clone()))))
    }
}

/// At least three digits.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// The quantile `q`, from 0 to 1, of at least one value.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// The median of at least one value.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { f64::midpoint(values[middle - 1], values[middle]) } else { values[middle] }
}

/// Where the figures were measured, without the name of the host.
pub struct Machine {
    pub cpu: String,
    pub cpus: usize,
    pub kernel: String,
}

impl Machine {
    pub fn this() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cpu: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: kernel.trim().to_owned(),
        }
    }
}

/// All values, with when, where and of what they were measured.
pub fn document(results: &Results, machine: &Machine, arguments: &[String], versions: &Map<String, Value>) -> Value {
    json!({
        "date": time::OffsetDateTime::now_utc().date().to_string(),
        "machine": { "cpu": machine.cpu, "cpus": machine.cpus, "kernel": machine.kernel },
        "arguments": arguments,
        "versions": versions,
        "figures": results.json(),
    })
}
