//! A network without a gateway, and one with an uplink.
#![cfg(not(loom))]

mod common;

use core::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use common::*;
use macaddr::MacAddr6;
use proptest::prelude::*;
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::{
    DropReason, JoinError, Network, NetworkConfig, NetworkConfigError, OpenError, PortConfig,
    PortPolicy, Registry, Sender, Sent, SourceRule,
};

fn switch() -> Arc<Network<Buffer>> {
    Network::new(NetworkConfig::switch()).unwrap()
}

/// Sends a frame as a batch of its own.
fn send(sender: &mut Sender<Buffer>, frame: &[u8]) -> Sent {
    let sent = sender.send(frame);
    sender.flush();
    sent
}

const IP: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 10);
const ALL: MacAddr6 = MacAddr6::broadcast();

// ---- A network without a gateway ----

#[test]
fn a_switch_answers_nothing_and_has_no_address() {
    let network = switch();
    assert!(network.gateway().is_none());
    let (mut alice, mut bob) = (Guest::join(&network, 1), Guest::join(&network, 2));
    for frame in [arp_request(alice.mac, IP, SHARED), Dhcp::discover(alice.mac).frame()] {
        assert_eq!(send(&mut alice.sender, &frame), Sent::Flooded { reached: 1 });
        assert!(alice.receive().is_empty());
        assert_eq!(bob.receive(), [frame]);
    }
    assert_eq!(alice.sender.stats().sent_to_gateway, 0);
    assert_eq!((network.leases(), network.lease_of(alice.mac)), (vec![], None));
    // A gateway's address is an address like any other.
    let gateway = Network::<Buffer>::new(NetworkConfig::default()).unwrap();
    let mac = gateway.gateway().unwrap().mac();
    let to_it = data(mac, alice.mac, b"anybody?");
    assert_eq!(send(&mut alice.sender, &to_it), Sent::Flooded { reached: 1 });
    let mut carol = Guest::with(&network, PortConfig { mac: Some(mac), ..config(3) });
    assert_eq!(send(&mut alice.sender, &to_it), Sent::Forwarded);
    assert_eq!(send(&mut carol.sender, &data(alice.mac, mac, b"here")), Sent::Forwarded);
    // An isolated port has nobody to talk to.
    let mut hermit = Guest::isolated(&network, 4);
    let isolated = Sent::Dropped(DropReason::Isolated);
    assert_eq!(send(&mut hermit.sender, &data(ALL, hermit.mac, b"")), isolated);
}

#[test]
fn settings_of_a_gateway_are_refused_without_one() {
    let config = NetworkConfig::switch();
    assert_eq!(config.check(), Ok(()));
    let first = Some(Ipv4Addr::new(192, 168, 64, 9));
    let reservations = vec![(ALL, IP)];
    let lease_file = Some(PathBuf::from("leases"));
    for (setting, config) in [
        ("dns", NetworkConfig { dns: vec![IP], ..config.clone() }),
        ("dhcp_first", NetworkConfig { dhcp_first: first, ..config.clone() }),
        ("reservations", NetworkConfig { reservations, ..config.clone() }),
        ("lease_file", NetworkConfig { lease_file, ..config.clone() }),
    ] {
        assert_eq!(config.check(), Err(NetworkConfigError::NoGateway { setting }));
        assert!(config.check().unwrap_err().to_string().contains(setting));
        assert!(Network::<Buffer>::new(config).is_err());
    }
    // A network of the same name with a gateway is another one.
    let registry = Registry::<Buffer>::new();
    let network = registry.open("lab", &config).unwrap();
    assert!(Arc::ptr_eq(&network, &registry.open("lab", &config).unwrap()));
    let conflict = registry.open("lab", &NetworkConfig::default()).unwrap_err();
    assert!(matches!(conflict, OpenError::Conflict { .. }));
    assert!(conflict.to_string().contains("with gateway no and not yes"), "{conflict}");
}

// ---- A network with an uplink ----

fn uplink(network: &Arc<Network<Buffer>>) -> Guest {
    Guest::with(network, PortConfig { uplink: true, ..config(100) })
}

