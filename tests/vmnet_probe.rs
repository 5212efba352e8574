//! The probe distinguishes one vmnet from another: for each open question, it reports whichever
//! answer is true.

use std::collections::BTreeMap;
use std::time::Duration;

use vmnet_sim::{Events, Reported, Rules, Script, World};
use vmring::device::vmnet::probe::{Probe, Told};

use crate::support::guarded;

/// The answers of a vmnet with this script, by number of the question.
fn answers(change: impl Fn(&mut Script)) -> BTreeMap<u32, String> {
    let world = World::with(Rules::Answers, true);
    let interface_ids = [world.interface_id(), world.interface_id()];
    interface_ids.iter().for_each(|id| world.script(*id, &change));
    let probe = Probe { interface_ids, sleep: None, patience: Duration::from_millis(100) };
    let (mut asked, mut answers) = (Vec::new(), BTreeMap::new());
    let outcome = world.enter(|| {
        probe.run(&mut |told| match told {
            Told::Asking { number, .. } => asked.push(number),
            Told::Line(line) => {
                if let Some(number) = asked.last() {
                    let before = answers.insert(*number, line.to_owned());
                    assert_eq!(before, None, "one line each");
                }
            }
            _ => {}
        })
    });
    outcome.expect("the simulator starts what it is asked for");
    assert_eq!(answers.keys().copied().collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    assert_eq!(world.unreleased(crate::support::LONG), [""; 0]);
    answers
}

#[track_caller]
fn says(answers: &BTreeMap<u32, String>, number: u32, words: &str) {
    assert!(answers[&number].contains(words), "no '{words}' in {}", answers[&number]);
}

#[test]
fn a_vmnet_that_is_as_everybody_expects() {
    guarded(|| {
        let answers = answers(|_| ());
        says(&answers, 2, "(1006, 4), arrived []");
        says(&answers, 3, "more than 256: (1008, 257)");
        says(&answers, 4, "(1000, 1): 0 more; a fourth packet: 1 more");
        says(&answers, 9, "not asked");
        says(&answers, 10, "1024 waited");
    });
}

#[test]
fn a_vmnet_that_sends_what_stands_before_a_fault_and_says_so_and_takes_less_and_asks_again() {
    guarded(|| {
        let answers = answers(|script| {
            script.failed_batch = (true, Reported::Done);
            (script.read_max_packets, script.write_max_packets) = (Some(64), Some(32));
            script.events = Events::Level;
            script.queue_depth = 100;
        });
        says(&answers, 2, "(1006, 2), arrived [0, 1]");
        says(&answers, 3, "more than 32: (1008, 33)");
        says(&answers, 3, "more than 64, after 65 were sent: (1008, 65)");
        assert!(!answers[&4].contains("(1000, 1): 0 more"), "{}", answers[&4]);
        says(&answers, 10, "100 waited");
    });
}

#[test]
fn a_vmnet_whose_events_come_once_and_whose_kernel_is_full_at_times() {
    guarded(|| {
        let answers = answers(|script| {
            script.events = Events::Edge;
            // An old macOS does not report the limits.
            (script.read_max_packets, script.write_max_packets) = (None, None);
            script.failed_batch = (true, Reported::Zero);
        });
        says(&answers, 2, "(1006, 0), arrived [0, 1]");
        says(&answers, 3, "more than 200: (1008, 201)");
        says(&answers, 4, "3 packets: 1 events");
        says(&answers, 4, "(1000, 1): 0 more; a fourth packet: 0 more");
    });
}

#[test]
fn without_the_privilege_it_says_what_is_missing() {
    guarded(|| {
        let world = World::with(Rules::Answers, true);
        world.set_host(|host| host.root = false);
        let interface_ids = [world.interface_id(), world.interface_id()];
        world.script(interface_ids[0], |script| script.start.status = 1001);
        let probe = Probe { interface_ids, ..Probe::default() };
        let mut told = 0;
        let error = world.enter(|| probe.run(&mut |_| told += 1)).expect_err("it is not allowed");
        assert!(matches!(error, vmring::Error::PermissionDenied { .. }), "{error}");
        assert_eq!(told, 0, "there is no report");
    });
}
