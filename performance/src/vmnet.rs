//! The vmnet driver over a simulated vmnet, beside loops that call the C ABI themselves. The
//! simulated vmnet costs nothing, or the time of a system call for each call.
//!
//! The batched loop does what every caller of the ABI has to do: set each descriptor, make the
//! call, look at each length. The other one does the same with one packet per call, as Lwt_vmnet
//! and QEMU write.

mod bare;
mod limits;

use std::time::{Duration, Instant};

use vmnet_sim::World;
use vmring::{Direction, Drive, Interface, Ring, RingOp, Vmnet};

use crate::common::{Null, pinned, take_turns, time_packets};
use crate::plan::{Part, Plan};
use crate::queues::Queues;
use crate::report::{Table, Want};
use crate::result::Result;
use bare::Bare;
use limits::{LENGTH, PATIENCE};

/// Packets in flight: the number that the other parts have, and the number that vmnet took at once
/// before macOS 15.
const BATCHES: [usize; 2] = [32, 200];
/// The cost of a system call.
const CALL: Duration = Duration::from_nanos(300);
/// The cost of a packet in vmnet beside that of the call, roughly its way through a kernel.
const PACKET: Duration = Duration::from_nanos(250);
pub(crate) fn run(plan: Plan) -> Part {
    pinned(|| {
        check()?;
        measure(plan)
    })
}

/// The time that vmnet itself takes.
#[derive(Clone, Copy)]
enum Price {
    Nothing,
    Call,
    /// For each packet. The simulator only knows the price of a call, so this is the price of a
    /// call with all packets in flight. That favours no contender: with fewer packets a call would
    /// cost the same.
    Packet,
}

impl Price {
    fn of_call(self, batch: usize) -> Duration {
        match self {
            Self::Nothing => Duration::ZERO,
            Self::Call => CALL,
            Self::Packet => PACKET * batch as u32,
        }
    }

    fn name(self) -> String {
        match self {
            Self::Nothing => "nothing".to_owned(),
            Self::Call => format!("{} ns a call", CALL.as_nanos()),
            Self::Packet => format!("{} ns a packet", PACKET.as_nanos()),
        }
    }
}

/// One contender at one price.
struct Contender {
    direction: Direction,
    batch: usize,
    method: Method,
}

enum Method {
    Ours(Box<Ours>),
    /// The same ring over a device that does nothing, which shows how much of the driver's figure
    /// is the ring's.
    Null(Box<Ours>),
    Bare(Bare),
    /// The batched loop, with the packets behind the least that a ring can be.
    Queued(Bare, Queues),
}

impl Contender {
    /// A world with an interface whose calls have this price.
    fn world(price: Price, batch: usize) -> (World, [u8; 16]) {
        let world = World::new();
        let id = world.interface_id();
        world.script(id, |script| {
            script.free_of_charge = Some(LENGTH);
            script.call_cost = price.of_call(batch);
        });
        (world, id)
    }

    fn start(price: Price, direction: Direction, batch: usize, ours: bool) -> Result<Self> {
        let (world, id) = Self::world(price, batch);
        let method = if ours {
            let mut ours = Ours::start(world, id, direction)?;
            ours.fill(direction, batch)?;
            Method::Ours(Box::new(ours))
        } else {
            Method::Bare(Bare::start(world, id, batch)?)
        };
        Ok(Self { direction, batch, method })
    }

    fn start_queued(direction: Direction, batch: usize) -> Result<Self> {
        let (world, id) = Self::world(Price::Nothing, batch);
        let mut queues = Queues::new(256);
        queues.fill(batch as u32)?;
        let method = Method::Queued(Bare::start(world, id, batch)?, queues);
        Ok(Self { direction, batch, method })
    }

    fn start_null(direction: Direction, batch: usize) -> Result<Self> {
        let mut null = Ours::over(Interface::builder().device(Null).start()?, None, direction)?;
        null.fill(direction, batch)?;
        Ok(Self { direction, batch, method: Method::Null(Box::new(null)) })
    }

