//! The Ethernet header in front of what the gateway and the DHCP server read and write.

use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr};
use vmring_core::view::ETHERNET_HEADER_LEN;

use crate::limits::{MIN_FRAME_LEN, VLAN_TAG_LEN};

/// The EtherType of a C-VLAN tag (IEEE 802.1Q, table 9-1).
const C_TAG: u16 = 0x8100;
/// The EtherType of an S-VLAN tag (IEEE 802.1Q, table 9-1).
const S_TAG: u16 = 0x88a8;

/// Where the payload of a frame begins that [`begin`] has begun.
pub(crate) const PAYLOAD_AT: usize = ETHERNET_HEADER_LEN;

/// What a station sends because of a frame that it was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Answer {
    /// The length of the reply in bytes, if there is one. The reply is at the start of the buffer
    /// that was passed, and is for the interface that the frame came from.
    pub reply: Option<usize>,
    /// A frame for every interface of the network, if there is one: an ARP request that asks
    /// whether an address is in use.
    pub to_all: Option<[u8; MIN_FRAME_LEN]>,
}

/// The header of a frame, without its tag if it has a priority tag.
pub(crate) struct Header {
    pub(crate) to: EthernetAddress,
    pub(crate) from: EthernetAddress,
    pub(crate) ethertype: EthernetProtocol,
}

/// Why a frame has no header that a station without VLANs reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeaderError {
    /// The frame is shorter than its header.
    Runt,
    /// The frame belongs to a VLAN.
    Vlan,
}

/// Splits a frame into its header and its payload. A frame with a priority tag, which is a C-VLAN
/// tag of VLAN 0, belongs to no VLAN and is read like an untagged one (IEEE 802.1Q, 6.9).
pub(crate) fn split(frame: &[u8]) -> Result<(Header, &[u8]), HeaderError> {
    let ethernet = EthernetFrame::new_checked(frame).map_err(|_| HeaderError::Runt)?;
    let (to, from) = (ethernet.dst_addr(), ethernet.src_addr());
    let (ethertype, payload) = match u16::from(ethernet.ethertype()) {
        C_TAG => {
            let tag = frame.get(ETHERNET_HEADER_LEN..ETHERNET_HEADER_LEN + VLAN_TAG_LEN);
            let &[priority, vlan, high, low] = tag.ok_or(HeaderError::Runt)? else {
                return Err(HeaderError::Runt);
            };
            if priority & 0x0f != 0 || vlan != 0 {
                return Err(HeaderError::Vlan);
            }
            let ethertype = EthernetProtocol::from(u16::from_be_bytes([high, low]));
            (ethertype, &frame[ETHERNET_HEADER_LEN + VLAN_TAG_LEN..])
        }
        S_TAG => return Err(HeaderError::Vlan),
        _ => (ethernet.ethertype(), &frame[ETHERNET_HEADER_LEN..]),
    };
    Ok((Header { to, from, ethertype }, payload))
}

/// Whether an EtherType is that of a VLAN or priority tag.
pub(crate) fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, C_TAG | S_TAG)
}

/// Whether a frame carries a VLAN or priority tag.
pub(crate) fn is_tagged(frame: &[u8]) -> bool {
    let ethertype = frame.get(ETHERNET_HEADER_LEN - 2..ETHERNET_HEADER_LEN);
    ethertype.is_some_and(|bytes| is_tag(u16::from_be_bytes([bytes[0], bytes[1]])))
}

/// Where the IP header of a frame is, behind the Ethernet header and all tags. `None` if the frame is no
/// IP packet, or if `head`, its first bytes, does not show it.
pub(crate) fn ip_at(head: &[u8]) -> Option<usize> {
    let mut at = ETHERNET_HEADER_LEN;
    loop {
        let bytes = head.get(at - 2..at)?;
        match EthernetProtocol::from(u16::from_be_bytes([bytes[0], bytes[1]])) {
            EthernetProtocol::Ipv4 | EthernetProtocol::Ipv6 => return Some(at),
            other if is_tag(other.into()) => at += VLAN_TAG_LEN,
            _ => return None,
        }
    }
}

/// Writes the header of a frame to the start of `out`, and zeros after the `len` bytes of its
/// payload if the frame is shorter than Ethernet's minimum. Returns the payload to be written and
/// the length of the frame, or `None` if `out` is too short.
pub(crate) fn begin(
    out: &mut [u8],
    to: EthernetAddress,
    from: EthernetAddress,
    ethertype: EthernetProtocol,
    len: usize,
) -> Option<(&mut [u8], usize)> {
    let end = ETHERNET_HEADER_LEN + len;
    let frame_len = end.max(MIN_FRAME_LEN);
    let frame = out.get_mut(..frame_len)?;
    let header = EthernetRepr { src_addr: from, dst_addr: to, ethertype };
    header.emit(&mut EthernetFrame::new_unchecked(&mut *frame));
    frame[end..].fill(0);
    Some((&mut frame[ETHERNET_HEADER_LEN..end], frame_len))
}
