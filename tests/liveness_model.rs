//! Random operations on everything at once, and what must come of them; see `churn`.

mod properties {
    use std::fmt;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::test_runner::{Config, FileFailurePersistence};

    use crate::churn::operation::{Operation, Plan, Shape, Step, Way};
    use crate::churn::setup::{Setup, Under};
    use crate::churn::world::run;
    use crate::support::{Dice, guarded};

    /// Cases of a run that does not say otherwise with `PROPTEST_CASES`.
    const CASES: u32 = 96;

    fn config() -> Config {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/liveness_model.txt");
        let default = Config::default();
        let asked = std::env::var_os("PROPTEST_CASES").is_some();
        Config {
            cases: if asked { default.cases } else { CASES },
            failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
            // A case that hangs costs its whole patience.
            max_shrink_time: 60_000,
            ..default
        }
    }

    /// A value that is printed on one line, so that a failed case can be read in a log.
    #[derive(Clone)]
    struct Line<T>(T);

    impl<T: fmt::Debug> fmt::Debug for Line<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{:?}", self.0)
        }
    }

    /// A smaller seed is not a simpler case, so steps are only left out.
    fn drawn<T: fmt::Debug>(draw: fn(&mut Dice) -> T) -> impl Strategy<Value = Line<T>> {
        any::<u64>().no_shrink().prop_map(move |seed| Line(draw(&mut Dice::new(seed))))
    }

    /// One case in 200 measures the processor time; this one always does.
    #[test]
    fn a_world_without_work_costs_no_processor() {
        guarded(|| {
            let mut dice = Dice::new(1);
            let mut setup = Setup::draw(&mut dice);
            (setup.device, setup.faults, setup.measured) = (Under::Loopback, None, true);
            let build = |place, drive, shape| {
                let plan = Plan { drive, shape, ..Plan::draw(&mut Dice::new(1)) };
                Operation::Build { place, plan: Plan { reads: false, writes: true, ..plan } }
            };
            let submit = |place| Operation::Submit { place, reads: 4, writes: 8, skip: false };
            let operations = [
                build(0, Way::Thread, Shape::Whole),
                build(1, Way::Shared(0), Shape::Split),
                build(2, Way::Inline, Shape::Whole),
                build(3, Way::Shared(0), Shape::Blocking),
                build(4, Way::Thread, Shape::Async),
                submit(0),
                submit(1),
                submit(2),
                Operation::Close { place: 0 },
            ];
            run(&setup, &operations.map(|operation| Step(vec![operation])));
        });
    }

    proptest! {
        #![proptest_config(config())]

        #[test]
        fn everything_ends_and_then_it_is_quiet(
            setup in drawn(Setup::draw),
            steps in vec(drawn(Step::draw), 1..60),
        ) {
            let steps: Vec<Step> = steps.into_iter().map(|step| step.0).collect();
            guarded(move || run(&setup.0, &steps));
        }
    }
}
