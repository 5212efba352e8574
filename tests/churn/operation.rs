//! One operation.

use std::fmt;

use crate::support::Dice;

/// Places for rings in a world.
pub(crate) const PLACES: u64 = 5;

/// One operation. `place` chooses a ring, which may not be there.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation {
    Build {
        place: usize,
        plan: Plan,
    },
    Submit {
        place: usize,
        reads: usize,
        writes: usize,
        /// The writes skip success.
        skip: bool,
    },
    /// Writes and waits for them, so many times.
    Rounds {
        place: usize,
        n: usize,
        writes: usize,
        /// The writes skip success.
        skip: bool,
    },
    Cancel {
        place: usize,
        all: bool,
    },
    Reap {
        place: usize,
    },
    Wait {
        place: usize,
        min: usize,
        micros: u64,
    },
    CancelAndWait {
        place: usize,
    },
    Drain {
        place: usize,
    },
    Resume {
        place: usize,
    },
    Arm {
        place: usize,
    },
    Close {
        place: usize,
    },
    Drop {
        place: usize,
        part: Part,
    },
    ControlWake {
        place: usize,
    },
    ControlStop {
        place: usize,
    },
    ControlCancel {
        place: usize,
    },
    Front {
        place: usize,
        task: Task,
    },
    Restart {
        interface: usize,
        patient: bool,
    },
    Stop {
        interface: usize,
    },
    /// The device wakes all rings, also those that are closed.
    DeviceWakes,
    Pause {
        micros: u64,
    },
}

/// Their kinds, for a summary.
pub(crate) const KINDS: [&str; 20] = [
    "build",
    "submit",
    "cancel",
    "reap",
    "wait",
    "cancel_and_wait",
    "arm",
    "close",
    "drop",
    "control wake",
    "control stop",
    "control cancel",
    "front-end",
    "restart",
    "stop",
    "device wakes",
    "pause",
    "rounds",
    "drain",
    "resume",
];

#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) interface: usize,
    pub(crate) drive: Way,
    pub(crate) shape: Shape,
    pub(crate) reads: bool,
    pub(crate) writes: bool,
    /// Depths as exponents of two.
    pub(crate) depth: u32,
    pub(crate) small_sq: bool,
    pub(crate) parks: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Thread,
    /// On one of two pollers.
    Shared(usize),
    Inline,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Whole,
    Split,
    Blocking,
    Async,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    Everything,
    Submitter,
    Reaper,
}

/// What a front-end is asked for, on a thread of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Task {
    Write,
    Read,
    ReadFor {
        micros: u64,
    },
    /// Polls a read and a write once and drops them.
    Once,
    /// A task whose waker panics waits for a packet.
    BadWaker,
}

impl Operation {
    pub(crate) fn draw(dice: &mut Dice) -> Self {
        let place = dice.below(PLACES) as usize;
        let interface = dice.below(2) as usize;
        match dice.below(109) {
            0..14 => Operation::Build { place, plan: Plan::draw(dice) },
            14..44 => {
                let (reads, writes) = (dice.below(12) as usize, dice.below(24) as usize);
                Operation::Submit { place, reads, writes, skip: dice.below(3) == 0 }
            }
            44..48 => Operation::Cancel { place, all: dice.below(2) == 0 },
            48..54 => Operation::Reap { place },
            54..62 => {
                let min = dice.below(9) as usize;
                Operation::Wait { place, min, micros: dice.below(4) * 700 }
            }
            62..64 => Operation::CancelAndWait { place },
            64..68 => Operation::Arm { place },
            68..71 => Operation::Close { place },
            71..74 => {
                let part = [Part::Everything, Part::Submitter, Part::Reaper];
                Operation::Drop { place, part: part[dice.below(3) as usize] }
            }
            74..76 => Operation::ControlWake { place },
            76..78 => Operation::ControlStop { place },
            78..80 => Operation::ControlCancel { place },
            80..88 => Operation::Front { place, task: Task::draw(dice) },
            88..94 => Operation::Restart { interface, patient: dice.below(4) > 0 },
            94 => Operation::Stop { interface },
            95..98 => Operation::DeviceWakes,
            98..100 => Operation::Pause { micros: dice.below(3) * 300 },
            100..102 => Operation::Drain { place },
            102..105 => Operation::Resume { place },
            _ => {
                let (n, writes) = (1 + dice.below(50) as usize, 1 + dice.below(16) as usize);
                Operation::Rounds { place, n, writes, skip: dice.below(3) == 0 }
            }
        }
    }

