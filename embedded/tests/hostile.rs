//! Tests with frames that no honest guest sends. Nothing panics, nothing exceeds its limits, and an
//! honest guest is served afterwards.
#![cfg(not(loom))]

mod common;

use core::net::Ipv4Addr;
use std::time::Duration;

use common::*;
use macaddr::MacAddr6;
use proptest::prelude::*;
use smoltcp::wire::*;
use vmring_embedded::{Network, NetworkConfig, Sent};

fn valid_frames(network: &Network<Buffer>, mac: MacAddr6) -> Vec<Vec<u8>> {
    let gateway = network.gateway().unwrap().mac();
    let address = Ipv4Addr::new(192, 168, 64, 2);
    let kinds = [
        DhcpMessageType::Discover,
        DhcpMessageType::Request,
        DhcpMessageType::Release,
        DhcpMessageType::Decline,
        DhcpMessageType::Inform,
        DhcpMessageType::Nak,
    ];
    let mut frames = vec![
        arp_request(mac, address, SHARED),
        ping(gateway, mac, address, SHARED, 1, &[3; 200]),
        data(gateway, mac, b"what is this"),
        data(MacAddr6::broadcast(), mac, b"and this"),
    ];
    for kind in kinds {
        let message = Dhcp::new(kind, mac).requested(address);
        frames.push(message.frame());
        frames.push(message.from(address).frame());
    }
    frames
}

/// Recomputes the checksums, so that a mutated frame passes these checks.
fn repair(frame: &mut [u8]) {
    let Some(packet) = frame.get_mut(14..) else { return };
    if packet.len() < 20 || packet[0] != 0x45 {
        return;
    }
    let mut ip = Ipv4Packet::new_unchecked(&mut *packet);
    ip.fill_checksum();
    let (from, to, protocol) = (ip.src_addr(), ip.dst_addr(), ip.next_header());
    let payload = &mut packet[20..];
    match protocol {
        IpProtocol::Icmp if payload.len() >= 8 => {
            Icmpv4Packet::new_unchecked(payload).fill_checksum();
        }
        IpProtocol::Udp if UdpPacket::new_checked(&payload[..]).is_ok() => {
            UdpPacket::new_unchecked(payload).fill_checksum(&from.into(), &to.into());
        }
        _ => {}
    }
}

fn check(network: &Network<Buffer>, guest: &mut Guest, frame: &[u8]) {
    let mut reply = vec![0; network.max_packet_size()];
    if let Some(len) =
        network.gateway().unwrap().handle(frame, 0, &mut reply, Duration::from_secs(1)).reply
    {
        assert!((14..=reply.len()).contains(&len));
        assert_eq!(
            EthernetFrame::new_unchecked(&reply).src_addr(),
            eth(network.gateway().unwrap().mac())
        );
    }
    // A reply never exceeds the buffer it is given.
    for space in [0, 13, 14, 60, 300] {
        let answer =
            network.gateway().unwrap().handle(frame, 0, &mut reply[..space], Duration::ZERO);
        assert!(answer.reply.is_none_or(|len| len <= space));
    }
    let sent = guest.sender.send(frame);
    guest.sender.flush();
    for answer in guest.receive() {
        assert!(answer.len() <= network.max_packet_size());
        assert!(matches!(sent, Sent::Gateway | Sent::Flooded { .. }));
    }
}

fn honest_guest_is_served(network: &std::sync::Arc<Network<Buffer>>) {
    let mut guest = Guest::join(network, 999);
    let replies = guest.ask(&arp_request(guest.mac, Ipv4Addr::UNSPECIFIED, SHARED));
    assert_eq!(replies.len(), 1);
    let offer = dhcp_reply(&guest.ask(&Dhcp::discover(guest.mac).frame())[0]);
    assert_eq!(offer.kind, DhcpMessageType::Offer);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_do_no_harm(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..1600), 1..20),
        // Most random frames do not reach the gateway, so some of them get its address.
        helped in any::<bool>(),
    ) {
        let network = Network::<Buffer>::new(NetworkConfig::default()).unwrap();
        let mut guest = Guest::join(&network, 1);
        for mut frame in frames {
            if helped && frame.len() >= 42 {
                frame[..6].copy_from_slice(network.gateway().unwrap().mac().as_bytes());
                frame[6..12].copy_from_slice(guest.mac.as_bytes());
                frame[12..15].copy_from_slice(&[8, 0, 0x45]);
                frame[20] &= 0x40;
                frame[21] = 0;
                frame[23] = if frame[23] & 1 == 0 { 1 } else { 17 };
                frame[30..34].copy_from_slice(&SHARED.octets());
                frame[36..38].copy_from_slice(&[0, 67]);
                repair(&mut frame);
            }
            check(&network, &mut guest, &frame);
        }
        honest_guest_is_served(&network);
    }

    #[test]
    fn mutated_valid_frames_do_no_harm(
        mutations in prop::collection::vec(
            (
                any::<prop::sample::Index>(),
                prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
                prop::option::of(any::<prop::sample::Index>()),
                prop::collection::vec(any::<u8>(), 0..40),
                any::<bool>(),
            ),
            1..40,
        ),
    ) {
        let network = Network::<Buffer>::new(NetworkConfig::default()).unwrap();
        let mut guest = Guest::join(&network, 1);
        let frames = valid_frames(&network, guest.mac);
        for (frame, changes, cut, tail, repaired) in mutations {
            let mut frame = frame.get(&frames).clone();
            for (at, byte) in changes {
                let at = at.index(frame.len());
                frame[at] = byte;
            }
            if let Some(cut) = cut {
                frame.truncate(cut.index(frame.len()));
            }
            frame.extend(tail);
            if repaired {
                repair(&mut frame);
            }
            check(&network, &mut guest, &frame);
        }
        honest_guest_is_served(&network);
    }
}
