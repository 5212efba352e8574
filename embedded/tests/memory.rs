//! What a DHCP server knows after a restart: with a lease file everything, and without one enough
//! that no address is ever used twice.
#![cfg(not(loom))]

mod common;

use core::net::Ipv4Addr;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use macaddr::MacAddr6;
use smoltcp::wire::{ArpPacket, ArpRepr, DhcpMessageType};
use vmring_embedded::clock::{Clock, ManualClock};
use vmring_embedded::dhcp::{DhcpConfig, DhcpServer, LeaseFileError};
use vmring_embedded::limits::{DHCP_REPLY_MAX, PROBE_TIME};
use vmring_embedded::{Network, NetworkConfig, NetworkConfigError};

const NOW: Duration = Duration::from_secs(1000);
const DAY: Duration = Duration::from_secs(86_400);
/// How long a test waits for the thread that writes the file.
const PATIENCE: Duration = Duration::from_secs(60);

fn config() -> DhcpConfig {
    DhcpConfig {
        server: SHARED,
        server_mac: MacAddr6::new(2, 0, 0, 0, 0, 1),
        first: Ipv4Addr::new(192, 168, 64, 2),
        last: Ipv4Addr::new(192, 168, 64, 254),
        mask: Ipv4Addr::new(255, 255, 255, 0),
        router: Some(SHARED),
        dns: vec![],
        mtu: Some(1500),
        lease_time: DAY,
    }
}

fn mac(number: usize) -> MacAddr6 {
    MacAddr6::new(0x52, 0x54, 0, 0, (number >> 8) as u8, number as u8)
}

/// A folder of one test, which is removed with its files.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vmring-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("leases")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Waits until the file has a lease of this client, or says what it has.
fn written(path: &Path, mac: MacAddr6) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = fs::read_to_string(path).unwrap();
        if text.lines().any(|line| line.starts_with(&mac.to_string())) {
            return text;
        }
        assert!(Instant::now() < deadline, "{mac} is not in {text}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

// ---- Random guests ----

/// A generator of numbers that a seed repeats (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % limit as u64) as usize
    }

    fn shuffled(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<_> = (0..count).collect();
        (1..count).rev().for_each(|last| order.swap(last, self.below(last + 1)));
        order
    }
}

/// A network of guests that keep their addresses while the server restarts.
struct World {
    server: DhcpServer,
    now: Duration,
    /// What each guest uses now.
    uses: BTreeMap<usize, Ipv4Addr>,
    /// What each guest had when it was switched off.
    had: HashMap<usize, Ipv4Addr>,
    silent: u32,
}

impl World {
    /// Sends a message of a guest. Every guest that uses the address which the server asks for
    /// answers.
    fn send(&mut self, message: &Dhcp) -> Option<DhcpReply> {
        let mut reply = [0; DHCP_REPLY_MAX];
        let answer = self.server.handle(&message.frame(), 0, &mut reply, self.now).unwrap();
        if let Some(question) = answer.to_all {
            let packet = ArpPacket::new_checked(&question[14..]).unwrap();
            let ArpRepr::EthernetIpv4 { target_protocol_addr: asked, .. } =
                ArpRepr::parse(&packet).unwrap()
            else {
                panic!("not ARP")
            };
            for (guest, _) in self.uses.iter().filter(|(_, address)| **address == asked) {
                // A guest has a port of its own.
                self.server.learn(mac(*guest), asked, *guest as u32, self.now);
            }
        }
        answer.reply.map(|len| dhcp_reply(&reply[..len]))
    }

    /// Gets an address as a client that has none does.
    fn boot(&mut self, guest: usize, requested: Option<Ipv4Addr>) {
        let (mac, mut discover) = (mac(guest), Dhcp::discover(mac(guest)));
        discover.requested = requested;
        for _ in 0..200 {
            let Some(offer) = self.send(&discover) else {
                self.now += PROBE_TIME;
                self.silent += 1;
                continue;
            };
            let Some(answer) = self.send(&Dhcp::select(mac, offer.address, SHARED)) else {
                panic!("a request got no answer")
            };
            if answer.kind == DhcpMessageType::Ack {
                self.set(guest, answer.address);
                return;
            }
            assert_eq!(answer.kind, DhcpMessageType::Nak);
        }
        panic!("guest {guest} got no address: {:?}", self.server.stats());
    }

