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
    net.nat.sources().reserve(OTHER_MAC, "192.168.64.8".parse().unwrap());
    for (from, why) in [
        ("192.168.64.1:1", Counter::SourceGateway),
        ("10.0.0.1:1", Counter::SourceOutside),
        ("192.168.64.255:1", Counter::SourceOutside),
        ("192.168.64.8:1", Counter::SourceReserved),
    ] {
        syn(&mut net, 0, GUEST_MAC, from, "192.0.2.1:80");
        assert_eq!((net.kernel.len(), counted(&net, why) > 0), (0, true), "{from}");
    }
    syn(&mut net, 0, OTHER_MAC, "192.168.64.8:1", "192.0.2.1:80");
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
