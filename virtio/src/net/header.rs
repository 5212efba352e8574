//! The `virtio_net_hdr` in front of a packet that a guest sends: copied out once, and checked.

use vmring::config::Offloads;
use vmring::software::{self, Left};
use vmring::{OFFLOAD_LEN, OffloadHeader};
use vmring_core::offload::{F_DATA_VALID, F_NEEDS_CSUM, F_RSC_INFO};

use crate::queue::Chain;

/// The bytes of the header. With VERSION_1 they are always as many (virtio 1.2, section 5.1.6.1).
pub(super) const HEADER_LEN: u32 = OFFLOAD_LEN as u32;

/// Why a chain to send is no packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadPacket {
    /// It has no header, or no packet behind it.
    Short,
    /// The header is none, is not true of the packet, or leaves work that was not negotiated.
    Header,
}

/// A header that is true of its packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Checked {
    pub(super) header: OffloadHeader,
    /// Whether it has flags that this version does not know. A device must ignore them, but not every
    /// interface does.
    pub(super) has_unknown_flags: bool,
}

/// Whether a packet with this header leaves nothing to do, as is usual. The last two bytes are the
/// receiver's.
#[inline]
pub(super) fn is_plain(bytes: &[u8; OFFLOAD_LEN]) -> bool {
    bytes[..10] == [0; 10]
}

/// The header of a chain that the guest sends. The guest may leave the work of `left` undone, and ask
/// for ECN if `ecn`. The header may be split over any descriptors, as ANY_LAYOUT allows. The bytes are
/// copied once, because the guest may change them between two looks.
pub(super) fn read(chain: &Chain<'_>, left: &Offloads, ecn: bool) -> Result<Checked, BadPacket> {
    let len = chain.readable_len();
    if len <= HEADER_LEN.into() {
        return Err(BadPacket::Short);
    }
    // Most headers are in one piece.
    let first = chain.readable().next().and_then(|first| first.read());
    let bytes: [u8; OFFLOAD_LEN] = first.unwrap_or_else(|| split(chain));
    if is_plain(&bytes) {
        return Ok(Checked { header: OffloadHeader::NONE, has_unknown_flags: false });
    }
    // "The device MUST ignore flag bits that it does not recognize" (section 5.1.6.2.2).
    let header = OffloadHeader::parse_ignoring_reserved(&bytes).map_err(|_| BadPacket::Header)?;
    let has_unknown_flags = bytes[0] & !(F_NEEDS_CSUM | F_DATA_VALID | F_RSC_INFO) != 0;
    let checked = Checked { header, has_unknown_flags };
    let packet = usize::try_from(len - u64::from(HEADER_LEN)).unwrap_or(usize::MAX);
    header.validate(packet).map_err(|_| BadPacket::Header)?;
    match software::left_by(left, &header) {
        Left::Nothing if ecn || !header.ecn => Ok(checked),
        _ => Err(BadPacket::Header),
    }
}

/// The first bytes of a chain whose header is in several pieces.
#[cold]
fn split(chain: &Chain<'_>) -> [u8; OFFLOAD_LEN] {
    let mut bytes = [0; OFFLOAD_LEN];
    let mut copied = 0;
    for segment in chain.readable() {
        copied += segment.copy_to(&mut bytes[copied..]);
        if copied == OFFLOAD_LEN {
            break;
        }
    }
    bytes
}