    fn set(&mut self, guest: usize, address: Ipv4Addr) {
        let other = self.uses.iter().find(|(other, its)| **its == address && **other != guest);
        assert_eq!(other, None, "guest {guest} gets {address}, which another uses");
        self.uses.insert(guest, address);
    }

    fn step(&mut self, random: &mut Random, guest: usize) {
        let asks = |kind| Dhcp::new(kind, mac(guest));
        match (self.uses.get(&guest).copied(), random.below(6)) {
            // It runs on and does nothing.
            (Some(_), 0 | 1) => {}
            (Some(address), 2) => {
                let renewal = asks(DhcpMessageType::Request).from(address);
                let answer = self.send(&renewal).expect("a renewal is answered");
                assert_eq!(answer.kind, DhcpMessageType::Ack, "guest {guest} and {address}");
            }
            // It is switched off, without a release or with one.
            (Some(address), 3) => {
                self.had.insert(guest, address);
                self.uses.remove(&guest);
            }
            (Some(address), 4) => {
                self.send(&asks(DhcpMessageType::Release).from(address));
                self.uses.remove(&guest);
                self.had.remove(&guest);
            }
            // It boots again and remembers nothing.
            (Some(_), _) => {
                self.uses.remove(&guest);
                self.boot(guest, None);
            }
            // It is switched on and asks for the address that it had, if it had one.
            (None, 0..3) => {
                if let Some(&address) = self.had.get(&guest) {
                    let reboot = asks(DhcpMessageType::Request).requested(address);
                    let answer = self.send(&reboot).expect("INIT-REBOOT is answered");
                    if answer.kind == DhcpMessageType::Ack {
                        return self.set(guest, address);
                    }
                }
                self.boot(guest, self.had.get(&guest).copied());
            }
            (None, _) => self.boot(guest, None),
        }
    }
}

/// Goal: 100 guests in random order and 50 restarts of the server, with a file and without, and
/// never one address for two. Method: the guests keep their addresses over a restart, are switched
/// off and on, renew, release and boot. Those that run answer ARP. Each address that a guest gets
/// is compared with those that the others use.
#[test]
fn no_address_is_ever_used_twice_whatever_restarts() {
    const GUESTS: usize = 100;
    for (seed, with_file) in [(1, false), (2, true), (3, false)] {
        let folder = Folder::new(&format!("restarts-{seed}"));
        let mut random = Random(seed);
        let mut kept = 0;
        let mut world = World {
            server: DhcpServer::new(config()),
            now: NOW,
            uses: BTreeMap::new(),
            had: HashMap::new(),
            silent: 0,
        };
        for restart in 0..50 {
            world.server = DhcpServer::new(config());
            let path = folder.file();
            let file = with_file.then(|| world.server.open_lease_file(&path, world.now).unwrap());
            for guest in random.shuffled(GUESTS) {
                let before = world.uses.get(&guest).or(world.had.get(&guest)).copied();
                world.step(&mut random, guest);
                if restart > 0 && before.is_some() && world.uses.get(&guest).copied() == before {
                    kept += 1;
                }
            }
            drop(file);
        }
        assert!(kept > 2000, "seed {seed}: {kept} times a guest had its old address");
        assert!(world.silent > 0, "seed {seed}: some first choices were taken");
    }
}

