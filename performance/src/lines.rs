//! Why a packet between two processors costs what it does: from the bare loop to vmring in steps, and
//! one thing changed at a time.
//!
//! One copy and one transfer of each of a packet's cache lines cannot be avoided. Everything else is
//! switched on and off by itself here, so that the step at which a cost appears is seen. Each figure
//! is of one place of the processors, whatever the machine's host does with them meanwhile, and says
//! how many packets the receiver took at once, and which side waited for the other.

mod pair;
mod parts;

use crate::guests::traffic::{BATCH, Carried, Traffic, WINDOW};
use crate::guests::{LONG_PACKET, bare, ours, sockets};
use crate::net::{FULL_FRAME, SMALL_FRAME};
use crate::plan::{Part, Plan};
use crate::report::Table;
use crate::result::Result;
use crate::rounds::{Half, take_turns};
use pair::{Asks, Copier, Copying, Handover, Posted, Shape};

/// Bytes from one slot of a ring to the next for packets of 1,514 bytes, and the bytes in front.
const OUR_STRIDE: usize = 1664;
const OUR_FRONT: usize = 64;
/// The cells of a port's inbox by default.
const OUR_CELLS: usize = 1024;
/// The frames that the sender of each contender sends in turn.
const FRAMES: usize = 32;

/// What carries the packets.
#[derive(Clone, Copy)]
enum Carrier {
    Bare,
    Pair(Shape),
    Inbox,
    Port,
    Ours,
    Stream,
}

struct Contender {
    table: usize,
    length: usize,
    name: String,
    carrier: Carrier,
}

/// A side that had its processor for less of the time was disturbed.
const UNDISTURBED: f64 = 0.97;

impl Contender {
    /// Nanoseconds per packet, packets at once, and for how much of the time each side waits, in percent.
    /// There are none if others used the processors.
    fn measure(&self, plan: Plan) -> Result<Option<[f64; 4]>> {
        let traffic =
            Traffic { length: self.length, touched: true, time: plan.time, watched: false };
        // A look at the clock makes a side slower, so the waits are measured apart from the rest.
        let watched = Traffic { time: plan.time / 4, watched: true, ..traffic };
        let (timed, watched) = (self.carry(traffic)?, self.carry(watched)?);
        let running = timed.running.into_iter().chain(watched.running).fold(1.0, f64::min);
        let [sender, receiver] = watched.waiting.map(|share| 100.0 * share);
        let figures = [timed.ns, timed.at_once, sender, receiver];
        Ok((running >= UNDISTURBED).then_some(figures))
    }

    fn carry(&self, traffic: Traffic) -> Result<Carried> {
        let carried = match self.carrier {
            Carrier::Bare => bare::measure(traffic, false),
            Carrier::Pair(shape) => pair::measure(shape, traffic),
            Carrier::Inbox => parts::measure_inbox(traffic),
            Carrier::Port => parts::measure_port(traffic),
            Carrier::Ours => ours::measure(ours::Driven::Inline, traffic),
            Carrier::Stream => sockets::measure_stream(traffic),
        };
        carried.map_err(|error| format!("{}, {} B: {error}", self.name, self.length).into())
    }
}

/// The least: packed slots in turn, one index for a batch.
const LEAST: Shape = Shape {
    slots: WINDOW,
    window: WINDOW,
    stride: 1536,
    front: 0,
    cells: WINDOW,
    batch: BATCH,
    handover: Handover::Index,
    posted: Posted::Number,
    claim: false,
    ring: false,
    queues: false,
    look_up: false,
    copier: Copier::Sender,
    copying: Copying::Memcpy,
    ask_ahead: 0,
    receiver_asks: Asks::Never,
    frames: FRAMES,
    fresh: false,
    receiver_writes: false,
    receiver_flushes: false,
    rest: 0,
    least: 1,
};

/// What is like vmring's, without its code.
const LIKE_OURS: Shape = Shape {
    stride: OUR_STRIDE,
    front: OUR_FRONT,
    cells: OUR_CELLS,
    handover: Handover::States,
    posted: Posted::Kept,
    claim: true,
    ring: true,
    queues: true,
    look_up: true,
    ..LEAST
};

/// The labels that tell the rows of each table apart.
const LABELS: &[&str] = &["bytes", "what"];

/// The tables: their names, and what they show.
const TABLES: [(&str, &str); 7] = [
    ("lines, steps", "from the bare loop to vmring; each step has what the steps above it have"),
    ("lines, without", "what is like vmring's, and the same without one thing"),
    ("lines, handover", "how the receiver learns that a slot is filled, in batches of so many"),
    ("lines, slots", "where the receiver's slots are; so many in turn, so many posted"),
    ("lines, who copies", "the sender writes each frame anew before it sends it"),
    ("lines, asking", "how the sender copies, and who asks for which lines before it uses them"),
    ("lines, frames", "the frames that the sender sends in turn, and who writes to a packet"),
];