fn guest(network: &Arc<Network<Buffer>>, id: u64, source: SourceRule) -> Guest {
    Guest::with(network, PortConfig { policy: rule(source), ..config(id) })
}

fn rule(source: SourceRule) -> PortPolicy {
    PortPolicy { source, ..PortPolicy::default() }
}

fn header(frame: &[u8]) -> [u8; ETHERNET_HEADER_LEN] {
    *frame.first_chunk().unwrap()
}

/// A station behind the uplink, or one that is nowhere.
const ROUTER: MacAddr6 = MacAddr6::new(2, 9, 9, 9, 9, 9);
const NOWHERE: MacAddr6 = MacAddr6::new(2, 8, 8, 8, 8, 8);
/// A station behind a guest.
const NESTED: MacAddr6 = MacAddr6::new(2, 7, 7, 7, 7, 7);
const MULTICAST: MacAddr6 = MacAddr6::new(1, 0, 0x5e, 0, 0, 0xfb);

const UNKNOWN: Sent = Sent::Dropped(DropReason::Unknown);
const SPOOFED: Sent = Sent::Dropped(DropReason::Spoofed);
const ISOLATED: Sent = Sent::Dropped(DropReason::Isolated);

/// How many packets each of these has received since the last look.
fn received(ports: [&mut Guest; 3]) -> [usize; 3] {
    ports.map(|port| port.receive().len())
}

#[test]
fn two_guests_and_an_uplink_get_their_own_frames_and_no_others() {
    let network = switch();
    let mut up = uplink(&network);
    let mut alice = guest(&network, 1, SourceRule::Fixed);
    let mut bob = guest(&network, 2, SourceRule::Fixed);
    let (a, b) = (alice.mac, bob.mac);
    for (to, sent, expected) in [
        (b, Sent::Forwarded, [0, 0, 1]),
        (ROUTER, Sent::Forwarded, [1, 0, 0]),
        (ALL, Sent::Flooded { reached: 2 }, [1, 0, 1]),
        (MULTICAST, Sent::Flooded { reached: 2 }, [1, 0, 1]),
    ] {
        assert_eq!(send(&mut alice.sender, &data(to, a, b"of alice")), sent, "{to}");
        assert_eq!(received([&mut up, &mut alice, &mut bob]), expected, "{to}");
    }
    for (to, sent, expected) in [
        (a, Sent::Forwarded, [0, 1, 0]),
        (b, Sent::Forwarded, [0, 0, 1]),
        (NOWHERE, UNKNOWN, [0, 0, 0]),
        (ALL, Sent::Flooded { reached: 2 }, [0, 1, 1]),
        (MULTICAST, Sent::Flooded { reached: 2 }, [0, 1, 1]),
    ] {
        assert_eq!(send(&mut up.sender, &data(to, ROUTER, b"from outside")), sent, "{to}");
        assert_eq!(received([&mut up, &mut alice, &mut bob]), expected, "{to}");
    }
    // What the uplink has sent does not change where frames to it go.
    assert_eq!(send(&mut bob.sender, &data(ROUTER, b, b"of bob")), Sent::Forwarded);
    assert_eq!(received([&mut up, &mut alice, &mut bob]), [1, 0, 0]);
    assert_eq!(up.sender.stats().dropped_unknown, 1);
    assert_eq!(up.sender.stats().drops(), 1);
    // A frame to the uplink is no flood.
    assert_eq!(alice.sender.stats().sent_floods, 2);
}

