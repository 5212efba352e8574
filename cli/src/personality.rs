//! The helpers of virtual machine monitors whose part this command takes: `vmnet-helper` and `vmnet-run`,
//! `socket_vmnet` and `socket_vmnet_client`.
//!
//! Each is a command of `vmring`, and what the program is when it is called by that name, as a link or a
//! copy. Each has its original's command line, output, exit codes and socket rules, and translates them
//! into what [`serve`](crate::serve) has. The sources are nirs/vmnet-helper (`programs/options.c`,
//! `helper.c`, `run.c`) and lima-vm/socket_vmnet (`cli.c`, `main.c`, `client/main.c`). `docs/helpers.md` has
//! a table of what is different on purpose.

mod limits;
mod log;
mod network;
mod options;
mod program;
mod socket_vmnet;
mod socket_vmnet_client;
mod vmnet_helper;
mod vmnet_run;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use limits::NAMES;
use log::Log;
use options::{help_of, refusal};

/// A helper whose part this command takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Personality {
    VmnetHelper,
    VmnetRun,
    SocketVmnet,
    SocketVmnetClient,
}

impl Personality {
    const ALL: [Personality; 4] = [
        Personality::VmnetHelper,
        Personality::VmnetRun,
        Personality::SocketVmnet,
        Personality::SocketVmnetClient,
    ];

    fn name(self) -> &'static str {
        NAMES[self as usize]
    }

    /// The one that these arguments ask for, and its own arguments, of which the first is its name. The
    /// program's name comes first, and then the command.
    pub(crate) fn of(arguments: &[OsString]) -> Option<(Self, &[OsString])> {
        let named = |name: &OsString| {
            let name = Path::new(name).file_name()?;
            Self::ALL.into_iter().find(|one| name == one.name())
        };
        if let Some(personality) = arguments.first().and_then(named) {
            return Some((personality, arguments));
        }
        let command = arguments.get(1)?;
        let personality = Self::ALL.into_iter().find(|one| command == one.name())?;
        Some((personality, &arguments[1..]))
    }

    /// Their command lines, for help, completions and manual pages.
    pub(crate) fn commands() -> [clap::Command; 4] {
        Self::ALL.map(|one| match one {
            Personality::VmnetHelper => vmnet_helper::Options::command(),
            Personality::VmnetRun => vmnet_run::Options::command(),
            Personality::SocketVmnet => socket_vmnet::Options::command(),
            Personality::SocketVmnetClient => socket_vmnet_client::Options::command(),
        })
    }

    /// Runs it. `arguments` are those that [`of`](Self::of) returns.
    pub(crate) fn run(self, arguments: &[OsString]) -> ExitCode {
        match self {
            Personality::VmnetHelper => parsed(arguments, Log::HELPER, vmnet_helper::run),
            Personality::VmnetRun => parsed(arguments, Log::RUNNER, vmnet_run::run),
            Personality::SocketVmnet => parsed(arguments, Log::DAEMON, socket_vmnet::run),
            Personality::SocketVmnetClient => {
                parsed(arguments, Log::PLAIN, socket_vmnet_client::run)
            }
        }
    }
}

/// Runs what the arguments say. If they are wrong, says why and ends with 1, as the originals do.
fn parsed<T: Parser>(
    arguments: &[OsString],
    log: Log,
    run: impl FnOnce(T, Log) -> ExitCode,
) -> ExitCode {
    match T::try_parse_from(arguments) {
        Ok(options) => run(options, log),
        Err(error) => match help_of(&error) {
            Some(help) => log.printed(&help),
            None => {
                log.error(&refusal(&error));
                log.plain(&format!("See '{} --help'", T::command().get_name()));
                ExitCode::FAILURE
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Option<(Personality, Vec<String>)> {
        let words: Vec<_> = line.split(' ').map(OsString::from).collect();
        let (personality, arguments) = Personality::of(&words)?;
        let text = |word: &OsString| word.to_string_lossy().into_owned();
        Some((personality, arguments.iter().map(text).collect()))
    }

    #[test]
    fn a_personality_is_asked_for_by_name_or_by_command() {
        let arguments = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
        for (line, personality, words) in [
            (
                "vmring vmnet-helper --fd 3",
                Personality::VmnetHelper,
                &["vmnet-helper", "--fd", "3"][..],
            ),
            ("/opt/bin/vmnet-run ls", Personality::VmnetRun, &["/opt/bin/vmnet-run", "ls"]),
            ("vmring socket_vmnet s", Personality::SocketVmnet, &["socket_vmnet", "s"]),
            (
                "socket_vmnet_client s vmnet-run",
                Personality::SocketVmnetClient,
                &["socket_vmnet_client", "s", "vmnet-run"],
            ),
        ] {
            assert_eq!(of(line), Some((personality, arguments(words))), "{line}");
        }
        for line in
            ["vmring", "vmring serve vmnet-helper", "vmring bin/vmnet-helper", "x-vmnet-run"]
        {
            assert_eq!(of(line), None, "{line}");
        }
    }

    #[test]
    fn each_command_line_is_sound_and_has_its_name() {
        for (one, command) in Personality::ALL.into_iter().zip(Personality::commands()) {
            assert_eq!(command.get_name(), one.name());
            command.debug_assert();
        }
    }
}
