//! Guests on a switch with an uplink, and the policy of their ports, through interfaces and rings.

use std::num::NonZeroU64;

use vmring::device::embedded::{LimitsControl, PortLimits, Rate, SourceRule};
use vmring::{ConfigError, Direction, Embedded, Error, Interface, Ring};

use crate::support::{
    LONG, drive_to_rest, guarded, inline, packet_between, post, quiet_network, reap, reap_n, stage,
    unique,
};

/// A station outside, behind the uplink.
const OUTSIDE: [u8; 6] = [2, 9, 9, 9, 9, 9];
/// An address that nobody has.
const NOBODY: [u8; 6] = [2, 8, 8, 8, 8, 8];
const ALL: [u8; 6] = [0xff; 6];

/// An interface, with a ring for each direction that the test drives.
struct Station {
    interface: Interface,
    reads: Ring,
    writes: Ring,
    mac: [u8; 6],
}

impl Station {
    fn start(driver: Embedded, isolated: bool) -> Self {
        Self::of(Interface::builder().isolated(isolated).device(driver).start().unwrap())
    }

    fn of(interface: Interface) -> Self {
        let mut reads = inline(&interface, Direction::Read).build().unwrap();
        let writes = inline(&interface, Direction::Write).build().unwrap();
        (0..8).for_each(|number| post(&mut reads, number));
        drive_to_rest(&mut reads);
        let mac = interface.mac().into_array();
        Self { interface, reads, writes, mac }
    }

    /// Restarts the interface. Its rings are others afterwards.
    fn restart(self) -> Self {
        let Self { interface, mut reads, mut writes, .. } = self;
        reads.close().unwrap();
        writes.close().unwrap();
        interface.restart(LONG).unwrap();
        Self::of(interface)
    }

    /// Sends `count` packets in one batch.
    fn send(&mut self, from: [u8; 6], to: [u8; 6], count: u64) {
        for number in 0..count {
            let mut frame = self.writes.alloc().unwrap();
            frame.copy_from(&packet_between(from, to, number, 60)).unwrap();
            self.writes.submit_write(frame, number).unwrap();
        }
        for done in reap_n(&mut self.writes, count as usize) {
            assert_eq!(done.result, Ok(60));
        }
    }

    /// Returns how many packets have arrived, and checks that each is for this station.
    fn receive(&mut self, mine: &[[u8; 6]]) -> usize {
        drive_to_rest(&mut self.reads);
        let done = reap(&mut self.reads);
        for done in &done {
            let packet = done.frame.as_ref().unwrap();
            assert_eq!(done.result, Ok(60));
            assert!(mine.iter().any(|mac| packet[..6] == *mac), "{:x?}", &packet[..12]);
        }
        let count = done.len();
        drop(done);
        (0..count).for_each(|_| post(&mut self.reads, 0));
        drive_to_rest(&mut self.reads);
        count
    }

    fn drops(&self, reason: &str) -> u64 {
        let drops = self.interface.drops();
        drops.iter().find(|(name, _)| *name == reason).expect("a reason of the device").1
    }
}

/// Goal: on a switch with an uplink, two guests exchange packets with each other and with stations
/// outside, and no packet reaches the wrong one, in batches and one by one. Isolated guests reach the
/// uplink only.
#[test]
fn two_guests_and_an_uplink_get_their_own_packets_and_no_others() {
    guarded(|| {
        for isolated in [false, true] {
            let name = unique("uplink");
            let guest =
                |source| Station::start(Embedded::switch(name.clone()).source(source), isolated);
            let mut alice = guest(SourceRule::Fixed);
            let mut bob = guest(SourceRule::LearnOnce);
            let mut up = Station::start(Embedded::switch(name.clone()).uplink(), false);
            assert_eq!(up.interface.info().ipv4, None);
            let (a, b) = (alice.mac, bob.mac);
            for count in [1, 8] {
                stage(format!("{count} packets, isolated: {isolated}"));
                bob.send(b, OUTSIDE, count);
                alice.send(a, OUTSIDE, count);
                assert_eq!(up.receive(&[OUTSIDE]), 8.min(2 * count as usize));
                up.receive(&[OUTSIDE]);
                up.send(OUTSIDE, a, count);
                assert_eq!(alice.receive(&[a]), count as usize);
                up.send(OUTSIDE, b, count);
                assert_eq!(bob.receive(&[b]), count as usize);
                // What is for a station that is nowhere here, and what a guest is said to have sent.
                up.send(OUTSIDE, NOBODY, count);
                up.send(a, b, count);
                alice.send(a, b, count);
                alice.send(b, OUTSIDE, count);
                assert_eq!(up.receive(&[]), 0);
                assert_eq!(alice.receive(&[]), 0);
                assert_eq!(bob.receive(&[b]), if isolated { 0 } else { count as usize });
                // What is for all.
                up.send(OUTSIDE, ALL, 1);
                alice.send(a, ALL, 1);
                let both = if isolated { 1 } else { 2 };
                assert_eq!((alice.receive(&[ALL]), bob.receive(&[ALL])), (1, both));
                assert_eq!(up.receive(&[ALL]), 1);
            }
            assert_eq!(up.drops("unknown address"), 9);
            assert_eq!((up.drops("spoofed"), alice.drops("spoofed")), (9, 9));
            assert_eq!(alice.drops("isolated"), if isolated { 9 } else { 0 });
        }
    });
}

