//! The vmring command.
//!
//! Exit codes: 0 if every step succeeded, 1 if one failed, 2 for invalid arguments. A failure is
//! one sentence on stderr. Stdout carries results only.

mod args;
mod bench;
mod bridge;
mod demo;
mod device;
mod dhcp;
mod failure;
mod info;
mod manual;
mod nat;
#[cfg(target_os = "linux")]
mod netns;
mod personality;
mod probe;
mod progress;
mod recording;
mod report;
mod serve;
mod size;
mod stop;
mod stream;
mod system;
#[cfg(target_os = "linux")]
mod tap;
mod vmnet;
mod wire;

use std::io::{self, Write};
use std::process::ExitCode;

use crate::args::Command;
use crate::failure::Failure;
use crate::personality::Personality;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    if let Some((personality, arguments)) = Personality::of(&arguments) {
        return personality.run(arguments);
    }
    let outcome = args::parse(arguments, &Personality::commands()).and_then(run);
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            // If this fails there is nobody to report it to.
            let _ = writeln!(io::stderr(), "vmring: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    let done = match command {
        #[cfg(target_os = "linux")]
        Command::RunNetns(args) => return netns::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Bridge(args) => bridge::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Man(args) => manual::run(&args, args::command(&Personality::commands())),
        Command::Completions { shell } => {
            let script = manual::script(shell, &args::command(&Personality::commands()));
            report::print(&String::from_utf8_lossy(&script))
        }
        Command::Text(text) => report::print(&text),
    };
    done.map(|()| ExitCode::SUCCESS)
}
