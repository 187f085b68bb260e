//! The agent's block in the user's crontab, between two marker lines.
//!
//! Invariants: no byte outside the block changes, and [`Crontab::without_block`] removes exactly what [`Crontab::with_block`] adds. A
//! crontab is rejected if its markers or the lines between them differ from those that this module writes: the operator may have
//! edited them.

use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::process::{Command, Output, Stdio};

use super::{ServiceCommand, command, error_text};

const BEGIN: &str =
    "# >>> usepod-agent: written by `usepod-agent service install`, removed by `usepod-agent service uninstall`";
/// The part of the first marker line that is matched.
const BEGIN_MARKER: &str = "# >>> usepod-agent";
const END: &str = "# <<< usepod-agent";
/// When cron runs the command: at boot and every minute.
const TIMES: [&str; 2] = ["@reboot ", "* * * * * "];
/// Between the program and the configuration file, in both lines of the block.
const RUN: &str = " run --cron --config ";
/// The agent logs to its file, so cron must not mail its output.
const DISCARD_OUTPUT: &str = " >/dev/null 2>&1";

/// A crontab.
pub struct Crontab {
    text: Vec<u8>,
    /// From the first marker to the line end of the second.
    block: Option<Range<usize>>,
}

impl Crontab {
    /// The crontab of this user; `None` if no cron is installed.
    ///
    /// # Errors
    /// `crontab` failed, or the block was edited.
    pub fn read() -> Result<Option<Crontab>, String> {
        let output = match command("crontab").arg("-l").output() {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            ran => ran.map_err(not_started)?,
        };
        if output.status.success() {
            return Crontab::parse(output.stdout).map(Some);
        }
        let said = error_text(&output);
        // The messages of cron, cronie and dcron; then that of busybox.
        let is_none = said.contains("no crontab for") || (said.contains("can't open") && said.contains("No such file"));
        match is_none && output.stdout.is_empty() {
            true => Crontab::parse(Vec::new()).map(Some),
            false => Err(format!("`crontab -l` failed, so the crontab is left as it is: {said}")),
        }
    }

    /// Finds the block in a crontab.
    ///
    /// # Errors
    /// The block was edited.
    pub fn parse(text: Vec<u8>) -> Result<Crontab, String> {
        let mut markers = Vec::new();
        let mut block: Option<Range<usize>> = None;
        let mut at = 0;
        for (number, line) in text.split_inclusive(|b| *b == b'\n').enumerate() {
            let content = line.trim_ascii_end();
            let (begins, ends) = (content.starts_with(BEGIN_MARKER.as_bytes()), content == END.as_bytes());
            let is_within = markers.len() == 1;
            if begins || ends {
                markers.push((number + 1, ends));
            } else if is_within && !is_ours(content) {
                return Err(format!(
                    "line {} of the crontab is inside the block of usepod-agent, but was not written by it; move it out of the \
                     block with `crontab -e`",
                    number + 1
                ));
            }
            match (&mut block, begins || ends) {
                (None, true) => block = Some(at..at + line.len()),
                (Some(block), true) => block.end = at + line.len(),
                _ => {}
            }
            at += line.len();
        }
        match markers[..] {
            [] | [(_, false), (_, true)] => Ok(Crontab { text, block }),
            _ => {
                let numbers: Vec<String> = markers.iter().map(|(number, _)| number.to_string()).collect();
                Err(format!(
                    "the markers of usepod-agent in the crontab are not one pair `{BEGIN_MARKER} …`, `{END}` (line {}); with \
                     `crontab -e`, remove them and the lines of usepod-agent",
                    numbers.join(", ")
                ))
            }
        }
    }

    /// The crontab with the block added or replaced.
    pub fn with_block(&self, command: &ServiceCommand) -> Vec<u8> {
        let mut block = format!("{BEGIN}\n");
        for times in TIMES {
            block.push_str(times);
            block.push_str(&command_line(command));
            block.push('\n');
        }
        block.push_str(END);
        let (before, after) = match &self.block {
            Some(block) => (&self.text[..block.start], &self.text[block.end..]),
            None => (&self.text[..], &[][..]),
        };
        let mut text = before.to_vec();
        // If the last line of the crontab has no line end, the block has none either, by which `without_block` recognizes the case.
        let was_open = match &self.block {
            Some(block) => !self.text[block.clone()].ends_with(b"\n"),
            None => !before.is_empty() && !before.ends_with(b"\n"),
        };
        if was_open && self.block.is_none() {
            text.push(b'\n');
        }
        text.extend_from_slice(block.as_bytes());
        if !was_open {
            text.push(b'\n');
        }
        text.extend_from_slice(after);
        text
    }