/// Goal: a handle changes the limits of every interface that was started with it, also after a
/// restart, and each interface has them for itself. Method: a byte a second, so that only the bursts
/// count, and floods in one batch, which has one time.
#[test]
fn limits_change_while_interfaces_are_in_use_and_outlast_a_restart() {
    guarded(|| {
        let name = unique("limits");
        let burst = |tokens| {
            let number = |number| NonZeroU64::new(number).unwrap();
            Some(Rate { per_second: number(1), burst: number(tokens) })
        };
        let control = LimitsControl::default();
        assert_eq!(control.get(), PortLimits::default());
        let guest = |control: &LimitsControl| {
            Station::start(quiet_network(name.clone()).limits(control), false)
        };
        let (mut alice, mut bob) = (guest(&control), guest(&control));
        let mut carol = guest(&LimitsControl::default());
        let (a, b, c) = (alice.mac, bob.mac, carol.mac);
        alice.send(a, c, 8);
        assert_eq!(carol.receive(&[c]), 8);
        stage("limits");
        let mut limits = PortLimits::default();
        limits.send.bytes = burst(3 * 60);
        limits.receive.bytes = burst(2 * 60);
        control.set(limits);
        assert_eq!(control.get(), limits);
        alice.send(a, c, 8);
        assert_eq!((carol.receive(&[c]), alice.drops("send limit")), (3, 5));
        bob.send(b, c, 1);
        assert_eq!((carol.receive(&[c]), bob.drops("send limit")), (1, 0));
        carol.send(c, a, 8);
        assert_eq!((alice.receive(&[a]), alice.drops("receive limit")), (2, 6));
        stage("restart");
        alice = alice.restart();
        bob = bob.restart();
        bob.send(b, c, 8);
        assert_eq!((carol.receive(&[c]), bob.drops("send limit")), (3, 5));
        stage("limits of a restarted interface");
        limits.send.bytes = None;
        limits.flood = burst(1);
        control.clone().set(limits);
        alice.send(a, ALL, 4);
        assert_eq!((carol.receive(&[ALL]), alice.drops("flood limit")), (1, 3));
        alice.send(a, c, 8);
        assert_eq!((carol.receive(&[c]), alice.drops("send limit")), (8, 0));
        // A handle holds what it is given, also if its interfaces are gone.
        drop((alice, bob));
        control.set(PortLimits::default());
        assert_eq!(control.get(), PortLimits::default());
    });
}

/// Goal: the settings of a gateway are refused for a switch, and an uplink that cannot be is refused
/// with a reason.
#[test]
fn settings_that_a_switch_or_an_uplink_cannot_have_are_refused() {
    let name = unique("refused");
    let switch = || Embedded::switch(name.clone());
    let refused = |builder: vmring::InterfaceBuilder| builder.start().unwrap_err();
    let builder = Interface::builder;
    let address = [192, 168, 64, 9].into();
    for (what, driver) in [
        ("lease time", switch().lease_time(LONG)),
        ("DHCP range", switch().dhcp_range(address, address)),
        ("reservation", switch().reserve(NOBODY.into(), address)),
        ("lease file", switch().lease_file("leases")),
        ("name server", switch().dns([address])),
        ("IPv6 prefix", switch().ipv6(None)),
    ] {
        let error = refused(builder().device(driver));
        let Error::Config(ConfigError::NotApplicable { what: named, .. }) = &error else {
            panic!("{error:?}")
        };
        assert_eq!(*named, what);
        assert!(error.to_string().contains("no gateway"), "{error}");
    }
    let range = "192.168.70.1/24".parse().unwrap();
    let error = refused(builder().ipv4(range).device(switch()));
    assert!(error.to_string().contains("address range"), "{error}");
    let error = refused(builder().isolated(true).device(switch().uplink()));
    assert!(error.to_string().contains("not isolated"), "{error}");
    let error = refused(builder().device(switch().uplink().source(SourceRule::Fixed)));
    assert!(error.to_string().contains("no source rule"), "{error}");
    let _up = builder().device(switch().uplink()).start().unwrap();
    let error = refused(builder().device(switch().uplink()));
    assert!(error.to_string().contains("has an uplink already"), "{error}");
    // A network of the same name is another one.
    let _network = builder().device(Embedded::network(name.clone())).start().unwrap();
}
