//! The two requests of a DHCP client, written by hand.

use std::net::Ipv4Addr;

use crate::support::{BROADCAST, Interface};

/// BOOTP's operation code of a reply. Requests are broadcast to everybody.
const REPLY: u8 = 2;
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;

/// A lease: the client's address and the server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) address: Ipv4Addr,
    pub(crate) server: Ipv4Addr,
}

fn question(mac: [u8; 6], kind: u8, lease: Option<Lease>) -> Vec<u8> {
    let mut bootp = vec![1, 1, 6, 0, 0x12, 0x34, 0x56, 0x78];
    bootp.resize(28, 0);
    bootp.extend(mac);
    bootp.resize(236, 0);
    bootp.extend([99, 130, 83, 99, 53, 1, kind]);
    if let Some(lease) = lease {
        bootp.extend([&[50, 4][..], &lease.address.octets()].concat());
        bootp.extend([&[54, 4][..], &lease.server.octets()].concat());
    }
    bootp.push(255);
    bootp.resize(300, 0);
    let udp_len = (8 + bootp.len()) as u16;
    let udp = [&[0, 68, 0, 67][..], &udp_len.to_be_bytes(), &[0, 0], &bootp].concat();
    let mut ip =
        [&[0x45, 0][..], &(20 + udp_len).to_be_bytes(), &[0, 0, 0, 0, 64, 17, 0, 0]].concat();
    ip.extend([0, 0, 0, 0, 255, 255, 255, 255]);
    let mut sum: u32 = ip.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    ip[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    [&BROADCAST[..], &mac, &[8, 0], &ip, &udp].concat()
}

/// The type of an answer, and its lease.
fn answer(frame: &[u8]) -> Option<(u8, Lease)> {
    let bootp = frame.get(42..).filter(|bootp| bootp.first() == Some(&REPLY))?;
    let quad = |from: usize| -> Option<Ipv4Addr> {
        let bytes: [u8; 4] = bootp.get(from..from + 4)?.try_into().ok()?;
        Some(bytes.into())
    };
    let (mut kind, mut server, mut at) = (None, None, 240);
    while *bootp.get(at)? != 255 {
        match bootp[at] {
            53 => kind = bootp.get(at + 2).copied(),
            54 => server = quad(at + 2),
            _ => {}
        }
        at += 2 + usize::from(*bootp.get(at + 1)?);
    }
    Some((kind?, Lease { address: quad(16)?, server: server? }))
}

fn ask(interface: &Interface, mac: [u8; 6], kind: u8, lease: Option<Lease>) -> Option<(u8, Lease)> {
    interface.send(&question(mac, kind, lease));
    interface.receive().iter().find_map(|frame| answer(frame))
}

/// What the network's server gives a client with this MAC address.
pub(crate) fn lease(interface: &Interface, mac: [u8; 6]) -> Option<Lease> {
    let (kind, offered) = ask(interface, mac, DISCOVER, None)?;
    assert_eq!(kind, OFFER);
    let (kind, lease) = ask(interface, mac, REQUEST, Some(offered)).expect("an answer");
    assert_eq!((kind, lease), (ACK, offered));
    Some(lease)
}