    #[inline]
    fn turn(&mut self) -> Result<u64> {
        match (&mut self.method, self.direction) {
            (Method::Ours(ours) | Method::Null(ours), direction) => ours.turn(direction),
            (Method::Bare(bare), Direction::Read) => bare.read(),
            (Method::Bare(bare), _) => bare.write(),
            (Method::Queued(bare, queues), direction) => {
                bare.turn_behind(queues, direction == Direction::Read)
            }
        }
    }

    fn labels(&self, price: Price) -> [String; 4] {
        let method = match &self.method {
            Method::Ours(_) => "vmring, inline",
            Method::Null(_) => "vmring, inline, null device instead",
            Method::Bare(_) if self.batch == 1 => "loop over the C ABI, one packet a call",
            Method::Bare(_) => "loop over the C ABI, in batches",
            Method::Queued(..) => "that loop behind two rtrb queues",
        };
        [price.name(), self.direction.to_string(), self.batch.to_string(), method.to_owned()]
    }
}

fn measure(plan: Plan) -> Part {
    const LABELS: &[&str] = &["vmnet costs", "direction", "batch", "contender"];
    let about = format!("packets of {LENGTH} B through a simulated vmnet that copies nothing");
    let mut table = Table::new("vmnet", about, LABELS, &["ns/packet"]);
    let mut wants = Vec::new();
    for price in [Price::Nothing, Price::Call, Price::Packet] {
        for direction in [Direction::Read, Direction::Write] {
            let mut contenders = Vec::new();
            for batch in BATCHES {
                contenders.push(Contender::start(price, direction, batch, true)?);
                contenders.push(Contender::start(price, direction, batch, false)?);
            }
            let single = contenders.len();
            contenders.push(Contender::start(price, direction, 1, false)?);
            if matches!(price, Price::Nothing) {
                contenders.push(Contender::start_null(direction, BATCHES[0])?);
                contenders.push(Contender::start_queued(direction, BATCHES[0])?);
            }
            let values = take_turns(plan, &mut contenders, |contender| {
                time_packets(plan.time, 64, || contender.turn())
            })?;
            let mut medians = Vec::new();
            for (contender, values) in contenders.iter().zip(&values) {
                let labels = contender.labels(price);
                medians.push(table.row(&labels.each_ref().map(String::as_str), &[values]));
            }
            let single = medians[single];
            for (pair, batch) in medians.chunks_exact(2).zip(BATCHES) {
                let what = format!("vmnet, {direction}, batch {batch}, at {}", price.name());
                wants.push(match price {
                    Price::Nothing | Price::Packet => {
                        Want::at_most(format!("{what}: x loop in batches"), pair[0] / pair[1], 1.1)
                    }
                    Price::Call => {
                        Want::at_least(format!("{what}: loop of one / it"), single / pair[0], 5.0)
                    }
                });
            }
        }
    }
    Ok((vec![table], wants))
}