/// These values must never change: a guest keeps its address when the program is updated.
#[test]
fn the_first_choice_follows_from_the_mac_and_the_subnet() {
    let first = |config: &DhcpConfig, number| {
        let server = DhcpServer::new(config.clone());
        let mut reply = [0; DHCP_REPLY_MAX];
        let frame = Dhcp::discover(mac(number)).frame();
        let answer = server.handle(&frame, 0, &mut reply, NOW).unwrap();
        dhcp_reply(&reply[..answer.reply.unwrap()]).address
    };
    let other = DhcpConfig {
        server: Ipv4Addr::new(10, 0, 0, 1),
        first: Ipv4Addr::new(10, 0, 0, 2),
        last: Ipv4Addr::new(10, 0, 255, 254),
        mask: Ipv4Addr::new(255, 255, 0, 0),
        ..config()
    };
    let found = [1, 2, 3].map(|number| (first(&config(), number), first(&other, number)));
    let pair = |one: &str, two: &str| (one.parse().unwrap(), two.parse().unwrap());
    let expected: [(Ipv4Addr, Ipv4Addr); 3] = [
        pair("192.168.64.152", "10.0.143.221"),
        pair("192.168.64.128", "10.0.253.105"),
        pair("192.168.64.107", "10.0.72.98"),
    ];
    assert_eq!(found, expected);
}

// ---- The file ----

fn network(path: &Path) -> Result<Arc<Network<Buffer>>, NetworkConfigError> {
    let config = NetworkConfig { lease_file: Some(path.to_owned()), ..NetworkConfig::default() };
    Network::new(config)
}

/// Gets a lease on a network.
fn lease(guest: &mut Guest, requested: Option<Ipv4Addr>) -> Ipv4Addr {
    let mut discover = Dhcp::discover(guest.mac);
    discover.requested = requested;
    let deadline = Instant::now() + PATIENCE;
    let offer = loop {
        let replies = guest.ask(&discover.frame());
        if let Some(offer) = replies.iter().find(|frame| frame.len() > 60) {
            break dhcp_reply(offer);
        }
        assert!(Instant::now() < deadline, "no offer");
        std::thread::sleep(PROBE_TIME / 2);
    };
    let replies = guest.ask(&Dhcp::select(guest.mac, offer.address, SHARED).frame());
    let ack = dhcp_reply(&replies[0]);
    assert_eq!(ack.kind, DhcpMessageType::Ack);
    ack.address
}

#[test]
fn a_network_with_a_file_knows_its_leases_after_a_restart() {
    let folder = Folder::new("restart");
    let path = folder.file();
    let wanted = Ipv4Addr::new(192, 168, 64, 77);
    let started = network(&path).unwrap();
    let mut alice = Guest::join(&started, 1);
    assert_eq!(lease(&mut alice, Some(wanted)), wanted);
    let mac = alice.mac;
    written(&path, mac);
    drop((alice, started));

    let started = network(&path).unwrap();
    let left = started.lease_of(mac).unwrap();
    assert_eq!(left.address, wanted);
    assert!(left.remaining > DAY - PATIENCE && left.remaining <= DAY, "{:?}", left.remaining);
    // Another guest does not get the address, and the first one has it at once.
    let mut bob = Guest::join(&started, 2);
    assert_ne!(lease(&mut bob, Some(wanted)), wanted);
    let mut alice = Guest::join(&started, 1);
    let reboot = Dhcp::new(DhcpMessageType::Request, alice.mac).requested(wanted);
    let ack = dhcp_reply(&alice.ask(&reboot.frame())[0]);
    assert_eq!((ack.kind, ack.address), (DhcpMessageType::Ack, wanted));
    // A release is remembered as well.
    alice.ask(&Dhcp::new(DhcpMessageType::Release, alice.mac).from(wanted).frame());
    drop((alice, bob, started));
    let started = network(&path).unwrap();
    assert_eq!(started.lease_of(mac), None);
    assert_eq!(started.leases().len(), 1);
}