    /// Its place in [`KINDS`].
    pub(crate) fn kind(&self) -> usize {
        match self {
            Operation::Build { .. } => 0,
            Operation::Submit { .. } => 1,
            Operation::Cancel { .. } => 2,
            Operation::Reap { .. } => 3,
            Operation::Wait { .. } => 4,
            Operation::CancelAndWait { .. } => 5,
            Operation::Arm { .. } => 6,
            Operation::Close { .. } => 7,
            Operation::Drop { .. } => 8,
            Operation::ControlWake { .. } => 9,
            Operation::ControlStop { .. } => 10,
            Operation::ControlCancel { .. } => 11,
            Operation::Front { .. } => 12,
            Operation::Restart { .. } => 13,
            Operation::Stop { .. } => 14,
            Operation::DeviceWakes => 15,
            Operation::Pause { .. } => 16,
            Operation::Rounds { .. } => 17,
            Operation::Drain { .. } => 18,
            Operation::Resume { .. } => 19,
        }
    }
}

impl Plan {
    pub(crate) fn draw(dice: &mut Dice) -> Self {
        let shape = match dice.below(8) {
            0..4 => Shape::Whole,
            4..6 => Shape::Split,
            6 => Shape::Blocking,
            _ => Shape::Async,
        };
        let front = matches!(shape, Shape::Blocking | Shape::Async);
        let drive = match dice.below(if front { 4 } else { 6 }) {
            0..2 => Way::Thread,
            n @ 2..4 => Way::Shared(n as usize - 2),
            _ => Way::Inline,
        };
        let (reads, writes) = match dice.below(8) {
            0 => (true, false),
            1..4 => (false, true),
            _ => (true, true),
        };
        Self {
            interface: dice.below(2) as usize,
            drive,
            shape,
            reads,
            writes,
            depth: dice.below(6) as u32,
            small_sq: dice.below(5) == 0,
            parks: dice.below(2) == 0,
        }
    }
}

impl Task {
    fn draw(dice: &mut Dice) -> Self {
        match dice.below(10) {
            0..4 => Task::Write,
            4 => Task::Read,
            5..8 => Task::ReadFor { micros: dice.below(3) * 800 },
            8 => Task::Once,
            _ => Task::BadWaker,
        }
    }
}

/// One step: an operation, or several of several threads at once.
#[derive(Clone)]
pub(crate) struct Step(pub(crate) Vec<Operation>);

impl Step {
    pub(crate) fn draw(dice: &mut Dice) -> Self {
        let place = dice.below(PLACES) as usize;
        let interface = dice.below(2) as usize;
        let restart = Operation::Restart { interface, patient: true };
        let skip = dice.below(3) == 0;
        let submit = Operation::Submit { place, reads: 4, writes: 8, skip };
        match dice.below(12) {
            0 => Self(vec![restart, restart]),
            1 => Self(vec![restart, Operation::Build { place, plan: Plan::draw(dice) }]),
            2 if dice.below(4) == 0 => Self(vec![restart, Operation::Stop { interface }]),
            3 => {
                let end = match dice.below(5) {
                    0 => Operation::Close { place },
                    1 => Operation::ControlStop { place },
                    2 => Operation::Drop { place, part: Part::Reaper },
                    3 => Operation::Drain { place },
                    _ => Operation::CancelAndWait { place },
                };
                Self(vec![submit, end])
            }
            4 if dice.below(3) == 0 => Self(vec![Operation::Drain { place }, restart]),
            4 => Self(vec![submit, restart]),
            5 => Self((0..3).map(|_| Operation::draw(dice)).collect()),
            _ => Self(vec![Operation::draw(dice)]),
        }
    }
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0[..] {
            [operation] => operation.fmt(f),
            several => f.debug_tuple("AtOnce").field(&several).finish(),
        }
    }
}
