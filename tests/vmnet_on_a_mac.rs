//! Apple's own vmnet, on a Mac: as root, or with the entitlement. Without either the tests report
//! themselves skipped and say why.

use std::time::{Duration, Instant};

use vmring::{Direction, Drive, EntryError, Error, Interface, Mode, Op, Ring, Vmnet};

use crate::support::{LONG, guarded, number_of, packet_between, stage};

/// An interface in host mode: the network's own noise is there, and nobody else's.
fn start() -> Option<Interface> {
    match Interface::builder().mode(Mode::Host).device(Vmnet::new()).start() {
        Ok(interface) => Some(interface),
        Err(error @ Error::PermissionDenied { .. }) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("vmnet does not start: {error}"),
    }
}

struct End {
    interface: Interface,
    ring: Ring,
}

impl End {
    fn new(interface: Interface) -> Self {
        let ring =
            interface.ring(Direction::Both).depth(64).drive(Drive::Thread).build().expect("a ring");
        let mut end = Self { interface, ring };
        end.post(48);
        end
    }

    fn post(&mut self, n: u64) {
        (0..n).for_each(|number| crate::support::post(&mut self.ring, number));
    }

    fn mac(&self) -> [u8; 6] {
        self.interface.mac().into_array()
    }
}

/// Sends `count` numbered packets from one to the other, and sees them come, in order and whole.
/// What else is on the network is passed over.
fn exchange(from: &mut End, to: &mut End, numbers: std::ops::Range<u64>) {
    let macs = [from.mac(), to.mac()];
    let start = Instant::now();
    for number in numbers {
        let packet = packet_between(macs[0], macs[1], number, 60 + (number % 8) as usize * 200);
        let mut frame = from.ring.alloc().expect("a free frame");
        frame.copy_from(&packet).expect("it fits");
        from.ring.submit_write(frame, number).expect("there are credits");
        let (mut sent, mut came) = (false, false);
        while !(sent && came) {
            assert!(start.elapsed() < LONG, "packet {number}: sent {sent}, came {came}");
            from.ring.wait(1, Some(Duration::from_millis(10)));
            let (mut sq, mut cq) = from.ring.split();
            for done in cq.reap() {
                match done.op {
                    Op::Write => {
                        assert_eq!(done.result, Ok(packet.len()));
                        sent = true;
                    }
                    _ => drop(sq.submit_read(done.frame().expect("a frame"), done.user_data)),
                }
            }
            to.ring.wait(1, Some(Duration::from_millis(10)));
            let (mut sq, mut cq) = to.ring.split();
            for done in cq.reap() {
                let frame = done.frame_ok().expect("a packet");
                if frame.len() >= 22 && frame[12..14] == [0x88, 0xb5] {
                    assert_eq!(number_of(&frame), number, "in order, and once");
                    assert!(frame[..] == packet[..], "packet {number} differs");
                    came = true;
                }
                sq.submit_read(frame, done.user_data).expect("its credit came back");
            }
        }
    }
}

#[test]
fn two_interfaces_exchange_packets_restart_and_stop() {
    guarded(|| {
        let (Some(a), Some(b)) = (start(), start()) else { return };
        let mut ends = [End::new(a), End::new(b)];
        let [a, b] = &mut ends;
        stage("there");
        exchange(a, b, 0..200);
        stage("back");
        exchange(b, a, 1000..1200);

        stage("restart");
        let (mac, id) = (b.interface.mac(), b.interface.interface_id());
        b.interface.restart(LONG).expect("it restarts");
        assert_eq!((b.interface.mac(), b.interface.interface_id()), (mac, id));
        let start = Instant::now();
        let mut cancelled = 0;
        while cancelled < 48 {
            assert!(start.elapsed() < LONG, "{cancelled} of 48 reads came back");
            b.ring.wait(1, Some(Duration::from_millis(10)));
            let results: Vec<_> = b.ring.reap().map(|done| done.result).collect();
            cancelled += results.iter().filter(|r| **r == Err(EntryError::Cancelled)).count();
            // A packet that came before the restart has taken one of them.
            cancelled += results.iter().filter(|r| r.is_ok()).count();
        }
        b.post(48);
        exchange(a, b, 2000..2050);

        stage("stop");
        for End { interface, mut ring } in ends {
            ring.close().expect("it closes");
            interface.stop(LONG).expect("a clean stop");
        }
    });
}
