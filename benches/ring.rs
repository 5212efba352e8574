//! The rings: echo by batch size, wake-up latency, forwarding between two interfaces.
//!
//! Every bench first checks the result of what it times.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use vmring::{
    Direction, Drive, Embedded, IdlePolicy, Interface, Loopback, Ring, RingBuilder, RingOp,
};

const BATCHES: [u64; 4] = [1, 8, 32, 128];
const LONG: Option<Duration> = Some(Duration::from_secs(10));

fn loopback() -> Interface {
    Interface::builder().device(Loopback::new(1500)).start().expect("a loop starts")
}

/// Posts `batch` reads and sends `batch` packets.
fn fill(ring: &mut Ring, batch: u64, packet: &[u8]) {
    for i in 0..batch {
        let frame = ring.alloc().expect("a fresh ring");
        ring.submit_read(frame, i).expect("a fresh ring");
        let mut frame = ring.alloc().expect("a fresh ring");
        frame.copy_from(packet).expect("it fits");
        ring.submit_write(frame, i).expect("a fresh ring");
    }
}

/// One round: reaps all completions and submits their frames again. Returns the number of packets
/// read.
fn turn(ring: &mut Ring, packet: &[u8]) -> u64 {
    let waiting = ring.wait(1, LONG);
    assert!(waiting > 0, "nothing came back within ten seconds");
    let (mut sq, mut cq) = ring.split();
    let mut read = 0;
    for done in cq.reap() {
        let frame = done.take_packet().expect("a loop succeeds");
        match done.op {
            RingOp::Read => {
                assert_eq!(frame.len(), packet.len());
                read += 1;
                sq.submit_read(frame, done.user_data)
            }
            _ => sq.submit_write(frame, done.user_data),
        }
        .expect("its credit just came back");
    }
    read
}

/// The units for packets of `size` bytes: packets and bytes. A criterion group has one unit, so
/// each case is measured in two groups.
fn units(size: usize) -> [(&'static str, Throughput); 2] {
    [("packets", Throughput::Elements(1)), ("bytes", Throughput::Bytes(size as u64))]
}

/// A packet goes out and comes back: two submissions, two completions, one copy.
fn echo(c: &mut Criterion) {
    let packet = [0x5a; 60];
    for (name, inline) in [("inline", true), ("thread", false)] {
        for (unit, throughput) in units(packet.len()) {
            let mut group = c.benchmark_group(format!("echo/{name}/{unit}"));
            group.throughput(throughput);
            for batch in BATCHES {
                let interface = loopback();
                let drive = if inline { Drive::Inline } else { Drive::Thread };
                let mut ring = build(interface.ring(Direction::Both).drive(drive));
                fill(&mut ring, batch, &packet);
                group.bench_function(BenchmarkId::from_parameter(batch), |b| {
                    b.iter_custom(|packets| {
                        let start = Instant::now();
                        let mut seen = 0;
                        while seen < packets {
                            seen += turn(&mut ring, &packet);
                        }
                        start.elapsed().mul_f64(packets as f64 / seen as f64)
                    });
                });
            }
            group.finish();
        }
    }
}

fn build(builder: RingBuilder<'_>) -> Ring {
    builder.depth(256).prefault(true).build().expect("a ring")
}

/// A packet goes out and comes back with both sides asleep. The submit wakes the poller, and the
/// completion wakes the submitter.
fn wakeup(c: &mut Criterion) {
    let mut group = c.benchmark_group("wakeup");
    group.sample_size(20);
    for (name, idle) in [("parked", IdlePolicy::PARK), ("default", IdlePolicy::default())] {
        let interface = loopback();
        let mut ring = build(interface.ring(Direction::Both).idle(idle));
        group.bench_function(name, |b| {
            b.iter(|| {
                fill(&mut ring, 1, &[0x5a; 60]);
                assert_eq!(ring.wait(2, LONG), 2, "nothing came back within ten seconds");
                assert!(ring.reap().all(|done| done.result == Ok(60)));
            });
        });
    }
    group.finish();
}

/// Two guests, each of which drives its own ring. One sends, the other receives.
fn forward(c: &mut Criterion) {
    for (size, mtu) in [(60, 1500), (1514, 1500), (65_535, 65_521)] {
        let start = |name| {
            let driver = Embedded::network(name).no_ipv6();
            Interface::builder().device(driver).mtu(mtu).start().expect("the network starts")
        };
        let name = format!("bench-{size}");
        let (a, b) = (start(name.clone()), start(name));
        let ring = |interface: &Interface| {
            let builder = interface.ring(Direction::Both).drive(Drive::Inline);
            builder.depth(64).prefault(true).build().expect("a ring")
        };
        let (mut sender, mut receiver) = (ring(&a), ring(&b));
        let mut packet = vec![0x5a; size];
        packet[..6].copy_from_slice(&b.mac().into_array());
        packet[6..12].copy_from_slice(&a.mac().into_array());
        for i in 0..32 {
            let frame = receiver.alloc().expect("a fresh ring");
            receiver.submit_read(frame, i).expect("a fresh ring");
            let mut frame = sender.alloc().expect("a fresh ring");
            frame.copy_from(&packet).expect("it fits");
            sender.submit_write(frame, i).expect("a fresh ring");
        }
        // One thread drives both rings, so that the figure is the cost of forwarding and not of a
        // wake-up.
        for (unit, throughput) in units(size) {
            let mut group = c.benchmark_group(format!("forward/{unit}"));
            group.throughput(throughput);
            group.bench_function(BenchmarkId::from_parameter(size), |bench| {
                bench.iter_custom(|packets| {
                    let start = Instant::now();
                    let mut seen = 0;
                    while seen < packets {
                        // Post the reads of the last turn before sending anything.
                        receiver.wait(0, None);
                        turn(&mut sender, &packet);
                        seen += turn(&mut receiver, &packet);
                    }
                    start.elapsed().mul_f64(packets as f64 / seen as f64)
                });
            });
            group.finish();
        }
        drop((sender, receiver));
        let drops = [a.drops(), b.drops()].concat();
        assert!(drops.iter().all(|(_, n)| *n == 0), "packets were dropped: {size} {drops:?}");
    }
}

fn main() {
    let mut c = Criterion::default()
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(500))
        .configure_from_args();
    echo(&mut c);
    wakeup(&mut c);
    forward(&mut c);
    c.final_summary();
}