/// A frame from outside to an unknown address reaches those behind whom the address can be.
#[test]
fn an_unknown_address_is_sought_behind_guests_with_any_source() {
    let network = switch();
    let mut up = uplink(&network);
    let mut bridge = Guest::join(&network, 1);
    let mut others = [SourceRule::Fixed, SourceRule::LearnOnce].map(|rule| {
        let id = 2 + u64::from(rule == SourceRule::LearnOnce);
        guest(&network, id, rule)
    });
    let to_nested = data(NESTED, ROUTER, b"from outside");
    assert_eq!(send(&mut up.sender, &to_nested), Sent::Flooded { reached: 1 });
    let hermit = PortConfig { isolated: true, ..config(4) };
    let mut hermit = Guest::with(&network, hermit);
    assert_eq!(send(&mut up.sender, &to_nested), Sent::Flooded { reached: 2 });
    assert_eq!((bridge.receive().len(), hermit.receive().len()), (2, 1));
    assert!(others.iter_mut().all(|guest| guest.receive().is_empty()));
    // Once the station has sent, its frames go to it alone.
    assert_eq!(send(&mut bridge.sender, &data(ROUTER, NESTED, b"here")), Sent::Forwarded);
    assert_eq!(send(&mut up.sender, &to_nested), Sent::Forwarded);
    assert_eq!((bridge.receive().len(), hermit.receive().len()), (1, 0));
    // A closed port is not asked.
    bridge.receiver.close();
    hermit.receiver.close();
    assert_eq!(send(&mut up.sender, &data(NOWHERE, ROUTER, b"")), UNKNOWN);
    bridge.receiver.reopen();
    assert_eq!(send(&mut up.sender, &data(NOWHERE, ROUTER, b"")), Sent::Flooded { reached: 1 });
}

#[test]
fn isolated_guests_reach_the_uplink_and_not_each_other() {
    for settings in [NetworkConfig::switch(), NetworkConfig::default()] {
        let network = Network::new(settings).unwrap();
        let isolated = |id| {
            let policy = rule(SourceRule::Fixed);
            Guest::with(&network, PortConfig { isolated: true, policy, ..config(id) })
        };
        let (mut alice, mut bob) = (isolated(1), isolated(2));
        let (a, b) = (alice.mac, bob.mac);
        let mut up = uplink(&network);
        let to_bob = data(b, a, b"of alice");
        assert_eq!(send(&mut alice.sender, &to_bob), ISOLATED);
        assert!(alice.sender.run(header(&to_bob), 1, |_| ()).is_none());
        for (to, sent) in [
            (ROUTER, Sent::Forwarded),
            (up.mac, Sent::Forwarded),
            (ALL, Sent::Flooded { reached: 1 }),
            (MULTICAST, Sent::Flooded { reached: 1 }),
        ] {
            assert_eq!(send(&mut alice.sender, &data(to, a, b"of alice")), sent, "{to}");
            assert_eq!(received([&mut up, &mut alice, &mut bob]), [1, 0, 0], "{to}");
        }
        for (to, expected) in [(a, [0, 1, 0]), (ALL, [0, 1, 1]), (MULTICAST, [0, 1, 1])] {
            send(&mut up.sender, &data(to, ROUTER, b"from outside"));
            assert_eq!(received([&mut up, &mut alice, &mut bob]), expected, "{to}");
        }
        let frame = data(a, ROUTER, b"of a run");
        assert!(up.sender.run(header(&frame), 1, |_| ()).unwrap().put(&frame));
        let gateway = network.gateway().is_some();
        assert_eq!(alice.sender.stats().sent_to_gateway, u64::from(gateway));
        assert_eq!(alice.sender.stats().dropped_isolated, 1);
    }
}

