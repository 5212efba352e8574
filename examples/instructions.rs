//! Scenarios for counting instructions per packet, a figure without noise. `.ci/instructions` runs
//! this under callgrind with two packet counts and takes the difference.
//!
//! ```text
//! instructions --list
//! instructions SCENARIO PACKETS
//! ```

use std::process::ExitCode;
use std::sync::Arc;

use vmring::device::{Capabilities, Device, PollContext, Progress, Queue, QueueConfig, Wake};
use vmring::{
    Direction, Drive, Driver, Embedded, Error, Interface, InterfaceConfig, InterfaceInfo, Loopback,
    MacAddr6, Ring, Status,
};

/// The name of a scenario, and a function that runs the given number of packets.
type Scenario = (&'static str, fn(u64));

const SCENARIOS: &[Scenario] = &[
    ("null-read-batch-1", |n| null_read(n, 1)),
    ("null-read-batch-32", |n| null_read(n, 32)),
    ("loopback-60-batch-1", |n| loopback(n, 1)),
    ("loopback-60-batch-32", |n| loopback(n, 32)),
    ("embedded-60-batch-32", |n| embedded(n, 60, 32)),
    ("embedded-1514-batch-32", |n| embedded(n, 1514, 32)),
    ("view-parse", view_parse),
    #[cfg(not(target_os = "macos"))]
    ("vmnet-read-batch-1", |n| vmnet(n, 1, Direction::Read)),
    #[cfg(not(target_os = "macos"))]
    ("vmnet-read-batch-32", |n| vmnet(n, 32, Direction::Read)),
    #[cfg(not(target_os = "macos"))]
    ("vmnet-write-batch-32", |n| vmnet(n, 32, Direction::Write)),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--list"] => {
            SCENARIOS.iter().for_each(|(name, _)| println!("{name}"));
            ExitCode::SUCCESS
        }
        [name, packets] => {
            let scenario = SCENARIOS.iter().find(|(known, _)| *known == name);
            let (Some((_, run)), Ok(packets)) = (scenario, packets.parse()) else {
                eprintln!("no scenario '{name}', or '{packets}' is no number; see --list");
                return ExitCode::from(2);
            };
            run(packets);
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: instructions --list | SCENARIO PACKETS");
            ExitCode::from(2)
        }
    }
}

/// A device that completes every slot at once and touches no byte, so that the figure is the cost
/// of the rings alone.
struct Null;

impl Driver for Null {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let mac = MacAddr6::new(2, 0, 0, 0, 0, 1);
        Ok(Arc::new(NullDevice(InterfaceInfo::new(config, mac, 1500, 1514))))
    }
}

struct NullDevice(InterfaceInfo);

impl Device for NullDevice {
    fn name(&self) -> &str {
        "null"
    }

    fn info(&self) -> InterfaceInfo {
        self.0.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(1500, 1514)
    }

    fn queue(&self, _: QueueConfig, _: Wake) -> Result<Box<dyn Queue>, Error> {
        Ok(Box::new(NullQueue))
    }
}

struct NullQueue;

impl Queue for NullQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        while let Some(slot) = cx.take_read() {
            cx.complete_read(slot, 60);
        }
        while let Some(slot) = cx.take_write() {
            cx.complete_write(slot);
        }
        Ok(Progress::Idle)
    }
}

fn ring(interface: &Interface) -> Ring {
    let builder = interface.ring(Direction::Both).depth(64).prefault(true);
    builder.drive(Drive::Inline).build().expect("a ring")
}

fn null_read(packets: u64, batch: u64) {
    let interface = Interface::builder().device(Null).start().expect("null starts");
    let mut ring = ring(&interface);
    for i in 0..batch {
        let frame = ring.alloc().expect("a fresh ring");
        ring.submit_read(frame, i).expect("a fresh ring");
    }
    let mut reaped = 0;
    while reaped < packets {
        let (mut sq, mut cq) = ring.split();
        for done in cq.reap() {
            let frame = done.take_packet().expect("null succeeds");
            sq.submit_read(frame, done.user_data).expect("one credit came back");
            reaped += 1;
        }
    }
}