    /// The crontab without the block.
    pub fn without_block(&self) -> Vec<u8> {
        let Some(block) = &self.block else { return self.text.clone() };
        let was_open = !self.text[block.clone()].ends_with(b"\n");
        let before = &self.text[..block.start];
        let before = if was_open { before.strip_suffix(b"\n").unwrap_or(before) } else { before };
        [before, &self.text[block.end..]].concat()
    }

    /// The shell command that cron runs every minute, or at boot if only that line remains; `None` without a block.
    pub fn command(&self) -> Option<String> {
        let block = String::from_utf8_lossy(&self.text[self.block.clone()?]);
        let command = TIMES.iter().rev().find_map(|times| block.lines().find_map(|line| line.strip_prefix(times)))?;
        Some(command.trim_end().replace("\\%", "%"))
    }

    /// The configuration file that the block names.
    pub fn config(&self) -> Option<String> {
        let command = self.command()?;
        let mut quoted = command.split_once(RUN)?.1.strip_prefix('\'')?;
        let mut config = String::new();
        loop {
            let (piece, rest) = quoted.split_once('\'')?;
            config.push_str(piece);
            match rest.strip_prefix("\\''") {
                Some(rest) => quoted = rest,
                None => return Some(config),
            }
            config.push('\'');
        }
    }

    /// The variables that cron sets for the block: those assigned above it.
    pub fn environment(&self) -> Vec<(String, String)> {
        let above = self.block.as_ref().map_or(&self.text[..], |block| &self.text[..block.start]);
        String::from_utf8_lossy(above).lines().filter_map(assignment).collect()
    }

    /// Installs `text` as the user's crontab.
    ///
    /// # Errors
    /// The error message of `crontab`.
    pub fn write(text: &[u8]) -> Result<(), String> {
        // An empty crontab is removed.
        let how = if text.is_empty() { "-r" } else { "-" };
        let output = output_with_input(command("crontab").arg(how), text).map_err(not_started)?;
        match output.status.success() {
            true => Ok(()),
            false => Err(format!("`crontab` refused the new crontab: {}", error_text(&output))),
        }
    }

    /// The bytes of the crontab.
    pub fn text(&self) -> &[u8] {
        &self.text
    }
}

/// Runs a program to its end, with `input` as its stdin.
fn output_with_input(command: &mut Command, input: &[u8]) -> io::Result<Output> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that stops reading reports the reason on stderr.
        let _ = stdin.write_all(input);
    }
    child.wait_with_output()
}

/// The command in the lines of the block.
fn command_line(command: &ServiceCommand) -> String {
    let mut line = format!("exec {}{RUN}{}", cron_quote(&command.binary), cron_quote(&command.config));
    for option in command.options() {
        line.push(' ');
        line.push_str(&option);
    }
    line.push_str(DISCARD_OUTPUT);
    line
}

/// Quotes for the shell and for cron, which treats an unescaped `%` as a line end.
fn cron_quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''").replace('%', "\\%"))
}

fn is_ours(line: &[u8]) -> bool {
    let line = String::from_utf8_lossy(line);
    let command = TIMES.iter().find_map(|times| line.strip_prefix(times));
    command.is_some_and(|command| command.starts_with("exec '") && command.contains(RUN))
}

/// Parses `NAME = value` by cron's rules.
fn assignment(line: &str) -> Option<(String, String)> {
    let (name, value) = line.split_once('=')?;
    let (name, value) = (unquoted(name.trim()), unquoted(value.trim()));
    let is_name = !name.is_empty() && !name.starts_with('#') && !name.contains(char::is_whitespace);
    is_name.then(|| (name.to_owned(), value.to_owned()))
}

fn unquoted(text: &str) -> &str {
    let within = |quote: char| text.strip_prefix(quote)?.strip_suffix(quote);
    within('"').or_else(|| within('\'')).unwrap_or(text)
}