#[test]
fn nobody_outside_sends_in_a_guests_name() {
    let network = switch();
    let mut up = uplink(&network);
    let mut alice = guest(&network, 1, SourceRule::Fixed);
    let mut bob = guest(&network, 2, SourceRule::LearnOnce);
    let mut bridge = Guest::join(&network, 3);
    let bound = MacAddr6::new(2, 6, 6, 6, 6, 6);
    // Before bob is bound, his address is anybody's.
    assert_eq!(send(&mut up.sender, &data(alice.mac, bound, b"")), Sent::Forwarded);
    assert_eq!(send(&mut bob.sender, &data(ALL, bound, b"")), Sent::Flooded { reached: 3 });
    bridge.sender.send(&data(ROUTER, NESTED, b"here"));
    bridge.sender.flush();
    for (source, other) in [(alice.mac, bound), (bob.mac, alice.mac), (bound, alice.mac)] {
        // For example a guest's broadcast that comes back.
        for to in [ALL, other, NOWHERE] {
            let frame = data(to, source, b"forged");
            assert_eq!(send(&mut up.sender, &frame), SPOOFED, "{source} to {to}");
            assert!(up.sender.run(header(&frame), 1, |_| ()).is_none());
        }
    }
    let stats = up.sender.stats();
    assert_eq!((stats.dropped_spoofed, stats.drops()), (9, 9));
    // Frames to the guests still go to them.
    received([&mut up, &mut alice, &mut bob]);
    for to in [alice.mac, bound] {
        assert_eq!(send(&mut bridge.sender, &data(to, bridge.mac, b"")), Sent::Forwarded);
    }
    assert_eq!(received([&mut up, &mut alice, &mut bob]), [0, 1, 1]);
    // A station that was behind a guest and is outside now has moved.
    let to_nested = data(NESTED, alice.mac, b"where?");
    assert_eq!(send(&mut alice.sender, &to_nested), Sent::Forwarded);
    bridge.receive();
    assert_eq!(received([&mut up, &mut alice, &mut bob]), [0, 0, 0]);
    assert_eq!(send(&mut up.sender, &data(alice.mac, NESTED, b"moved")), Sent::Forwarded);
    assert_eq!(send(&mut alice.sender, &to_nested), Sent::Forwarded);
    assert_eq!(received([&mut up, &mut alice, &mut bob]), [1, 1, 0]);
    assert!(bridge.receive().is_empty());
    // What is no address of a station comes from nowhere.
    for source in [ALL, MULTICAST, MacAddr6::nil()] {
        let bad = Sent::Dropped(DropReason::BadSource);
        assert_eq!(send(&mut up.sender, &data(alice.mac, source, b"")), bad);
    }
    // The uplink's own address is its own.
    assert_eq!(send(&mut up.sender, &data(alice.mac, up.mac, b"")), Sent::Forwarded);
    assert_eq!(send(&mut bridge.sender, &data(alice.mac, up.mac, b"")), bad_source());
}

fn bad_source() -> Sent {
    Sent::Dropped(DropReason::BadSource)
}

/// The stations behind the uplink take no space in the table, however many there are.
#[test]
fn a_large_network_outside_pushes_out_no_address_of_a_guest() {
    let network = switch();
    let (mut up, mut bridge) = (uplink(&network), Guest::join(&network, 1));
    let mut alice = guest(&network, 2, SourceRule::Fixed);
    let nested = |number: u8| MacAddr6::new(2, 7, 7, 7, 7, number);
    (0..100).for_each(|number| {
        bridge.sender.send(&data(ROUTER, nested(number), b"here"));
    });
    bridge.sender.flush();
    for number in 0..50_000u32 {
        let [a, b, c, d] = number.to_be_bytes();
        up.sender.send(&data(alice.mac, MacAddr6::new(6, 1, a, b, c, d), b""));
    }
    up.sender.flush();
    for number in 0..100 {
        let frame = data(nested(number), alice.mac, b"");
        bridge.receive();
        assert_eq!(send(&mut alice.sender, &frame), Sent::Forwarded);
        assert_eq!(bridge.receive(), [frame]);
    }
}

#[test]
fn a_network_without_its_uplink_keeps_what_was_for_it() {
    let network = switch();
    let mut alice = guest(&network, 1, SourceRule::Fixed);
    let mut bob = Guest::join(&network, 2);
    let hermit = PortConfig { isolated: true, ..config(3) };
    let mut hermit = Guest::with(&network, hermit);
    let to_router = data(ROUTER, alice.mac, b"");
    assert_eq!(send(&mut alice.sender, &to_router), Sent::Flooded { reached: 1 });
    bob.receive();
    let mut up = uplink(&network);
    let second = network.join(PortConfig { uplink: true, ..config(4) });
    assert_eq!(second.unwrap_err(), JoinError::SecondUplink);
    assert_eq!(send(&mut alice.sender, &to_router), Sent::Forwarded);
    up.receive();
    drop(up);
    assert_eq!(send(&mut alice.sender, &to_router), UNKNOWN);
    assert!(alice.sender.run(header(&to_router), 1, |_| ()).is_none());
    assert_eq!(send(&mut hermit.sender, &data(ALL, hermit.mac, b"")), ISOLATED);
    assert_eq!(send(&mut hermit.sender, &data(ROUTER, hermit.mac, b"")), UNKNOWN);
    assert!(bob.receive().is_empty());
    assert_eq!(send(&mut alice.sender, &data(ALL, alice.mac, b"")), Sent::Flooded { reached: 1 });
    let mut up = uplink(&network);
    assert_eq!(send(&mut alice.sender, &to_router), Sent::Forwarded);
    assert_eq!(up.receive(), vec![to_router.clone()]);
    // An uplink that does not read is a receiver like any other.
    up.receiver.close();
    assert_eq!(send(&mut alice.sender, &to_router), Sent::Dropped(DropReason::Closed));
    assert_eq!(up.receiver.stats().missed_closed, 1);
    assert_eq!(alice.sender.stats().dropped_unknown, 1);
}

