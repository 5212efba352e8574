//! The Ethernet header of a frame.

use vmring_core::view::ETHERNET_HEADER_LEN;

/// The EtherType of a C-VLAN tag (IEEE 802.1Q, table 9-1).
const C_TAG: u16 = 0x8100;
/// The EtherType of an S-VLAN tag (IEEE 802.1Q, table 9-1).
const S_TAG: u16 = 0x88a8;

/// Whether a frame carries a VLAN or priority tag.
pub(crate) fn is_tagged(frame: &[u8]) -> bool {
    let ethertype = frame.get(ETHERNET_HEADER_LEN - 2..ETHERNET_HEADER_LEN);
    ethertype.is_some_and(|bytes| matches!(u16::from_be_bytes([bytes[0], bytes[1]]), C_TAG | S_TAG))
}
