//! Policy at the translator: whose address it is, and what of the host is reached.

use std::net::SocketAddr;
use std::time::Duration;

use vmring_core::offload::OffloadHeader;
use vmring_nat::{Counter, GuestFrame, Port, SocketError};

use crate::support::port::{GUEST_MAC, Net, config, plain_link};
use crate::support::script::Segment;

fn syn(net: &mut Net, port: u32, mac: [u8; 6], from: &str, to: &str) {
    let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
    let segment = Segment { flags: "S".into(), seq: 7, window: 1000, ..Segment::default() };
    let mut bytes = segment.frame(from, to);
    bytes[6..12].copy_from_slice(&mac);
    let frame = GuestFrame { bytes: &bytes, header: OffloadHeader::NONE };
    net.nat.from_guest(Port(port), &[frame], net.now, &mut net.out);
    net.settle();
}

fn counted(net: &Net, counter: Counter) -> u64 {
    net.nat.counters()[counter]
}

const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];

/// S1: a guest with an address that nobody leased gets out, at once, and from then on no other port
/// speaks for it. A lease overrides that.
#[test]
fn an_address_is_the_first_users_until_a_lease_says_otherwise() {
    for (a, to) in [("192.168.64.9:1", "192.0.2.1:80"), ("[fd00::9]:1", "[2001:db8::1]:80")] {
        let mut net = Net::new(config(false), plain_link());
        syn(&mut net, 0, GUEST_MAC, a, to);
        assert_eq!(net.kernel.open(), 1);
        syn(&mut net, 1, OTHER_MAC, a, to);
        assert_eq!((net.kernel.open(), counted(&net, Counter::SourceTaken)), (1, 1));
        let address = a.parse::<SocketAddr>().unwrap().ip();
        net.nat.sources().lease(Port(1), OTHER_MAC, address);
        syn(&mut net, 1, OTHER_MAC, a, to);
        assert_eq!(net.kernel.open(), 2);
        syn(&mut net, 0, GUEST_MAC, &a.replace(":1", ":2"), to);
        assert_eq!((net.kernel.open(), counted(&net, Counter::SourceReserved)), (2, 1));
    }
}

/// S1: a packet that says that it comes from the gateway, from outside or from a reservation opens
/// nothing.
#[test]
fn a_source_that_is_no_guests_opens_nothing() {
    let mut net = Net::new(config(false), plain_link());
    for address in ["192.168.64.8", "fd00::8"] {
        net.nat.sources().reserve(OTHER_MAC, address.parse().unwrap());
    }
    for (from, why) in [
        ("192.168.64.1:1", Counter::SourceGateway),
        ("10.0.0.1:1", Counter::SourceOutside),
        ("192.168.64.255:1", Counter::SourceOutside),
        ("192.168.64.8:1", Counter::SourceReserved),
        ("[fd00::1]:1", Counter::SourceGateway),
        ("[2001:db8::9]:1", Counter::SourceOutside),
        ("[fd00:0:0:1::9]:1", Counter::SourceOutside),
        ("[fd00::]:1", Counter::SourceOutside),
        ("[::ffff:192.168.64.9]:1", Counter::BadSource),
        ("[fe80::9]:1", Counter::BadSource),
        ("[fd00::8]:1", Counter::SourceReserved),
    ] {
        let to = if from.starts_with('[') { "[2001:db8::1]:80" } else { "192.0.2.1:80" };
        let before = counted(&net, why);
        syn(&mut net, 0, GUEST_MAC, from, to);
        assert_eq!((net.kernel.len(), counted(&net, why)), (0, before + 1), "{from}");
    }
    syn(&mut net, 0, OTHER_MAC, "192.168.64.8:1", "192.0.2.1:80");
    syn(&mut net, 0, OTHER_MAC, "[fd00::8]:1", "[2001:db8::1]:80");
    assert_eq!(net.kernel.len(), 2);
}

/// S2 and S3: over IPv6 a guest reaches neither its own network nor the host, by whatever form of an
/// address.
#[test]
fn nothing_of_the_host_is_reached_over_ipv6() {
    let mut net = Net::new(config(false), plain_link());
    let host = ["2001:db8:7::1", "198.51.100.7"].map(|address| address.parse().unwrap());
    net.kernel.0.borrow_mut().addresses = Ok(host.into());
    for (to, why) in [
        ("fd00::1", Counter::DeniedSubnet),
        ("fd00::77", Counter::DeniedSubnet),
        ("2001:db8:7::1", Counter::DeniedHost),
        ("64:ff9b::198.51.100.7", Counter::DeniedHost),
        ("2002:c633:6407::1", Counter::DeniedHost),
        ("64:ff9b::192.168.64.1", Counter::DeniedSubnet),
        ("::ffff:192.0.2.1", Counter::DeniedMapped),
        ("::1", Counter::DeniedLoopback),
        ("fe80::1", Counter::DeniedLinkLocal),
        ("ff0e::1", Counter::DeniedMulticast),
        ("fd00:ec2::254", Counter::DeniedMetadata),
    ] {
        let before = counted(&net, why);
        syn(&mut net, 0, GUEST_MAC, "[fd00::9]:1", &format!("[{to}]:80"));
        assert_eq!((net.kernel.len(), counted(&net, why)), (0, before + 1), "{to}");
    }
    syn(&mut net, 0, GUEST_MAC, "[fd00::9]:1", "[2001:db8:7::2]:80");
    assert_eq!(net.kernel.len(), 1);
}

/// S3: the host's own addresses are denied, those that it gets later too, and all of them if they
/// cannot be read.
#[test]
fn the_hosts_own_addresses_are_denied_as_they_change() {
    let mut net = Net::new(config(false), plain_link());
    let set = |net: &Net, addresses| net.kernel.0.borrow_mut().addresses = addresses;
    set(&net, Err(SocketError::NoDescriptor));
    syn(&mut net, 0, GUEST_MAC, "192.168.64.9:1", "192.0.2.1:80");
    assert_eq!((net.kernel.len(), counted(&net, Counter::HostAddresses)), (0, 1));
    set(&net, Ok(vec!["198.51.100.7".parse().unwrap()]));
    net.wait(Duration::from_secs(5));
    syn(&mut net, 0, GUEST_MAC, "192.168.64.9:2", "198.51.100.7:80");
    syn(&mut net, 0, GUEST_MAC, "192.168.64.9:3", "192.0.2.1:80");
    assert_eq!((net.kernel.len(), counted(&net, Counter::DeniedHost)), (1, 2));
    set(&net, Ok(vec!["192.0.2.1".parse().unwrap()]));
    net.wait(Duration::from_secs(5));
    syn(&mut net, 0, GUEST_MAC, "192.168.64.9:4", "192.0.2.1:80");
    syn(&mut net, 0, GUEST_MAC, "192.168.64.9:5", "198.51.100.7:80");
    assert_eq!((net.kernel.len(), counted(&net, Counter::DeniedHost)), (2, 3));
    // If they cannot be read again, the old ones hold.
    set(&net, Err(SocketError::NoDescriptor));
    net.wait(Duration::from_secs(5));
    syn(&mut net, 0, GUEST_MAC, "192.168.64.9:6", "192.0.2.1:80");
    assert_eq!((net.kernel.len(), counted(&net, Counter::DeniedHost)), (2, 4));
}