/// A broadcast packet, for both directions, with its number in every byte after the header.
fn packet(number: usize) -> [u8; LENGTH] {
    let mut packet = [number as u8; LENGTH];
    packet[..14].copy_from_slice(b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x07\x88\xb5");
    packet
}

/// Checks a packet that has arrived. A packet that a host sends of its own accord is ignored.
fn expect(seen: &mut usize, packet_seen: &[u8]) -> Result<()> {
    if packet_seen.get(12..14) != Some(b"\x88\xb5") {
        return Ok(());
    }
    if packet_seen != packet(*seen) {
        return Err(format!("packet {seen} did not come as it was sent").into());
    }
    *seen += 1;
    Ok(())
}

/// Checks that the ring and the loop really send and receive: through a network, from one to the
/// other and back.
fn check() -> Result<()> {
    const COUNT: usize = BATCHES[0];
    let world = World::new();
    let (id, other) = (world.interface_id(), world.interface_id());
    let mut ours = Ours::start(world.clone(), id, Direction::Both)?;
    let mut bare = Bare::start(world, other, COUNT)?;
    ours.fill(Direction::Read, COUNT)?;
    for (i, buffer) in bare.buffers_mut().enumerate() {
        buffer[..LENGTH].copy_from_slice(&packet(i));
    }
    let mut seen = 0;
    // The reads have to be posted before anything arrives.
    ours.ring.wait(0, None);
    if bare.write()? != COUNT as u64 {
        return Err("the simulator took fewer packets than it was given".into());
    }
    let end = Instant::now() + PATIENCE;
    while seen < COUNT && Instant::now() < end {
        ours.ring.wait(1, Some(PATIENCE));
        let (mut sq, mut cq) = ours.ring.split();
        for done in cq.reap() {
            let frame = done.take_packet()?;
            expect(&mut seen, &frame)?;
            sq.submit_read(frame, done.user_data)?;
        }
    }
    if seen != COUNT {
        return Err(format!("{seen} of {COUNT} packets came from the loop to the ring").into());
    }

    ours.fill(Direction::Write, COUNT)?;
    let (mut seen, mut written) = (0, 0);
    while (seen < COUNT || written < COUNT) && Instant::now() < end {
        for done in ours.ring.reap() {
            if done.op == RingOp::Write {
                done.take_packet()?;
                written += 1;
            }
        }
        let mut came = false;
        for packet in bare.receive()? {
            came = true;
            expect(&mut seen, packet)?;
        }
        if !came {
            std::thread::yield_now();
        }
    }
    if (seen, written) != (COUNT, COUNT) {
        return Err(format!("{written} of {COUNT} were sent, {seen} came to the loop").into());
    }
    Ok(())
}

/// An interface and a ring.
struct Ours {
    ring: Ring,
    _interface: Interface,
    _world: Option<World>,
}

impl Ours {
    fn start(world: World, id: [u8; 16], direction: Direction) -> Result<Self> {
        let builder = Interface::builder().device(Vmnet::new()).interface_id(id);
        Self::over(builder.start()?, Some(world), direction)
    }

    fn over(interface: Interface, world: Option<World>, direction: Direction) -> Result<Self> {
        let builder = interface.ring(direction).drive(Drive::Inline);
        let ring = builder.depth(256).prefault(true).build()?;
        Ok(Self { ring, _interface: interface, _world: world })
    }

    /// Puts `batch` frames in flight.
    fn fill(&mut self, direction: Direction, batch: usize) -> Result<()> {
        for i in 0..batch {
            let mut frame = self.ring.alloc().ok_or("the ring has too few frames")?;
            if direction == Direction::Read {
                self.ring.submit_read(frame, i as u64)?;
            } else {
                frame.copy_from(&packet(i))?;
                self.ring.submit_write(frame, i as u64)?;
            }
        }
        Ok(())
    }

    /// Reaps what has completed and submits it again. Returns the number of packets.
    #[inline]
    fn turn(&mut self, direction: Direction) -> Result<u64> {
        let mut wrong = None;
        let (mut sq, mut cq) = self.ring.split();
        let frames = cq.reap().filter_map(|done| match done.take_packet() {
            Ok(frame) if frame.len() == LENGTH => Some((frame, done.user_data)),
            Ok(frame) => {
                wrong = Some(format!("a packet of {} bytes", frame.len()));
                None
            }
            Err(error) => {
                wrong = Some(error.to_string());
                None
            }
        });
        let submitted = if direction == Direction::Read {
            sq.submit_reads(frames)?
        } else {
            sq.submit_writes(frames)?
        };
        match wrong {
            Some(wrong) => Err(format!("vmnet, {direction}: {wrong}").into()),
            None => Ok(submitted as u64),
        }
    }
}
