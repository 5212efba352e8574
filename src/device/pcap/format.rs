//! The numbers of the pcapng format (draft-ietf-opsawg-pcapng) that the reader and the writer use.

/// The link type of Ethernet (draft-ietf-opsawg-pcaplinktype).
pub(super) const ETHERNET: u16 = 1;

/// The name of a link type that people meet.
pub(super) fn link_name(link: u16) -> Option<&'static str> {
    Some(match link {
        0 => "NULL",
        101 => "RAW",
        105 => "IEEE802_11",
        113 => "LINUX_SLL",
        127 => "IEEE802_11_RADIOTAP",
        220 => "USB_LINUX_MMAPPED",
        228 => "IPV4",
        229 => "IPV6",
        276 => "LINUX_SLL2",
        _ => return None,
    })
}

/// Types of blocks (section 10.1).
pub(super) const SECTION_HEADER: u32 = 0x0a0d_0d0a;
pub(super) const INTERFACE_DESCRIPTION: u32 = 1;
pub(super) const PACKET: u32 = 2;
pub(super) const SIMPLE_PACKET: u32 = 3;
pub(super) const ENHANCED_PACKET: u32 = 6;

/// The first field of a section header (section 4.1).
pub(super) const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;

/// Options of any block (section 3.5), of an interface description (section 4.2), and of an
/// enhanced packet block (section 4.3).
pub(super) const END_OF_OPTIONS: u16 = 0;
pub(super) const IF_NAME: u16 = 2;
pub(super) const IF_MACADDR: u16 = 6;
pub(super) const IF_TSRESOL: u16 = 9;
pub(super) const IF_FCSLEN: u16 = 13;
pub(super) const EPB_FLAGS: u16 = 2;
pub(super) const EPB_DROPCOUNT: u16 = 4;
