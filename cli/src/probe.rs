//! `vmring probe`: asks a real vmnet the questions that no document answers.

use std::time::Duration;

use vmring::device::vmnet::probe::{Probe, Told};

use crate::args::ProbeArgs;
use crate::failure::Failure;
use crate::progress::say;
use crate::report::print;

#[cfg(target_os = "macos")]
pub(crate) fn run(args: &ProbeArgs) -> Result<(), Failure> {
    let probe = Probe { sleep: args.sleep.map(Duration::from_secs), ..Probe::default() };
    ask(&probe)
}

#[cfg(not(target_os = "macos"))]
pub(crate) fn run(args: &ProbeArgs) -> Result<(), Failure> {
    use vmnet_sim::{Rules, World};

    if !args.simulated {
        let sentence = "the probe asks Apple's vmnet, which exists on macOS only ('vmring probe \
                        --simulated' asks the simulated one)";
        return Err(Failure::Usage(sentence.to_owned()));
    }
    // This world answers where the strict one aborts, because the probe breaks rules on purpose.
    let world = World::with(Rules::Answers, true);
    let probe = Probe {
        interface_ids: [world.interface_id(), world.interface_id()],
        sleep: args.sleep.map(Duration::from_secs),
        // Nothing is late in the simulator.
        patience: Duration::from_millis(100),
    };
    print(
        "These are the simulator's answers: they prove nothing about vmnet, only that the probe runs.\n",
    )?;
    world.enter(|| ask(&probe))
}

/// Writes the report to stdout as it grows, and the current step to stderr.
fn ask(probe: &Probe) -> Result<(), Failure> {
    let mut printed = Ok(());
    let asked = probe.run(&mut |told| match told {
        Told::Asking { number, question } => say(&format!("  question {number}: {question}")),
        Told::Line(line) if printed.is_ok() => printed = print(&format!("{line}\n")),
        _ => {}
    });
    asked.map_err(Failure::starting)?;
    printed
}