#[test]
fn an_uplink_is_bound_to_nothing() {
    let network = switch();
    let up = PortConfig { uplink: true, ..config(1) };
    for config in [
        PortConfig { isolated: true, ..up.clone() },
        PortConfig { policy: rule(SourceRule::Fixed), ..up.clone() },
        PortConfig { policy: rule(SourceRule::LearnOnce), ..up.clone() },
    ] {
        assert_eq!(network.join(config).unwrap_err(), JoinError::BoundUplink);
    }
    assert_eq!(network.ports(), 0);
    assert!(network.join(up).is_ok());
}

/// The frames of a guest to the uplink go in runs too.
#[test]
fn a_run_to_an_unknown_address_goes_to_the_uplink() {
    let network = switch();
    let mut up = uplink(&network);
    let mut alice = guest(&network, 1, SourceRule::Fixed);
    let mut bob = Guest::join(&network, 2);
    let frame = data(ROUTER, alice.mac, b"of a run");
    let mut run = alice.sender.run(header(&frame), 20, |_| ()).unwrap();
    let count = run.left();
    assert_eq!(count, 8, "as many as the uplink has buffers");
    (0..count).for_each(|_| assert!(run.put(&frame)));
    drop(run);
    alice.sender.flush();
    assert_eq!(up.receive(), vec![frame; count]);
    assert!(bob.receive().is_empty());
    // One from outside to an unknown address is for several or for nobody.
    let unknown = data(NOWHERE, ROUTER, b"");
    assert!(up.sender.run(header(&unknown), 1, |_| ()).is_none());
    // The gateway's address is not unknown, though it is behind no port.
    let network = Network::new(NetworkConfig::default()).unwrap();
    let (_up, mut alice) = (uplink(&network), Guest::join(&network, 1));
    let to_gateway = data(network.gateway().unwrap().mac(), alice.mac, b"");
    assert!(alice.sender.run(header(&to_gateway), 1, |_| ()).is_none());
}

// ---- Random networks ----

#[derive(Clone, Copy, Debug)]
struct Settings {
    source: SourceRule,
    isolated: bool,
}

#[derive(Clone, Copy, Debug)]
enum Address {
    /// The address that was assigned to a port.
    Port(usize),
    /// One of a few others.
    Other(u8),
    Group,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    from: usize,
    source: Address,
    to: Address,
    run: bool,
}

const GUESTS: usize = 4;
/// The uplink's number among the ports.
const UP: usize = GUESTS;

fn address() -> impl Strategy<Value = Address> {
    prop_oneof![
        4 => (0..=GUESTS).prop_map(Address::Port),
        4 => (0..5u8).prop_map(Address::Other),
        1 => Just(Address::Group),
    ]
}

fn settings() -> impl Strategy<Value = Settings> {
    let rules = vec![SourceRule::Any, SourceRule::Fixed, SourceRule::LearnOnce];
    (proptest::sample::select(rules), any::<bool>())
        .prop_map(|(source, isolated)| Settings { source, isolated })
}

/// Where each address is, by what was sent so far.
struct Model {
    guests: Vec<Settings>,
    bound: [Option<MacAddr6>; GUESTS],
    learned: Vec<(MacAddr6, usize)>,
    assigned: Vec<MacAddr6>,
}

impl Model {
    fn owner(&self, mac: MacAddr6) -> Option<usize> {
        let assigned = self.assigned.iter().position(|known| *known == mac);
        assigned.or_else(|| self.bound.iter().position(|known| *known == Some(mac)))
    }

