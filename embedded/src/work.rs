//! [`Work`]: where a sender does what the receiver of a packet does not do itself.

use vmring_core::offload::{OffloadHeader, Offloads};

use crate::limits::SEGMENTS_PER_PACKET;
use crate::packet::Packet;
use crate::software::{self, Left, Segments};
use crate::stats::DropReason;

/// The memory in which packets are completed and cut. It is as large as the longest of them.
#[derive(Default)]
pub(crate) struct Work {
    /// A packet whose checksum is completed, or a guest's, which is copied before it is cut.
    whole: Box<[u8]>,
    segment: Box<[u8]>,
}

impl Work {
    /// The memory for packets of at most `longest` bytes, of a port with these offloads, on a network
    /// whose frames have at most `frame` bytes. A port without offloads needs none.
    pub(crate) fn new(offloads: &Offloads, longest: usize, frame: usize) -> Self {
        let space = |wanted: bool, len| vec![0; if wanted { len } else { 0 }].into_boxed_slice();
        Self {
            whole: space(offloads.virtio_header, longest),
            segment: space(longest > frame, frame),
        }
    }

    /// Does what is `left` of a packet's work, and gives each frame that results to `each`, in order.
    /// None is longer than `longest`.
    ///
    /// # Errors
    ///
    /// The reason why the packet must be dropped. In this case `each` was not called.
    pub(crate) fn finish(
        &mut self,
        packet: Packet<'_>,
        left: Left,
        longest: usize,
        mut each: impl FnMut(Packet<'_>),
    ) -> Result<(), DropReason> {
        let header = packet.offload();
        match left {
            Left::Nothing => each(packet),
            Left::Checksum => {
                let bytes = copied(packet, &mut self.whole)?;
                software::complete_checksum(header, bytes).map_err(|_| DropReason::BadOffload)?;
                each(Packet::from(&*bytes));
            }
            Left::Segments { partial } => {
                let bytes = match packet.bytes() {
                    Some(bytes) => bytes,
                    // A guest may change its packet at any time. The copy is checked and cut.
                    None => &*copied(packet, &mut self.whole)?,
                };
                let segments =
                    Segments::new(header, bytes).map_err(|_| DropReason::NotSegmentable)?;
                // A guest may have changed the packet since its segments were counted.
                if segments.count() > SEGMENTS_PER_PACKET {
                    return Err(DropReason::NotSegmentable);
                }
                if segments.len_max() > longest.min(self.segment.len()) {
                    return Err(DropReason::TooBig);
                }
                let header = match partial {
                    true => segments.partial_header(),
                    false => OffloadHeader::NONE,
                };
                for index in 0..segments.count() {
                    let written = match partial {
                        true => segments.write_partial(index, &mut self.segment),
                        false => segments.write(index, &mut self.segment),
                    };
                    // It was checked above that every segment fits.
                    let Ok(len) = written else { break };
                    each(Packet::from(&self.segment[..len]).with_offload(&header));
                }
            }
        }
        Ok(())
    }
}

/// Copies a packet to the front of `whole`, which has space for it, and returns the copy.
fn copied<'w>(packet: Packet<'_>, whole: &'w mut [u8]) -> Result<&'w mut [u8], DropReason> {
    let whole = whole.get_mut(..packet.len()).ok_or(DropReason::TooBig)?;
    packet.copy_to(0, whole);
    Ok(whole)
}