/// Keeps `batch` reads and `batch` writes in flight. A packet is one write and one read.
fn loopback(packets: u64, batch: u64) {
    let interface = Interface::builder().device(Loopback::new(1500)).start().expect("it starts");
    let mut ring = ring(&interface);
    for i in 0..batch {
        let frame = ring.alloc().expect("a fresh ring");
        ring.submit_read(frame, i).expect("a fresh ring");
        let mut frame = ring.alloc().expect("a fresh ring");
        frame.copy_from(&[0x5a; 60]).expect("60 bytes fit");
        ring.submit_write(frame, batch + i).expect("a fresh ring");
    }
    let mut reaped = 0;
    while reaped < 2 * packets {
        let (mut sq, mut cq) = ring.split();
        for done in cq.reap() {
            let frame = done.take_packet().expect("a loop succeeds");
            if done.user_data < batch {
                sq.submit_read(frame, done.user_data).expect("one credit came back");
            } else {
                sq.submit_write(frame, done.user_data).expect("one credit came back");
            }
            reaped += 1;
        }
    }
}

fn embedded(packets: u64, size: usize, batch: u64) {
    let start = || Interface::builder().device(Embedded::network("count")).start().expect("starts");
    let (a, b) = (start(), start());
    let (mut sender, mut receiver) = (ring(&a), ring(&b));
    let mut packet = vec![0x5a; size];
    packet[..6].copy_from_slice(&b.mac().into_array());
    packet[6..12].copy_from_slice(&a.mac().into_array());
    for i in 0..batch {
        let frame = receiver.alloc().expect("a fresh ring");
        receiver.submit_read(frame, i).expect("a fresh ring");
        let mut frame = sender.alloc().expect("a fresh ring");
        frame.copy_from(&packet).expect("it fits");
        sender.submit_write(frame, i).expect("a fresh ring");
    }
    let mut reaped = 0;
    while reaped < packets {
        // Post the reads of the last turn before sending anything.
        receiver.wait(0, None);
        recycle(&mut sender);
        reaped += recycle(&mut receiver);
    }
}

fn recycle(ring: &mut Ring) -> u64 {
    let (mut sq, mut cq) = ring.split();
    let mut reaped = 0;
    for done in cq.reap() {
        let frame = done.take_packet().expect("a network takes every frame");
        match done.op {
            vmring::RingOp::Read => sq.submit_read(frame, done.user_data),
            _ => sq.submit_write(frame, done.user_data),
        }
        .expect("one credit came back");
        reaped += 1;
    }
    reaped
}

/// The vmnet driver over a simulated vmnet whose calls cost nothing.
#[cfg(not(target_os = "macos"))]
fn vmnet(packets: u64, batch: u64, direction: Direction) {
    let world = vmnet_sim::World::new();
    let id = world.interface_id();
    world.script(id, |script| script.free_of_charge = Some(60));
    let builder = Interface::builder().device(vmring::Vmnet::new()).interface_id(id);
    let interface = builder.start().expect("the simulator starts it");
    let builder = interface.ring(direction).depth(64).prefault(true).drive(Drive::Inline);
    let mut ring = builder.build().expect("a ring");
    for i in 0..batch {
        let mut frame = ring.alloc().expect("a fresh ring");
        match direction {
            Direction::Read => ring.submit_read(frame, i).expect("a fresh ring"),
            _ => {
                frame.copy_from(&[0x5a; 60]).expect("60 bytes fit");
                ring.submit_write(frame, i).expect("a fresh ring");
            }
        }
    }
    let mut reaped = 0;
    while reaped < packets {
        let (mut sq, mut cq) = ring.split();
        let frames =
            cq.reap().map(|done| (done.take_packet().expect("it succeeds"), done.user_data));
        let submitted = match direction {
            Direction::Read => sq.submit_reads(frames),
            _ => sq.submit_writes(frames),
        };
        reaped += submitted.expect("their credits came back") as u64;
    }
}

fn view_parse(packets: u64) {
    let packet = [0x08; 60];
    let mut sum = 0_u64;
    for _ in 0..packets {
        let view = vmring::PacketView::whole(std::hint::black_box(&packet[..])).expect("a view");
        let ethernet = view.ethernet().expect("60 bytes have a header");
        let ip = view.shift(14).expect("60 bytes are more than 14");
        sum += u64::from(ethernet.ethertype()) + u64::from(ip.be16(2).unwrap_or(0));
    }
    std::hint::black_box(sum);
}
