//! The Internet checksum: sums, and the completion of a partial one.

use vmring_core::offload::{Checksum, Gso, OffloadHeader};

use super::error::SoftwareError;

/// The number of words of four bytes that [`sum`] adds in one step.
const LANES: usize = 16;

/// The sum of `start` and `bytes` as the Internet checksum has it (RFC 1071), folded to 16 bits and
/// not complemented.
pub(super) fn sum(start: u16, bytes: &[u8]) -> u16 {
    // Words of four bytes are added in the machine's byte order. The order does not matter, except
    // that the bytes of the result are swapped at the end (RFC 1071, 2B). Each lane has a sum of its
    // own, so that the compiler adds several at once. 64 bits hold more words than there is memory.
    let mut total = u64::from(start.to_be());
    let mut blocks = bytes.chunks_exact(4 * LANES);
    let mut lanes = [0_u64; LANES];
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(4)) {
            *lane += word_of(word);
        }
    }
    total += lanes.iter().sum::<u64>();
    let mut words = blocks.remainder().chunks_exact(4);
    for word in &mut words {
        total += word_of(word);
    }
    let mut last = [0; 4];
    let rest = words.remainder();
    last[..rest.len()].copy_from_slice(rest);
    total += word_of(&last);
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::from_be(total as u16)
}

/// Four bytes in the machine's byte order.
fn word_of(bytes: &[u8]) -> u64 {
    u64::from(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
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

#[cfg(test)]
mod tests {
    use super::sum;

    /// Lengths around the size of a block, odd ones, and starts anywhere, against two bytes at a time.
    #[test]
    fn the_sum_is_that_of_words_of_two_bytes() {
        let bytes: Vec<u8> = (0..200_u32).map(|i| (i * i * 7 + 250) as u8).collect();
        for from in 0..8 {
            for to in from..bytes.len() {
                let part = &bytes[from..to];
                let word =
                    |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
                let mut total = 0xfe01 + part.chunks(2).map(word).sum::<u64>();
                while total > 0xffff {
                    total = (total & 0xffff) + (total >> 16);
                }
                assert_eq!(u64::from(sum(0xfe01, part)), total, "{from}..{to}");
            }
        }
        assert_eq!(sum(0, &[0xff; 65_535]), 0xff00, "it does not overflow");
        assert_eq!(sum(0, &[]), 0);
    }
}
