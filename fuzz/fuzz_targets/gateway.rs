//! Hostile frames to the gateway. It must not panic, its replies must be well formed and within the
//! permitted length, and leases must stay distinct and in range.
#![no_main]

mod frames;

use arbitrary::Arbitrary;
use core::net::{Ipv4Addr, Ipv6Addr};
use core::time::Duration;
use frames::{Frame, GATEWAY, LAST, MASK, PREFIX, checksum, checksum6, link_local};
use libfuzzer_sys::fuzz_target;
use std::collections::HashSet;
use vmring_embedded::DhcpLease;
use vmring_embedded::dhcp::DhcpConfig;
use vmring_embedded::gateway::{Gateway, Ipv6Config};
use vmring_embedded::limits::{DHCP_REPLY_MAX, MIN_FRAME_LEN};

const FIRST: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 2);
/// How much longer than its cause an ICMP error is: its own IP and ICMP headers.
const ICMP_ERROR: usize = 28;
/// The same over IPv6.
const ICMPV6_ERROR: usize = 48;
const MAC: [u8; 6] = [0x02, 0, 0, 0, 1, 0];
const GUESTS: [[u8; 6]; 2] = [[0x02, 0, 0, 0, 2, 1], [0x02, 0, 0, 0, 2, 2]];

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    router: bool,
    dns: Vec<[u8; 4]>,
    mtu: Option<u16>,
    /// Whether there is IPv6, and with how many name servers, up to 3.
    ipv6: Option<u8>,
    steps: Vec<Step<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Ask(Frame<'a>),
    AskWithRoom(Frame<'a>, u16),
    Wait { seconds: u16 },
    SetRouter(bool),
    Advertise { room: u16 },
}

fn check_reply(frame: &[u8], reply: &[u8], gateway: [u8; 6]) {
    let more = if reply[12..14] == [0x86, 0xdd] { ICMPV6_ERROR } else { ICMP_ERROR };
    let longest = (frame.len() + more).max(DHCP_REPLY_MAX);
    assert!(reply.len() <= longest, "a reply that amplifies");
    assert!(reply.len() >= MIN_FRAME_LEN);
    assert_eq!(reply[6..12], gateway);
    match [reply[12], reply[13]] {
        [8, 6] => assert_eq!(reply.len(), MIN_FRAME_LEN),
        [8, 0] => {
            assert_eq!(reply[14], 0x45);
            let len = 14 + usize::from(u16::from_be_bytes([reply[16], reply[17]]));
            assert_eq!(len.max(MIN_FRAME_LEN), reply.len());
            assert!(reply[len..].iter().all(|byte| *byte == 0), "the padding");
            let reply = &reply[..len];
            assert_eq!(checksum(&[&reply[14..34]]), 0);
            assert_eq!(reply[26..30], GATEWAY.octets());
            let payload = &reply[34..];
            match reply[23] {
                1 => assert_eq!(checksum(&[payload]), 0),
                6 => {
                    let len = (payload.len() as u16).to_be_bytes();
                    assert_eq!(checksum(&[&reply[26..34], &[0, 6], &len, payload]), 0);
                }
                17 if payload[6..8] == [0, 0] => {} // none was computed
                17 => {
                    let len = &payload[4..6];
                    assert_eq!(checksum(&[&reply[26..34], &[0, 17], len, payload]), 0);
                }
                other => panic!("a reply of protocol {other}"),
            }
        }
        [0x86, 0xdd] => check_reply6(reply, gateway),
        other => panic!("a reply of type {other:x?}"),
    }
}

fn check_reply6(reply: &[u8], gateway: [u8; 6]) {
    assert_eq!(reply[14] >> 4, 6);
    let len = 54 + usize::from(u16::from_be_bytes([reply[18], reply[19]]));
    assert_eq!(len.max(MIN_FRAME_LEN), reply.len());
    assert!(reply[len..].iter().all(|byte| *byte == 0), "the padding");
    let address = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&reply[at..at + 16]).unwrap());
    let (from, to) = (address(22), address(38));
    let own = Ipv6Addr::from_bits(PREFIX.to_bits() | 1);
    assert!(from == own || from == link_local(gateway), "{from}");
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let of_prefix = to.segments()[..4] == PREFIX.segments()[..4] && to != PREFIX;
    assert!(of_prefix || to.is_unicast_link_local() || to == all_nodes, "{to}");
    assert!(to != own && to != link_local(gateway), "{to}");
    let payload = &reply[54..len];
    assert_eq!(checksum6(&reply[22..38], &reply[38..54], reply[20], payload), 0);
    match reply[20] {
        58 => {
            assert!(matches!(payload[0], 1 | 3 | 4 | 129 | 134 | 136));
            assert!(payload[0] > 128 || len - 14 <= 1280, "a long error");
            assert!(to != all_nodes || matches!(payload[0], 134 | 136));
        }
        6 | 17 => {}
        other => panic!("a reply of protocol {other}"),
    }
}

/// Checks that each guest has one address, each address has one guest, and all addresses are in the
/// range.
fn check_leases(leases: &[DhcpLease]) {
    let addresses: HashSet<_> = leases.iter().map(|lease| lease.address).collect();
    let holders: HashSet<_> = leases.iter().map(|lease| lease.mac).collect();
    assert_eq!((addresses.len(), holders.len()), (leases.len(), leases.len()));
    assert!(addresses.iter().all(|address| (FIRST..=LAST).contains(address)));
}

fuzz_target!(|input: Input| {
    let gateway = Gateway::new(DhcpConfig {
        server: GATEWAY,
        server_mac: MAC.into(),
        first: FIRST,
        last: LAST,
        mask: MASK,
        router: input.router.then_some(GATEWAY),
        dns: input.dns.iter().copied().map(Ipv4Addr::from).collect(),
        mtu: input.mtu,
        lease_time: Duration::from_secs(3600),
    });
    let gateway = match input.ipv6 {
        Some(count) => {
            let dns =
                vec![Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53); usize::from(count % 4)];
            gateway.with_ipv6(Ipv6Config { prefix: PREFIX, dns })
        }
        None => gateway,
    };
    let mut now = Duration::ZERO;
    for step in &input.steps {
        let (frame, room) = match step {
            Step::Ask(frame) => (frame, 65_535),
            Step::AskWithRoom(frame, room) => (frame, usize::from(*room) % 512),
            Step::Wait { seconds } => {
                now += Duration::from_secs((*seconds).into());
                continue;
            }
            Step::SetRouter(is_router) => {
                gateway.set_ipv6_router(*is_router);
                continue;
            }
            Step::Advertise { room } => {
                let mut out = vec![0; usize::from(*room) % 512];
                if let Some(len) = gateway.router_advertisement(&mut out) {
                    check_reply(&[], &out[..len], MAC);
                }
                continue;
            }
        };
        let frame = frame.bytes(&GUESTS, MAC);
        let longest = (frame.len() + ICMPV6_ERROR).max(DHCP_REPLY_MAX);
        let mut reply = vec![0; room.min(longest)];
        let answer = gateway.handle(&frame, 0, &mut reply, now);
        if let Some(len) = answer.reply {
            check_reply(&frame, &reply[..len], MAC);
        }
        check_leases(&gateway.dhcp().leases(now));
    }
});
