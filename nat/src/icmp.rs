//! ICMP errors that tell a guest why something does not work (RFC 792, RFC 4443).

use core::net::IpAddr;

use smoltcp::wire::{
    Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Icmpv4TimeExceeded, Icmpv6DstUnreachable,
    Icmpv6Message, Icmpv6Packet, Icmpv6TimeExceeded, IpProtocol,
};

use crate::limits::{ICMP_ERROR_MAX, ICMPV6_ERROR_MAX};
use crate::packet::Addresses;

/// What an error says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// There is no route to the network.
    NoRoute,
    /// The host cannot be reached.
    NoHost,
    /// A rule forbids it.
    Prohibited,
    /// The source is an address of its link, and the destination is elsewhere. Over IPv4 there is no such
    /// error, and a rule forbids it.
    Scope,
    /// The packet's hop limit was used up.
    HopLimit,
    /// Nobody listens at the port.
    NoPort,
    /// An error of the guest's family that others have sent: its type and its code.
    Passed(u8, u8),
}

/// The bytes of the longest frame with an error.
pub(crate) const ERROR_MAX: usize = 14 + ICMPV6_ERROR_MAX;
/// The bytes in front of what an error quotes.
const HEADER_LEN: usize = 8;

/// Whether a packet is an error itself, or a redirect, which gets no error (RFC 1122, 3.2.2; RFC 4443, 2.4
/// e). Errors are the messages of ICMP of the types 3 to 5, 11 and 12, and those of ICMPv6 below 128.
pub(crate) fn is_error(protocol: IpProtocol, message: &[u8]) -> bool {
    let kind = message.first();
    match protocol {
        IpProtocol::Icmp => kind.is_none_or(|kind| matches!(kind, 3..=5 | 11 | 12)),
        IpProtocol::Icmpv6 => kind.is_none_or(|kind| matches!(kind, 0..=127 | 137)),
        _ => false,
    }
}

/// Writes the frame of an error to the start of `out`, which has [`ERROR_MAX`] bytes, and returns its
/// length. `cause` is the IP packet that the error is about.
pub(crate) fn write(reason: Reason, addresses: &Addresses, cause: &[u8], out: &mut [u8]) -> usize {
    let headers = addresses.header_len() + HEADER_LEN;
    let longest = 14 + if addresses.to.is_ipv4() { ICMP_ERROR_MAX } else { ICMPV6_ERROR_MAX };
    let quoted = &cause[..cause.len().min(longest - headers)];
    let frame = &mut out[..headers + quoted.len()];
    let len = frame.len();
    frame[headers..].copy_from_slice(quoted);
    frame[headers - HEADER_LEN..headers].fill(0);
    match (addresses.from, addresses.to) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let payload = addresses.emit(IpProtocol::Icmpv6, frame);
            let mut icmp = Icmpv6Packet::new_unchecked(payload);
            let (kind, code) = match reason {
                Reason::NoRoute => {
                    (Icmpv6Message::DstUnreachable, Icmpv6DstUnreachable::NoRoute.into())
                }
                Reason::NoHost => {
                    (Icmpv6Message::DstUnreachable, Icmpv6DstUnreachable::AddrUnreachable.into())
                }
                Reason::Prohibited => {
                    (Icmpv6Message::DstUnreachable, Icmpv6DstUnreachable::AdminProhibit.into())
                }
                Reason::Scope => {
                    (Icmpv6Message::DstUnreachable, Icmpv6DstUnreachable::BeyondScope.into())
                }
                Reason::HopLimit => {
                    (Icmpv6Message::TimeExceeded, Icmpv6TimeExceeded::HopLimitExceeded.into())
                }
                Reason::NoPort => {
                    (Icmpv6Message::DstUnreachable, Icmpv6DstUnreachable::PortUnreachable.into())
                }
                Reason::Passed(kind, code) => (kind.into(), code),
            };
            icmp.set_msg_type(kind);
            icmp.set_msg_code(code);
            icmp.fill_checksum(&from, &to);
        }
        _ => {
            let payload = addresses.emit(IpProtocol::Icmp, frame);
            let mut icmp = Icmpv4Packet::new_unchecked(payload);
            let (kind, code) = match reason {
                Reason::NoRoute => {
                    (Icmpv4Message::DstUnreachable, Icmpv4DstUnreachable::NetUnreachable.into())
                }
                Reason::NoHost => {
                    (Icmpv4Message::DstUnreachable, Icmpv4DstUnreachable::HostUnreachable.into())
                }
                Reason::Prohibited | Reason::Scope => {
                    (Icmpv4Message::DstUnreachable, Icmpv4DstUnreachable::CommProhibited.into())
                }
                Reason::HopLimit => {
                    (Icmpv4Message::TimeExceeded, Icmpv4TimeExceeded::TtlExpired.into())
                }
                Reason::NoPort => {
                    (Icmpv4Message::DstUnreachable, Icmpv4DstUnreachable::PortUnreachable.into())
                }
                Reason::Passed(kind, code) => (kind.into(), code),
            };
            icmp.set_msg_type(kind);
            icmp.set_msg_code(code);
            icmp.fill_checksum();
        }
    }
    len
}
