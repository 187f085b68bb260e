//! A run of the binary, after its end.

use std::process::Output;

/// How it ended, and what it printed.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// It ended with 0 and without a word on stderr; returns what it printed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stderr, "");
        self.stdout
    }

    /// It failed with this code, and printed each of `words`; returns all that it printed.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) -> String {
        let printed = format!("{}{}", self.stdout, self.stderr);
        assert_eq!(self.code, Some(code), "{printed}");
        for word in words {
            assert!(printed.contains(word), "no `{word}` in: {printed}");
        }
        printed
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}