fn contenders() -> Vec<Contender> {
    let mut all = Vec::new();
    let mut add = |table: usize, length: usize, name: String, carrier: Carrier| {
        all.push(Contender { table, length, name, carrier });
    };
    for length in [SMALL_FRAME, FULL_FRAME] {
        for (name, carrier) in steps() {
            add(0, length, name.to_owned(), carrier);
        }
        for (name, shape) in without() {
            add(1, length, name.to_owned(), Carrier::Pair(shape));
        }
    }
    for batch in [1, 8, 32, 64] {
        for (name, handover, front) in handovers() {
            // Twice as many are posted as either side handles at once.
            let window = WINDOW.max(2 * batch);
            let (slots, cells) = (window, OUR_CELLS);
            let shape = Shape { handover, front, batch, window, slots, cells, ..LEAST };
            let shape = Shape { stride: OUR_STRIDE, ..shape };
            add(2, FULL_FRAME, format!("{batch}: {name}"), Carrier::Pair(shape));
        }
    }
    for (name, handover, front) in handovers() {
        let stride = (front + LONG_PACKET).next_multiple_of(128);
        let shape = Shape { handover, front, stride, cells: OUR_CELLS, ..LEAST };
        add(2, LONG_PACKET, format!("{BATCH}: {name}"), Carrier::Pair(shape));
    }
    for (name, shape) in places() {
        add(3, FULL_FRAME, name, Carrier::Pair(shape));
    }
    for (name, shape) in copiers() {
        add(4, FULL_FRAME, name, Carrier::Pair(shape));
    }
    for (name, shape) in askers() {
        add(5, FULL_FRAME, name, Carrier::Pair(shape));
    }
    for (name, shape) in frames() {
        add(6, FULL_FRAME, name, Carrier::Pair(shape));
    }
    all
}

fn steps() -> Vec<(&'static str, Carrier)> {
    let laid_out = Shape { stride: OUR_STRIDE, front: OUR_FRONT, ..LEAST };
    let states = Shape { handover: Handover::States, cells: OUR_CELLS, ..laid_out };
    let addresses = Shape { posted: Posted::Kept, ..states };
    let claim = Shape { claim: true, ..addresses };
    let ring = Shape { ring: true, ..claim };
    let queues = Shape { queues: true, ..ring };
    vec![
        ("Unix stream", Carrier::Stream),
        ("bare loop", Carrier::Bare),
        ("the same with plain arrays", Carrier::Pair(LEAST)),
        ("+ slots laid out like vmring's", Carrier::Pair(laid_out)),
        ("+ a state for each packet", Carrier::Pair(states)),
        ("+ posted addresses", Carrier::Pair(addresses)),
        ("+ a claim for each batch", Carrier::Pair(claim)),
        ("+ counters, fence and flag", Carrier::Pair(ring)),
        ("+ two queues on each side", Carrier::Pair(queues)),
        ("+ a look at the addresses", Carrier::Pair(LIKE_OURS)),
        ("an inbox", Carrier::Inbox),
        ("ports of a network", Carrier::Port),
        ("vmring, inline", Carrier::Ours),
    ]
}

fn without() -> Vec<(&'static str, Shape)> {
    let all = LIKE_OURS;
    vec![
        ("like vmring's", all),
        ("dense slots", Shape { stride: LEAST.stride, front: 0, ..all }),
        ("an index for a batch", Shape { handover: Handover::Index, ..all }),
        ("states of a line together", Shape { handover: Handover::StatesByLine, ..all }),
        ("states of a batch together", Shape { handover: Handover::StatesTogether, ..all }),
        ("as many cells as slots", Shape { cells: WINDOW, ..all }),
        ("no addresses", Shape { posted: Posted::Number, ..all }),
        ("addresses that change", Shape { posted: Posted::Written, ..all }),
        ("no claim", Shape { claim: false, ..all }),
        ("no counters and no fence", Shape { ring: false, ..all }),
        ("neither claim nor fence", Shape { claim: false, ring: false, ..all }),
        ("no queues", Shape { queues: false, ..all }),
        ("no look at the addresses", Shape { look_up: false, ..all }),
        (
            "neither, and the states of a line together",
            Shape { handover: Handover::StatesByLine, claim: false, ring: false, ..all },
        ),
    ]
}

