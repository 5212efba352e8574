//! Reasons why the command ends without having done what was asked.

use std::fmt;

use vmring::Error;

/// A sentence for stderr, and an exit code.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Invalid arguments: exit code 2. Nothing was started.
    Usage(String),
    /// A step that failed: exit code 1.
    Step(String),
}

impl Failure {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) => 2,
            Failure::Step(_) => 1,
        }
    }

    /// A failure to start. It is the arguments' fault if the library says that they are invalid or
    /// not supported.
    pub(crate) fn starting(error: Error) -> Self {
        match error {
            Error::Config(_) | Error::NotSupported { .. } | Error::NeedsMacos { .. } => {
                Failure::Usage(error.to_string())
            }
            error => Failure::Step(error.to_string()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Failure::Usage(sentence) | Failure::Step(sentence)) = self;
        f.write_str(sentence)
    }
}