/// A process that is killed writes nothing more, and may leave a part of a line, or a part of a
/// file beside it.
#[test]
fn a_file_that_was_cut_is_read_up_to_its_last_whole_line() {
    let folder = Folder::new("cut");
    let path = folder.file();
    let started = network(&path).unwrap();
    let mut alice = Guest::join(&started, 1);
    let its = lease(&mut alice, None);
    let text = written(&path, alice.mac);
    let mac = alice.mac;
    drop((alice, started));
    for cut in 0..text.len() {
        fs::write(&path, &text[..cut]).unwrap();
        fs::write(path.with_file_name("leases.new"), &text[..cut / 2]).unwrap();
        let started = network(&path).unwrap_or_else(|error| panic!("cut to {cut}: {error}"));
        assert_eq!(started.lease_of(mac), None, "cut to {cut}");
        let mut bob = Guest::join(&started, 2);
        let of_bob = lease(&mut bob, None);
        let mac = bob.mac;
        drop((bob, started));
        let started = network(&path).unwrap();
        assert_eq!(started.lease_of(mac).map(|lease| lease.address), Some(of_bob));
    }
    // Lines that are no leases, or leases of another subnet, are passed over.
    let more =
        "nonsense\n\n02:00:00:00:00:99 10.1.2.3 99999999999\n02:00:00:00:00:98 192.168.64.5\n";
    fs::write(&path, text + more).unwrap();
    let started = network(&path).unwrap();
    assert_eq!(started.lease_of(mac).map(|lease| lease.address), Some(its));
    assert_eq!(started.leases().len(), 1);
}

#[test]
fn a_file_that_is_no_lease_file_or_in_use_is_refused_and_left_alone() {
    let folder = Folder::new("refused");
    let error = |path: &Path| match network(path) {
        Err(NetworkConfigError::LeaseFile { error }) => error,
        other => panic!("{other:?}"),
    };
    let diary = folder.0.join("diary");
    fs::write(&diary, "Dear diary\n").unwrap();
    assert_eq!(error(&diary), LeaseFileError::Foreign { path: diary.clone() });
    assert_eq!(fs::read_to_string(&diary).unwrap(), "Dear diary\n");
    assert_eq!(error(&folder.0), LeaseFileError::Foreign { path: folder.0.clone() });
    let nowhere = folder.0.join("missing/leases");
    assert!(error(&nowhere).to_string().contains("cannot be opened"), "{}", error(&nowhere));
    let path = folder.file();
    let first = network(&path).unwrap();
    if cfg!(unix) {
        assert_eq!(error(&path), LeaseFileError::InUse { path: path.clone() });
    }
    drop(first);
    assert!(network(&path).is_ok());
}

