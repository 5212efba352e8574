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
    /// not supported, or that they name an interface that cannot be used.
    pub(crate) fn starting(error: Error) -> Self {
        let sentence = error.to_string();
        if is_the_arguments_fault(&error) {
            Failure::Usage(sentence)
        } else {
            Failure::Step(sentence)
        }
    }
}

fn is_the_arguments_fault(error: &Error) -> bool {
    match error {
        Error::Config(_) | Error::NotSupported { .. } | Error::NeedsMacos { .. } => true,
        Error::Socket(error) => {
            use vmring::SocketError;
            !matches!(error, SocketError::Taken(_))
        }
        #[cfg(target_os = "linux")]
        Error::Tap(error) => {
            use vmring::TapError;
            // The others depend on what the machine has or does at the moment.
            matches!(
                error,
                TapError::Name(_)
                    | TapError::NotATap(_)
                    | TapError::NoBridge(_)
                    | TapError::SubnetTaken { .. }
                    | TapError::QueueMismatch { .. }
                    | TapError::Setting(_)
            )
        }
        _ => false,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Failure::Usage(sentence) | Failure::Step(sentence)) = self;
        f.write_str(sentence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmring::ConfigError;

    fn code(error: impl Into<Error>) -> u8 {
        Failure::starting(error.into()).exit_code()
    }

    #[test]
    fn what_the_command_line_names_wrongly_is_a_usage_error() {
        assert_eq!(code(ConfigError::Zero { what: "depth" }), 2);
        assert_eq!(code(Error::NotSupported { what: "offload", device: "abacus".into() }), 2);
        assert_eq!(code(Error::NeedsMacos { what: "a network object", version: "26.0" }), 2);
        assert_eq!(code(Error::PermissionDenied { needs: "root".to_owned() }), 1);
        assert_eq!(code(Error::OutOfFrames), 1);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_no_tap_can_have_is_a_usage_error_and_a_busy_tap_is_not() {
        use vmring::TapError;
        let name = || "lo".to_owned();
        assert_eq!(code(TapError::Name(name())), 2);
        assert_eq!(code(TapError::NotATap(name())), 2);
        assert_eq!(code(TapError::NoBridge(name())), 2);
        assert_eq!(code(TapError::QueueMismatch { name: name(), multi: true }), 2);
        let (subnet, by) = ("192.168.64.0/24".to_owned(), "'eth0' has it".to_owned());
        assert_eq!(code(TapError::SubnetTaken { subnet, by, free: None }), 2);
        assert_eq!(code(TapError::NoTun), 1);
        assert_eq!(code(TapError::Taken(name())), 1);
        assert_eq!(code(TapError::Gone(name())), 1);
    }
}