fn not_started(e: io::Error) -> String {
    format!("`crontab` cannot be run: {e}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> ServiceCommand {
        ServiceCommand {
            binary: "/opt/a b/usepod-agent".into(),
            config: "/home/o'neil/100%/agent.toml".into(),
            log_level: Some(log::LevelFilter::Debug),
            allow_insecure: false,
        }
    }

    fn table(text: &[u8]) -> Crontab {
        Crontab::parse(text.to_vec()).expect("a crontab")
    }

    #[test]
    fn with_block_is_idempotent_and_without_block_restores_the_crontab() {
        const PIECES: [&[u8]; 12] = [
            b"\n",
            b"\r\n",
            b"# a comment",
            b"PATH=/usr/bin",
            b"* * * * * echo 100\\%",
            b"\xff\x00",
            b"'",
            b" ",
            b"% ",
            b"# <<< other",
            b"@reboot exec '",
            b"usepod-agent",
        ];
        let other = ServiceCommand { log_level: None, ..command() };
        arbtest::arbtest(|u| {
            let mut text = Vec::new();
            for _ in 0..u.int_in_range(0..=12)? {
                text.extend_from_slice(u.choose(&PIECES)?);
            }
            let installed = table(&text).with_block(&command());
            let start = text.len();
            assert_eq!(installed[..start], text, "what was there comes first");
            assert_eq!(table(&installed).with_block(&command()), installed);
            assert_eq!(table(&installed).without_block(), text);
            assert_eq!(table(&table(&installed).with_block(&other)).without_block(), text);
            assert_eq!(table(&installed).config(), Some(command().config));
            Ok(())
        });
    }

    #[test]
    fn without_block_keeps_lines_below_the_block() {
        for before in ["", "MAILTO=me\n", "# no end"] {
            let mut text = table(before.as_bytes()).with_block(&command());
            if !text.ends_with(b"\n") {
                text.push(b'\n');
            }
            text.extend_from_slice(b"0 3 * * * backup\n");
            let after = String::from_utf8(table(&text).without_block()).expect("UTF-8");
            let expected =
                if before.is_empty() || before.ends_with('\n') { before.to_owned() } else { format!("{before}\n") };
            assert_eq!(after, format!("{expected}0 3 * * * backup\n"));
        }
    }

    #[test]
    fn block_of_one_line_is_still_a_block() {
        let ours = String::from_utf8(table(b"").with_block(&command())).expect("UTF-8");
        for times in TIMES {
            let left: String = ours.split_inclusive('\n').filter(|line| !line.starts_with(times)).collect();
            let left = table(left.as_bytes());
            assert_eq!((left.command(), left.config()), (table(ours.as_bytes()).command(), Some(command().config)));
            assert_eq!((left.with_block(&command()), left.without_block()), (ours.clone().into_bytes(), Vec::new()));
        }
    }

    #[test]
    fn command_passes_paths_through_the_shell_unchanged() {
        let table = table(&table(b"").with_block(&command()));
        let command =
            table.command().expect("a command").replace("exec ", "printf '%s\\n' ").replace(DISCARD_OUTPUT, "");
        let output = std::process::Command::new("sh").arg("-c").arg(command).output().expect("a shell");
        let words = "/opt/a b/usepod-agent\nrun\n--cron\n--config\n/home/o'neil/100%/agent.toml\n--log-level\ndebug\n";
        assert_eq!(String::from_utf8_lossy(&output.stdout), words);
    }

    #[test]
    fn parse_refuses_an_edited_block_and_names_the_lines() {
        let ours = String::from_utf8(table(b"").with_block(&command())).expect("UTF-8");
        let (begin, end) = (format!("{BEGIN}\n"), format!("{END}\n"));
        let cases = [
            (begin.clone(), "line 1"),
            (format!("x\n{end}"), "line 2"),
            (format!("{end}{begin}"), "line 1, 2"),
            (format!("{ours}{ours}"), "line 1, 4, 5, 8"),
            (ours.replace(END, ""), "line 4"),
            (ours.replace(END, "0 3 * * * backup\n# <<< usepod-agent"), "line 4"),
            (ours.replace("@reboot", "KEY=1\n@reboot"), "line 2"),
        ];
        for (text, lines) in cases {
            let error = Crontab::parse(text.clone().into_bytes()).map(|_| ()).expect_err(&text);
            assert!(error.contains(lines) && error.contains("crontab -e"), "{text}: {error}");
        }
    }

    #[test]
    fn environment_is_read_as_cron_reads_it() {
        let above = "# NOT=this\nA=1\n B = \"two words\" \nC='3'\n* * * * * X=1 command\nD=\n";
        let mut text = table(above.as_bytes()).with_block(&command());
        text.extend_from_slice(b"BELOW=1\n");
        let found = table(&text).environment();
        let found: Vec<(&str, &str)> = found.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(found, [("A", "1"), ("B", "two words"), ("C", "3"), ("D", "")]);
    }

    #[test]
    fn a_program_with_much_to_say_on_stderr_comes_to_its_end() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "cat; head -c 300000 /dev/zero >&2; echo out; exit 3"]);
        let output = output_with_input(&mut shell, b"in ").expect("a shell");
        assert_eq!((&output.stdout[..], output.status.code()), (&b"in out\n"[..], Some(3)));
        assert_eq!(output.stderr.len(), 300_000);
    }
}