/// A lease that is renewed for ever does not make the file grow for ever. What was left out is not
/// needed, and the file is whole at any time.
#[test]
fn a_file_does_not_grow_without_limit() {
    let folder = Folder::new("growth");
    let path = folder.file();
    let server = DhcpServer::new(config());
    let file = server.open_lease_file(&path, NOW).unwrap();
    let mut reply = [0; DHCP_REPLY_MAX];
    let mut longest = 0;
    for round in 0..300 {
        for guest in 0..20 {
            let address = Ipv4Addr::new(192, 168, 64, 10 + guest as u8);
            let renewal = Dhcp::new(DhcpMessageType::Request, mac(guest)).from(address).frame();
            let answer = server.handle(&renewal, 0, &mut reply, NOW).unwrap();
            assert!(answer.reply.is_some());
        }
        if round == 0 {
            // So that the thread writes often and not once.
            (0..20).for_each(|guest| drop(written(&path, mac(guest))));
        }
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# vmring leases"), "round {round}: {text}");
        longest = longest.max(text.lines().count());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(longest < 1500, "{longest} lines");
    drop(file);
    let server = DhcpServer::new(config());
    let _file = server.open_lease_file(&path, NOW).unwrap();
    assert_eq!(server.leases(NOW).len(), 20);
}

// ---- Time ----

/// The offers of a network follow its clock, down to the quarter of a second that the server waits
/// for an answer.
#[test]
fn a_network_offers_another_choice_at_the_retransmission() {
    struct Shared(Arc<ManualClock>);
    impl Clock for Shared {
        fn now(&self) -> Duration {
            self.0.now()
        }
    }
    let clock = Arc::new(ManualClock::new());
    let network =
        Network::with_clock(NetworkConfig::default(), Box::new(Shared(clock.clone()))).unwrap();
    let mut alice = Guest::join(&network, 1);
    let mut bob = Guest::join(&network, 2);
    let mut hermit = Guest::isolated(&network, 3);
    let wanted = Ipv4Addr::new(192, 168, 64, 77);
    let discover = Dhcp::discover(alice.mac).requested(wanted).frame();
    // All are asked, also the isolated one, and the guest itself, behind which there may be others.
    let asks = |frame: &Vec<u8>| frame.len() == 60 && frame[12..14] == [8, 6];
    assert!(alice.ask(&discover).iter().all(asks));
    assert_eq!(bob.receive().iter().filter(|frame| asks(frame)).count(), 1);
    assert_eq!(hermit.receive().iter().filter(|frame| asks(frame)).count(), 1);
    clock.advance(PROBE_TIME - Duration::from_millis(1));
    assert_eq!(alice.ask(&discover).len(), 0, "it asks once");
    clock.advance(Duration::from_millis(1));
    assert_eq!(dhcp_reply(&alice.ask(&discover)[0]).address, wanted);

    // Somebody answers, so the next client gets another address.
    let wanted = Ipv4Addr::new(192, 168, 64, 88);
    let discover = Dhcp::discover(bob.mac).requested(wanted).frame();
    bob.ask(&discover);
    hermit.ask(&arp_reply(hermit.mac, wanted, network.gateway().unwrap().mac(), SHARED));
    clock.advance(PROBE_TIME);
    let offer = dhcp_reply(&bob.ask(&discover)[0]);
    assert_ne!(offer.address, wanted);
    assert_eq!(network.gateway().unwrap().dhcp().stats().conflicts, 1);
}

/// The first choice is offered at once. If its user answers the question, the request is refused,
/// and the client gets another address.
#[test]
fn a_first_choice_that_is_in_use_is_not_given() {
    let network = Network::<Buffer>::new(NetworkConfig::default()).unwrap();
    let mut alice = Guest::join(&network, 1);
    let mut old = Guest::join(&network, 2);
    let replies = alice.ask(&Dhcp::discover(alice.mac).frame());
    let offer = dhcp_reply(&replies[0]);
    old.ask(&arp_reply(old.mac, offer.address, network.gateway().unwrap().mac(), SHARED));
    let request = Dhcp::select(alice.mac, offer.address, SHARED).frame();
    assert_eq!(dhcp_reply(&alice.ask(&request)[0]).kind, DhcpMessageType::Nak);
    assert_ne!(lease(&mut alice, None), offer.address);
}

/// A guest that claims every address by ARP denies the others 16 addresses and no more. It takes no
/// lease away.
#[test]
fn a_hostile_guest_blocks_few_addresses() {
    let network = Network::<Buffer>::new(NetworkConfig::default()).unwrap();
    let mut alice = Guest::join(&network, 1);
    let its = lease(&mut alice, None);
    let mut hostile = Guest::join(&network, 2);
    let gateway = network.gateway().unwrap().mac();
    let claim_all = |hostile: &mut Guest| {
        for last in 2..255 {
            let address = Ipv4Addr::new(192, 168, 64, last);
            let from = MacAddr6::new(0x0a, 0, 0, 0, 0, last);
            hostile.ask(&arp_reply(from, address, gateway, SHARED));
        }
    };
    claim_all(&mut hostile);
    let renew = Dhcp::new(DhcpMessageType::Request, alice.mac).from(its).frame();
    assert_eq!(dhcp_reply(&alice.ask(&renew)[0]).kind, DhcpMessageType::Ack);
    drop(alice);
    let mut got = 0;
    for id in 10..200 {
        let mut guest = Guest::join(&network, id);
        let discover = Dhcp::discover(guest.mac).frame();
        let first = guest.ask(&discover);
        let offered = first.iter().any(|frame| frame.len() > 60);
        let request = first
            .iter()
            .find(|frame| frame.len() > 60)
            .map(|frame| Dhcp::select(guest.mac, dhcp_reply(frame).address, SHARED).frame());
        claim_all(&mut hostile);
        if let Some(request) = request {
            let ack = dhcp_reply(&guest.ask(&request)[0]);
            got += u32::from(offered && ack.kind == DhcpMessageType::Ack);
        }
    }
    assert!(got > 60, "{got} of 190 guests had their first choice at once");
}
