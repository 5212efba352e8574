//! The Internet checksum: sums, and the completion of a partial one.

use vmring_core::offload::{Checksum, Gso, OffloadHeader};

use super::error::SoftwareError;

/// The sum of `start` and `bytes` as the Internet checksum has it (RFC 1071), folded to 16 bits and
/// not complemented.
pub(super) fn sum(start: u16, bytes: &[u8]) -> u16 {
    // Add four bytes at a time, in the machine's byte order. The order does not matter, except that
    // the bytes of the result are swapped at the end (RFC 1071, 2B).
    let mut words = bytes.chunks_exact(4);
    let mut total = u64::from(start.to_be());
    for word in &mut words {
        total += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    }
    let mut last = [0; 4];
    let rest = words.remainder();
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_ne_bytes(last));
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::from_be(total as u16)
}

/// Writes the checksum of `part` into its field, which is at offset `field` and holds the sum of
/// the pseudo header.
pub(super) fn complete(part: &mut [u8], field: usize) {
    // In UDP a 0 means that there is no checksum. Everywhere else 0 and 0xffff are the same number.
    let sum = match !sum(0, part) {
        0 => 0xffff,
        sum => sum,
    };
    part[field..][..2].copy_from_slice(&sum.to_be_bytes());
}

/// Completes a partial checksum in the packet, and returns the header that describes the packet
/// afterwards. A complete checksum stays as it is.
///
/// # Errors
///
/// [`SoftwareError::Offload`] if the header does not describe the packet;
/// [`SoftwareError::ToBeCut`] if the packet is to be cut into segments. In both cases the packet
/// has not changed.
pub fn complete_checksum(
    header: &OffloadHeader,
    packet: &mut [u8],
) -> Result<OffloadHeader, SoftwareError> {
    header.validate(packet.len())?;
    if header.gso != Gso::None {
        return Err(SoftwareError::ToBeCut);
    }
    if let Checksum::Partial { start, offset } = header.checksum {
        complete(&mut packet[start.into()..], offset.into());
        return Ok(OffloadHeader { checksum: Checksum::Complete, ..*header });
    }
    Ok(*header)
}
