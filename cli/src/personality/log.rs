//! What the helpers say on stderr, each in the form of its original.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::report::print;

/// How lines begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Log {
    /// Between the level, in five columns, and the text.
    joint: &'static str,
    /// Whether lines have a level.
    has_level: bool,
    verbose: bool,
}

impl Log {
    /// vmnet-helper (`log.h`).
    pub(super) const HELPER: Self = Self { joint: " [main] ", has_level: true, verbose: false };
    /// vmnet-run.
    pub(super) const RUNNER: Self = Self { joint: " [runner] ", has_level: true, verbose: false };
    /// socket_vmnet (`log.h`).
    pub(super) const DAEMON: Self = Self { joint: "| ", has_level: true, verbose: false };
    /// socket_vmnet_client.
    pub(super) const PLAIN: Self = Self { joint: "", has_level: false, verbose: false };

    /// The same, of another part of the helper.
    pub(super) fn of(self, joint: &'static str) -> Self {
        Self { joint, ..self }
    }

    /// The same, which says more if it is `verbose`.
    pub(super) fn verbose(self, verbose: bool) -> Self {
        Self { verbose, ..self }
    }

    fn line(&self, level: &str, text: &str) {
        let line = match self.has_level {
            true => format!("{level:5}{}{text}\n", self.joint),
            false => format!("{text}\n"),
        };
        // If this fails there is nobody to report it to.
        let _ = io::stderr().write_all(line.as_bytes());
    }

    pub(super) fn debug(&self, text: &str) {
        if self.verbose {
            self.line("DEBUG", text);
        }
    }

    pub(super) fn info(&self, text: &str) {
        self.line("INFO", text);
    }

    pub(super) fn warn(&self, text: &str) {
        self.line("WARN", text);
    }

    pub(super) fn error(&self, text: &str) {
        self.line("ERROR", text);
    }

    /// A line without a level.
    pub(super) fn plain(&self, text: &str) {
        Self::PLAIN.line("", text);
    }

    /// Says why the helper ends, which is a failure.
    pub(super) fn failed(&self, text: &str) -> ExitCode {
        self.error(text);
        ExitCode::FAILURE
    }

    /// Prints to stdout, and ends the helper.
    pub(super) fn printed(&self, text: &str) -> ExitCode {
        match print(text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => self.failed(&failure.to_string()),
        }
    }
}
