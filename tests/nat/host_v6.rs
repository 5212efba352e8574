//! A host that is a network namespace, whose ways over IPv6 come and go.

use std::net::{Ipv4Addr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv6Packet, Icmpv6Repr, IpAddress};
use vmring::device::embedded::nat::{HostAccess, NatControl, NatSettings};
use vmring::{Embedded, Interface};

use super::guest::{Guest, datagram};
use super::ipv6::{OUTSIDE, is_icmp};
use super::join;
use crate::netns::{has, in_namespace, sh, with_ipv6};
use crate::support::{skip, stage, unique};

/// Gives this namespace an interface with an address of IPv6, and no route.
fn connect_to_world() {
    sh("ip link add world type veth peer name there && ip link set world up && \
        ip link set there up && ip -6 addr add 2001:db8:5::2/64 dev world nodad");
}

/// The lifetime of the router, if a frame is an advertisement.
fn lifetime(frame: &[u8]) -> Option<u16> {
    is_icmp(frame, 134).then(|| u16::from_be_bytes([frame[60], frame[61]]))
}

/// Goal: guests use the gateway as their router as long as the host has a way to the world, and hear at once
/// when it comes and goes. Without it they are told "no route". Method: the host is a network namespace.
#[test]
fn guests_hear_when_the_hosts_way_comes_and_goes() {
    in_namespace(|| {
        if !has("ip") {
            return;
        }
        with_ipv6();
        connect_to_world();
        let control = NatControl::default();
        let interface = join(&unique("route"), &NatSettings::new(), &control);
        let mut guest = Guest::with_ipv6(interface, 9);
        let macs = (guest.mac(), guest.ask_for_gateway(Ipv4Addr::new(192, 168, 64, 9)));
        let frame = datagram(macs, (guest.address_v6(), OUTSIDE), 53);
        let error = guest.frame_where("an error", &frame, |frame| is_icmp(frame, 1));
        assert_eq!(error[55], 0, "no route (RFC 4443, 3.1)");
        assert_eq!(error[..6], guest.mac());
        sh("ip -6 route add default via 2001:db8:5::1 dev world");
        // A network that is used looks at the routes more often.
        guest.frame_where("a route comes", &frame, |frame| lifetime(frame) == Some(65_535));
        stage("a guest that comes later is told so");
        let mut later = Guest::new(
            Interface::builder()
                .device(Embedded::network(unique("later")))
                .start()
                .expect("an interface"),
            16,
        );
        later.ask_for_gateway(Ipv4Addr::new(192, 168, 64, 10));
        let first = later.frame_where("an advertisement", &[], |frame| is_icmp(frame, 134));
        assert_eq!(lifetime(&first), Some(65_535));
        sh("ip -6 route del default");
        guest.frame_where("the route goes", &frame, |frame| lifetime(frame) == Some(0));
    });
}

/// Goal: a guest pings an address of the host's world over IPv6. Method: the host is a network namespace
/// with an address that guests may reach.
#[test]
fn a_guest_pings_over_ipv6() {
    in_namespace(|| {
        if !has("ip") {
            return;
        }
        with_ipv6();
        connect_to_world();
        // The kernel's default lets nobody have such sockets.
        let range = "/proc/sys/net/ipv4/ping_group_range";
        if std::fs::write(range, "0 2147483647").is_err() {
            return skip("ping sockets cannot be allowed");
        }
        let settings = NatSettings::new().host_access(HostAccess::Allow);
        let interface = join(&unique("ping6"), &settings, &NatControl::default());
        let mut guest = Guest::with_ipv6(interface, 9);
        let host: Ipv6Addr = "2001:db8:5::2".parse().expect("an address");
        let socket = guest.ping(77);
        let request = Icmpv6Repr::EchoRequest { ident: 77, seq_no: 5, data: b"there?" };
        let (own, checksums) = (guest.address_v6(), ChecksumCapabilities::default());
        let buffer = guest.icmp(socket).send(request.buffer_len(), host.into()).expect("space");
        let mut packet = Icmpv6Packet::new_unchecked(buffer);
        request.emit(&own, &host, &mut packet, &checksums);
        let (bytes, from) = guest.until("an answer", |guest| {
            let (bytes, from) = guest.icmp(socket).recv().ok()?;
            Some((bytes.to_vec(), from))
        });
        assert_eq!(from, IpAddress::Ipv6(host));
        assert_eq!(
            (bytes[0], &bytes[4..8], &bytes[8..]),
            (129, &[0, 77, 0, 5][..], &b"there?"[..])
        );
    });
}