    /// Whether a port may send from an address, after which the address is where it is.
    fn may_send(&mut self, from: usize, source: MacAddr6) -> bool {
        if source.is_multicast() {
            return false;
        }
        let owner = self.owner(source);
        let rule = self.guests.get(from).map(|guest| guest.source);
        let may = match rule {
            None | Some(SourceRule::Any) => owner.is_none_or(|owner| owner == from),
            Some(SourceRule::LearnOnce) => match self.bound[from] {
                Some(bound) => bound == source,
                None => owner.is_none_or(|owner| owner == from),
            },
            Some(_) => source == self.assigned[from],
        };
        if may && owner.is_none() {
            self.learned.retain(|(known, _)| *known != source);
        }
        if may {
            match rule {
                Some(SourceRule::Any) if owner.is_none() => self.learned.push((source, from)),
                Some(SourceRule::LearnOnce) => self.bound[from] = Some(source),
                _ => {}
            }
        }
        may
    }

    /// Which ports a frame reaches.
    fn reached(&self, from: usize, to: MacAddr6) -> Vec<usize> {
        let apart = |other: usize| {
            let isolated = |port: usize| self.guests.get(port).is_some_and(|guest| guest.isolated);
            from != UP && other != UP && (isolated(from) || isolated(other))
        };
        let learned = || self.learned.iter().find(|(mac, _)| *mac == to).map(|(_, port)| *port);
        let ports = (0..=UP).filter(|port| *port != from && !apart(*port));
        if to.is_multicast() {
            return ports.collect();
        }
        match self.owner(to).or_else(learned) {
            Some(port) => ports.filter(|other| *other == port).collect(),
            None if from != UP => vec![UP],
            None => {
                let any = |port: &usize| self.guests[*port].source == SourceRule::Any;
                ports.filter(any).collect()
            }
        }
    }
}

proptest! {
    /// Goal: on a network with an uplink each frame reaches those that it is for and nobody else,
    /// whatever the guests send and whatever their settings are. Method: random guests and frames,
    /// beside a model of who is where.
    #[test]
    fn each_frame_reaches_those_that_it_is_for(
        guests in proptest::collection::vec(settings(), GUESTS),
        steps in proptest::collection::vec(
            (0..=GUESTS, address(), address(), any::<bool>())
                .prop_map(|(from, source, to, run)| Step { from, source, to, run }),
            1..60,
        ),
    ) {
        let network = switch();
        let mut ports: Vec<_> = guests.iter().zip(0..).map(|(settings, id)| {
            let (isolated, policy) = (settings.isolated, rule(settings.source));
            Guest::with(&network, PortConfig { isolated, policy, ..config(id) })
        }).collect();
        ports.push(uplink(&network));
        let assigned: Vec<_> = ports.iter().map(|port| port.mac).collect();
        let mac = |address| match address {
            Address::Port(port) => assigned[port],
            Address::Other(number) => MacAddr6::new(2, 5, 5, 5, 5, number),
            Address::Group => MULTICAST,
        };
        let bound = [None; GUESTS];
        let mut model = Model { guests, bound, learned: vec![], assigned: assigned.clone() };
        for (number, step) in steps.iter().enumerate() {
            let (source, to) = (mac(step.source), mac(step.to));
            let frame = data(to, source, &number.to_be_bytes());
            let expected = if model.may_send(step.from, source) {
                model.reached(step.from, to)
            } else {
                vec![]
            };
            let sender = &mut ports[step.from].sender;
            let ran = step.run
                && sender.run(header(&frame), 1, |_| ()).is_some_and(|mut run| run.put(&frame));
            sender.flush();
            if ran {
                prop_assert_eq!(expected.len(), 1);
            } else {
                let drops = sender.stats().drops();
                let dropped = matches!(send(sender, &frame), Sent::Dropped(_));
                prop_assert!(!dropped || expected.is_empty());
                prop_assert_eq!(sender.stats().drops() - drops, u64::from(dropped));
            }
            for (index, port) in ports.iter_mut().enumerate() {
                let frames = if expected.contains(&index) { vec![frame.clone()] } else { vec![] };
                prop_assert_eq!(port.receive(), frames, "port {} in step {}", index, number);
            }
        }
    }
}