fn handovers() -> [(&'static str, Handover, usize); 7] {
    [
        ("an index", Handover::Index, OUR_FRONT),
        ("an index for each packet", Handover::IndexEach, OUR_FRONT),
        ("states", Handover::States, OUR_FRONT),
        ("states, a line together", Handover::StatesByLine, OUR_FRONT),
        ("states, together", Handover::StatesTogether, OUR_FRONT),
        ("states, each in a line", Handover::StatesApart, OUR_FRONT),
        ("states in front of the packet", Handover::InSlot, 16),
    ]
}

fn places() -> Vec<(String, Shape)> {
    let mut places = Vec::new();
    for (slots, window) in
        [(16, 16), (64, 64), (256, 64), (256, 256), (1024, 64), (1024, 1024), (16384, 64)]
    {
        for stride in [1536, 2048, 4096] {
            // Each side handles at most half of what is posted.
            let batch = BATCH.min(window / 2);
            let shape = Shape { slots, window, stride, batch, cells: window, ..LEAST };
            places.push((format!("{slots} slots, {window} posted, {stride} B apart"), shape));
        }
    }
    places
}

fn copiers() -> Vec<(String, Shape)> {
    let mut copiers = Vec::new();
    for slots in [WINDOW, OUR_CELLS] {
        let names = [
            ("the sender", Copier::Sender),
            ("the receiver", Copier::Receiver),
            ("both", Copier::Both),
        ];
        for (name, copier) in names {
            for receiver_writes in [false, true] {
                let end = if receiver_writes { ", the receiver writes to it" } else { "" };
                let name = format!("{name}, {slots} slots{end}");
                let shape = Shape { copier, slots, receiver_writes, fresh: true, ..LEAST };
                copiers.push((name, shape));
            }
        }
    }
    copiers
}

fn askers() -> Vec<(String, Shape)> {
    let mut all = Vec::new();
    let by_line = Shape { handover: Handover::StatesByLine, ..LIKE_OURS };
    let bases = [
        ("an index", LEAST),
        ("like vmring's", LIKE_OURS),
        ("like vmring's, a line together", by_line),
    ];
    for (name, base) in bases {
        let mut add = |what: &str, shape| all.push((format!("{name}: {what}"), shape));
        add("memcpy", base);
        add("rep movsb", Shape { copying: Copying::Repeated, ..base });
        add("streaming stores", Shape { copying: Copying::Streaming, ..base });
        for ask_ahead in [1, 2, 4] {
            let what = format!("the sender asks {ask_ahead} ahead");
            add(&what, Shape { ask_ahead, ..base });
        }
        let (before, after) = (Asks::Before, Asks::After);
        add("the receiver asks first", Shape { receiver_asks: before, ..base });
        add("the receiver asks when it posts", Shape { receiver_asks: after, ..base });
        let both = Shape { receiver_asks: after, ask_ahead: 4, ..base };
        add("the same, and the sender asks 4 ahead", both);
        add("the receiver writes", Shape { receiver_writes: true, ..base });
        let both = Shape { receiver_writes: true, ask_ahead: 2, ..base };
        add("the same, and the sender asks 2 ahead", both);
        add("the receiver flushes", Shape { receiver_flushes: true, ..base });
        for rest in [8, 64] {
            let what = format!("the receiver pauses {rest} times");
            add(&what, Shape { rest, ..base });
        }
        for least in [8, 16] {
            let what = format!("the receiver takes {least} or none");
            add(&what, Shape { least, ..base });
        }
    }
    all
}

fn frames() -> Vec<(String, Shape)> {
    let mut all = Vec::new();
    for frames in [1, 32, 1024, 16384] {
        let shape = Shape { frames, fresh: true, ..LEAST };
        all.push((format!("{frames} in turn, written anew"), shape));
        if frames > 1 {
            let shape = Shape { fresh: false, ..shape };
            all.push((format!("{frames} in turn, not written"), shape));
        }
    }
    let shape = Shape { receiver_writes: true, ..LEAST };
    all.push(("32 in turn, not written, the receiver writes".to_owned(), shape));
    all
}

/// Measures the rows whose table, bytes and name contain a text.
pub(crate) fn run(plan: Plan, only: &str) -> Part {
    let mut contenders = contenders();
    contenders.retain(|contender| {
        let Contender { table, length, name, .. } = contender;
        format!("{}: {length}: {name}", TABLES[*table].0).contains(only)
    });
    if contenders.is_empty() {
        return Err(format!("no row contains {only:?}").into());
    }
    let halves: Vec<Half<4>> =
        take_turns(plan, &mut contenders, |contender| contender.measure(plan))?;
    let figures = &["ns/packet", "at once", "sender waits %", "receiver waits %"];
    let mut tables: Vec<Table> =
        TABLES.iter().map(|(name, about)| Table::new(name, *about, LABELS, figures)).collect();
    for half in &halves {
        for table in contenders.chunk_by(|a, b| a.table == b.table) {
            half.begin(&mut tables[table[0].table]);
        }
        for (contender, values) in contenders.iter().zip(&half.values) {
            let Contender { table, length, name, .. } = contender;
            let figures = values.each_ref().map(Vec::as_slice);
            tables[*table].row(&[&length.to_string(), name], &figures);
        }
    }
    tables.retain(|table| table.medians().next().is_some());
    Ok((tables, Vec::new()))
}
