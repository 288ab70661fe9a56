//! Runs the built program and checks what every command promises.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The program, ready for arguments.
pub(crate) fn fulgur() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fulgur"));
    command.env_remove("RUST_BACKTRACE").stdin(Stdio::null());
    command
}

/// Runs the program where every file ends after `blocks` of 512 bytes, as on a disk that is full.
#[cfg(unix)]
pub(crate) fn on_a_small_disk(blocks: u32, arguments: &[&str]) -> Ran {
    let program = fulgur().get_program().to_owned();
    let mut shell = Command::new("sh");
    // Without the trap the system ends a process that writes too much, before it can say so.
    shell.args(["-c", "trap '' XFSZ; ulimit -f \"$1\"; shift; exec \"$@\"", "sh"]);
    shell.arg(blocks.to_string()).arg(program).args(arguments);
    shell.env_remove("RUST_BACKTRACE");
    Ran::of(shell.output().unwrap())
}

/// A finished run.
pub(crate) struct Ran {
    /// The exit code.
    pub(crate) code: i32,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

/// Runs the program with these arguments.
pub(crate) fn run<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Ran {
    Ran::of(fulgur().args(arguments).output().expect("the program starts"))
}

impl Ran {
    /// A finished process; it must have ended by itself.
    pub(crate) fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
        Self {
            code: output.status.code().expect("ended by itself, not by a signal"),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    /// The one JSON object on standard output, and nothing besides it.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(
            self.stdout.lines().count(),
            1,
            "one line expected: {}{}",
            self.stdout,
            self.stderr
        );
        let value: Value = serde_json::from_str(&self.stdout).expect("standard output is JSON");
        assert!(value.is_object(), "{value}");
        value
    }

    /// The one line of an error: exit code 2, nothing on standard output, no panic.
    #[track_caller]
    pub(crate) fn error(&self) -> &str {
        assert_eq!(self.code, 2, "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        let line = self
            .stderr
            .trim_end()
            .strip_prefix("error: ")
            .expect("an error line");
        assert!(
            !line.contains("bug in fulgur") && !line.contains("panicked"),
            "{line}"
        );
        line
    }
}

/// Names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entry = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(entry).collect();
    names.sort();
    names
}
